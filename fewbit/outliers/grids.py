"""The grids on which outliers are stored.

Outliers are `values`, 1-D float32, at ascending flat positions `where` of a matrix `(rows, columns)`. A grid has a
scale and a minimum for each group of a row, or for each row: ``scale`` and ``minimum`` `(rows, groups or 1)`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.grids import integer, positions
from fewbit.grids.grid import Fitted, Parts, Values
from fewbit.grids.packing import pack, packed_bytes, unpack
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.scales import (
    divisor,
    from_pattern,
    logarithmic_levels,
    logarithmic_patterns,
    relative_error,
    spread_of,
    to_pattern,
)
from fewbit.grids.scheme import Layout, Scheme, StoredWeight
from fewbit.grids.table import grid_of

Shape = tuple[int, int]


@dataclass(frozen=True)
class OutlierGrid:
    """One kind of grid for outliers; an entry of :data:`OUTLIER_GRIDS`.

    bits(asked, core): bits per code, if `asked` bits were requested (0: no request) and the core's codes have `core`
    bits. fit(values, where, shape, scheme): the grid, with the parts that store it. read(parts, stored): its values.
    layout(stored): names, dtypes and shapes of its parts. encode(values, scale, minimum, scheme): codes (int32) and
    decoded values. decode(codes, scale, minimum, scheme): the inverse. apart: codes are bit patterns in a separate
    tensor. fewest_bits: the smallest number of bits per code. middle(scheme): where a row's scale is not negative, its
    outliers are ``(code - middle) * scale``; None for other grids.
    """

    name: str
    summary: str
    fit: Callable[[Tensor, Tensor, Shape, Scheme], Fitted]
    read: Callable[[Parts, StoredWeight], Values]
    layout: Callable[[StoredWeight], Layout]
    encode: Callable[[Tensor, Tensor, Tensor, Scheme], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, Tensor, Scheme], Tensor]
    bits: Callable[[int, int], int] = lambda asked, core: asked or core
    fewest_bits: int = 1
    apart: bool = False
    middle: Callable[[Scheme], int] | None = None


def _half(scheme: Scheme) -> int:
    return int(2 ** (scheme.outlier_bits - 1))


# Two grids with a scale and a minimum for each group: one for the signed values, one for magnitudes with a sign bit.


def _fit_groups(signed: bool, values: Tensor, where: Tensor, shape: Shape, scheme: Scheme) -> Fitted:
    rows, columns = shape
    groups, form = columns // scheme.group_size, SCALE_FORMATS[scheme.scale_format]
    low, high = integer.extremes_of(values if signed else values.abs(), where // scheme.group_size, rows * groups)
    steps = int(2**scheme.outlier_bits) - 1 if signed else _half(scheme) - 1
    scales, scale = form.pack_floats(((high - low) / max(steps, 1)).view(rows, groups))
    minima, minimum = form.pack_floats(low.view(rows, groups))
    parts = {"outlier_scales": scales, "outlier_minima": minima}
    return Fitted(scheme, parts, {"scale": scale, "minimum": minimum})


def _read_groups(parts: Parts, stored: StoredWeight) -> Values:
    form = SCALE_FORMATS[stored.scheme.scale_format]
    return {
        "scale": form.read_floats(parts["outlier_scales"]),
        "minimum": form.read_floats(parts["outlier_minima"]),
    }


def _layout_groups(stored: StoredWeight) -> Layout:
    word = SCALE_FORMATS[stored.scheme.scale_format].word
    shape = (stored.shape[0], stored.groups)
    return {"outlier_scales": (word, shape), "outlier_minima": (word, shape)}


def _encode_minmax(values: Tensor, scale: Tensor, minimum: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    codes = ((values - minimum) / divisor(scale)).round_().clamp_(0, 2**scheme.outlier_bits - 1)
    return codes.to(torch.int32), codes * scale + minimum


def _decode_minmax(codes: Tensor, scale: Tensor, minimum: Tensor, scheme: Scheme) -> Tensor:
    return codes.to(torch.float32) * scale + minimum


def _encode_magnitude(values: Tensor, scale: Tensor, minimum: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    half, negative = _half(scheme), values < 0
    codes = ((values.abs() - minimum) / divisor(scale)).round_().clamp_(0, half - 1)
    decoded = codes * scale + minimum
    return torch.where(negative, codes + half, codes).to(torch.int32), torch.where(negative, -decoded, decoded)


def _decode_magnitude(codes: Tensor, scale: Tensor, minimum: Tensor, scheme: Scheme) -> Tensor:
    half = _half(scheme)
    magnitude = (codes % half).to(torch.float32) * scale + minimum
    return torch.where(codes >= half, -magnitude, magnitude)


# A grid around 0 with one bfloat16 scale for each row. If the outliers of a row differ greatly in size, evenly spaced
# levels would lose the small ones. Such a row has logarithmic levels, and its scale is stored as a negative number.

_LINEAR_LOSS = 0.1
_FEWEST_LOG_BITS = 7
_OCTAVES = 12.7


def _fit_row(values: Tensor, where: Tensor, shape: Shape, scheme: Scheme) -> Fitted:
    rows, columns = shape
    _, largest = integer.extremes_of(values.abs(), where // columns, rows)
    pattern = to_pattern(largest / (_half(scheme) - 1), "bfloat16")
    if scheme.outlier_bits >= _FEWEST_LOG_BITS:
        scale = from_pattern(pattern, "bfloat16")
        seen = _encode_row(values, scale[where // columns], values, scheme)[1]
        lost = ((seen - values).abs() > _LINEAR_LOSS * values.abs()).to(values.dtype)
        _, any_lost = integer.extremes_of(lost, where // columns, rows)
        pattern = torch.where(any_lost > 0, _logarithmic(values, where // columns, scale, scheme), pattern)
    return Fitted(scheme, {"outlier_scales": pattern}, _row_values(pattern))


def _logarithmic(values: Tensor, row: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Patterns `(rows,)` of logarithmic rows with the spread that has the least squared relative error."""
    patterns, costs = logarithmic_patterns(scale), []
    for pattern in patterns:
        seen = _encode_row(values, from_pattern(pattern, "bfloat16")[row], values, scheme)[1]
        # Whole numbers, so that the order of the sum does not matter.
        cost = (relative_error(seen, values) * 2**20).to(torch.int64)
        costs.append(cost.new_zeros(len(scale)).index_add_(0, row, cost))
    return patterns.gather(0, torch.stack(costs).argmin(dim=0, keepdim=True)).squeeze(0)


