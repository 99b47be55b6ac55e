"""One reading of a GGUF file for all that transformers takes from it: config, tokenizer and weights.

It opens the file anew for each of them, and a vocabulary of 262,144 tokens takes the package's reader half a minute.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """A context in which each file that `gguf.GGUFReader` opens is parsed once, and faster; the same is read."""
    import gguf
    import numpy as np

    known: dict[str, Any] = {}
    package: Any = gguf
    original: Any = package.GGUFReader

    class Reader(original):
        def __new__(cls, path: Any, *modes: Any, **named: Any) -> Any:
            return known.get(_key(path, modes, named)) or super().__new__(cls)

        def __init__(self, path: Any, *modes: Any, **named: Any) -> None:
            key = _key(path, modes, named)
            if key not in known:
                super().__init__(path, *modes, **named)
                known[key] = self

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            # Slices of a plain array take a third of the time of those of a memory map.
            self._data = np.asarray(mapped)

    package.GGUFReader = Reader
    try:
        yield
    finally:
        package.GGUFReader = original


def _key(path: Any, modes: tuple[Any, ...], named: dict[str, Any]) -> str:
    return repr((os.fspath(path), modes, sorted(named.items())))
