"""Float32 sums of products of 16-bit numbers, as fast as 16-bit matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products(precision: torch.dtype) -> Iterator[None]:
    """While inside, float32 matrix products may round their factors to bfloat16 if `precision` is a 16-bit dtype.

    Sums and results stay float32, so factors from a bfloat16 network lose almost nothing. This is torch's own setting
    for the whole process; it is restored at the end.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision.itemsize == 2 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
