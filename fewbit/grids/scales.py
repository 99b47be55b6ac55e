"""How scales and minima are stored: as bit patterns of floats in integer tensors, or as codes with a second level.

All packed tensors have integer dtypes, because loaders cast floating-point tensors to the dtype that the user asks for.
That would change the scales, and so the weights.
"""

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.grids.packing import pack, unpack

_PATTERNS = {
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.bfloat16, torch.int16),
    "float32": (torch.float32, torch.int32),
}

TWO_LEVEL_BITS = 7
"""Bits of a two-level scale code: six bits of magnitude, and the sign as the highest bit."""

_MAGNITUDE_LEVELS = 63
_SIGN = 64
_LINEAR_LOSS = 0.1
_LOG_STEPS = 5
SPREADS = 4
"""Number of spreads of logarithmic rows."""
_LARGEST_PATTERN = 0x7F7F


def to_pattern(values: Tensor, number_format: str) -> Tensor:
    """Bit patterns of float32 `values` rounded to `number_format`; FewbitError if one is out of its range."""
    dtype, word = _PATTERNS[number_format]
    rounded = values.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise FewbitError(f"a scale is too large for {number_format}: use --scale-format float32")
    return rounded.view(word)


def from_pattern(pattern: Tensor, number_format: str) -> Tensor:
    """Float32 values of bit patterns made by :func:`to_pattern`."""
    return pattern.view(_PATTERNS[number_format][0]).to(torch.float32)


