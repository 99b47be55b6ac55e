"""Memory figures from the operating system."""

import os
import sys
from typing import Any


def peak_rss_bytes() -> int:
    """Peak resident memory of this process in bytes; 0 if the system does not report it.

    On Linux, `ru_maxrss` of a forked process includes its parent's memory, so the process's own high-water mark is
    read.
    """
    own = _field("/proc/self/status", "VmHWM:")
    if own is not None:
        return own
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Memory that is available without swapping, in bytes; 4 GiB if the system does not report it."""
    available = _field("/proc/meminfo", "MemAvailable:")
    if available is not None:
        return available
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 << 30


def rows_at_once(matrix: Any) -> int:
    """Rows of a tensor `(rows, columns)` to take at a time in several passes over float32 copies of them.

    On the CPU so many that the copies stay in a core's cache, which makes passes over logits two to four times faster;
    elsewhere many.
    """
    return max(4, (1 << (20 if matrix.device.type == "cpu" else 26)) // matrix.shape[-1])


def activation_bytes(config: Any, tokens: int) -> int:
    """About what a transformers model of that config keeps in 16 bits for a backward pass over `tokens` tokens."""
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return 2 * tokens * text.num_hidden_layers * (12 * text.hidden_size + 4 * inner)


def _field(path: str, name: str) -> int | None:
    """A field in kB of one of Linux's status files, in bytes; None elsewhere."""
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(name)), None)
    except OSError:
        return None


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, if its C library is glibc.

    glibc returns blocks of more than 128 kB immediately, so the kernel maps and zeroes every temporary tensor again,
    which slows down every pass over weights. The setting affects the whole process, so only the command line uses it.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 1 << 28)
        mallopt(trim_threshold, 1 << 28)


def return_freed_memory() -> None:
    """Give the memory that this process has freed back to the system, if its C library is glibc; otherwise nothing."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
