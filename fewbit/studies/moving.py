"""A network whose quantized weights can be moved in place and put back exactly."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.network import Site
from fewbit.evaluation.perplexity import Totals
from fewbit.evaluation.score import window_logits
from fewbit.studies.directions import norm


@dataclass
class Movable:
    """The model, the places of its weights, and copies of them `(out, in)`; norm: of all of them."""

    model: Any
    sites: list[Site]
    originals: list[Tensor] = field(default_factory=list)
    norm: float = 0.0

    def __post_init__(self) -> None:
        self.originals = [site.read().clone() for site in self.sites]
        self.norm = norm(self.originals)

    @contextmanager
    def moved(self, *moves: tuple[float, Sequence[Tensor]]) -> Iterator[None]:
        """While inside, the weights are the originals plus every `factor * direction`; afterwards bit for bit the
        originals, whatever happened.
        """
        try:
            with torch.no_grad():
                for index, (site, original) in enumerate(zip(self.sites, self.originals, strict=True)):
                    weight = original.clone()
                    for factor, direction in moves:
                        weight.add_(direction[index].to(weight.dtype), alpha=factor)
                    site.write(weight)
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Put the originals back."""
        for site, original in zip(self.sites, self.originals, strict=True):
            site.write(original)


def loss(model: Any, windows: Tensor) -> float:
    """Mean next-token loss of windows `(windows, length)`, nats a token; NaN or infinite where the model breaks."""
    totals = Totals()
    for window in windows:
        totals.add(window_logits(model, window), window[1:].to(model.device), None)
    return totals.nll / totals.tokens
