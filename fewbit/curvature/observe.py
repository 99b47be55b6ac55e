"""Watch the linear layers of a running model: their inputs, and on the way back the gradients of their outputs.

Whatever the architecture, a linear layer is a call of ``linear`` (or ``addmm``, or a product) with a weight whose
memory is known, be it a module's own or one expert's slice of a fused tensor. So calls are watched, not modules.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewbit.linear import linear

Observer = Callable[[str, Tensor, Tensor | None], None]
"""Called with a layer's key, its inputs `(tokens, in)` and, going back, gradients of its outputs `(tokens, out)`."""
Replacement = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]
"""Called with a layer's key, inputs `(..., in)`, weight `(out, in)` and bias; gives its outputs `(..., out)`."""


@dataclass(frozen=True)
class Watched:
    """One weight that is watched: the module that owns it, the parameter's name, and the expert (None: not fused)."""

    key: str
    module: nn.Module
    parameter: str
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """The matrix as the model stores it."""
        whole = getattr(self.module, self.parameter)
        return whole if self.expert is None else whole[self.expert]


@contextmanager
def watching(layers: list[Watched], observer: Observer, backward: bool) -> Iterator[None]:
    """While inside, `observer` sees every use of the watched weights: their inputs, or with `backward` inputs and
    gradients when a loss is differentiated. Works under activation checkpointing; weights get no gradients.
    """

    def seen(key: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if backward:
            return _Observed.apply(x, weight, bias, key, observer)
        observer(key, x.reshape(-1, x.shape[-1]), None)
        return None

    with _intercepting(layers, seen):
        yield


@contextmanager
def replacing(layers: list[Watched], replacement: Replacement) -> Iterator[None]:
    """While inside, every use of the watched weights gives what `replacement` makes of it instead."""
    with _intercepting(layers, replacement):
        yield


@contextmanager
def _intercepting(layers: list[Watched], answer: "_Answer") -> Iterator[None]:
    keys = {layer.weight.data_ptr(): layer.key for layer in layers}
    owners = {id(layer.module): layer.module for layer in layers}
    before = {key: module.__dict__.get("forward") for key, module in owners.items()}
    try:
        for module in owners.values():
            module.forward = _Watching(module.forward, keys, answer)
        yield
    finally:
        for key, module in owners.items():
            module.__dict__.pop("forward", None)
            outer = before[key]
            if outer is not None:
                module.forward = outer


_Answer = Callable[[str, Tensor, Tensor, Tensor | None], Tensor | None]
"""As a Replacement, or None for what the call gives by itself."""


class _Watching:
    """A module's forward, run under a mode that sees its calls of linear; again when a checkpoint recomputes it."""

    def __init__(self, forward: Any, keys: dict[int, str], answer: _Answer) -> None:
        self._forward, self._keys, self._answer = forward, keys, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _LinearMode(self._keys, self._answer):
            return self._forward(*args, **kwargs)


class _LinearMode(TorchFunctionMode):
    def __init__(self, keys: dict[int, str], answer: _Answer) -> None:
        super().__init__()
        self._keys, self._answer = keys, answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = _as_linear(func, args, kwargs)
        key = self._keys.get(call[1].data_ptr()) if call is not None else None
        if call is None or key is None:
            return func(*args, **kwargs)
        out = self._answer(key, *call)
        return func(*args, **kwargs) if out is None else out


def _as_linear(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Inputs, weight `(out, in)` and bias of a call that is a linear layer; None for any other."""
    if func is nn.functional.linear or func is linear:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return args[0], args[1] if len(args) > 1 else kwargs["weight"], bias
    if func is torch.addmm and len(args) == 3 and not kwargs:
        return args[1], args[2].t(), args[0]
    if func in _PRODUCTS and len(args) == 2 and args[1].dim() == 2:
        return args[0], args[1].t(), None
    return None


_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class _Observed(torch.autograd.Function):
    """A linear layer that shows its inputs and output gradients, and asks for no gradient of its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, key: str, observer: Observer) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.key, ctx.observer = key, observer
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        ctx.observer(ctx.key, x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
        return linear(gradient, weight.t()) if ctx.needs_input_grad[0] else None, None, None, None, None
