"""Non-uniform codebooks: ``w = scale * levels[code]`` with a signed scale per group, searched for the least error.

The levels are normal quantiles as in NF4 (QLoRA, arXiv 2305.14314, appendix E). They include 0, and one more positive
level than negative ones. A negative scale gives a group the extra level on its negative side. With 1 bit there are only
the two signs (XNOR-Net, arXiv 1603.05279, section 3.1).
"""

from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from fewbit.grids.grid import ScaleSearch
from fewbit.grids.scales import divisor


@lru_cache
def normal_float(bits: int) -> tuple[float, ...]:
    """2^b ascending levels in [-1, 1]: evenly spaced normal quantiles that include 0; for b = 1 only -1 and 1."""
    if bits == 1:
        return (-1.0, 1.0)
    inverse = NormalDist().inv_cdf
    edge = 0.5 * ((1 - 1 / (2 * 2**bits)) + (1 - 1 / (2 * (2**bits - 1))))
    half = 2 ** (bits - 1)
    positive = [inverse(0.5 + (edge - 0.5) * i / half) for i in range(half + 1)]
    negative = [inverse(0.5 + (edge - 0.5) * i / (half - 1)) for i in range(1, half)]
    levels = [-v for v in reversed(negative)] + positive
    return tuple(v / positive[-1] if v > 0 else (v / negative[-1] if v < 0 else 0.0) for v in levels)


def search_scale(x: Tensor, importance: Tensor | None, levels: tuple[float, ...], search: ScaleSearch) -> Tensor:
    """The signed scale `(..., 1)` of each group with the least ``sum_i c_i |x_i - q_i|^p`` over the candidates.

    `x` is `(..., g)` float32 with outliers set to 0; `importance` (c) broadcasts to it, or is None for 1.
    """
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    widest = torch.maximum(high, -low)
    best_error = torch.full_like(widest, float("inf"))
    best = torch.zeros_like(widest)
    for ratio in search.ratios():
        for sign in (1.0, -1.0):
            scale = sign * ratio * widest
            error = _error(x, scale, importance, levels, search.error_power)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, scale, best)
    return best


def _error(x: Tensor, scale: Tensor, importance: Tensor | None, levels: tuple[float, ...], power: float) -> Tensor:
    residual = x / divisor(scale)
    residual = quantize(residual, levels).sub_(residual).mul_(scale)
    if power == 2.5:
        # |r|^2.5 as r^2 sqrt(|r|): the general power function is an order of magnitude slower.
        cost = residual.square().mul_(residual.abs_().sqrt_())
    else:
        cost = residual.square_() if power == 2.0 else residual.abs_().pow_(power)
    if importance is not None:
        cost = cost.mul_(importance)
    return cost.sum(dim=-1, keepdim=True)


def quantize(u: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The value of the level nearest to each element of `u` (float32)."""
    out = torch.full_like(u, levels[0])
    for below, above in pairwise(levels):
        # A step function from a clamped steep line: three contiguous passes, several times faster than comparing and
        # selecting.
        step = (u - 0.5 * (below + above)).mul_(_STEEP).clamp_(0.0, 1.0)
        out.add_(step, alpha=above - below)
    return out


def encode(x: Tensor, scale: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Codes (uint8) of the nearest levels; a scale of 0 gives the code of level 0."""
    u = x / divisor(scale)
    codes = torch.zeros(u.shape, dtype=torch.uint8, device=u.device)
    for below, above in pairwise(levels):
        codes += u > 0.5 * (below + above)
    return codes


def decode(codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Weights ``scale * levels[code]``; `levels` is a float32 tensor of 2^b entries on the codes' device."""
    return levels[codes.to(torch.int32)] * scale


_STEEP = 1e38
