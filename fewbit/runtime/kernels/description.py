"""What kernels read of a packed weight, prepared once from its parts: numbers per group, outliers by row, addresses.

Codes stay packed and are read where they are. Nothing decoded is kept but the numbers of the groups and the outliers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from mmap import mmap

import torch
from torch import Tensor

from fewbit.grids.formula import Formula, Plane, Terms
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.scheme import StoredWeight
from fewbit.grids.table import grid_of
from fewbit.runtime.kernels.order import BLOCK
from fewbit.runtime.kernels.outliers import Arrangement, outliers_by_row

COLUMNS, GROUP, GROUPS, MIDDLE, LADDER, PICKS, SCALE, ZERO, MINIMUM, UNITS, STARTS, GAPS, VALUES, STEPS = range(14)
"""Fields of a description, int64 each; from LADDER on they are addresses. UNITS: by which the scales of each row are
multiplied. STARTS: the number of the first outlier of each row; GAPS: between the columns of outliers; VALUES: the
outliers, or their codes, which are to be multiplied by the STEPS of their rows after MIDDLE is subtracted."""
PLANES = 14
"""Three times five fields: a plane's address, the bytes from one row to the next, the codes in a byte, the address of
the table of what a byte stands for, the bytes of a row."""
SCALE_KIND, ZERO_KIND, MINIMUM_KIND, VALUE_KIND = range(PLANES + 15, PLANES + 19)
"""Kinds of numbers, for kernels that do not have them compiled in."""
_FIELDS = PLANES + 19

FLOAT, HALF, BFLOAT, BYTE, SIGNED = 1, 2, 3, 4, 5
"""Kinds of numbers; SIGNED are bytes that a unit of their row belongs to."""
KIND_OF = {
    torch.float32: FLOAT,
    torch.float16: HALF,
    torch.bfloat16: BFLOAT,
    torch.uint8: BYTE,
    torch.int8: SIGNED,
}
ROWS = 8
"""Rows that are decoded, and then multiplied, together."""
_LANES = 16
_ALIGNED = 64
_SMALL, _LARGE = 2.0**-70, 2.0**20
"""Kernels divide scales by up to 2^24 and still need normal numbers of float32."""


@dataclass(frozen=True)
class Reading:
    """How codes become weights, as far as it is compiled in.

    widths: of the planes, from the lowest bits. bits: of a code. by_table: there are 16 levels at most, so that each
    group has a table of its weights. by_levels: the levels are not 0, 1, 2, …. expanded: a row's codes are first
    written as bytes, because groups do not start at a whole vector or codes are not in planes. vectors: so many whole
    ones follow each other in a group, at least. scale, zero, minimum: kinds of numbers, 0 for none. magnitudes: scales
    in a group. values: the kind of the outliers, 0 if there are none. to: the kind of the weights. by_blocks:
    whether columns are decoded in blocks, in an order of their own, as bfloat16. in_bytes: whether every
    code, also one above the levels, stands for a whole number that fits into a signed byte.
    """

    widths: tuple[int, ...]
    bits: int
    by_table: bool
    by_levels: bool
    expanded: bool
    vectors: int
    scale: int
    zero: int
    minimum: int
    magnitudes: int
    values: int
    to: int
    by_blocks: bool = False
    in_bytes: bool = False


@dataclass(frozen=True)
class Description:
    """A packed weight as kernels read it.

    fields: see above; they are at `address`. kept: the tensors behind the addresses in them. run: the compiled
    function.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    reading: Reading
    fields: Tensor
    kept: tuple[Tensor, ...]
    run: Callable[..., int]
    address: int
    groups: int

    @property
    def bytes(self) -> int:
        """Bytes of everything that it keeps, parts included."""
        return sum(one.numel() * one.element_size() for one in (self.fields, *self.kept))


def formula_of(stored: StoredWeight) -> Formula | None:
    """How the weight's codes become weights, or None if kernels cannot compute it."""
    grid = grid_of(stored.scheme)
    return grid.formula(stored.scheme) if grid.formula is not None else None


