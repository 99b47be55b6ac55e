"""Evenly spaced grids with codes 0 .. 2^b - 1, one grid per group.

Shapes: weights `x` are `(..., g)` float32, with a group in the last dimension; a bool mask of that shape marks weights
to which the grid is not fitted; scales, zero-points and minima are `(..., 1)`.
"""

import torch
from torch import Tensor

from fewbit.grids.scales import divisor

_LARGE = torch.finfo(torch.float32).max / 4


def extremes(x: Tensor, outside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, without those in the mask `outside`; (0, 0) if no weight is left.

    `x` must be 0 wherever `outside` is True.
    """
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    if outside is None:
        return low, high
    flat, mask = x.reshape(-1, x.shape[-1]), outside.reshape(-1, x.shape[-1])
    lowest, highest = low.view(-1, 1), high.view(-1, 1)
    # A zero in place of an excluded weight can be a group's extreme only if an extreme is 0. Such groups are few, so
    # only these are computed again.
    one_sided = ((lowest == 0) | (highest == 0)).view(-1).nonzero().squeeze(1)
    if one_sided.numel():
        left_out = mask[one_sided].to(x.dtype) * _LARGE
        group = flat[one_sided]
        least, most = (group + left_out).amin(dim=1, keepdim=True), (group - left_out).amax(dim=1, keepdim=True)
        empty = least > most
        lowest[one_sided], highest[one_sided] = least.masked_fill(empty, 0.0), most.masked_fill(empty, 0.0)
    return low, high


def extremes_of(values: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest of the `values` (1-D) in each group, `(groups,)` each; 0 for a group without values."""
    low = values.new_zeros(groups).scatter_reduce_(0, group, values, "amin", include_self=False)
    high = values.new_zeros(groups).scatter_reduce_(0, group, values, "amax", include_self=False)
    return low, high


def zero_point_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and integer zero-point of ``w = scale * (code - zero)`` for the range [low, high], widened to include 0.

    0 is then always a level. A group of zeros gets scale 0.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / (2**bits - 1)
    # A subnormal scale is itself rounded; without the clamp, the zero-point could then exceed the last code.
    zero = (-low / divisor(scale)).round_().clamp_(max=2**bits - 1)
    return scale, zero


def symmetric_grid(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Scale of ``w = scale * (code - 2^(b-1))`` with the largest magnitude on the outermost positive level."""
    return torch.maximum(high, -low).clamp(min=0.0) / (2 ** (bits - 1) - 1)


def minimum_grid(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Scale of ``w = low + scale * code`` (min-max with a real-valued minimum, as AdpQ publishes it)."""
    return (high - low) / (2**bits - 1)


def encode(x: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """Codes (float32, whole numbers) of ``w = scale * (code - zero)``; with a scale of 0, the code of weight 0."""
    return (x / divisor(scale)).round_().add_(zero).clamp_(0, 2**bits - 1)


def encode_minimum(x: Tensor, scale: Tensor, minimum: Tensor | float, bits: int) -> Tensor:
    """Codes (float32, whole numbers) of ``w = minimum + scale * code``."""
    return ((x - minimum) / divisor(scale)).round_().clamp_(0, 2**bits - 1)


def encode_real_zero(x: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """Codes (float32, whole numbers) of ``w = scale * (code - zero)`` with a real-valued zero-point."""
    return (x / divisor(scale)).add_(zero).round_().clamp_(0, 2**bits - 1)
