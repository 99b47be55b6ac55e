"""Memory that is mapped from a file and was only looked at."""

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

_PAGE_OUT, _POPULATE = 21, 22
"""MADV_PAGEOUT of Linux: what is unchanged leaves memory at once, what is changed is not lost. MADV_POPULATE_READ: all
is read and stays where it is used."""
_APART = 64
"""Bytes between two tensors of a file that still follow each other."""


def page_out(tensor: Tensor) -> None:
    """Let the system take back the pages of a contiguous tensor on the CPU, which come again when they are read.

    For a tensor that is mapped from a file. Nothing happens where the system has no such call.
    """
    _advise_on_pages(tensor, _PAGE_OUT)


def page_in(tensor: Tensor) -> None:
    """Read a contiguous tensor on the CPU that is mapped from a file, so that nobody waits for it later."""
    _advise_on_pages(tensor, _POPULATE)


def page_out_between(tensors: Iterable[Tensor]) -> None:
    """As :func:`page_out`, for all of these tensors, but without the pages that contain something else.

    Linux reads the pages around one that is missing, too. So one that is shared with a tensor in use would bring the
    others back with it.
    """
    places = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors if _takes_advice(one))
    ranges: list[tuple[int, int]] = []
    for start, end in places:
        if ranges and start <= ranges[-1][1] + _APART:
            ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
        else:
            ranges.append((start, end))
    for start, end in ranges:
        whole = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(*whole, _PAGE_OUT)


def _advise_on_pages(tensor: Tensor, advice: int) -> None:
    if _takes_advice(tensor):
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(start, tensor.data_ptr() + tensor.nbytes, advice)


def _takes_advice(tensor: Tensor) -> bool:
    return sys.platform.startswith("linux") and tensor.device.type == "cpu" and tensor.nbytes > 0


def _advise(start: int, end: int, advice: int) -> None:
    """Advice to the system about memory from `start`, where a page begins; ignored where there is no such call."""
    if end <= start:
        return
    try:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    except (OSError, AttributeError):
        return
