"""What is shown the inputs of a block's layers while sequences run through it, one sequence a worker at a time."""

import threading
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fewbit.curvature.observe import Watched

Step = Callable[[], None]


class Observing(Protocol):
    """Something that is shown what the layers of a block see."""

    def observe(self, key: str, x: Tensor, gradient: Tensor | None) -> None:
        """One call of a layer with inputs `(tokens, in)`."""


@runtime_checkable
class Divisible(Protocol):
    """An observer whose sums can be made in parts."""

    def another(self) -> Any:
        """An empty one of the same kind."""

    def add(self, other: Any) -> None:
        """Take in the sums of another."""


class EnoughSeenError(Exception):
    """Ends a run through a block: its last watched layer has been called."""


class UntilLast:
    """Shows an observer what layers see, and ends a run at the layer that is called last: what comes after it (a
    quarter of a block, where it is a down projection) would be for nothing.

    Which one is last the first sequence tells, if it calls each layer once: experts that not every text reaches could
    come in any order.
    """

    def __init__(self, observer: Observing, layers: list[Watched]) -> None:
        self._observer, self._keys = observer, sorted(layer.key for layer in layers)
        self._fused = any(layer.expert is not None for layer in layers)
        self._called: list[str] = []
        self._last: str | None = None

    def observe(self, key: str, x: Tensor, gradient: Tensor | None) -> None:
        self._observer.observe(key, x, gradient)
        self._called.append(key)
        if key == self._last:
            raise EnoughSeenError

    def ended(self) -> None:
        """A sequence is through."""
        if not self._fused and sorted(self._called) == self._keys:
            self._last = self._called[-1]
        self._called.clear()


class PerThread:
    """One observer for every worker; a thread's calls go to its own."""

    def __init__(self, observers: list[Any]) -> None:
        self._observers, self._mine = observers, threading.local()

    def begin(self, worker: int) -> Callable[[], None] | None:
        """From here on the calling thread is this worker; returns what is to be called when a sequence is through."""
        self._mine.observer = self._observers[worker]
        return getattr(self._observers[worker], "ended", None)

    def observe(self, key: str, x: Tensor, gradient: Tensor | None) -> None:
        self._mine.observer.observe(key, x, gradient)
