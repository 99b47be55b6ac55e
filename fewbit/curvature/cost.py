"""The cost of an error in a weight under a curvature."""

import torch
from torch import Tensor


def curvature_cost(error: Tensor, prepared: Tensor) -> float:
    """``tr(E H E^T)`` of an error `(out, in)` under a prepared curvature `(in, in)`."""
    return float((error @ prepared.to(torch.float32)).mul_(error).sum(dtype=torch.float64))


def relative_cost(error: Tensor, weight: Tensor, prepared: Tensor | None) -> float | None:
    """``tr(E H E^T) / tr(W H W^T)``, or None without a curvature."""
    if prepared is None:
        return None
    return curvature_cost(error, prepared) / max(curvature_cost(weight, prepared), 1e-300)
