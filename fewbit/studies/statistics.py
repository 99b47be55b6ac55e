"""Rank correlation and its uncertainty, pure functions over float64 arrays."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

_RESAMPLES = 2000


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1 of `values` `(n,)`; equal values share the mean of their ranks."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[place].astype(np.float64)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of `x` and `y` `(n,)`, ties by mean ranks; NaN where one of them is constant."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size else float("nan")


def spearman_interval(
    x: ArrayLike, y: ArrayLike, seed: int, coverage: float = 0.95, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """An interval of Spearman's correlation that holds :func:`bootstrap_interval` and :func:`normal_interval`.

    A few pairs in nearly the same order give hardly any other when they are drawn again, so that the first by itself
    would shrink to a point. NaN, NaN when there is no correlation.
    """
    low, high = bootstrap_interval(x, y, seed, coverage, resamples)
    other = normal_interval(spearman(x, y), np.asarray(x).size, coverage)
    return min(low, other[0]), max(high, other[1])


def normal_interval(rho: float, size: int, coverage: float = 0.95) -> tuple[float, float]:
    """Interval of a Spearman correlation of `size` pairs by Fisher's transformation, with the standard error
    ``sqrt((1 + rho^2 / 2) / (n - 3))`` of Bonett and Wright (2000). Needs 4 pairs; with fewer it is all of -1 to 1.

    A perfect order counts as the nearest one that is not: two neighbours exchanged.
    """
    if size < 4:
        return -1.0, 1.0
    nearest = 1 - 12 / (size * (size**2 - 1))
    rho = min(max(rho, -nearest), nearest)
    reach = NormalDist().inv_cdf((1 + coverage) / 2) * math.sqrt((1 + rho**2 / 2) / (size - 3))
    return math.tanh(math.atanh(rho) - reach), math.tanh(math.atanh(rho) + reach)


def bootstrap_interval(
    x: ArrayLike, y: ArrayLike, seed: int, coverage: float = 0.95, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap interval of Spearman's correlation, pairs drawn with replacement.

    Resamples in which one side is constant are left out; NaN, NaN when all are.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    size = a.size
    drawn = np.random.default_rng(seed).integers(0, size, (resamples, size))
    counts = np.zeros((resamples, size))
    np.add.at(counts, (np.arange(resamples)[:, None], drawn), 1.0)
    # A drawn item's rank from how often each item was drawn; the mean of all drawn ranks is (size + 1) / 2.
    first, second = (_ranks_among(values, counts) - (size + 1) / 2 for values in (a, b))
    product = (counts * first * second).sum(axis=1)
    scale = np.sqrt((counts * first**2).sum(axis=1) * (counts * second**2).sum(axis=1))
    found = product[scale > 0] / scale[scale > 0]
    if not found.size:
        return float("nan"), float("nan")
    low, high = np.quantile(found, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def _ranks_among(values: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean rank `(resamples, n)` of each value among samples that hold it and the others `counts` times."""
    below = (values[None, :] < values[:, None]).astype(np.float64)
    equal = (values[None, :] == values[:, None]).astype(np.float64)
    ranks_found: NDArray[np.float64] = counts @ below.T + (counts @ equal.T + 1) / 2
    return ranks_found


def discordant_share(x: ArrayLike, y: ArrayLike) -> float:
    """Share of the pairs that `x` and `y` `(n,)` order differently; pairs tied in either are left out (NaN: all)."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    first, second = np.triu_indices(a.size, 1)
    order = np.sign(a[first] - a[second]) * np.sign(b[first] - b[second])
    untied = order[order != 0]
    return float((untied < 0).mean()) if untied.size else float("nan")
