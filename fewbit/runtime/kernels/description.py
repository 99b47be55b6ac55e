"""What kernels read of a packed weight, prepared once from its parts: numbers per group, outliers by row, addresses.

Codes stay packed and are read where they are. Nothing decoded is kept but the numbers of the groups and the outliers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from mmap import mmap

import torch
from torch import Tensor

from fewbit.grids.formula import Formula, Plane
from fewbit.grids.grid import Grid
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.scheme import StoredWeight
from fewbit.grids.table import grid_of
from fewbit.outliers.grids import OUTLIER_GRIDS, at_positions, read_outlier_codes, read_positions

COLUMNS, GROUP, GROUPS, MIDDLE, LADDER, PICKS, SCALE, ZERO, MINIMUM, UNITS, STARTS, GAPS, VALUES, STEPS = range(14)
"""Fields of a description, int64 each; from LADDER on they are addresses. UNITS: by which the scales of each row are
multiplied. STARTS: the number of the first outlier of each row; GAPS: between the columns of outliers; VALUES: the
outliers, or their codes, which are to be multiplied by the STEPS of their rows after MIDDLE is subtracted."""
PLANES = 14
"""Three times five fields: a plane's address, the bytes from one row to the next, the codes in a byte, the address of
the table of what a byte stands for, the bytes of a row."""
_FIELDS = PLANES + 15

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
_LONGEST_GAP = 255
_ALIGNED = 64


@dataclass(frozen=True)
class Reading:
    """How codes become weights, as far as it is compiled in.

    widths: of the planes, from the lowest bits. bits: of a code. by_table: there are 16 levels at most, so that each
    group has a table of its weights. by_levels: the levels are not 0, 1, 2, …. expanded: a row's codes are first
    written as bytes, because groups do not start at a whole vector or codes are not in planes. vectors: so many whole
    ones follow each other in a group, at least. scale, zero, minimum: kinds of numbers, 0 for none. magnitudes: scales
    in a group. values: the kind of the outliers, 0 if there are none. to: the kind of the weights.
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

    @property
    def bytes(self) -> int:
        """Bytes of everything that it keeps, parts included."""
        return sum(one.numel() * one.element_size() for one in (self.fields, *self.kept))


def formula_of(stored: StoredWeight) -> Formula | None:
    """How the weight's codes become weights, or None if kernels cannot compute it."""
    grid = grid_of(stored.scheme)
    return grid.formula(stored.scheme) if grid.formula is not None else None


def room(columns: int, tokens: int) -> int:
    """Bytes of working memory for one call: decoded rows, a byte for each code of a row, inputs and sums in float32."""
    whole = (columns + _LANES - 1) // _LANES * _LANES
    # The last vector of a group that does not end with one is written too.
    return ROWS * 4 * (whole + _LANES) + whole + 64 + 4 * tokens * whole + 4 * ROWS + 4 * _LANES


