"""Outliers by the adaptive LASSO (AdpQ, arXiv 2405.13358), without calibration data and without iteration.

With pseudo-activations ``X X^T = c I`` the problem ``min ||WX - QX||^2 + lambda sum |q_i / w_i|`` separates, and
its solution is the soft threshold ``q = sign(w) max(|w| - lambda' / |w|, 0)``: a weight stays non-zero exactly when
``|w| > sqrt(lambda')``. The weights that stay non-zero are the outliers. So for a fraction alpha of outliers, lambda'
is the square of the (1 - alpha) quantile of ``|w|``.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor


def outlier_count(weights: int, fraction: float) -> int:
    """Largest number of outliers among `weights` weights: floor(fraction * weights)."""
    return int(weights * fraction + 1e-9)


def threshold(chunks: Sequence[Callable[[], Tensor]], outliers: int, pool: Executor | None = None) -> float:
    """sqrt(lambda') of a tensor, exactly: the smallest magnitude that at most `outliers` of its weights exceed.

    Each of `chunks` returns a part of the tensor (bfloat16, float16 or float32, any shape) each time it is called. The
    bit patterns of positive floats are ordered like the floats, so the quantile is found by counting patterns. 16-bit
    floats take one pass over the 15 low bits. float32 takes two passes: one over the upper halves of all patterns, and
    one over the lower halves of those whose upper half is that of the quantile. Each thread of `pool` holds one part in
    memory.
    """
    counts, dtype = _counts(chunks, None, pool)
    upper, below = _select(counts, outliers)
    if dtype.itemsize == 2:
        return float(torch.tensor([upper], dtype=torch.int16).view(dtype).item())
    counts, _ = _counts(chunks, upper, pool)
    lower, _ = _select(counts, outliers - below)
    return float(torch.tensor([(upper << 16) | lower], dtype=torch.int32).view(dtype).item())


def _counts(
    chunks: Sequence[Callable[[], Tensor]], upper: int | None, pool: Executor | None
) -> tuple[np.ndarray, torch.dtype]:
    """How often each bit pattern of a magnitude occurs.

    For float32: counts of the upper halves, or if `upper` is given, of the lower halves of patterns with that upper
    half.
    """

    def count(read: Callable[[], Tensor]) -> tuple[np.ndarray, torch.dtype]:
        chunk = read()
        word = torch.int16 if chunk.dtype.itemsize == 2 else torch.int32
        bits = chunk.detach().contiguous().view(word).reshape(-1)
        if word == torch.int16:
            bits = bits & 0x7FFF
        elif upper is None:
            bits = (bits >> 16) & 0x7FFF
        else:
            bits = bits[(bits >> 16) & 0x7FFF == upper] & 0xFFFF
        # Unlike NumPy's bincount, torch's lets other threads run meanwhile, and needs no conversion of 16-bit integers.
        return torch.bincount(bits, minlength=1 << 16).cpu().numpy(), chunk.dtype

    total = np.zeros(1 << 16, dtype=np.int64)
    dtype = torch.float32
    for part, dtype in pool.map(count, chunks) if pool else map(count, chunks):  # noqa: B007
        total += part
    return total, dtype


def _select(counts: np.ndarray, outliers: int) -> tuple[int, int]:
    """The smallest pattern that at most `outliers` exceed, and how many exceed it."""
    above = counts.sum() - np.cumsum(counts)
    pattern = int(np.nonzero(above <= outliers)[0][0])
    return pattern, int(above[pattern])


def split(weights: Tensor, cut: float) -> tuple[Tensor, Tensor]:
    """Split weights at a threshold: the core (0 at the outliers) and the mask of the outliers, ``|w| > cut``.

    This is exact: hard shrinkage leaves outliers unchanged, and ``w - w`` is 0. Both operations are vectorized, unlike
    a comparison.
    """
    outliers = torch.nn.functional.hardshrink(weights, cut)
    return weights - outliers, outliers.to(torch.bool)


def group_mask(magnitudes: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest magnitudes of every group; `magnitudes` is `(groups, g)`.

    Among equal magnitudes, the first in storage order is taken, so that the choice does not depend on the machine.
    """
    remaining = magnitudes.clone()
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    for _ in range(count):
        index = remaining.argmax(dim=1, keepdim=True)
        mask.scatter_(1, index, True)
        remaining.scatter_(1, index, -1.0)
    return mask
