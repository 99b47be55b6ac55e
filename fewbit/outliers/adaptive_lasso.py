"""Outliers by the adaptive LASSO (AdpQ, arXiv 2405.13358), with no data and no iteration.

With pseudo-activations ``X X^T = c I`` the problem ``min ||WX - QX||^2 + lambda sum |q_i / w_i|`` separates, and
its solution is the soft threshold ``q = sign(w) max(|w| - lambda' / |w|, 0)``: a weight stays non-zero exactly when
``|w| > sqrt(lambda')``. The weights that stay are the outliers, so lambda' for a share alpha of outliers is the
square of the (1 - alpha) quantile of ``|w|``: one selection.
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
    """sqrt(lambda') of a tensor: the smallest magnitude that at most `outliers` of its weights exceed, exact.

    Each of `chunks` gives a part of the tensor (bfloat16, float16 or float32, any shape) whenever it is called. The
    bits of a positive float are ordered as the float, so counting selects: 16-bit floats by one pass over their 15
    low bits, float32 by a pass over the upper half and one over the lower half of those that fall on the quantile.
    Memory is that of one part for each thread of `pool`.
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
    """How often each magnitude pattern occurs: its upper half, or with `upper` given, the lower half of those."""

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
        # torch's count, unlike NumPy's, lets other threads run meanwhile and takes 16-bit integers as they are.
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
    """Split by the soft threshold's support: the core (0 where an outlier was) and the mask of ``|w| > cut``.

    Exact: hard shrinkage keeps outliers as they are, and ``w - w`` is 0. Both run vectorized, unlike a comparison.
    """
    outliers = torch.nn.functional.hardshrink(weights, cut)
    return weights - outliers, outliers.to(torch.bool)


def group_mask(magnitudes: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest of every group; `magnitudes` is `(groups, g)`.

    Among equal magnitudes the first in storage order is taken, so that the choice does not depend on the machine.
    """
    remaining = magnitudes.clone()
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    for _ in range(count):
        index = remaining.argmax(dim=1, keepdim=True)
        mask.scatter_(1, index, True)
        remaining.scatter_(1, index, -1.0)
    return mask
