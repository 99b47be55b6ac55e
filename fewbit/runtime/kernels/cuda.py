"""The kernel for GPUs: Triton code that reads packed words once and multiplies them where they are decoded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.grids.scheme import StoredWeight
from fewbit.grids.table import grid_of
from fewbit.runtime.kernels.kernel import Kernel

_LARGEST = 1 << 31
"""Numbers of groups and outliers are counted in 32 bits."""


def _supports(stored: StoredWeight) -> bool:
    grid = grid_of(stored.scheme)
    if grid.formula is None or grid.formula(stored.scheme).planes == ():
        return False
    return stored.weights > 0 and 4 * stored.shape[0] * stored.groups < _LARGEST and stored.outliers < _LARGEST


def _prepare(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> Any:
    from fewbit.runtime.kernels.triton_form import prepare

    return prepare(parts, stored, dtype)


def _product(form: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    from fewbit.runtime.kernels.triton_products import product

    return product(form, x, bias)


def _rows(form: Any, first: int, last: int) -> Tensor:
    from fewbit.runtime.kernels.triton_products import rows

    return rows(form, first, last)


def _gather(form: Any, ids: Tensor) -> Tensor:
    from fewbit.runtime.kernels.triton_products import gather

    return gather(form, ids)


TRITON = Kernel(
    "triton",
    "decodes and multiplies words of eight codes in the GPU's registers",
    device="cuda",
    package="triton",
    extra="triton",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    most_tokens=16,
    # Every slice costs the time of several launches.
    weights_at_once=1 << 26,
    supports=_supports,
    prepare=_prepare,
    product=_product,
    rows=_rows,
    gather=_gather,
    # Tuples with names as arguments.
    oldest=(3, 3),
)
