"""Binarize a block of columns to a sign plane and a second plane, two bits per weight (BiLLM, arXiv 2402.04291).

Salient columns are approximated with two signs, ``a1 s1 + a2 s2``. In the other columns a break point splits the
magnitudes into concentrated weights, ``a_c s``, and sparse weights, ``a_s s``; the second plane stores which. In both
cases a weight is ``s * (one of two magnitudes)``, one of four levels.

Scales are `(rows, 4)`: a_c, a_s, a1, a2.
"""

import torch
from torch import Tensor

BREAKS = 40
"""Number of equal steps into which the range from 0 to the block's largest magnitude is divided for break points."""


def fit_block(block: Tensor, saliency: Tensor, most_salient: int) -> tuple[Tensor, Tensor]:
    """Choose salient columns and scales of a block `(rows, columns)` float32.

    saliency: `(columns,)`. The columns with the largest saliency become salient; their number, at most `most_salient`,
    is the one with the least squared error. Returns the mask of salient columns `(columns,)` and the scales
    `(rows, 4)`.
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
    """Squared error of a block when the first 0, 1, 2, … of its `candidates` are salient, float64.

    One sign with the mean magnitude a of n weights leaves the error ``sum w^2 - n a^2``. A second sign for the residual
    r of the first leaves ``sum r^2 - n a2^2``. So most of the errors follow from prefix sums over the candidates.
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
    """a1 and a2 `(rows, 1)`: the mean magnitude of the weights, and that of the residual after the first sign."""
    a1 = weights.abs().mean(dim=1, keepdim=True)
    return a1, (weights.abs() - a1).abs().mean(dim=1, keepdim=True)


def split_scales(weights: Tensor) -> tuple[Tensor, Tensor]:
    """a_c and a_s `(rows, 1)`: mean magnitudes below and above the break point with the least squared error."""
    magnitudes = weights.abs()
    largest = magnitudes.max() if magnitudes.numel() else magnitudes.new_zeros(())
    breaks = largest * torch.arange(1, BREAKS, device=weights.device, dtype=weights.dtype) / BREAKS
    # The number and the sum of the magnitudes between two neighbouring break points: all splits follow from these.
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
    """Sign plane (uint8, 1 for negative), second plane (uint8, 1 for the larger magnitude), and decoded weights."""
    negative = x < 0
    magnitude = x.abs()
    second = (magnitude - large).abs() < (magnitude - small).abs()
    value = torch.where(second, large, small)
    return negative.to(torch.uint8), second.to(torch.uint8), torch.where(negative, -value, value)
