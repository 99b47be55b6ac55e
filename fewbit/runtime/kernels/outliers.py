"""Outliers as kernels for the CPU read them: row by row, each by its distance from the one before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.grids.formula import Formula
from fewbit.grids.scheme import StoredWeight
from fewbit.outliers.grids import OUTLIER_GRIDS, at_positions, read_outlier_codes, read_positions

SKIP = 255
"""A gap after which there is no outlier, only the next gap."""
_LANES = 16


@dataclass(frozen=True)
class Outliers:
    """Outliers by some rows at a time: where those of each begin int32, gaps between their places uint8, and values.

    The place in the first of the rows is that of the column, the next row begins behind it, and so on. The first gap is
    the first outlier's place. Larger gaps than a byte can say have a gap of :data:`SKIP` in front. starts has one
    number more, the end. Where several rows belong together, the last outlier is repeated until their number is a
    multiple of 16, and a start is odd, one larger, if there is a :data:`SKIP` before the next start. values: in the
    dtype of the weights, or codes to be multiplied by `steps` `(rows,)` float32 after `middle` is subtracted.
    """

    starts: Tensor
    gaps: Tensor
    values: Tensor
    steps: Tensor | None = None
    middle: int = 0


@dataclass(frozen=True)
class Arrangement:
    """rows: so many belong together. order: the columns in the order of their places, in each block of so many."""

    rows: int = 1
    order: Sequence[int] = (0,)


def outliers_by_row(
    parts: Mapping[str, Tensor], stored: StoredWeight, formula: Formula, dtype: torch.dtype, how: Arrangement
) -> Outliers:
    """The outliers of a weight.

    Raises ValueError if positions do not ascend, or lie outside the weight.
    """
    (rows, columns), where = stored.shape, read_positions(parts, stored)
    if bool((where[1:] <= where[:-1]).any()) or not 0 <= int(where[0]) <= int(where[-1]) < rows * columns:
        raise ValueError("positions of outliers do not ascend, or lie outside the weight")
    dense = codes_at(parts, stored, formula, where)
    codes = read_outlier_codes(parts, stored, dense, torch.arange(len(where)))
    grid = OUTLIER_GRIDS[stored.scheme.outlier_grid]
    limits = grid.read(parts, stored)
    scale, steps, middle = limits["scale"], None, 0
    if grid.middle is not None and not bool((scale < 0).any()):
        values, steps, middle = codes.to(torch.uint8), scale.reshape(-1), grid.middle(stored.scheme)
    else:
        values = grid.decode(codes, *at_positions(limits, where, stored.shape), stored.scheme).to(dtype)
    row, place, block = where // columns, where % columns, len(how.order)
    if block > 1:
        places = torch.tensor(how.order).argsort()
        place = place - place % block + places[place % block]
        sorting = (row * columns + place).argsort()
        place, values = place[sorting], values[sorting]
    place, run = place + row % how.rows * columns, row // how.rows
    before = torch.cat([place.new_zeros(1), place[:-1]])
    before[torch.cat([run.new_ones(1, dtype=torch.bool), run[1:] != run[:-1]])] = 0
    gap = place - before
    skips, runs = gap // SKIP, -(-rows // how.rows)
    counts = torch.zeros(runs, dtype=torch.int64).index_add_(0, run, skips + 1)
    padding = -counts % _LANES if how.rows > 1 else torch.zeros_like(counts)
    starts = torch.zeros(runs + 1, dtype=torch.int64)
    starts[1:] = (counts + padding).cumsum(0)
    # Where each outlier is, behind what was added to those of the rows before.
    last = (skips + 1).cumsum(0) - 1 + (padding.cumsum(0) - padding)[run]
    # Both are read in whole vectors.
    size = int(starts[-1]) + _LANES
    gaps, source = torch.full((size,), SKIP, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64)
    gaps[last] = (gap % SKIP).to(torch.uint8)
    source[last] = torch.arange(1, len(last) + 1)
    ends, added = starts[1:] - padding, int(padding.max())
    for step in range(added):
        where_added = (ends + step)[padding > step]
        gaps[where_added] = 0
        source[where_added] = source[where_added - 1]
    spread = torch.cat([values.new_zeros(1), values])[source]
    if how.rows > 1:
        starts[:-1] += torch.zeros(runs, dtype=torch.int64).index_add_(0, run, skips).clamp(max=1)
    return Outliers(starts.to(torch.int32), gaps, spread, steps, middle)


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
