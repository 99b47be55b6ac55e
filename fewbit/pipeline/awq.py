"""Activation-aware weight scaling (AWQ, arXiv 2306.00978): channels with large inputs are rounded more finely.

    W' = W diag(s)    x' = diag(1/s) x    s_j = rms(x_j)^a, with the a of least ``tr(dW H dW^T)``

W' is what is rounded; 1/s is folded into whatever feeds the layer (a norm, or the linear layer before). Published with
the mean of ``|x_j|`` and the error on sampled outputs; the Gram H gives the root mean square and that error exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.architecture.folding import find_feeder
from fewbit.architecture.network import Site
from fewbit.curvature.damping import prepare
from fewbit.curvature.products import products
from fewbit.pipeline.solved import curvature_cost

_STEPS = 20

Rounding = Callable[[Site, Tensor], Tensor]


def fold_block(
    block: nn.Module,
    sites: Sequence[Site],
    curvature: Callable[[Site], Tensor | None],
    rounding: Rounding,
    run: Callable[[], Tensor],
) -> list[dict[str, Any]]:
    """Scale the channels of a block in place, in the network's own dtype.

    curvature: the input Gram of a layer. rounding: the decoded weights that a layer's weights `(out, in)` round to.
    run: what the block adds to a sample, to find out what feeds what. Returns for the report, for every set of layers
    that share their inputs: their names, the exponent (0: not scaled), or that nothing foldable feeds them.
    """
    shared: dict[int, list[Site]] = {}
    for site in sites:
        gram = curvature(site)
        if gram is not None:
            shared.setdefault(gram.data_ptr(), []).append(site)
    notes: list[dict[str, Any]] = []
    for consumers in shared.values():
        names = [site.tensor.entry.name for site in consumers]
        feeder = find_feeder(block, consumers, sites, run)
        if feeder is None:
            notes.append({"layers": names, "exponent": None, "reason": "nothing foldable feeds them"})
            continue
        gram = curvature(consumers[0])
        assert gram is not None
        exponent, scales = best_scales(consumers, gram, rounding)
        if exponent:
            left = feeder.divide(scales)
            for site in consumers:
                site.write(site.read().float() * left)
        notes.append({"layers": names, "exponent": exponent})
    return notes


def best_scales(consumers: Sequence[Site], gram: Tensor, rounding: Rounding) -> tuple[float, Tensor]:
    """The exponent among 0, 0.05, … 0.95 with the least error of all consumers together, and its scales `(in,)`."""
    prepared, dead = prepare(gram.to(consumers[0].watched.weight.device))
    prepared = (prepared - torch.diag(dead.to(prepared.dtype))).to(torch.float32)
    size = prepared.diagonal().sqrt()
    weights = [site.read().float() for site in consumers]
    best_error, best = float("inf"), (0.0, torch.ones_like(size))
    for step in range(_STEPS):
        scales = size.clamp(min=1e-4).pow(step / _STEPS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        scales = torch.where(dead, torch.ones_like(scales), scales)
        errors = [
            rounding(site, weight * scales).div_(scales).sub_(weight)
            for site, weight in zip(consumers, weights, strict=True)
        ]
        # Exponents are only compared, and all are summed over the same matrix: 16-bit factors tell them apart.
        with products(consumers[0].watched.weight.dtype):
            error = sum(curvature_cost(one, prepared) for one in errors)
        if error < best_error:
            best_error, best = error, (step / _STEPS, scales)
    return best