def to_two_level(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Signed scales `(rows, groups)` as 7-bit codes and one bfloat16 scale per row.

    ``scale = sign * magnitude / 63 * row_scale``. A scale that is not 0 keeps a magnitude of at least 1. In a row where
    a scale would lose more than `_LINEAR_LOSS` of itself that way, beside one many times larger, magnitudes are
    logarithmic instead, ``scale = sign * 2^(-(63 - magnitude) 2^s / 5) * row_scale`` (0 stays 0). The spread s, from 0
    to 3, is the one with the least relative error, squared and summed over the row: with s = 0 scales down to 1/5000 of
    the largest lose 7 % at most, with s = 1 those down to 1/2.9e7 lose 15 %.
    Returns packed codes uint8 `(rows, bytes)` and row scale patterns int16 `(rows,)`.
    """
    size = scales.abs()
    largest = size.amax(dim=1, keepdim=True)
    row_scales = to_pattern(largest, "bfloat16")
    unit = from_pattern(row_scales, "bfloat16") / _MAGNITUDE_LEVELS
    magnitude = (size / divisor(unit)).round_().clamp_(0, _MAGNITUDE_LEVELS)
    magnitude = torch.where((scales != 0) & (unit > 0), magnitude.clamp(min=1), magnitude)
    lost = ((magnitude * unit - size).abs() > _LINEAR_LOSS * size).any(dim=1).nonzero().squeeze(1)
    if lost.numel():
        magnitude[lost], row_scales[lost] = _logarithmic(size[lost], largest[lost])
    codes = magnitude.to(torch.uint8) + (scales < 0).to(torch.uint8) * _SIGN
    return pack(codes, TWO_LEVEL_BITS), row_scales.squeeze(1)


def _logarithmic(size: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes `(rows, groups)` and row scale patterns `(rows, 1)` of logarithmic rows, with the best spread."""
    patterns = logarithmic_patterns(largest)
    levels = logarithmic_levels(1 / _LOG_STEPS, _MAGNITUDE_LEVELS, size.device)
    tried, costs = [], []
    for spread in range(SPREADS):
        unit = from_pattern(patterns[spread], "bfloat16").abs()
        middles = (levels[spread, 2:] + levels[spread, 1:-1]) * 0.5
        magnitude = (torch.bucketize(size / divisor(unit), middles) + 1).masked_fill_(size == 0, 0)
        costs.append(relative_error(levels[spread, magnitude] * unit, size).sum(dim=1))
        tried.append(magnitude.to(size.dtype))
    best = torch.stack(costs).argmin(dim=0)
    row = torch.arange(len(size), device=size.device)
    return torch.stack(tried)[best, row], patterns[best, row]


def from_two_level(packed: Tensor, row_scales: Tensor, groups: int) -> Tensor:
    """Inverse of :func:`to_two_level`: float32 signed scales `(rows, groups)`."""
    codes = unpack(packed, TWO_LEVEL_BITS, groups)
    row_scale = from_pattern(row_scales, "bfloat16").unsqueeze(1)
    code = (codes & (_SIGN - 1)).to(torch.float32)
    magnitude = code * (row_scale / _MAGNITUDE_LEVELS)
    logarithmic = row_scale < 0
    if bool(logarithmic.any()):
        table = logarithmic_levels(1 / _LOG_STEPS, _MAGNITUDE_LEVELS, codes.device)
        level = table[spread_of(row_scales).unsqueeze(1), code.to(torch.int64)]
        magnitude = torch.where(logarithmic, level * -row_scale, magnitude)
    return torch.where(codes >= _SIGN, -magnitude, magnitude)


def two_level_factors(packed: Tensor, row_scales: Tensor, groups: int) -> tuple[Tensor, Tensor] | None:
    """Signed magnitudes int8 `(rows, groups)` and a unit `(rows, 1)` for each row; None if a row is logarithmic."""
    row_scale = from_pattern(row_scales, "bfloat16").unsqueeze(1)
    if bool((row_scale < 0).any()):
        return None
    codes = unpack(packed, TWO_LEVEL_BITS, groups)
    magnitude = (codes & (_SIGN - 1)).to(torch.int8)
    return torch.where(codes >= _SIGN, -magnitude, magnitude), row_scale / _MAGNITUDE_LEVELS


def logarithmic_patterns(largest: Tensor) -> Tensor:
    """Row scales of logarithmic rows, by spread `(4, ...)`: negative bfloat16 patterns near ``-largest`` `(...)`.

    Their two lowest bits are the spread.
    """
    near = to_pattern(largest, "bfloat16").to(torch.int32)
    spread = torch.arange(SPREADS, device=near.device, dtype=torch.int32).view(-1, *(1 for _ in near.shape))
    ahead = (spread - near) % SPREADS
    back = (ahead == SPREADS - 1) & (near > SPREADS)
    found = near + torch.where(back, ahead - SPREADS, ahead)
    found = torch.where(found > _LARGEST_PATTERN, found - SPREADS, found)
    return (found - 2**15).to(torch.int16)


def relative_error(seen: Tensor, wanted: Tensor) -> Tensor:
    """The squared relative error of each value, 1 at most: a value is not more than lost."""
    return ((seen - wanted) / divisor(wanted)).abs_().clamp_(max=1.0).square_()


def spread_of(pattern: Tensor) -> Tensor:
    """The spread s (int64) of bfloat16 patterns (int16) of logarithmic rows."""
    return pattern.to(torch.int64) & (SPREADS - 1)


def logarithmic_levels(step: float, last: int, device: torch.device) -> Tensor:
    """Levels `(4, last + 1)` by spread s and magnitude m: 0, and ``2^(-step 2^s (last - m))``, float32.

    From a table, so that the values are the same on every machine.
    """
    rows = [(0.0, *(2.0 ** (-step * 2**spread * (last - m)) for m in range(1, last + 1))) for spread in range(SPREADS)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def to_statistics(values: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Quantize float32 statistics `(rows, groups)` to `bits` bits (SpQR, arXiv 2306.03078, section 3.1).

    The values of `block` neighbouring rows in one group share a float16 minimum and step. Returns packed codes uint8
    `(rows, bytes)` and second-level patterns int16 `(blocks, groups, 2)`: minimum, step.
    """
    codes, low, step = _statistics(values, bits, block)
    return pack(codes.to(torch.uint8), bits), torch.stack([low, step], dim=2).view(torch.int16)


def as_statistics(values: Tensor, bits: int, block: int) -> Tensor:
    """The values that a reader decodes from :func:`to_statistics`, without packing and unpacking."""
    codes, low, step = _statistics(values, bits, block)
    return _of_codes(codes, low, step, block)


def from_statistics(packed: Tensor, patterns: Tensor, bits: int, block: int, groups: int) -> Tensor:
    """Inverse of :func:`to_statistics`: float32 `(rows, groups)`."""
    low, step = patterns.view(torch.float16).unbind(dim=2)
    return _of_codes(unpack(packed, bits, groups).to(torch.float32), low, step, block)


def _statistics(values: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `(rows, groups)` as float32, and float16 minima and steps `(blocks, groups)`."""
    rows, groups = values.shape
    largest = torch.finfo(torch.float16).max
    padded = values.clamp(-largest, largest)
    if rows % block:
        # The last block is padded with copies of the last row, which do not widen its range.
        padded = torch.cat([padded, padded[-1:].expand(block - rows % block, groups)])
    blocks = padded.reshape(-1, block, groups)
    low = blocks.amin(dim=1).to(torch.float16)
    step = ((blocks.amax(dim=1) - low.float()).clamp(min=0.0) / (2**bits - 1)).to(torch.float16)
    below, unit = low.float().unsqueeze(1), divisor(step.float()).unsqueeze(1)
    codes = ((blocks - below) / unit).round_().clamp_(0, 2**bits - 1)
    return codes.reshape(-1, groups)[:rows], low, step


def _of_codes(codes: Tensor, low: Tensor, step: Tensor, block: int) -> Tensor:
    rows = codes.shape[0]
    each_step = step.to(torch.float32).repeat_interleave(block, dim=0)[:rows]
    return codes * each_step + low.to(torch.float32).repeat_interleave(block, dim=0)[:rows]


def divisor(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is 0, so that a group of zeros can be divided by it and gets the code of weight 0."""
    return scale.masked_fill(scale == 0, 1.0)
