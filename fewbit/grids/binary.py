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
    best_error, best_count = float("inf"), 0
    for count in range(min(most_salient, columns - 1) + 1):
        salient = torch.zeros(columns, dtype=torch.bool, device=block.device)
        salient[order[:count]] = True
        one = block[:, ~salient]
        error = float((one.abs() - one.abs().mean(dim=1, keepdim=True)).square().sum())
        if count:
            two = block[:, salient]
            a1, a2 = residual_scales(two)
            error += float((binarize_twice(two, a1, a2) - two).square().sum())
        if error < best_error:
            best_error, best_count = error, count
    salient = torch.zeros(columns, dtype=torch.bool, device=block.device)
    salient[order[:best_count]] = True
    scales = block.new_zeros(block.shape[0], 4)
    scales[:, 0:1], scales[:, 1:2] = split_scales(block[:, ~salient])
    if best_count:
        scales[:, 2:3], scales[:, 3:4] = residual_scales(block[:, salient])
    return salient, scales


def residual_scales(weights: Tensor) -> tuple[Tensor, Tensor]:
    """a1 and a2 `(rows, 1)`: the mean magnitude, and that of what the first sign leaves."""
    a1 = weights.abs().mean(dim=1, keepdim=True)
    return a1, (weights.abs() - a1).abs().mean(dim=1, keepdim=True)


def binarize_twice(weights: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
    """``a1 sign(w) + a2 sign(w - a1 sign(w))``."""
    first = torch.where(weights >= 0, a1, -a1)
    return first + torch.where(weights - first >= 0, a2, -a2)


def split_scales(weights: Tensor) -> tuple[Tensor, Tensor]:
    """a_c and a_s `(rows, 1)`: mean magnitudes below and above the break point with the least squared error."""
    magnitudes = weights.abs()
    largest = float(magnitudes.max()) if magnitudes.numel() else 0.0
    best_error = float("inf")
    best = (magnitudes.mean(dim=1, keepdim=True), magnitudes.mean(dim=1, keepdim=True))
    for step in range(1, BREAKS):
        sparse = (magnitudes > largest * step / BREAKS).to(weights.dtype)
        inside = 1.0 - sparse
        near = (magnitudes * inside).sum(dim=1, keepdim=True) / inside.sum(dim=1, keepdim=True).clamp(min=1.0)
        far = (magnitudes * sparse).sum(dim=1, keepdim=True) / sparse.sum(dim=1, keepdim=True).clamp(min=1.0)
        far = torch.where(far > 0, far, near)
        error = float((magnitudes - near * inside - far * sparse).square().sum())
        if error < best_error:
            best_error, best = error, (near, far)
    return best


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
