"""Observers of the inputs of a block's layers, while each worker runs one sequence at a time through the block."""

import threading
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fewbit.curvature.observe import Watched

Step = Callable[[], None]


class Observing(Protocol):
    """An object that receives the inputs of a block's layers."""

    def observe(self, key: str, x: Tensor, gradient: Tensor | None) -> None:
        """Receive one call of a layer with inputs `(tokens, in)`."""


@runtime_checkable
class Divisible(Protocol):
    """An observer whose sums can be computed in parts."""

    def another(self) -> Any:
        """An empty observer of the same kind."""

    def add(self, other: Any) -> None:
        """Add the sums of another observer."""


class EnoughSeenError(Exception):
    """Ends the run of a block after its last watched layer has been called."""


class UntilLast:
    """Passes inputs to an observer, and ends the run of a block when its last watched layer is called.

    The rest of the block (a quarter of it, if it is a down projection) need not be computed. The order of the layers is
    taken from the first sequence, if it calls each layer once. It is not used with fused experts, because not every
    text reaches them, and they are called in any order.
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
        """Called at the end of a sequence."""
        if not self._fused and sorted(self._called) == self._keys:
            self._last = self._called[-1]
        self._called.clear()


class PerThread:
    """One observer for every worker; calls in a thread go to the observer of that thread's worker."""

    def __init__(self, observers: list[Any]) -> None:
        self._observers, self._mine = observers, threading.local()

    def begin(self, worker: int) -> Callable[[], None] | None:
        """Make the calling thread this worker; returns a function to call at the end of a sequence, or None."""
        self._mine.observer = self._observers[worker]
        return getattr(self._observers[worker], "ended", None)

    def observe(self, key: str, x: Tensor, gradient: Tensor | None) -> None:
        self._mine.observer.observe(key, x, gradient)
