"""Fit grids to groups of weights and round to them: what every solver shares.

Groups are rows of a `(groups, g)` float32 matrix. What a fit returns is what a reader of the stored weight will see:
scales are already rounded to their storage format.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats import native
from fewbit.formats.scheme import Scheme
from fewbit.grids import codebook, integer
from fewbit.grids.codebook import ScaleSearch
from fewbit.grids.packing import pack, small_integers
from fewbit.grids.scales import as_statistics, divisor, from_pattern, to_pattern


@dataclass(frozen=True)
class Grid:
    """The grid of every group: scale `(rows, groups)` and offset (zero-points or minima, or one number for all).

    parts: the tensors that store it. extremes: the ends of each group's range, `(rows, groups)`, that an evenly spaced
    grid was made from.
    """

    scheme: Scheme
    parts: dict[str, Tensor]
    scale: Tensor
    offset: Tensor | float = 0.0
    extremes: tuple[Tensor, Tensor] | None = None


def fit_core(
    x: Tensor,
    rows: int,
    scheme: Scheme,
    search: ScaleSearch | None,
    outside: Tensor | None,
    importance: Tensor | None,
    stored: bool = True,
) -> Grid:
    """Fit a grid to every group of `rows` rows.

    x: `(rows * groups, g)` float32, 0 where `outside` is True (outliers). importance: c_j that broadcasts to x. stored:
    False where the parts that store the grid are not wanted, so that they need not be made.
    """
    if scheme.grid == "codebook":
        wanted = codebook.search_scale(x, importance, scheme.levels, search or ScaleSearch(smallest=1.0))
        parts, seen = native.pack_scales(wanted.view(rows, -1), scheme)
        return Grid(scheme, parts, seen)
    low, high = integer.extremes(x, outside)
    if search is not None:
        low, high = _search_range(x, outside, (low, high), importance, scheme, search)
    return evenly_spaced(low.view(rows, -1), high.view(rows, -1), scheme, stored)


def evenly_spaced(low: Tensor, high: Tensor, scheme: Scheme, stored: bool = True) -> Grid:
    """The grid of groups whose ranges are `low` to `high`, each `(rows, groups)`; `stored` as in :func:`fit_core`."""
    bits, ends = scheme.bits, (low, high)
    if scheme.grid == "real-zero" and not stored:
        form = (scheme.statistic_bits, scheme.statistic_rows)
        seen = as_statistics(integer.minimum_grid(low, high, bits), *form)
        return Grid(scheme, {}, seen, as_statistics(-low / divisor(seen), *form), ends)
    if scheme.grid == "real-zero":
        parts, seen = native.pack_scales(integer.minimum_grid(low, high, bits), scheme)
        zero_parts, zero = native.pack_real_zeros(-low / divisor(seen), scheme)
        return Grid(scheme, {**parts, **zero_parts}, seen, zero, ends)
    if scheme.grid == "minimum":
        parts, seen = native.pack_scales(integer.minimum_grid(low, high, bits), scheme)
        parts["minima"], minimum = native.pack_floats(low, scheme)
        return Grid(scheme, parts, seen, minimum, ends)
    if scheme.grid == "zero-point":
        wanted, zero = integer.zero_point_grid(low, high, bits)
        parts, seen = native.pack_scales(wanted, scheme)
        parts["zeros"] = pack(zero.to(torch.uint8), bits)
        return Grid(scheme, parts, seen, zero, ends)
    parts, seen = native.pack_scales(integer.symmetric_grid(low, high, bits), scheme)
    return Grid(scheme, parts, seen, float(2 ** (bits - 1)), ends)


def _search_range(
    x: Tensor,
    outside: Tensor | None,
    widest: tuple[Tensor, Tensor],
    importance: Tensor | None,
    scheme: Scheme,
    search: ScaleSearch,
) -> tuple[Tensor, Tensor]:
    """The range of each group, shrunk by the ratio with the least weighted error of the core."""
    low, high = widest
    kind = "minimum" if scheme.grid == "real-zero" else scheme.grid
    exact = Scheme(scheme.bits, scheme.group_size, kind, scale_format="float32")
    best_error = torch.full_like(low, float("inf"))
    best = torch.ones_like(low)
    for ratio in search.ratios():
        grid = evenly_spaced(low * ratio, high * ratio, exact)
        _, decoded = encode(x, grid.scale, grid.offset, exact)
        error = decoded.sub_(x).abs_().pow_(search.error_power)
        error = error if outside is None else error.masked_fill_(outside, 0.0)
        error = error if importance is None else error.mul_(importance)
        total = error.sum(dim=1, keepdim=True)
        best = torch.where(total < best_error, ratio, best)
        best_error = torch.minimum(total, best_error)
    return low * best, high * best


def encode(x: Tensor, scale: Tensor, offset: Tensor | float, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and decoded weights (float32) of `x`, to which scale and offset broadcast."""
    if scheme.grid == "codebook":
        codes = codebook.encode(x, scale, scheme.levels)
        levels = torch.tensor(scheme.levels, dtype=torch.float32, device=x.device)
        return codes, codebook.decode(codes, scale, levels)
    if scheme.grid == "minimum":
        codes = integer.encode_minimum(x, scale, offset, scheme.bits)
        return small_integers(codes), codes.mul_(scale).add_(offset)
    if scheme.grid == "real-zero":
        codes = integer.encode_real_zero(x, scale, offset, scheme.bits)
    else:
        codes = integer.encode(x, scale, offset, scheme.bits)
    return small_integers(codes), codes.sub_(offset).mul_(scale)