def describe(
    parts: Mapping[str, Tensor],
    stored: StoredWeight,
    dtype: torch.dtype,
    compiled: Callable[[Reading], Callable[..., int]],
) -> Description:
    """Prepare a weight on the CPU for products in `dtype`; raises ValueError if its outliers lie outside of it.

    compiled: gives the function for a way of reading.
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
    outlier_kind = 0
    if stored.scheme.has_outliers and stored.outliers > 0:
        found = _outliers(parts, stored, formula, dtype)
        made |= {STARTS: found.starts, GAPS: found.gaps, VALUES: found.values}
        outlier_kind = KIND_OF[found.values.dtype]
        if found.steps is not None:
            made[STEPS], fields[MIDDLE] = found.steps, found.middle
        del found
    reading = _reading(formula, stored, kinds, terms.scale.shape[-1], (outlier_kind, KIND_OF[dtype]))
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
    known = torch.tensor(fields, dtype=torch.int64)
    return Description(stored.shape, dtype, reading, known, tuple(kept), compiled(reading), known.data_ptr())


def _together(tensors: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, int]]:
    """The numbers of all tensors in one, and the address of each there.

    It has pages of its own. Elsewhere it would lie between larger tensors that are needed only until all is prepared,
    and keep their memory from going back to the system.
    """
    places, size = {}, 0
    for key, tensor in tensors.items():
        places[key] = size
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
    own = torch.frombuffer(mmap(-1, size), dtype=torch.uint8)
    for key, tensor in tensors.items():
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        own[places[key] : places[key] + flat.numel()] = flat
    return own, {key: own.data_ptr() + place for key, place in places.items()}


def _reading(
    formula: Formula, stored: StoredWeight, kinds: list[int], magnitudes: int, ends: tuple[int, int]
) -> Reading:
    widths = tuple(plane.width for plane in formula.planes)
    bits, first, group = sum(widths), formula.ladder[0], stored.scheme.group_size
    scale, zero, minimum = kinds
    return Reading(
        widths,
        bits,
        by_table=2**bits <= _LANES,
        by_levels=formula.ladder != tuple(first + place for place in range(len(formula.ladder))),
        expanded=group % _LANES != 0 or any(plane.base != 2**plane.width for plane in formula.planes),
        vectors=next((count for count in (4, 2) if group % (count * _LANES) == 0), 1),
        scale=scale,
        zero=zero,
        minimum=minimum,
        magnitudes=magnitudes,
        values=ends[0],
        to=ends[1],
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


@dataclass(frozen=True)
class _Outliers:
    """Outliers by row: the first of every row int32 `(rows + 1,)`, gaps between columns uint8, and values.

    A row's first gap is its first outlier's column. A gap above 255 is divided by weights that are no outliers. values:
    in the dtype of the weights, or codes to be multiplied by `steps` `(rows,)` float32 after `middle` is subtracted.
    """

    starts: Tensor
    gaps: Tensor
    values: Tensor
    steps: Tensor | None = None
    middle: int = 0


def _outliers(parts: Mapping[str, Tensor], stored: StoredWeight, formula: Formula, dtype: torch.dtype) -> _Outliers:
    (rows, columns), where = stored.shape, read_positions(parts, stored)
    if bool((where[1:] <= where[:-1]).any()) or not 0 <= int(where[0]) <= int(where[-1]) < rows * columns:
        raise ValueError("positions of outliers do not ascend, or lie outside the weight")
    dense = codes_at(parts, stored, formula, where)
    codes = read_outlier_codes(parts, stored, dense, torch.arange(len(where)))
    row, column = where // columns, where % columns
    before = torch.cat([column.new_zeros(1), column[:-1]])
    before[torch.cat([row.new_ones(1, dtype=torch.bool), row[1:] != row[:-1]])] = 0
    between = (column - before - 1).clamp(min=0) // _LONGEST_GAP
    grid = OUTLIER_GRIDS[stored.scheme.outlier_grid]
    limits = grid.read(parts, stored)
    scale = limits["scale"]
    if grid.middle is not None and not bool(between.any()) and not bool((scale < 0).any()):
        starts = torch.zeros(rows + 1, dtype=torch.int64)
        starts[1:] = torch.bincount(row, minlength=rows).cumsum(0)
        # Codes are read in whole vectors.
        short = torch.nn.functional.pad(codes.to(torch.uint8), (0, _LANES))
        gaps = (column - before).to(torch.uint8)
        return _Outliers(starts.to(torch.int32), gaps, short, scale.reshape(-1), grid.middle(stored.scheme))
    values = grid.decode(codes, *at_positions(limits, where, stored.shape), stored.scheme)
    each = torch.repeat_interleave(between + 1)
    step = torch.arange(len(each)) - ((between + 1).cumsum(0) - between - 1)[each]
    last = step == between[each]
    reached = torch.where(last, column[each], before[each] + _LONGEST_GAP * (step + 1))
    start = torch.where(step == 0, before[each], before[each] + _LONGEST_GAP * step)
    values = values[each]
    core = (~last).nonzero().squeeze(1)
    if core.numel():
        values[core] = _core_at(parts, stored, formula, row[each][core] * columns + reached[core])
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(row[each], minlength=rows).cumsum(0)
    return _Outliers(starts.to(torch.int32), (reached - start).to(torch.uint8), values.to(dtype))


def codes_at(parts: Mapping[str, Tensor], stored: StoredWeight, formula: Formula, where: Tensor) -> Tensor:
    """The dense codes at some flat positions, uint8 1-D."""
    row, column = where // stored.shape[1], where % stored.shape[1]
    codes, below = torch.zeros_like(where), 0
    for plane in formula.planes:
        start, _ = plane.place(stored.shape[1])
        part = parts[plane.part]
        line = torch.zeros_like(row) if plane.shared else row
        byte = part.reshape(-1)[line * part.shape[-1] + start + column // plane.codes_in_a_byte].to(torch.int64)
        codes |= (byte // plane.base ** (column % plane.codes_in_a_byte) % plane.base) << below
        below += plane.width
    return codes.to(torch.uint8)


def _core_at(parts: Mapping[str, Tensor], stored: StoredWeight, formula: Formula, where: Tensor) -> Tensor:
    """The weights without outliers at some flat positions, 1-D float32."""
    grid: Grid = grid_of(stored.scheme)
    values = grid.read(parts, stored.scheme, stored.groups)
    row, group = where // stored.shape[1], where % stored.shape[1] // stored.scheme.group_size
    chosen = {name: value[row, group].unsqueeze(1) for name, value in values.items()}
    codes = codes_at(parts, stored, formula, where)
    return grid.decode(codes.view(-1, 1, 1), chosen, stored.scheme).view(-1)
