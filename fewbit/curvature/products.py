"""Float32 sums of products of 16-bit numbers at the speed of 16-bit products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products(precision: torch.dtype) -> Iterator[None]:
    """While inside, float32 matrix products may take their factors as bfloat16 if `precision` is a 16-bit dtype.

    They still sum and store in float32, so numbers from a bfloat16 network lose next to nothing. The setting is
    torch's own and for the whole process; it is put back at the end.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision.itemsize == 2 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