def room(about: "Description", tokens: int) -> int:
    """Bytes of working memory for one call.

    Decoded rows, a byte for each code of a row, inputs and sums in float32; or for products by pairs decoded rows and
    inputs of two bytes, sums, and for each group of a row its numbers and a table.
    """
    columns = about.shape[1]
    if about.reading.by_blocks:
        groups = (about.groups + 15) // 16 * 16
        return 2 * ROWS * columns + 4 * 64 + 3 * 4 * groups + 32 * groups + 2 * columns * tokens
    whole = (columns + _LANES - 1) // _LANES * _LANES
    # The last vector of a group that does not end with one is written too.
    return ROWS * 4 * (whole + _LANES) + whole + 64 + 4 * tokens * whole + 4 * ROWS + 4 * _LANES


def describe(
    parts: Mapping[str, Tensor],
    stored: StoredWeight,
    dtype: torch.dtype,
    compiled: Callable[[Reading], Callable[..., int]],
    in_blocks: Callable[[tuple[int, ...], bool], Sequence[int]] | None = None,
) -> Description:
    """Prepare a weight on the CPU for products in `dtype`; raises ValueError if its outliers lie outside of it.

    compiled: gives the function for a way of reading. in_blocks: the order of
    the columns of a block, if the processor decodes bfloat16 in blocks (:mod:`fewbit.runtime.kernels.order`).
    """
    formula = formula_of(stored)
    if formula is None:
        raise ValueError(f"no kernel computes the grid {stored.scheme.grid}")
    kept: list[Tensor] = []
    made: dict[int, Tensor] = {}
    fields = [0] * _FIELDS
    fields[COLUMNS], fields[GROUP], fields[GROUPS] = stored.shape[1], stored.scheme.group_size, stored.groups
    terms = formula.terms(grid_of(stored.scheme).read(parts, stored.scheme, stored.groups))
    kinds = [0, 0, 0]
    products = factors(parts, stored, terms.scale)
    if products is not None:
        kinds[0], made[SCALE], made[UNITS] = SIGNED, *products
    for place, values in enumerate((terms.scale, terms.zero, terms.minimum)):
        if values is not None and not (place == 0 and products is not None):
            numbers = smallest(values) if values.shape[-1] == 1 else values.to(torch.float32)
            made[SCALE + place], kinds[place] = numbers, KIND_OF[numbers.dtype]
    reading = _reading(formula, stored, kinds, terms.scale.shape[-1], KIND_OF[dtype])
    if (
        in_blocks is not None
        and dtype == torch.bfloat16
        and _fits_in_blocks(formula, stored, reading)
        and _are_normal(terms)
    ):
        reading = replace(reading, by_blocks=True)
    if stored.scheme.has_outliers and stored.outliers > 0:
        how = Arrangement()
        if in_blocks is not None and reading.by_blocks:
            how = Arrangement(ROWS, in_blocks(reading.widths, reading.by_table))
        found = outliers_by_row(parts, stored, formula, dtype, how)
        made |= {STARTS: found.starts, GAPS: found.gaps, VALUES: found.values}
        reading = replace(reading, values=KIND_OF[found.values.dtype])
        if found.steps is not None:
            made[STEPS], fields[MIDDLE] = found.steps, found.middle
        del found
    made[LADDER] = _ladder(formula, reading)
    each = len(formula.ladder) // reading.magnitudes
    made[PICKS] = (torch.arange(_LANES) % len(formula.ladder) // each).to(torch.int32)
    below = 0
    for number, plane in enumerate(formula.planes):
        at = PLANES + 5 * number
        start, size = plane.place(stored.shape[1])
        part = parts[plane.part]
        kept.append(part.contiguous())
        fields[at] = kept[-1].data_ptr() + start
        fields[at + 1] = 0 if plane.shared else part.shape[-1]
        if reading.expanded:
            fields[at + 2], fields[at + 4] = plane.codes_in_a_byte, size
            made[at + 3] = _of_bytes(plane, below)
        below += plane.width
    own, addresses = _together(made)
    kept.append(own)
    for place, address in addresses.items():
        fields[place] = address
    fields[SCALE_KIND : VALUE_KIND + 1] = [*kinds, reading.values]
    known, run = torch.tensor(fields, dtype=torch.int64), compiled(reading)
    return Description(stored.shape, dtype, reading, known, tuple(kept), run, known.data_ptr(), stored.groups)


def _together(tensors: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, int]]:
    """The numbers of all tensors in one, and the address of each there.

    It has pages of its own. Elsewhere it would lie between larger tensors that are needed only until all is prepared,
    and keep their memory from going back to the system.
    """
    places, size = {}, 0
    for key, tensor in tensors.items():
        places[key] = size
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
    # A vector of the last numbers may end behind them.
    own = torch.frombuffer(mmap(-1, size + _ALIGNED), dtype=torch.uint8)
    for key, tensor in tensors.items():
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        own[places[key] : places[key] + flat.numel()] = flat
    return own, {key: own.data_ptr() + place for key, place in places.items()}


