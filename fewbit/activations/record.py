"""Run sequences through a network and record the inputs of its linear layers; layers with the same inputs share one
record.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbit.activations.massive import HiddenStates
from fewbit.curvature.observe import Watched, watching

Step = Callable[[int, int], None]


class Record(Protocol):
    """An object that collects inputs `(tokens, in)`."""

    def add(self, x: Tensor) -> None:
        """Add the inputs of one call."""


@dataclass
class Recorder:
    """Records by layer. make: a new record for inputs of that form. shared: layer -> the layer with the same inputs."""

    make: Callable[[Tensor], Any]
    found: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    _last: tuple[str, Tensor] | None = None

    def observe(self, key: str, x: Tensor, gradient: Tensor | None) -> None:
        """Add one call of a layer with inputs `(tokens, in)`."""
        if self._last is not None and self._last[1].data_ptr() == x.data_ptr() and self._last[1].shape == x.shape:
            self.shared[key] = self._last[0]
            return
        self._last = (key, x)
        if key not in self.found:
            self.found[key] = self.make(x)
        self.found[key].add(x)

    def of(self, key: str) -> Any:
        """The record of a layer, or None if it never ran."""
        return self.found.get(self.shared.get(key, key))


@dataclass
class Largest:
    """Largest magnitude of every channel, float32 `(in,)`."""

    magnitude: Tensor

    def add(self, x: Tensor) -> None:
        """Add inputs `(tokens, in)`."""
        if x.shape[0]:
            self.magnitude = torch.maximum(self.magnitude, x.detach().abs().amax(dim=0).float().cpu())

    @classmethod
    def like(cls, x: Tensor) -> "Largest":
        """An empty record for inputs with the channels of `x`."""
        return cls(torch.zeros(x.shape[-1]))


def record(
    model: Any, layers: list[Watched], ids: Tensor, make: Callable[[Tensor], Any], step: Step | None = None
) -> Recorder:
    """Run the sequences `ids` `(samples, length)` one by one and record the inputs of `layers`."""
    recorder = Recorder(make)
    with watching(layers, recorder.observe, backward=False):
        run(model, ids, step)
    return recorder


@torch.inference_mode()
def run(model: Any, ids: Tensor, step: Step | None = None) -> None:
    """Run sequences through the model without its output head, which no record needs."""
    body = getattr(model, "base_model", model)
    for index, sequence in enumerate(ids):
        body(sequence[None].to(model.device), use_cache=False)
        if step:
            step(index + 1, ids.shape[0])


@contextmanager
def following_states(blocks: Sequence[nn.Module]) -> Iterator[list[HiddenStates]]:
    """While inside, collect statistics of the hidden states before the first block (index 0) and after every block."""
    found = [HiddenStates() for _ in range(len(blocks) + 1)]

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[0].add((args[0] if args else kwargs["hidden_states"])[0])

    def leaving(place: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            found[place].add((out[0] if isinstance(out, tuple) else out)[0])

        return note

    handles = [blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    handles += [block.register_forward_hook(leaving(place + 1)) for place, block in enumerate(blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
