"""Reading at a place of an open file, from several threads at once, on every system."""

import os
import threading
from pathlib import Path

# Windows has no positioned reads: a seek and a read, one thread at a time.
_SEEKS = threading.Lock()


def open_to_read(path: Path) -> int:
    """A descriptor of a file's bytes as they are."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def read_at(descriptor: int, view: memoryview, position: int) -> int:
    """Fill `view`, or its beginning, with what is at `position`; returns how many bytes were read, 0 at the end."""
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
