"""Transforms that are folded into the network.

A layer's input channels are scaled in its weights before they are rounded, and scaled back in the module that produces
its inputs (a norm, or the preceding linear layer).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from fewbit.architecture.folding import find_feeder
from fewbit.architecture.network import Site
from fewbit.transforms.transform import Inputs, Transform


@dataclass(frozen=True)
class Folding:
    """How channel scales are chosen.

    transform: one that is folded. rounding(site, w): the decoded weights that a layer's weights `(out, in)` round to.
    largest(site): the largest magnitude of each input `(in,)`, or None if it was not measured.
    """

    transform: Transform
    rounding: Callable[[Site, Tensor], Tensor]
    largest: Callable[[Site], Tensor | None] = lambda site: None


def fold_block(
    block: nn.Module,
    sites: Sequence[Site],
    curvature: Callable[[Site], Tensor | None],
    folding: Folding,
    run: Callable[[], Tensor],
) -> list[dict[str, Any]]:
    """Scale the channels of a block in place, in the network's own dtype.

    curvature: the input Gram of a layer. folding: how scales are chosen. run: the change that the block, in float32,
    makes to a sample, used to find the module that produces a layer's inputs. Returns notes for the report: for every
    set of layers that share their inputs, their names and the exponent (0: not scaled), or that no foldable module
    feeds them.
    """
    shared: dict[int, list[Site]] = {}
    for site in sites:
        gram = curvature(site)
        if gram is not None:
            shared.setdefault(gram.data_ptr(), []).append(site)
    notes: list[dict[str, Any]] = []
    choose = folding.transform.choose
    assert choose is not None
    for consumers in shared.values():
        names = [site.tensor.entry.name for site in consumers]
        feeder = find_feeder(block, consumers, [] if folding.transform.from_norms else sites, run)
        if feeder is None:
            module = "norm" if folding.transform.from_norms else "module"
            notes.append({"layers": names, "exponent": None, "reason": f"no foldable {module} feeds them"})
            continue
        gram = curvature(consumers[0])
        assert gram is not None
        weights = [site.read() for site in consumers]
        inputs = Inputs(gram, folding.largest(consumers[0]))
        said, scales = choose(weights, inputs, partial(_round, folding.rounding, consumers))
        if scales is not None:
            left = feeder.divide(scales)
            for site in consumers:
                site.write(site.read().float() * left)
        notes.append({"layers": names, **said})
    return notes


def _round(rounding: Callable[[Site, Tensor], Tensor], consumers: Sequence[Site], index: int, weight: Tensor) -> Tensor:
    return rounding(consumers[index], weight)
