"""One weight matrix, rows at a time: outliers, grid, codes. Read it beside `docs/methods.md`.

Every function takes whole rows in float32 and returns what is stored for them, so rows can be done in any order
and by any number of workers with the same result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats.scheme import Scheme
from fewbit.grids.packing import pack
from fewbit.grids.positions import flat_positions
from fewbit.outliers.adaptive_lasso import group_mask, split
from fewbit.pipeline.fit_grid import encode, encode_outliers, fit_core, fit_outliers, outlier_grid_of
from fewbit.recipe import Recipe


@dataclass(frozen=True)
class RowsContext:
    """What all rows of one matrix share.

    threshold: sqrt(lambda') for outliers of tensor scope. per_group: outliers of each group for group scope.
    importance: c_j of each column `(in,)`, or None for 1.
    """

    recipe: Recipe
    scheme: Scheme
    threshold: float | None = None
    per_group: int = 0
    importance: Tensor | None = None


@dataclass(frozen=True)
class QuantizedRows:
    """Parts by name (concatenated over rows they are the stored tensors), outliers, and error sums."""

    parts: dict[str, Tensor]
    outlier_positions: Tensor | None
    outlier_codes: Tensor | None
    squared_error: float
    squared_norm: float


class NotFiniteError(ValueError):
    """A weight is NaN or infinite."""


def quantize_rows(weight: Tensor, context: RowsContext) -> QuantizedRows:
    """Quantize whole rows `(rows, in)` of any floating dtype, on their device.

    Raises NotFiniteError when a weight is NaN or infinite.
    """
    scheme = context.scheme
    rows, columns = weight.shape
    x = weight.to(torch.float32).reshape(-1, scheme.group_size)
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        raise NotFiniteError
    core, mask = _split(x, context)
    importance = _grouped_importance(x, context)
    grid = fit_core(core, rows, scheme, context.recipe.search, mask, importance)
    offset = grid.offset.view(-1, 1) if isinstance(grid.offset, Tensor) else grid.offset
    codes, decoded = encode(core, grid.scale.view(-1, 1), offset, scheme)
    parts = grid.parts
    where = outlier_codes = None
    if mask is not None:
        where = flat_positions(mask)
        values = x.view(-1)[where]
        outlier_grid = fit_outliers(values, where, (rows, columns), scheme)
        outlier_codes, values = encode_outliers(values, *outlier_grid_of(where, columns, outlier_grid), scheme)
        parts.update(outlier_grid.parts)
        codes.view(-1)[where] = (outlier_codes & (2**scheme.bits - 1)).to(torch.uint8)
        decoded.view(-1)[where] = values
    squared_norm = _sum_of_squares(x)
    squared_error = _sum_of_squares(decoded.sub_(x))
    parts["codes"] = pack(codes.view(rows, columns), scheme.bits)
    return QuantizedRows(parts, where, outlier_codes, squared_error, squared_norm)


def _sum_of_squares(x: Tensor) -> float:
    """Over groups in float32, over the rest in float64: a float64 copy of everything would cost more than the rest."""
    return float(x.square().sum(dim=1).sum(dtype=torch.float64))


def _split(x: Tensor, context: RowsContext) -> tuple[Tensor, Tensor | None]:
    """The weights with 0 where an outlier was, and the mask of the outliers (None where there can be none)."""
    if context.threshold is not None:
        return split(x, context.threshold)
    if context.per_group:
        mask = group_mask(x.abs(), context.per_group)
        return x.masked_fill(mask, 0.0), mask
    return x, None


def _grouped_importance(x: Tensor, context: RowsContext) -> Tensor | None:
    if context.importance is None:
        return None
    per_row = context.importance.view(-1, x.shape[1])
    return per_row.repeat(x.shape[0] // per_row.shape[0], 1)
