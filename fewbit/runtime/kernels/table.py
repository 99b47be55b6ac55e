"""The table of kernels, and the choice of one for a weight."""

import logging
from functools import lru_cache
from importlib.util import find_spec

import torch

from fewbit.grids.scheme import StoredWeight
from fewbit.runtime.kernels.cpu import NUMBA
from fewbit.runtime.kernels.cuda import TRITON
from fewbit.runtime.kernels.kernel import Kernel

KERNELS: tuple[Kernel, ...] = (NUMBA, TRITON)
"""Kernels in order of preference."""


def kernel_for(stored: StoredWeight, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The first kernel for a weight on a device and inputs in `dtype`; None if the weight is to be decoded first.

    If only a package is missing, the log says once which extra provides it.
    """
    for kernel in KERNELS:
        if kernel.device == device.type and dtype in kernel.dtypes and kernel.supports(stored):
            if _is_installed(kernel.package):
                return kernel
            _say_missing(kernel.package, kernel.extra)
    return None


@lru_cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


@lru_cache
def _say_missing(package: str, extra: str) -> None:
    logging.getLogger("fewbit").warning(
        f"packed weights run many times faster with {package}: install it with  pip install 'fewbit[{extra}]'"
    )
