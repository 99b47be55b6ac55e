"""Directions in the space of a model's quantized weights: lists of tensors, one for each weight `(out, in)`.

Lengths are relative: the Euclidean norm over all weights, divided by that of the weights themselves.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("filter", "plain")
Direction = list[Tensor]


def norm(direction: Sequence[Tensor]) -> float:
    """Euclidean norm over all tensors, summed in float64."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in direction))


def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Inner product over all tensors, summed in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))


def random_direction(weights: Sequence[Tensor], kind: str, seed: int) -> Direction:
    """A Gaussian direction of relative length 1, float32, the same for one seed on every machine type's CPU.

    plain: one vector over all weights. filter: every output row gets the norm of that row of the weights (filter
    normalisation, Li et al., arXiv 1712.09913), so that a layer is moved in proportion to its size.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for weight in weights:
        part = torch.randn(weight.shape, generator=generator).to(weight.device)
        if kind == "filter":
            part.mul_(weight.float().norm(dim=1, keepdim=True) / part.norm(dim=1, keepdim=True).clamp(min=1e-30))
        found.append(part)
    length = norm(found)
    scale = norm(weights) / length if length else 0.0
    return [part.mul_(scale) for part in found]


def plane_of(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Direction, Direction, tuple[float, float]]:
    """Orthogonal directions of unit norm that span two others, and where the second lies on them.

    The first axis is `one` itself; the second what `other` has beside it (Gram-Schmidt). Returns both axes and the
    coordinates `(x, y)` of `other`; those of `one` are `(norm(one), 0)`. An axis is 0 where the two are parallel.
    """
    length = norm(one)
    first = [part / length for part in one] if length else [torch.zeros_like(part) for part in one]
    x = inner(first, other)
    rest = [part - x * axis for part, axis in zip(other, first, strict=True)]
    y = norm(rest)
    second = [part / y for part in rest] if y > 1e-6 * norm(other) else [torch.zeros_like(part) for part in rest]
    return first, second, (x, y)
