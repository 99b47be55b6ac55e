"""Memory that is mapped from a file and was only looked at."""

import ctypes
import mmap
import sys

from torch import Tensor

_PAGE_OUT = 21
"""MADV_PAGEOUT of Linux: what is unchanged leaves memory at once, what is changed is not lost."""


def page_out(tensor: Tensor) -> None:
    """Let the system take back the pages of a contiguous tensor on the CPU, which come again when they are read.

    For a tensor that is mapped from a file. Nothing happens where the system has no such call.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.numel():
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
    try:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _PAGE_OUT)
    except (OSError, AttributeError):
        return
