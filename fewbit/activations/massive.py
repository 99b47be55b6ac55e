"""Massive activations: a few entries of the hidden states that are thousands of times larger than the others.

They are defined as in arXiv 2402.17762: a magnitude above 100 and above 1,000 times the median magnitude of the hidden
states. They occur at few tokens, mostly at the first, so the norm of the first token is recorded for every block.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

MASSIVE_MAGNITUDE = 100.0
MASSIVE_RATIO = 1000.0


@dataclass
class HiddenStates:
    """Statistics of hidden states `(tokens, channels)`, one entry per sequence.

    first_ratios: norm of the first token divided by the median norm. largest_ratios: the same for the token with the
    largest norm. largest_first: whether that is the first token. magnitudes: largest magnitude. medians: median
    magnitude. channels: the channel of the largest magnitude.
    """

    first_ratios: list[float] = field(default_factory=list)
    largest_ratios: list[float] = field(default_factory=list)
    largest_first: list[bool] = field(default_factory=list)
    magnitudes: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    channels: list[int] = field(default_factory=list)

    def add(self, states: Tensor) -> None:
        """Add the hidden states of one sequence."""
        states = states.detach().float()
        norms = states.norm(dim=1)
        middle = float(norms.median()) or 1.0
        self.first_ratios.append(float(norms[0]) / middle)
        self.largest_ratios.append(float(norms.max()) / middle)
        self.largest_first.append(int(norms.argmax()) == 0)
        magnitudes = states.abs()
        self.magnitudes.append(float(magnitudes.max()))
        self.medians.append(float(magnitudes.median()))
        self.channels.append(int(magnitudes.argmax()) % states.shape[1])

    def describe(self) -> dict[str, float | int | bool]:
        """Means over sequences; massive: whether more than half of them are; channel: the most frequent one."""
        count = max(len(self.magnitudes), 1)
        massive = [
            magnitude > MASSIVE_MAGNITUDE and magnitude > MASSIVE_RATIO * median
            for magnitude, median in zip(self.magnitudes, self.medians, strict=True)
        ]
        return {
            "first_norm_ratio": sum(self.first_ratios) / count,
            "largest_norm_ratio": sum(self.largest_ratios) / count,
            "largest_is_first": sum(self.largest_first) / count,
            "magnitude": sum(self.magnitudes) / count,
            "median_magnitude": sum(self.medians) / count,
            "massive": 2 * sum(massive) > count,
            "channel": int(torch.tensor(self.channels).mode().values) if self.channels else -1,
        }


def begins_at(ratios: list[float], threshold: float) -> int | None:
    """Index of the first ratio that exceeds the threshold, or None if none does."""
    return next((index for index, ratio in enumerate(ratios) if ratio > threshold), None)