def round_to(x: Tensor, scale: Tensor, offset: Tensor | float, scheme: Scheme) -> Tensor:
    """What :func:`encode` decodes to, without the codes: for one column at a time."""
    if scheme.grid == "codebook":
        levels = torch.tensor(scheme.levels, dtype=torch.float32, device=x.device)
        middles = (levels[1:] + levels[:-1]) * 0.5
        return levels[torch.bucketize(x / divisor(scale), middles)] * scale
    if scheme.grid == "minimum":
        return integer.encode_minimum(x, scale, offset, scheme.bits).mul_(scale).add_(offset)
    if scheme.grid == "real-zero":
        return integer.encode_real_zero(x, scale, offset, scheme.bits).sub_(offset).mul_(scale)
    return integer.encode(x, scale, offset, scheme.bits).sub_(offset).mul_(scale)


def fit_outliers(values: Tensor, where: Tensor, shape: tuple[int, int], scheme: Scheme) -> Grid:
    """Fit the grid of outliers with `values` at flat positions `where` of a matrix of that shape.

    The result's scale and offset are `(rows, groups)`, or `(rows, 1)` for the grid `row`.
    """
    rows, columns = shape
    if scheme.outlier_grid == "float16":
        return Grid(scheme, {}, values.new_ones(rows, 1), values.new_zeros(rows, 1))
    steps = 2**scheme.outlier_bits - 1
    half = 2 ** (scheme.outlier_bits - 1)
    if scheme.outlier_grid == "row":
        _, largest = integer.extremes_of(values.abs(), where // columns, rows)
        pattern = to_pattern(largest / (half - 1), "bfloat16")
        scale = from_pattern(pattern, "bfloat16").unsqueeze(1)
        return Grid(scheme, {"outlier_scales": pattern}, scale, torch.zeros_like(scale))
    signed = scheme.outlier_grid == "minmax"
    groups = columns // scheme.group_size
    low, high = integer.extremes_of(values if signed else values.abs(), where // scheme.group_size, rows * groups)
    steps = steps if signed else half - 1
    scales, scale = native.pack_floats(((high - low) / max(steps, 1)).view(rows, groups), scheme)
    minima, minimum = native.pack_floats(low.view(rows, groups), scheme)
    return Grid(scheme, {"outlier_scales": scales, "outlier_minima": minima}, scale, minimum)


def outlier_grid_of(where: Tensor, columns: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the outliers at flat positions `where`, each 1-D."""
    assert isinstance(grid.offset, Tensor)
    group = where // (grid.scheme.group_size if grid.scale.shape[1] > 1 else columns)
    return grid.scale.reshape(-1)[group], grid.offset.reshape(-1)[group]


def as_float16(values: Tensor) -> Tensor:
    """Float32 values as float16 holds them; what is beyond its range becomes its largest number."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).to(torch.float16).to(torch.float32)


def encode_outliers(values: Tensor, scale: Tensor, minimum: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes (int32) and decoded values of outliers; scale and minimum broadcast to `values`."""
    if scheme.outlier_grid == "float16":
        kept = as_float16(values)
        return to_pattern(kept, "float16").to(torch.int32), kept
    top = 2**scheme.outlier_bits - 1
    half = 2 ** (scheme.outlier_bits - 1)
    if scheme.outlier_grid == "row":
        codes = ((values / divisor(scale)).round_() + half).clamp_(0, top)
        return codes.to(torch.int32), (codes - half) * scale
    signed = scheme.outlier_grid == "minmax"
    magnitudes = values if signed else values.abs()
    codes = ((magnitudes - minimum) / divisor(scale)).round_().clamp_(0, top if signed else half - 1)
    decoded = codes * scale + minimum
    if not signed:
        negative = values < 0
        decoded = torch.where(negative, -decoded, decoded)
        codes = torch.where(negative, codes + half, codes)
    return codes.to(torch.int32), decoded
