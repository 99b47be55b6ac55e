"""Simulate layers whose inputs and weights are both rounded (W8A8), plain or smoothed, in a loaded model.

The rounding is exactly that of integer codes with the requested number of bits (see
:mod:`fewbit.activations.rounding`); the speed is not that of integer kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewbit.activations.choice import ActivationChoice
from fewbit.activations.record import Largest, Recorder, Step, record
from fewbit.activations.rounding import Range, RoundedWeight, range_of, round_weight, rounded_linear
from fewbit.activations.statistics import InputRanges
from fewbit.architecture.folding import find_feeder
from fewbit.curvature.observe import replacing
from fewbit.errors import FewbitError
from fewbit.pipeline.input_sites import input_sites, watched_layers
from fewbit.pipeline.network import Network
from fewbit.pipeline.walk import Walk
from fewbit.transforms.channel_scales import smoothing_scales

_SCALE_BITS = 32
_SAMPLE_TOKENS = 24


@dataclass(frozen=True)
class Simulation:
    """Rounded weights and static ranges by layer, and notes on which sites were smoothed."""

    choice: ActivationChoice
    weights: dict[str, RoundedWeight]
    ranges: Recorder | None
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, as an integer kernel stores them: codes, and a float32 scale per output channel."""
        count = sum(weight.codes.numel() for weight in self.weights.values())
        scales = sum(weight.scale.numel() for weight in self.weights.values())
        return self.choice.weight_bits + _SCALE_BITS * scales / count

    def linear(self, key: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs of layer `key` for inputs `(..., tokens, in)` of one sequence, in their dtype."""
        choice = self.choice
        out = rounded_linear(x, self.weights[key], self._range(key, x), choice.bits, choice.symmetric)
        if bias is not None:
            out = out + bias.float()
        return out.to(x.dtype)

    def _range(self, key: str, x: Tensor) -> Range:
        found = self.ranges.of(key) if self.ranges is not None else None
        if found is None:
            # Dynamic ranges, or an expert that no calibration token reached.
            return range_of(x, self.choice.granularity)
        if self.choice.granularity == "token":
            low, high = found.at(x.shape[-2])
        else:
            low, high = torch.tensor(found.low), torch.tensor(found.high)
        return Range(low.to(x.device), high.to(x.device))


@contextmanager
def rounding_inputs(
    network: Network,
    choice: ActivationChoice,
    ids: Tensor | None = None,
    step: Step | None = None,
    only: set[str] | None = None,
) -> Iterator[Simulation]:
    """While inside, the linear layers of the decoder blocks round their inputs and weights; afterwards all is restored.

    network: with the whole model loaded (:func:`fewbit.pipeline.network.open_network` without `walking`). ids:
    calibration sequences `(samples, length)`, for static ranges and for smoothing. only: keys of the layers that round
    (default: all). With a range for each position, run one sequence at a time; otherwise batches are possible too.
    Raises FewbitError if the choice needs calibration sequences and there are none.
    """
    if choice.calibrated and ids is None:
        raise FewbitError("static ranges and SmoothQuant need a calibration set: give one, or choose dynamic ranges")
    layers = [layer for layer in watched_layers(network) if only is None or layer.key in only]
    smoothed = choice.exponent is not None
    before = [(p, p.detach().clone()) for block in network.blocks for p in block.parameters()] if smoothed else []
    try:
        notes: list[dict[str, Any]] = []
        if smoothed:
            assert ids is not None
            largest = record(network.model, watched_layers(network), ids, Largest.like, step)
            notes = smooth(network, largest, choice)
        ranges = None
        if choice.ranges == "static":
            assert ids is not None
            length = ids.shape[1]
            ranges = record(network.model, layers, ids, lambda _: InputRanges.empty(length), step)
        weights = {layer.key: round_weight(_matrix(network, layer.key), choice.weight_bits) for layer in layers}
        simulation = Simulation(choice, weights, ranges, notes)
        with replacing(layers, simulation.linear):
            yield simulation
    finally:
        for parameter, values in before:
            parameter.data.copy_(values)


def _matrix(network: Network, key: str) -> Tensor:
    """A layer's whole weight `(out, in)`."""
    site = next(site for sites in network.sites for site in sites if site.watched.key == key)
    matrix = site.watched.weight.detach()
    return matrix.t() if site.transposed else matrix


def smooth(network: Network, largest: Recorder, choice: ActivationChoice) -> list[dict[str, Any]]:
    """Divide the inputs of the layers by SmoothQuant's scales and multiply their weights by them, in place.

    The division is folded into the module that produces the inputs; layers without a foldable one stay unchanged.
    largest: :class:`Largest` of every site. Returns for every site its block, label, layers and whether it was
    smoothed. The network's outputs do not change, except by the rounding of weights to its own dtype.
    """
    assert choice.exponent is not None
    sites = input_sites(network, list(largest.found), largest.shared)
    sample = Walk(network.model, network.blocks, torch.arange(_SAMPLE_TOKENS).unsqueeze(0) + 5, 1 << 30)
    notes: list[dict[str, Any]] = []
    for index, block in enumerate(network.blocks):
        others = network.sites[index] if choice.smoothed == "all" else []
        for site in (site for site in sites if site.block == index):
            feeder = find_feeder(block, site.consumers, others, partial(sample.change, index))
            notes.append({"block": index, "site": site.label, "layers": site.layers, "smoothed": feeder is not None})
            if feeder is None:
                continue
            weights = [consumer.read().float() for consumer in site.consumers]
            left = feeder.divide(smoothing_scales(largest.of(site.key).magnitude, weights, choice.exponent))
            for consumer, weight in zip(site.consumers, weights, strict=True):
                consumer.write(weight * left)
        sample.advance(index, _nothing)
    return notes


def _nothing() -> None:
    """A step of progress that is not shown."""
