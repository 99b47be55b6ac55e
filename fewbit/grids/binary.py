"""One sign a weight and a second plane (BiLLM, arXiv 2402.04291): what a block of columns is binarized to.

Salient columns get two signs, ``a1 s1 + a2 s2``. In the others the bell is split at a break point into concentrated
and sparse weights, ``a_c s`` and ``a_s s``; the second plane says which. So a weight of a row and block is one of four
levels, in both cases ``s * (one of two magnitudes)``: sign plane and second plane.

Scales are `(rows, 4)`: a_c, a_s, a1, a2.
"""

import torch
from torch import Tensor

BREAKS = 40
"""Break points that are tried, as even shares of the block's largest magnitude."""


def fit_block(block: Tensor, saliency: Tensor, most_salient: int) -> tuple[Tensor, Tensor]:
    """Choose salient columns and scales of a block `(rows, columns)` float32.

    saliency: `(columns,)`; the columns that have most of it are salient, as many (up to `most_salient`) as give the
    least squared error. Returns the mask of salient columns `(columns,)` and the scales `(rows, 4)`.
    """
    columns = block.shape[1]
    order = torch.argsort(saliency, descending=True, stable=True)
    errors = _errors_by_count(block.abs(), order[: min(most_salient, columns - 1)])
    best_count = int(errors.argmin())
    salient = torch.zeros(columns, dtype=torch.bool, device=block.device)
    salient[order[:best_count]] = True
    scales = block.new_zeros(block.shape[0], 4)
    scales[:, 0:1], scales[:, 1:2] = split_scales(block[:, ~salient])
    if best_count:
        scales[:, 2:3], scales[:, 3:4] = residual_scales(block[:, salient])
    return salient, scales


def _errors_by_count(magnitudes: Tensor, candidates: Tensor) -> Tensor:
    """Squared error of a block when its first 0, 1, … `candidates` are salient, float64.

    A mean magnitude a of n weights leaves ``sum w^2 - n a^2``, and two signs leave ``sum r^2 - n a2^2`` of the first
    one's rest r: so prefix sums over the candidates are all that most of it needs.
    """
    columns, count = magnitudes.shape[1], candidates.numel()
    first = magnitudes[:, candidates].to(torch.float64)
    ones = torch.arange(1, count + 1, device=magnitudes.device, dtype=torch.float64)
    sums, squares = first.cumsum(dim=1), first.square().sum(dim=0).cumsum(dim=0)
    total, total_square = magnitudes.sum(dim=1, dtype=torch.float64), magnitudes.to(torch.float64).square().sum()
    rest = (total.unsqueeze(1) - sums).square().sum(dim=0) / (columns - ones)
    a1 = sums / ones
    a2_squared = torch.zeros_like(ones)
    for index in range(count):
        a2 = (first[:, : index + 1] - a1[:, index : index + 1]).abs_().mean(dim=1)
        a2_squared[index] = a2.square().sum()
    two = squares - ones * (a1.square().sum(dim=0) + a2_squared)
    none = total_square - total.square().sum() / columns
    return torch.cat([none.view(1), total_square - squares - rest + two])


def residual_scales(weights: Tensor) -> tuple[Tensor, Tensor]:
    """a1 and a2 `(rows, 1)`: the mean magnitude, and that of what the first sign leaves."""
    a1 = weights.abs().mean(dim=1, keepdim=True)
    return a1, (weights.abs() - a1).abs().mean(dim=1, keepdim=True)


def split_scales(weights: Tensor) -> tuple[Tensor, Tensor]:
    """a_c and a_s `(rows, 1)`: mean magnitudes below and above the break point with the least squared error."""
    magnitudes = weights.abs()
    largest = magnitudes.max() if magnitudes.numel() else magnitudes.new_zeros(())
    breaks = largest * torch.arange(1, BREAKS, device=weights.device, dtype=weights.dtype) / BREAKS
    # How many weights, and how much of them, lie between two break points: all splits follow from that.
    between = torch.bucketize(magnitudes, breaks)
    empty = torch.zeros(weights.shape[0], BREAKS, dtype=torch.float64, device=weights.device)
    exact = magnitudes.to(torch.float64)
    inside = empty.scatter_add(1, between, torch.ones_like(exact)).cumsum(dim=1)
    near_sum = empty.scatter_add(1, between, exact).cumsum(dim=1)
    outside, far_sum = inside[:, -1:] - inside, near_sum[:, -1:] - near_sum
    near, far = near_sum / inside.clamp(min=1.0), far_sum / outside.clamp(min=1.0)
    gained = (inside * near.square() + outside * far.square()).sum(dim=0)[: BREAKS - 1]
    best = int(gained.argmax())
    near, far = near[:, best : best + 1], far[:, best : best + 1]
    none_beyond = outside[:, best : best + 1] == 0
    return near.to(weights.dtype), torch.where(none_beyond, near, far).to(weights.dtype)


def magnitudes_of(scales: Tensor, salient: Tensor) -> tuple[Tensor, Tensor]:
    """The two magnitudes that a weight can have: the smaller and the larger.

    scales `(..., 4)`; salient broadcasts to `(...)`. Magnitudes of salient weights are ``|a1 - a2|`` and ``a1 + a2``.
    """
    a_c, a_s, a1, a2 = scales.unbind(dim=-1)
    return torch.where(salient, (a1 - a2).abs(), a_c), torch.where(salient, a1 + a2, a_s)


def encode(x: Tensor, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sign plane and second plane (uint8: 1 is negative, 1 is the larger magnitude) and decoded weights."""
    negative = x < 0
    magnitude = x.abs()
    second = (magnitude - large).abs() < (magnitude - small).abs()
    value = torch.where(second, large, small)
    return negative.to(torch.uint8), second.to(torch.uint8), torch.where(negative, -value, value)
