"""One weight matrix, rows at a time: outliers, grid, codes. Read it beside `docs/methods.md`.

Every function takes whole rows in float32 and returns what is stored for them, so rows can be done in any order
and by any number of workers with the same result.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.formats import native
from fewbit.formats.scheme import Scheme
from fewbit.grids import codebook, integer
from fewbit.grids.packing import pack, small_integers
from fewbit.grids.positions import flat_positions
from fewbit.grids.scales import divisor, from_pattern, to_pattern
from fewbit.outliers.adaptive_lasso import group_mask, split
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
    codes, decoded, parts = _encode_core(core, mask, rows, context)
    where = outlier_codes = None
    if mask is not None:
        where = flat_positions(mask)
        outlier_codes, values, outlier_parts = _encode_outliers(x, where, rows, context)
        parts.update(outlier_parts)
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


def _encode_core(
    x: Tensor, outliers: Tensor | None, rows: int, context: RowsContext
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Codes (uint8), decoded weights (float32) and parts of the core; where `outliers` is True both are arbitrary."""
    scheme, recipe = context.scheme, context.recipe
    if scheme.grid == "codebook":
        importance = _grouped_importance(x, context)
        search = recipe.search or codebook.ScaleSearch(smallest=1.0)
        wanted = codebook.search_scale(x, importance, scheme.levels, search)
        parts, seen = native.pack_scales(wanted.view(rows, -1), scheme)
        scale = seen.view(-1, 1)
        codes = codebook.encode(x, scale, scheme.levels)
        levels = torch.tensor(scheme.levels, dtype=torch.float32, device=x.device)
        return codes, codebook.decode(codes, scale, levels), parts
    low, high = integer.extremes(x, outliers)
    if recipe.search is not None:
        low, high = _search_range(x, outliers, low, high, context)
    return _encode_integer(x, low, high, rows, scheme)


def _encode_integer(
    x: Tensor, low: Tensor, high: Tensor, rows: int, scheme: Scheme
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    bits = scheme.bits
    if scheme.grid == "minimum":
        parts, seen = native.pack_scales(integer.minimum_grid(low, high, bits).view(rows, -1), scheme)
        parts["minima"], minimum = native.pack_floats(low.view(rows, -1), scheme)
        scale, minimum = seen.view(-1, 1), minimum.view(-1, 1)
        codes = integer.encode_minimum(x, scale, minimum, bits)
        return small_integers(codes), codes.mul_(scale).add_(minimum), parts
    zero: Any
    if scheme.grid == "zero-point":
        wanted, zero = integer.zero_point_grid(low, high, bits)
    else:
        wanted, zero = integer.symmetric_grid(low, high, bits), float(2 ** (bits - 1))
    parts, seen = native.pack_scales(wanted.view(rows, -1), scheme)
    if scheme.grid == "zero-point":
        parts["zeros"] = pack(zero.view(rows, -1).to(torch.uint8), bits)
    scale = seen.view(-1, 1)
    codes = integer.encode(x, scale, zero, bits)
    return small_integers(codes), codes.sub_(zero).mul_(scale), parts


def _search_range(
    x: Tensor, outliers: Tensor | None, low: Tensor, high: Tensor, context: RowsContext
) -> tuple[Tensor, Tensor]:
    """The range of each group, shrunk by the ratio with the least weighted error of the core."""
    recipe, bits = context.recipe, context.scheme.bits
    assert recipe.search is not None
    importance = _grouped_importance(x, context)
    best_error = torch.full_like(low, float("inf"))
    best = torch.ones_like(low)
    for ratio in recipe.search.ratios():
        _, decoded, _ = _encode_integer(x, low * ratio, high * ratio, x.shape[0], _unrounded(context.scheme, bits))
        error = decoded.sub_(x).abs_().pow_(recipe.search.error_power)
        error = error if outliers is None else error.masked_fill_(outliers, 0.0)
        error = error if importance is None else error.mul_(importance)
        total = error.sum(dim=1, keepdim=True)
        best = torch.where(total < best_error, ratio, best)
        best_error = torch.minimum(total, best_error)
    return low * best, high * best


def _unrounded(scheme: Scheme, bits: int) -> Scheme:
    return Scheme(bits, scheme.group_size, scheme.grid, scale_format="float32")


def _grouped_importance(x: Tensor, context: RowsContext) -> Tensor | None:
    if context.importance is None:
        return None
    per_row = context.importance.view(-1, x.shape[1])
    return per_row.repeat(x.shape[0] // per_row.shape[0], 1)


def _encode_outliers(
    x: Tensor, where: Tensor, rows: int, context: RowsContext
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Codes (int32, 1-D), decoded values and parts of the outliers at flat positions `where`."""
    scheme = context.scheme
    values = x.view(-1)[where]
    top = 2**scheme.outlier_bits - 1
    half = 2 ** (scheme.outlier_bits - 1)
    if scheme.outlier_grid == "row":
        row = where // (x.numel() // rows)
        _, largest = integer.extremes_of(values.abs(), row, rows)
        pattern = to_pattern(largest / (half - 1), "bfloat16")
        scale = from_pattern(pattern, "bfloat16")[row]
        codes = ((values / divisor(scale)).round_() + half).clamp_(0, top)
        return codes.to(torch.int32), (codes - half) * scale, {"outlier_scales": pattern}
    signed = scheme.outlier_grid == "minmax"
    group = where // scheme.group_size
    low, high = integer.extremes_of(values if signed else values.abs(), group, x.shape[0])
    steps = top if signed else half - 1
    scale_pattern, scale = native.pack_floats(((high - low) / max(steps, 1)).view(rows, -1), scheme)
    minimum_pattern, minimum = native.pack_floats(low.view(rows, -1), scheme)
    scale, minimum = scale.view(-1)[group], minimum.view(-1)[group]
    magnitudes = values if signed else values.abs()
    codes = ((magnitudes - minimum) / divisor(scale)).round_().clamp_(0, steps)
    decoded = codes * scale + minimum
    if not signed:
        negative = values < 0
        decoded = torch.where(negative, -decoded, decoded)
        codes = torch.where(negative, codes + half, codes)
    parts = {"outlier_scales": scale_pattern, "outlier_minima": minimum_pattern}
    return codes.to(torch.int32), decoded, parts
