"""Straight-through rounding: the forward pass gives the stored value, the backward pass ignores the rounding.

For an evenly spaced grid ``q = s (clamp(round(w / s + z), 0, top) - z)`` (LSQ, arXiv 1902.08153, with a zero-point
as LSQ+, arXiv 2004.09576), with I = 1 where the code was not clamped and v = code - z:

    dq/dw = I        dq/ds = v - I w / s        dq/dz = -s (1 - I)

For codebooks, v is the level, and top is replaced by the number of levels. Gradients of scales and offsets are sums
over the weights of a group. They are divided by ``sqrt(g top)`` (LSQ, section 2.2), so that their size is comparable
to that of the weights' gradients when gradients are clipped by norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.grids import codebook
from fewbit.grids.scales import divisor


class _Even(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, scale: Tensor, zero: Tensor, top: int, whole: bool) -> Tensor:
        ratio = weight / divisor(scale)
        code = ratio.round_().add_(zero) if whole else ratio.add_(zero).round_()
        inside = (code >= 0) & (code <= top)
        value = code.clamp_(0, top).sub_(zero).mul_(scale)
        context.save_for_backward(weight, scale, value, inside)
        context.top = top
        return value

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        gradient = gradients[0]
        weight, scale, value, inside = context.saved_tensors
        passed = gradient * inside
        if not context.needs_input_grad[1]:
            return passed, None, None, None, None
        damping = (weight.shape[-1] * context.top) ** -0.5
        of_scale = _of_scale(gradient, passed, weight, value, scale) * damping
        of_zero = (gradient - passed).sum(dim=-1, keepdim=True).mul_(-scale) * damping
        return passed, of_scale, of_zero, None, None


@dataclass(frozen=True)
class Levels:
    """The levels of a scale of 1. nearest(u): the nearest level of each element. lowest, highest: the outermost."""

    nearest: Callable[[Tensor], Tensor]
    lowest: float
    highest: float
    count: int


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, scale: Tensor, levels: Levels) -> Tensor:
        ratio = weight / divisor(scale)
        inside = (ratio >= levels.lowest) & (ratio <= levels.highest)
        value = levels.nearest(ratio).mul_(scale)
        context.save_for_backward(weight, scale, value, inside)
        context.levels = levels.count
        return value

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gradient = gradients[0]
        weight, scale, value, inside = context.saved_tensors
        passed = gradient * inside
        if not context.needs_input_grad[1]:
            return passed, None, None
        damping = (weight.shape[-1] * context.levels) ** -0.5
        return passed, _of_scale(gradient, passed, weight, value, scale) * damping, None


def _of_scale(gradient: Tensor, passed: Tensor, weight: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """``sum (v - I w / s) dL/dq`` of each group, with ``v = q / s``."""
    total = (gradient * value).sub_(passed * weight).sum(dim=-1, keepdim=True)
    return total / divisor(scale)


class _Nearest(torch.autograd.Function):
    """The nearest of ``+-small`` and ``+-large``."""

    @staticmethod
    def forward(context: Any, weight: Tensor, small: Tensor, large: Tensor) -> Tensor:
        context.save_for_backward(weight, small, large)
        magnitude = weight.abs()
        second = (magnitude - large).abs() < (magnitude - small).abs()
        value = torch.where(second, large, small)
        return torch.where(weight < 0, -value, value)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient = gradients[0]
        weight, small, large = context.saved_tensors
        magnitude = weight.abs()
        second = (magnitude - large).abs() < (magnitude - small).abs()
        signed = torch.where(weight < 0, -gradient, gradient)
        # A weight beyond the outermost level is clamped, so it gets no gradient.
        passed = gradient * (magnitude <= torch.maximum(small, large))
        return passed, signed * ~second, signed * second


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, wanted: Tensor, seen: Tensor, damping: float) -> Tensor:
        context.damping = damping
        return seen.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] if context.damping == 1.0 else gradients[0] * context.damping, None, None


def round_evenly(weight: Tensor, scale: Tensor, zero: Tensor, top: int, whole: bool) -> Tensor:
    """Values of an evenly spaced grid of codes 0 to `top`; scale and zero are `(..., 1)`, weight `(..., g)`, float32.

    whole: the zero-point is a whole number and is added after rounding, as in :func:`fewbit.grids.integer.encode`.
    """
    return _apply(_Even, weight, scale, zero, top, whole)


def round_to_levels(weight: Tensor, scale: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Values ``scale * level`` of a codebook; scale is `(..., 1)`, weight `(..., g)`, float32."""
    known = Levels(lambda u: codebook.quantize(u, levels), levels[0], levels[-1], len(levels))
    return round_to_nearest(weight, scale, known)


def round_to_nearest(weight: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """As :func:`round_to_levels`, with a function that finds the nearest level."""
    return _apply(_Levels, weight, scale, levels)


def round_to_magnitudes(weight: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """The nearest of ``+-small`` and ``+-large``, all of one shape, float32; gradients go to the chosen magnitude."""
    return _apply(_Nearest, weight, small, large)


def seen_as(wanted: Tensor, seen: Tensor, damping: float = 1.0) -> Tensor:
    """`seen` (the decoded value of `wanted`); the gradient, times `damping`, goes to `wanted`."""
    return _apply(_Through, wanted, seen, damping)


def _apply(function: Any, *arguments: Any) -> Tensor:
    result = function.apply(*arguments)
    assert isinstance(result, Tensor)
    return result
