"""What a solver gives back for one weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.pipeline.quantize_weight import QuantizedRows


@dataclass(frozen=True)
class Solved:
    """The rows to store, the decoded weights `(out, in)` float32, and how they were found.

    path: solved, solved with raised damping, rounded (nothing was to be solved), or fallback with its reason.
    predicted: ``tr(dW H dW^T) / tr(W H W^T)``, the relative error that the curvature sees.
    """

    rows: QuantizedRows
    decoded: Tensor
    path: str
    predicted: float | None


def curvature_cost(error: Tensor, prepared: Tensor) -> float:
    """``tr(E H E^T)`` of an error `(out, in)` under a prepared curvature `(in, in)`."""
    return float((error @ prepared.to(torch.float32)).mul_(error).sum(dtype=torch.float64))


def relative_cost(error: Tensor, weight: Tensor, prepared: Tensor | None) -> float | None:
    """``tr(E H E^T) / tr(W H W^T)``, or None without a curvature."""
    if prepared is None:
        return None
    return curvature_cost(error, prepared) / max(curvature_cost(weight, prepared), 1e-300)
