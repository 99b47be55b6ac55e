"""What the inputs of one site are needed for when fixes for its layers are tried: all gathered in one pass."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.activations.rounding import Range
from fewbit.activations.statistics import InputRanges
from fewbit.curvature.products import products


@dataclass
class SiteRecord:
    """gram: ``sum_t x_t x_t^T``, float32 `(in, in)`. low, high: extremes of every channel `(in,)`. ranges: by place."""

    gram: Tensor
    low: Tensor
    high: Tensor
    ranges: InputRanges

    @classmethod
    def empty(cls, channels: int, length: int) -> "SiteRecord":
        """A record of nothing, for sequences of `length` tokens."""
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
        """Range of everything, of inputs divided by `scales` `(in,)` where they are given."""
        low, high = (self.low, self.high) if scales is None else (self.low / scales, self.high / scales)
        return Range(low.min(), high.max())


@dataclass
class Captured:
    """The inputs themselves, a tensor `(tokens, in)` a sequence, in the network's dtype."""

    parts: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Keep one sequence's inputs."""
        self.parts.append(x.detach().cpu().clone())
