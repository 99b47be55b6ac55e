"""Scales of input channels, folded into the operation that produces a layer's inputs: AWQ and SmoothQuant.

    W' = W diag(s)    x' = diag(1/s) x

AWQ (arXiv 2306.00978): ``s_j = size(x_j)^a``, so channels with large inputs are rounded more finely. The exponent a is
the one with the least error ``tr(dW H dW^T)``. The paper uses the mean of ``|x_j|`` as the size, and measures the error
on sampled outputs. Here the size is the root mean square; the Gram H gives it and the error exactly.
SmoothQuant (arXiv 2211.10438): ``s_j = max|x_j|^a / max|W_j|^(1-a)``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbit.curvature.cost import curvature_cost
from fewbit.curvature.damping import prepare
from fewbit.curvature.products import products
from fewbit.transforms.transform import Inputs, Rounding, Transform, Values

_STEPS = 20
_SMALLEST = 1e-5


def best_scales(weights: Sequence[Tensor], gram: Tensor, rounding: Rounding) -> tuple[float, Tensor]:
    """The exponent among 0, 0.05, … 0.95 with the least total error of all weights, and its scales `(in,)`.

    weights: `(out, in)` each, in the dtype in which they run. gram: the input Gram that they share. rounding(i, w): the
    decoded weights that weight i rounds to.
    """
    prepared, dead = prepare(gram.to(weights[0].device))
    prepared = (prepared - torch.diag(dead.to(prepared.dtype))).to(torch.float32)
    size, dtype = prepared.diagonal().sqrt(), weights[0].dtype
    wide = [weight.float() for weight in weights]
    best_error, best = float("inf"), (0.0, torch.ones_like(size))
    for step in range(_STEPS):
        scales = size.clamp(min=1e-4).pow(step / _STEPS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        scales = torch.where(dead, torch.ones_like(scales), scales)
        errors = [rounding(i, weight * scales).div_(scales).sub_(weight) for i, weight in enumerate(wide)]
        # The errors are only compared with each other, and all use the same matrix: 16-bit factors are precise enough.
        with products(dtype):
            error = sum(curvature_cost(one, prepared) for one in errors)
        if error < best_error:
            best_error, best = error, (step / _STEPS, scales)
    return best


def smoothing_scales(largest: Tensor, weights: Sequence[Tensor], exponent: float) -> Tensor:
    """``s_j = max|X_j|^a / max|W_j|^(1-a)`` (SmoothQuant, section 4.1), float32 `(in,)`; inputs are divided by it.

    largest: largest magnitude of every input channel `(in,)`. weights: those of all layers with these inputs, each
    `(out, in)`. A channel whose inputs or weights are all 0 gets the scale 1.
    """
    columns = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    inputs = largest.to(columns.device, torch.float32)
    scales = inputs.pow(exponent) / columns.pow(1.0 - exponent).clamp(min=_SMALLEST)
    return torch.where((inputs > 0) & (columns > 0), scales.clamp(min=_SMALLEST), torch.ones_like(scales))


def _awq(weights: Sequence[Tensor], inputs: Inputs, rounding: Rounding) -> tuple[dict[str, Any], Tensor | None]:
    exponent, scales = best_scales(weights, inputs.gram, rounding)
    return {"exponent": exponent}, scales if exponent else None


def _smoothquant(weights: Sequence[Tensor], inputs: Inputs, rounding: Rounding) -> tuple[dict[str, Any], Tensor | None]:
    assert inputs.largest is not None
    return {"exponent": 0.5}, smoothing_scales(inputs.largest, list(weights), 0.5)


def _weight(weight: Tensor, values: Values) -> Tensor:
    return weight * values["scale"]


def _back(weight: Tensor, values: Values) -> Tensor:
    return weight / values["scale"]


def _curvature(curvature: Tensor, values: Values) -> Tensor:
    return curvature / (values["scale"].unsqueeze(0) * values["scale"].unsqueeze(1))


_MAP: dict[str, Any] = {"weight": _weight, "back": _back, "curvature": _curvature, "inputs": _back}
AWQ = Transform(
    "awq", "scale channels so that those with large inputs are rounded more finely (AWQ)", choose=_awq, **_MAP
)
SMOOTHQUANT = Transform(
    "smoothquant",
    "scale channels so that large inputs become smaller (SmoothQuant)",
    choose=_smoothquant,
    from_largest=True,
    from_norms=True,
    **_MAP,
)
