"""Statistics of a tensor that is read in parts: moments, energy shares, entropy, and divergences of histograms."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewbit.outliers.adaptive_lasso import outlier_count, threshold

BINS = 256
SMOOTHING = 1e-6
TOP_SHARES = (0.001, 0.01, 0.05)

ESTIMATOR = (
    f"histograms of {BINS} equal bins between the original tensor's smallest and largest weight (values outside are "
    f"counted in the end bins), in bits; for D_KL the second histogram is mixed with {SMOOTHING:g} of the uniform one"
)

Chunks = Sequence[Callable[[], Tensor]]


@dataclass(frozen=True)
class Range:
    """Count, mean and extremes of a tensor; `finite` is False if it contains NaN or infinity."""

    count: int
    mean: float
    low: float
    high: float
    finite: bool


def measure_range(chunks: Chunks) -> Range:
    """Compute a tensor's range in one pass over its parts (any floating-point dtype)."""
    count, total, low, high, finite = 0, 0.0, math.inf, -math.inf, True
    for read in chunks:
        x = read().to(torch.float32)
        if not x.numel():
            continue
        count += x.numel()
        total += float(x.sum(dtype=torch.float64))
        low, high = min(low, float(x.min())), max(high, float(x.max()))
    finite = math.isfinite(total)
    return Range(count, total / count if count else 0.0, low, high, finite)


def histogram(chunks: Chunks, span: Range) -> np.ndarray:
    """Counts in BINS equal bins over the range `span`; values outside count in the first or last bin."""
    counts = np.zeros(BINS)
    for read in chunks:
        x = read().to(torch.float32).clamp(span.low, span.high)
        counts += torch.histc(x, BINS, span.low, span.high).double().numpy()
    return counts


def kurtosis(chunks: Chunks, span: Range) -> float:
    """Fourth central moment over the squared variance (3 for a normal distribution); NaN for a constant tensor."""
    second = fourth = 0.0
    for read in chunks:
        squared = (read().to(torch.float32) - span.mean).square_()
        second += float(squared.sum(dtype=torch.float64))
        fourth += float(squared.square_().sum(dtype=torch.float64))
    return fourth * span.count / second**2 if second else math.nan


def energy_shares(chunks: Chunks, count: int) -> dict[str, float]:
    """Share of the sum of squares in the largest 0.1, 1 and 5 % of the weights."""
    total = sum(float(read().float().square().sum(dtype=torch.float64)) for read in chunks)
    shares = {}
    for share in TOP_SHARES:
        wanted = outlier_count(count, share)
        edge = threshold(chunks, wanted)
        above, energy = 0, 0.0
        for read in chunks:
            x = read().to(torch.float32)
            larger = x[x.abs() > edge]
            above += larger.numel()
            energy += float(larger.square().sum(dtype=torch.float64))
        energy += (wanted - above) * edge**2
        shares[f"energy_top_{share:g}"] = energy / total if total else 0.0
    return shares


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy of a histogram in bits."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def kl_divergence(p_counts: np.ndarray, q_counts: np.ndarray) -> float:
    """D_KL(p || q) of two histograms in bits, q smoothed."""
    p = p_counts / p_counts.sum()
    q = (1 - SMOOTHING) * q_counts / q_counts.sum() + SMOOTHING / q_counts.size
    filled = p > 0
    return float((p[filled] * np.log2(p[filled] / q[filled])).sum())


def jensen_shannon(p_counts: np.ndarray, q_counts: np.ndarray) -> float:
    """Jensen-Shannon divergence of two histograms in bits, from 0 to 1."""
    p, q = p_counts / p_counts.sum(), q_counts / q_counts.sum()
    middle = (p + q) / 2
    return sum(0.5 * float((d[d > 0] * np.log2(d[d > 0] / middle[d > 0])).sum()) for d in (p, q))
