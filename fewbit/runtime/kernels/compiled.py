"""How functions are compiled: by numba, without the interpreter's lock, and kept on disk for the next process."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numba

_SETTINGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled together with each compiled function that calls it."""
    return numba.njit(**_SETTINGS)(function)


def kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call on this kind of processor.

    What was compiled is kept beside the function's file, or in the user's cache folder. numba looks for changes in that
    file and in the values around the function only: one of those should be :func:`sources`.
    """
    try:
        return numba.njit(cache=True, **_SETTINGS)(function)
    except RuntimeError:
        # Neither folder can be written: it is compiled anew in each process.
        return numba.njit(**_SETTINGS)(function)


@lru_cache
def sources() -> int:
    """A number that changes with each file of this folder."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return crc32(b"".join(file.read_bytes() for file in files))
