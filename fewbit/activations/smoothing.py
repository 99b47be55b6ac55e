"""SmoothQuant (arXiv 2211.10438): move the spread of a layer's inputs into its weights, channel by channel."""

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-5


def smoothing_scales(largest: Tensor, weights: Sequence[Tensor], exponent: float) -> Tensor:
    """``s_j = max|X_j|^a / max|W_j|^(1-a)`` (section 4.1), float32 `(in,)`; inputs are divided by it.

    largest: largest magnitude of every input channel `(in,)`. weights: those of all layers with these inputs, each
    `(out, in)`. A channel that is 0 on either side stays as it is.
    """
    columns = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    inputs = largest.to(columns.device, torch.float32)
    scales = inputs.pow(exponent) / columns.pow(1.0 - exponent).clamp(min=_SMALLEST)
    return torch.where((inputs > 0) & (columns > 0), scales.clamp(min=_SMALLEST), torch.ones_like(scales))
