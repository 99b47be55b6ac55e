"""What the Triton kernels read of a packed weight, prepared once on its device.

Codes stay packed and are read where they are: words of eight codes where the layout allows it, otherwise bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fewbit.grids.formula import Formula, Plane
from fewbit.grids.scheme import StoredWeight
from fewbit.grids.table import grid_of
from fewbit.outliers.grids import OUTLIER_GRIDS, at_positions, read_outlier_codes, read_positions
from fewbit.runtime.kernels.description import factors, formula_of, smallest
from fewbit.runtime.kernels.outliers import codes_at

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bits of a plane: the number that holds eight of its codes."""
_PLANES = 3


class Packed(NamedTuple):
    """A weight without outliers; tensors that it does not have are None.

    one, two, three: planes of codes, from the lowest bits; by them, the numbers from one row to the next. scale, zero,
    minimum: of the groups; unit `(rows,)`: by which the scales of a row are multiplied. ladder: the levels.
    """

    one: Tensor
    by_one: int
    two: Tensor | None
    by_two: int
    three: Tensor | None
    by_three: int
    scale: Tensor
    unit: Tensor | None
    zero: Tensor | None
    minimum: Tensor | None
    ladder: Tensor | None
    columns: int
    groups: int


class Sparse(NamedTuple):
    """Outliers by row: the first of each row, int32 `(rows + 1,)`, their columns, and numbers.

    numbers: their values in the dtype of the weights; or codes, from which `middle` is subtracted before they are
    multiplied by the `steps` `(rows,)` of their rows.
    """

    starts: Tensor
    columns: Tensor
    numbers: Tensor
    steps: Tensor | None
    middle: int


class Reading(NamedTuple):
    """How codes become weights, as far as it is compiled in.

    unit: how many codes a word holds, 8; or 1 if codes are read byte by byte. one, two, three: bits of the planes, 0
    for none. base, in_a_byte: a byte is a number in this base, with so many digits. first: the lowest level, if levels
    are evenly spaced. group: columns of a group. magnitudes: scales in a group. each: levels that share one of those.
    in_pairs: whether weights are rounded by NVIDIA's instruction for two numbers.
    """

    unit: int
    one: int
    two: int
    three: int
    base: int
    in_a_byte: tuple[int, int, int]
    first: float
    group: int
    magnitudes: int
    each: int
    in_pairs: bool


@dataclass(frozen=True)
class Form:
    """A prepared weight of `shape` (rows, columns) for products in `dtype`."""

    shape: tuple[int, int]
    dtype: torch.dtype
    packed: Packed
    sparse: Sparse | None
    reading: Reading

    @property
    def bytes(self) -> int:
        """Bytes of everything that it keeps, parts included."""
        tensors = [one for one in (*self.packed, *(self.sparse or ())) if isinstance(one, Tensor)]
        return sum(one.numel() * one.element_size() for one in tensors)


