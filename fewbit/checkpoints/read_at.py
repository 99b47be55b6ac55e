"""Read an open file at a position, from several threads at once, on every system."""

import os
import threading
from pathlib import Path

# Windows has no positioned reads, so one thread at a time does a seek and a read.
_SEEKS = threading.Lock()


def open_to_read(path: Path) -> int:
    """A descriptor for reading a file's bytes without any conversion."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def read_at(descriptor: int, view: memoryview, position: int) -> int:
    """Read from `position` into `view`, or into its beginning; returns the number of bytes read, 0 at the end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], position)
    with _SEEKS:
        os.lseek(descriptor, position, os.SEEK_SET)
        data = os.read(descriptor, len(view))
    view[: len(data)] = data
    return len(data)


def bytes_at(descriptor: int, count: int, position: int) -> bytes:
    """At most `count` bytes from `position`."""
    data = bytearray(count)
    return bytes(data[: read_at(descriptor, memoryview(data), position)])
