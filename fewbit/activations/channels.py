"""Outlier channels of activations, their overlap, and the weights that they are multiplied with."""

from dataclasses import dataclass

import torch
from torch import Tensor


def outlier_channels(size: Tensor, factor: float) -> Tensor:
    """Mask `(in,)` of the channels whose size (rms or largest magnitude) is above `factor` times the median channel's.

    If the median is 0, no channel is an outlier.
    """
    median = size.median()
    return (size > factor * median) & (median > 0)


def jaccard(one: Tensor, other: Tensor) -> float | None:
    """Size of the intersection of two masks divided by that of their union; None if both are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else None


def expected_jaccard(one: Tensor, other: Tensor) -> float | None:
    """Approximate value of :func:`jaccard` for two random masks of the same sizes; None if both are empty."""
    a, b, n = int(one.sum()), int(other.sum()), one.numel()
    both = a * b / n
    return both / (a + b - both) if a + b else None


def top_share(energy: Tensor, fraction: float) -> float:
    """Share of the total energy in the largest `fraction` of the channels (at least one channel)."""
    count = max(1, round(fraction * energy.numel()))
    total = float(energy.sum(dtype=torch.float64))
    return float(energy.topk(count).values.sum(dtype=torch.float64)) / total if total > 0 else 0.0


@dataclass(frozen=True)
class Met:
    """The columns of a weight that outlier channels are multiplied with; None if there are no such channels.

    relative_norm: mean norm of these columns divided by the median norm of all columns. rank: mean fraction of the
    other columns with a smaller norm, 0.5 by chance.
    """

    relative_norm: float | None
    rank: float | None


def weights_met(norms: Tensor, outliers: Tensor) -> Met:
    """Compare the columns of outlier channels (mask `(in,)`) with the others. norms: of all columns `(in,)`."""
    if not bool(outliers.any()):
        return Met(None, None)
    median = float(norms.median())
    smaller = (norms.unsqueeze(0) < norms[outliers].unsqueeze(1)).sum() / max(norms.numel() - 1, 1)
    relative = float(norms[outliers].mean()) / median if median > 0 else None
    return Met(relative, float(smaller) / int(outliers.sum()))
