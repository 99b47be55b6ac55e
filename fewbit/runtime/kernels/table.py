"""The table of kernels, and the choice of one for a weight."""

import logging
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
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
            if _is_installed(kernel.package, kernel.oldest):
                return kernel
            _say_missing(kernel.package, kernel.extra)
    return None


def can_gather(device: torch.device) -> bool:
    """Whether a kernel for this type of device gathers single rows."""
    return any(kernel.gather is not None for kernel in KERNELS if kernel.device == device.type)


@lru_cache
def _is_installed(package: str, oldest: tuple[int, int]) -> bool:
    if find_spec(package) is None:
        return False
    if oldest == (0, 0):
        return True
    try:
        found = version(package).split(".")
        return (int(found[0]), int(found[1])) >= oldest
    except (PackageNotFoundError, ValueError, IndexError):
        # Builds of other makers have other names: what can be imported is tried.
        return True


@lru_cache
def _say_missing(package: str, extra: str) -> None:
    logging.getLogger("fewbit").warning(
        f"packed weights run many times faster with {package}: install it with  pip install 'fewbit[{extra}]'"
    )