def _fits_in_blocks(formula: Formula, stored: StoredWeight, reading: Reading) -> bool:
    """Whether groups are whole blocks, and codes places in a table of 16 or whole numbers."""
    whole = stored.scheme.group_size % BLOCK == 0 and stored.shape[1] == stored.groups * stored.scheme.group_size
    first = formula.ladder[0]
    numbers = not reading.by_levels and first == int(first) and abs(first) < _LARGE
    return whole and not reading.expanded and reading.magnitudes == 1 and (reading.by_table or numbers)


def _are_normal(terms: Terms) -> bool:
    """Whether no weight is below the normal numbers of float32, which those products take for zeros."""
    given = (one.abs() for one in (terms.scale, terms.minimum) if one is not None)
    return all(bool(((one == 0) | (one > _SMALL)).all()) for one in given)


def _reading(formula: Formula, stored: StoredWeight, kinds: list[int], magnitudes: int, to: int) -> Reading:
    widths = tuple(plane.width for plane in formula.planes)
    bits, first, group = sum(widths), formula.ladder[0], stored.scheme.group_size
    by_levels = formula.ladder != tuple(first + place for place in range(len(formula.ladder)))
    scale, zero, minimum = kinds
    return Reading(
        widths,
        bits,
        by_table=2**bits <= _LANES,
        by_levels=by_levels,
        expanded=group % _LANES != 0 or any(plane.base != 2**plane.width for plane in formula.planes),
        vectors=next((count for count in (4, 2) if group % (count * _LANES) == 0), 1),
        scale=scale,
        zero=zero,
        minimum=minimum,
        magnitudes=magnitudes,
        values=0,
        to=to,
        in_bytes=not by_levels and first == int(first) and -128 <= first <= 128 - 2**bits,
    )


def _ladder(formula: Formula, reading: Reading) -> Tensor:
    levels = torch.tensor(formula.ladder, dtype=torch.float32)
    if not reading.by_table:
        return levels
    padded = torch.zeros(2**reading.bits)
    padded[: len(levels)] = levels
    return padded.repeat(_LANES // len(padded))


def smallest(values: Tensor) -> Tensor:
    """The numbers as bytes or float16 if that is exact, or else as float32."""
    for dtype in (torch.uint8, torch.float16):
        narrow = values.clamp(0, 255).to(dtype) if dtype is torch.uint8 else values.to(dtype)
        if torch.equal(narrow.to(torch.float32), values):
            return narrow
    return values.to(torch.float32)


def _of_bytes(plane: Plane, below: int) -> Tensor:
    """What each byte of a plane stands for: a code in each byte of an int64, `below` bits up."""
    byte = torch.arange(256, dtype=torch.int64)
    digits = [byte // plane.base**place % plane.base for place in range(plane.codes_in_a_byte)]
    codes = torch.zeros(256, 8, dtype=torch.uint8)
    codes[:, : len(digits)] = (torch.stack(digits, dim=1) << below).to(torch.uint8)
    return codes.view(torch.int64).view(-1)


def factors(parts: Mapping[str, Tensor], stored: StoredWeight, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """Signed bytes and a unit for each row whose products are exactly the scales, if the scale format has them."""
    scheme = stored.scheme
    found = SCALE_FORMATS[scheme.scale_format].factors(parts, "scale", scheme, stored.groups)
    if found is None or not torch.equal((found[0].to(torch.float32) * found[1]).unsqueeze(-1), scale):
        return None
    return found