def prepare(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> Form:
    """Prepare a weight for products in `dtype`; raises ValueError if its outliers lie outside of it."""
    formula = formula_of(stored)
    if formula is None or not formula.planes:
        raise ValueError(f"no kernel computes the grid {stored.scheme.grid}")
    grid = grid_of(stored.scheme)
    terms = formula.terms(grid.read(parts, stored.scheme, stored.groups))
    products = factors(parts, stored, terms.scale)
    scale, unit = (smallest(terms.scale), None) if products is None else products
    planes = _words(parts, formula, stored)
    whole = planes is not None
    planes = planes or [_bytes(parts, plane, stored) for plane in formula.planes]
    planes += [(None, 0)] * (_PLANES - len(planes))
    (one, by_one), (two, by_two), (three, by_three) = planes
    if one is None:
        raise ValueError("a weight without codes")
    first = formula.ladder[0]
    is_even = formula.ladder == tuple(first + place for place in range(len(formula.ladder))) and first == int(first)
    packed = Packed(
        one,
        by_one,
        two,
        by_two,
        three,
        by_three,
        scale=scale.contiguous(),
        unit=None if unit is None else unit.reshape(-1).contiguous(),
        zero=None if terms.zero is None else smallest(terms.zero).contiguous(),
        minimum=None if terms.minimum is None else smallest(terms.minimum).contiguous(),
        ladder=None if is_even else torch.tensor(formula.ladder, dtype=torch.float32, device=scale.device),
        columns=stored.shape[1],
        groups=stored.groups,
    )
    missing = [0] * (_PLANES - len(formula.planes))
    widths = [*(plane.width for plane in formula.planes), *missing]
    in_a_byte = [*(plane.codes_in_a_byte for plane in formula.planes), *missing]
    magnitudes = terms.scale.shape[-1]
    reading = Reading(
        unit=8 if whole else 1,
        one=widths[0],
        two=widths[1],
        three=widths[2],
        base=formula.planes[0].base,
        in_a_byte=(in_a_byte[0], in_a_byte[1], in_a_byte[2]),
        first=first if is_even else 0.0,
        group=stored.scheme.group_size,
        magnitudes=magnitudes,
        each=len(formula.ladder) // magnitudes,
        in_pairs=dtype == torch.bfloat16 and _rounds_in_pairs(scale.device),
    )
    sparse = _sparse(parts, stored, formula, dtype) if stored.scheme.has_outliers and stored.outliers else None
    return Form(stored.shape, dtype, packed, sparse, reading)


@lru_cache
def _rounds_in_pairs(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


_Plane = tuple[Tensor | None, int]


def _words(parts: Mapping[str, Tensor], formula: Formula, stored: StoredWeight) -> list[_Plane] | None:
    """The planes as words of eight codes; None if a group or a row does not consist of whole ones."""
    columns = stored.shape[1]
    if stored.scheme.group_size % 8 or any(plane.base != 2**plane.width for plane in formula.planes):
        return None
    found: list[_Plane] = []
    for plane in formula.planes:
        data, start = parts[plane.part].reshape(-1), plane.place(columns)[0]
        word = _WORDS[plane.width]
        step = parts[plane.part].shape[-1]
        if step % word.itemsize or start % word.itemsize or data.data_ptr() % word.itemsize:
            return None
        found.append((data.view(word)[start // word.itemsize :], 0 if plane.shared else step // word.itemsize))
    return found


def _bytes(parts: Mapping[str, Tensor], plane: Plane, stored: StoredWeight) -> _Plane:
    part = parts[plane.part]
    return part.reshape(-1)[plane.place(stored.shape[1])[0] :], 0 if plane.shared else part.shape[-1]


def _sparse(parts: Mapping[str, Tensor], stored: StoredWeight, formula: Formula, dtype: torch.dtype) -> Sparse:
    (rows, columns), where = stored.shape, read_positions(parts, stored)
    if bool((where[1:] <= where[:-1]).any()) or not 0 <= int(where[0]) <= int(where[-1]) < rows * columns:
        raise ValueError("positions of outliers do not ascend, or lie outside the weight")
    index = torch.arange(len(where), device=where.device)
    codes = read_outlier_codes(parts, stored, codes_at(parts, stored, formula, where), index)
    row = where // columns
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=where.device)
    starts[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    # Kernels take the sign away from columns of 16 bits.
    places = (where % columns).to(torch.int16 if columns <= 1 << 16 else torch.int32)
    grid = OUTLIER_GRIDS[stored.scheme.outlier_grid]
    limits = grid.read(parts, stored)
    scale = limits["scale"]
    if grid.middle is not None and not bool((scale < 0).any()):
        short = codes.to(torch.uint8)
        return Sparse(starts.int(), places, short, scale.reshape(-1).contiguous(), grid.middle(stored.scheme))
    values = grid.decode(codes, *at_positions(limits, where, stored.shape), stored.scheme)
    return Sparse(starts.int(), places, values.to(dtype), None, 0)
