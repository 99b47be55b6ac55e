"""Round the inputs and weights of a linear layer to integer codes, multiply the codes, and scale the product.

``y = s_x s_w ((c_x - z) c_w)``. The codes have at most 8 bits; products and sums of whole numbers are in float32, so
the simulation computes what an integer kernel does. The product ``s c`` is not rounded to a 16-bit float in between.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.curvature.products import products
from fewbit.grids import integer


@dataclass(frozen=True)
class Range:
    """Smallest and largest input, float32: scalars `()` for all tokens, or `(tokens, 1)` for each token."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class RoundedWeight:
    """Codes int8 `(out, in)`, symmetric around 0, and one float32 scale per output channel `(out, 1)`."""

    codes: Tensor
    scale: Tensor

    def decode(self) -> Tensor:
        """The decoded weight, float32 `(out, in)`."""
        return self.codes.float() * self.scale


def range_of(x: Tensor, granularity: str) -> Range:
    """Range of inputs `(..., tokens, in)`: over all of them, or of each token (`granularity` token)."""
    if granularity == "token":
        return Range(x.amin(dim=-1, keepdim=True).float(), x.amax(dim=-1, keepdim=True).float())
    return Range(x.amin().float(), x.amax().float())


def steps(spread: Range, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | float]:
    """Scale and zero-point of a range, in its shape; 0 is always a level."""
    if symmetric:
        return integer.symmetric_grid(spread.low, spread.high, bits), float(2 ** (bits - 1))
    return integer.zero_point_grid(spread.low, spread.high, bits)


def whole_numbers(x: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """Codes minus the zero-point, float32 whole numbers with magnitudes up to 2^bits: ``x ~ scale * codes``."""
    return integer.encode(x.float(), scale, zero, bits).sub_(zero)


def round_inputs(x: Tensor, spread: Range, bits: int, symmetric: bool) -> Tensor:
    """The inputs after rounding, float32, clipped to the range `spread`."""
    scale, zero = steps(spread, bits, symmetric)
    return whole_numbers(x, scale, zero, bits).mul_(scale)


def round_weight(weight: Tensor, bits: int) -> RoundedWeight:
    """Round a weight `(out, in)` of any floating-point dtype symmetrically, with one scale per output channel."""
    weight = weight.float()
    low, high = integer.extremes(weight)
    scale = integer.symmetric_grid(low, high, bits)
    return RoundedWeight(whole_numbers(weight, scale, float(2 ** (bits - 1)), bits).to(torch.int8), scale)


def rounded_linear(x: Tensor, weight: RoundedWeight, spread: Range, bits: int, symmetric: bool) -> Tensor:
    """The layer's outputs `(..., tokens, out)`, float32, without its bias.

    x: `(..., tokens, in)`. spread: from :func:`range_of`, or measured before.
    """
    scale, zero = steps(spread, bits, symmetric)
    codes = whole_numbers(x, scale, zero, bits)
    # Whole numbers up to 256 are exact in bfloat16, so the factors may be converted to it; sums stay float32.
    with products(torch.bfloat16):
        out = torch.nn.functional.linear(codes, weight.codes.float())
    return out.mul_(scale).mul_(weight.scale.t())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected|^2 / |expected|^2``, summed in float64."""
    error = (found.float() - expected.float()).square().sum(dtype=torch.float64)
    return float(error / expected.float().square().sum(dtype=torch.float64).clamp(min=1e-300))
