"""All measurements of the inputs of one site that trying fixes for its layers needs, collected in one pass."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.activations.rounding import Range
from fewbit.activations.statistics import InputRanges
from fewbit.curvature.products import products


@dataclass
class SiteRecord:
    """Measurements of the inputs of one site.

    gram: ``sum_t x_t x_t^T``, float32 `(in, in)`. low, high: extremes of every channel `(in,)`. ranges: of all inputs
    and by position in the sequence.
    """

    gram: Tensor
    low: Tensor
    high: Tensor
    ranges: InputRanges

    @classmethod
    def empty(cls, channels: int, length: int) -> "SiteRecord":
        """An empty record, for sequences of `length` tokens."""
        infinite = torch.full((channels,), float("inf"))
        return cls(torch.zeros(channels, channels), infinite, -infinite, InputRanges.empty(length))

    def add(self, x: Tensor) -> None:
        """Add one sequence's inputs `(tokens, in)`."""
        if x.shape[0] == 0:
            return
        self.ranges.add(x)
        rows = x.detach().float().cpu()
        self.low, self.high = torch.minimum(self.low, rows.amin(dim=0)), torch.maximum(self.high, rows.amax(dim=0))
        with products(x.dtype):
            self.gram.addmm_(rows.t(), rows)

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of every channel `(in,)`."""
        return torch.maximum(self.high, -self.low)

    def range(self, scales: Tensor | None = None) -> Range:
        """Range of all inputs; if `scales` `(in,)` is given, of the inputs divided by it."""
        low, high = (self.low, self.high) if scales is None else (self.low / scales, self.high / scales)
        return Range(low.min(), high.max())


@dataclass
class Captured:
    """The inputs themselves, one tensor `(tokens, in)` per sequence, in the network's dtype."""

    parts: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Keep one sequence's inputs."""
        self.parts.append(x.detach().cpu().clone())