def _row_values(pattern: Tensor) -> Values:
    scale = from_pattern(pattern, "bfloat16").unsqueeze(1)
    return {"scale": scale, "minimum": torch.zeros_like(scale)}


def _encode_row(values: Tensor, scale: Tensor, minimum: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    half = _half(scheme)
    codes = ((values / divisor(scale)).round_() + half).clamp_(0, 2**scheme.outlier_bits - 1)
    if bool((scale < 0).any()):
        levels, spread = _log_levels(scheme, values.device), _spread(scale)
        share = (values / divisor(scale)).abs() / (half - 1)
        for which, row in enumerate(levels):
            size = torch.bucketize(share, (row[1:] + row[:-1]) * 0.5).to(values.dtype)
            signed = torch.where(values < 0, size + half, size)
            codes = torch.where((scale < 0) & (spread == which), signed, codes)
    whole = codes.to(torch.int32)
    return whole, _decode_row(whole, scale, minimum, scheme)


def _decode_row(codes: Tensor, scale: Tensor, minimum: Tensor, scheme: Scheme) -> Tensor:
    half = _half(scheme)
    linear = (codes.to(torch.float32) - float(half)) * scale
    if not bool((scale < 0).any()):
        return linear
    size = _log_levels(scheme, codes.device)[_spread(scale), codes.to(torch.int64) % half] * (scale * -(half - 1))
    return torch.where(scale < 0, torch.where(codes >= half, -size, size), linear)


def _spread(scale: Tensor) -> Tensor:
    return spread_of(scale.to(torch.bfloat16).view(torch.int16))


def _log_levels(scheme: Scheme, device: torch.device) -> Tensor:
    """By spread s: 0 and the magnitudes ``2^(-12.7 2^s (n - m) / n)`` for m = 1 … n = half - 1; the largest is 1."""
    last = _half(scheme) - 1
    return logarithmic_levels(_OCTAVES / last, last, device)


# A grid with 16 bits per outlier.


def as_float16(values: Tensor) -> Tensor:
    """Float32 values rounded to float16; values beyond its range are clamped to it."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).to(torch.float16).to(torch.float32)


def _ones(rows: int, like: Tensor) -> Values:
    return {"scale": like.new_ones(rows, 1), "minimum": like.new_zeros(rows, 1)}


def _encode_float16(values: Tensor, scale: Tensor, minimum: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    kept = as_float16(values)
    return to_pattern(kept, "float16").to(torch.int32), kept


OUTLIER_GRIDS: dict[str, OutlierGrid] = {
    one.name: one
    for one in (
        OutlierGrid(
            "minmax",
            "a scale and a minimum for the outliers of each group, as in AdpQ",
            fit=lambda *problem: _fit_groups(True, *problem),
            read=_read_groups,
            layout=_layout_groups,
            encode=_encode_minmax,
            decode=_decode_minmax,
        ),
        OutlierGrid(
            "sign-magnitude",
            "a sign, and a scale and a minimum for the magnitudes in each group",
            fit=lambda *problem: _fit_groups(False, *problem),
            read=_read_groups,
            layout=_layout_groups,
            encode=_encode_magnitude,
            decode=_decode_magnitude,
        ),
        OutlierGrid(
            "row",
            "one scale for the outliers of each row",
            fit=_fit_row,
            read=lambda parts, stored: _row_values(parts["outlier_scales"]),
            layout=lambda stored: {"outlier_scales": (torch.int16, (stored.shape[0],))},
            encode=_encode_row,
            decode=_decode_row,
            fewest_bits=2,
            middle=_half,
        ),
        OutlierGrid(
            "float16",
            "each outlier in 16 bits, as in SpQR",
            fit=lambda values, where, shape, scheme: Fitted(scheme, {}, _ones(shape[0], values)),
            read=lambda parts, stored: _ones(stored.shape[0], from_pattern(parts["outlier_values"], "float16")),
            layout=lambda stored: {},
            encode=_encode_float16,
            decode=lambda codes, scale, minimum, scheme: from_pattern(codes.to(torch.int16), "float16"),
            bits=lambda asked, core: 16,
            apart=True,
        ),
    )
}


def at_positions(values: Values, where: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the outliers at flat positions `where` of a matrix of that shape, each 1-D."""
    scale, minimum = values["scale"], values["minimum"]
    group = where // (shape[1] // scale.shape[1])
    return scale.reshape(-1)[group], minimum.reshape(-1)[group]


def outlier_layout(stored: StoredWeight) -> Layout:
    """Names, dtypes and shapes of the parts of a weight's outliers; empty if it has none."""
    scheme = stored.scheme
    if not scheme.has_outliers:
        return {}
    grid = OUTLIER_GRIDS[scheme.outlier_grid]
    encoding, where = positions.ENCODINGS.get(stored.positions), _where(stored)
    if encoding is None or not encoding.fits(where):
        raise ValueError(f"positions of {stored.outliers} outliers cannot be stored as {stored.positions!r}")
    layout: Layout = {"outlier_positions": (torch.uint8, (encoding.bytes(where),))}
    if grid.apart:
        return {**layout, "outlier_values": (torch.int16, (stored.outliers,)), **grid.layout(stored)}
    beside = _bits_beside(scheme)
    if beside:
        layout["outlier_codes"] = (torch.uint8, (packed_bytes(stored.outliers, beside),))
    return {**layout, **grid.layout(stored)}


def _bits_beside(scheme: Scheme) -> int:
    """Number of bits of an outlier's code that do not fit into the dense codes."""
    return max(0, scheme.outlier_bits - grid_of(scheme).codes(scheme).room_bits)


def pack_outliers(codes: Tensor, where: Tensor, stored: StoredWeight) -> dict[str, Tensor]:
    """The parts for positions, and for the bits of the outliers' codes (int32, 1-D) that are not in the dense codes."""
    scheme = stored.scheme
    parts = {"outlier_positions": positions.ENCODINGS[stored.positions].encode(where, _where(stored))}
    beside = _bits_beside(scheme)
    if OUTLIER_GRIDS[scheme.outlier_grid].apart:
        parts["outlier_values"] = codes.to(torch.int16)
    elif beside:
        parts["outlier_codes"] = pack((codes >> (scheme.outlier_bits - beside)).to(torch.uint8), beside)
    return parts


def read_positions(parts: Parts, stored: StoredWeight) -> Tensor:
    """Ascending flat positions (int64) of the outliers; ValueError if there are fewer or more."""
    return positions.ENCODINGS[stored.positions].decode(parts["outlier_positions"], _where(stored))


def _where(stored: StoredWeight) -> positions.Where:
    return positions.Where(stored.weights, stored.outliers, stored.scheme.group_size)


def check_outlier_values(parts: Parts, stored: StoredWeight) -> None:
    """Raise ValueError if positions or values of outliers cannot have been written by :func:`pack_outliers`."""
    scheme = stored.scheme
    positions.check(read_positions(parts, stored), _where(stored))
    grid = OUTLIER_GRIDS[scheme.outlier_grid]
    values = list(grid.read(parts, stored).values())
    if grid.apart:
        values.append(from_pattern(parts["outlier_values"], "float16"))
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise ValueError("values of outliers are not finite")


def read_values(parts: Parts, stored: StoredWeight, dense: Tensor, where: Tensor) -> Tensor:
    """Decoded outliers at flat positions `where`, 1-D float32. dense: the dense codes of the weight."""
    scheme, grid = stored.scheme, OUTLIER_GRIDS[stored.scheme.outlier_grid]
    codes = read_outlier_codes(parts, stored, dense, where)
    return grid.decode(codes, *at_positions(grid.read(parts, stored), where, stored.shape), scheme)


def read_outlier_codes(parts: Parts, stored: StoredWeight, dense: Tensor, where: Tensor) -> Tensor:
    """The codes of the outliers, 1-D; int32, or the patterns of a grid that has those."""
    scheme = stored.scheme
    beside = _bits_beside(scheme)
    if OUTLIER_GRIDS[scheme.outlier_grid].apart:
        return parts["outlier_values"]
    codes = grid_of(scheme).codes(scheme).low_bits(dense, where)
    if beside:
        extra = unpack(parts["outlier_codes"], beside, stored.outliers)
        codes = codes | (extra.to(torch.int32) << (scheme.outlier_bits - beside))
    return codes


def check_outliers(scheme: Scheme) -> None:
    """Raise ValueError unless the outlier grid is known and supports the scheme's number of bits."""
    if not scheme.has_outliers:
        return
    grid = OUTLIER_GRIDS.get(scheme.outlier_grid)
    if grid is None:
        raise ValueError(f"a stored weight cannot have this outlier grid {scheme.outlier_grid!r}")
    fits = scheme.outlier_bits == 16 if grid.apart else scheme.whole_bits <= scheme.outlier_bits <= 8
    if not fits or scheme.outlier_bits < grid.fewest_bits:
        raise ValueError("a stored weight cannot have this outlier bits")
