"""Scales of eight bits: exponents (E8M0), and small floating-point numbers (E4M3) with a divisor for a tensor."""

import math

import torch
from torch import Tensor

from fewbit.errors import FewbitError

E4M3_LARGEST = 448.0
_BIAS, _SMALLEST_CODE, _LARGEST_CODE = 127, 1, 254
_LARGEST_POWER = 126
"""Divisors are powers of two from 2^-126 to 2^126, normal numbers of float32."""


def to_exponents(scales: Tensor) -> Tensor:
    """Codes (uint8) of the nearest powers of two from 2^-126 to 2^127; a scale of 0 becomes the smallest."""
    fraction, exponent = torch.frexp(scales.abs())
    # The middle between 2^(e-1) and 2^e is 0.75 * 2^e.
    code = exponent + _BIAS - (fraction <= 0.75).to(exponent.dtype)
    code = code.clamp(_SMALLEST_CODE, _LARGEST_CODE)
    return torch.where(scales == 0, _SMALLEST_CODE, code).to(torch.uint8)


def exponents_to_float(codes: Tensor) -> Tensor:
    """``2^(code - 127)`` in float32; 255 stands for no number, and becomes infinite."""
    # A float32 has the same exponent in the same place; only 2^-127 is no normal number of it.
    pattern = codes.to(torch.int32) << 23
    return torch.where(codes == 0, 1 << 22, pattern).to(torch.int32).view(torch.float32)


def divisor_for(largest: float) -> float:
    """The power of two that brings the largest scale of a tensor between half the largest E4M3 number and that number.

    Raises FewbitError if it is not finite.
    """
    if not math.isfinite(largest):
        raise FewbitError("a scale is too large for e4m3")
    if largest == 0:
        return 1.0
    fraction, exponent = math.frexp(largest / E4M3_LARGEST)
    # largest * 2^-e is fraction * 448, and a fraction of 1/2 leaves room for one more power.
    power = -exponent + (fraction == 0.5)
    return math.ldexp(1.0, max(-_LARGEST_POWER, min(power, _LARGEST_POWER)))


def round_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 numbers in float32; larger magnitudes than 448 become 448."""
    return x.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).to(torch.float32)


def to_e4m3(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of a whole tensor as E4M3 patterns (uint8), and the divisor of all, float32 `(1,)`.

    The largest scale determines the divisor, so storing what was read back changes nothing.
    """
    whole = torch.full((1,), divisor_for(float(scales.abs().max()) if scales.numel() else 0.0), device=scales.device)
    codes = (scales * whole).clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, whole


def from_e4m3(codes: Tensor, whole: Tensor) -> Tensor:
    """Inverse of :func:`to_e4m3`, float32."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32) / whole
