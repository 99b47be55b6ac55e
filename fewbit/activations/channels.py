"""Outlier channels of activations, their overlap, and which weights they meet. Pure functions of statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor


def outlier_channels(size: Tensor, factor: float) -> Tensor:
    """Mask `(in,)` of the channels whose size (rms or largest magnitude) is above `factor` times the median channel's.

    Where the median channel is 0 nothing is an outlier by comparison.
    """
    median = size.median()
    return (size > factor * median) & (median > 0)


def jaccard(one: Tensor, other: Tensor) -> float | None:
    """Size of the intersection of two masks over that of their union; None where both are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else None


def expected_jaccard(one: Tensor, other: Tensor) -> float | None:
    """About what :func:`jaccard` is for two random masks of the same sizes, which chance alone gives."""
    a, b, n = int(one.sum()), int(other.sum()), one.numel()
    both = a * b / n
    return both / (a + b - both) if a + b else None


def top_share(energy: Tensor, fraction: float) -> float:
    """Share of the total that the largest `fraction` of the channels (at least one) hold."""
    count = max(1, round(fraction * energy.numel()))
    total = float(energy.sum(dtype=torch.float64))
    return float(energy.topk(count).values.sum(dtype=torch.float64)) / total if total > 0 else 0.0


@dataclass(frozen=True)
class Met:
    """The weights that outlier channels multiply.

    relative_norm: mean norm of their columns over the median column's. rank: mean share of columns with a smaller
    norm, 0.5 by chance. correlation: Spearman's, between the size of a channel and the norm of its column.
    """

    relative_norm: float | None
    rank: float | None
    correlation: float


def weights_met(weight: Tensor, size: Tensor, outliers: Tensor) -> Met:
    """Which columns of `weight` `(out, in)` the channels in the mask `outliers` `(in,)` meet; size: of each channel."""
    norms = weight.float().norm(dim=0)
    correlation = spearman(size, norms)
    if not bool(outliers.any()):
        return Met(None, None, correlation)
    median = float(norms.median())
    place = ranks(norms) / max(norms.numel() - 1, 1)
    relative = float(norms[outliers].mean()) / median if median > 0 else None
    return Met(relative, float(place[outliers].mean()), correlation)


def ranks(values: Tensor) -> Tensor:
    """Rank of each value from 0, float64 `(n,)`; equal values share the mean of their ranks."""
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    middle = ends - (counts.double() + 1) / 2
    return middle[inverse]


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two `(n,)`; 0 where one of them is constant."""
    a, b = ranks(one), ranks(other)
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 0.0
