"""Observe the linear layers of a running model: their inputs, and in a backward pass the gradients of their outputs.

In any architecture, a linear layer is a call of ``linear`` (or ``addmm``, or a matrix product) with a weight that can
be recognised by its memory address, whether it is a module's own or one expert's slice of a fused tensor. So function
calls are intercepted, not modules.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewbit.errors import FewbitError
from fewbit.linear import linear

Observer = Callable[[str, Tensor, Tensor | None], None]
"""Called with a layer's key, inputs `(tokens, in)` and, in a backward pass, output gradients `(tokens, out)`."""
Replacement = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]
"""Called with a layer's key, inputs `(..., in)`, weight `(out, in)` and bias; returns its outputs `(..., out)`."""


@dataclass(frozen=True)
class Watched:
    """One weight that is watched: the module that owns it, the parameter's name, and the expert (None: not fused).

    transposed: whether it is stored as (in, out); every use is checked against this (None: not known). scope: the
    module whose forward uses it, if that is not the module that owns it.
    """

    key: str
    module: nn.Module
    parameter: str
    expert: int | None = None
    transposed: bool | None = None
    scope: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        """The matrix as the model stores it."""
        whole = getattr(self.module, self.parameter)
        return whole if self.expert is None else whole[self.expert]

    @property
    def inputs(self) -> int:
        """How many inputs the layer has."""
        return self.weight.shape[-2 if self.transposed else -1]


@contextmanager
def watching(layers: list[Watched], observer: Observer, backward: bool) -> Iterator[None]:
    """While inside, `observer` is called for every use of the watched weights.

    It gets the inputs, or with `backward`, in the backward pass, the inputs and the output gradients. This works with
    activation checkpointing. The weights get no gradients.
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
    """While inside, every use of the watched weights is computed by `replacement` instead."""
    with _intercepting(layers, replacement, in_pieces=False):
        yield


@contextmanager
def _intercepting(layers: list[Watched], answer: "_Answer", in_pieces: bool = True) -> Iterator[None]:
    """in_pieces: also intercept a batched product with all parts of a weight that is split by rows."""
    found = {layer.weight.data_ptr(): layer for layer in layers}
    users = [module for layer in layers for module in (layer.module, layer.scope) if module is not None]
    owners = {id(module): module for module in users}
    before = {key: module.__dict__.get("forward") for key, module in owners.items()}
    inside = threading.local()
    try:
        for module in owners.values():
            module.forward = _Watching(module.forward, _LinearMode(found, answer, in_pieces), inside)
        yield
    finally:
        for key, module in owners.items():
            module.__dict__.pop("forward", None)
            outer = before[key]
            if outer is not None:
                module.forward = outer


_Answer = Callable[[str, Tensor, Tensor, Tensor | None], Tensor | None]
"""Like a Replacement, but None leaves the call unchanged."""


class _Watching:
    """A module's forward, run in a mode that intercepts calls of linear, also when a checkpoint recomputes it.

    inside: whether the thread already runs such a forward. A module inside another needs no mode of its own.
    """

    def __init__(self, forward: Any, mode: "_LinearMode", inside: threading.local) -> None:
        self._forward, self._mode, self._inside = forward, mode, inside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self._inside, "now", False):
            return self._forward(*args, **kwargs)
        self._inside.now = True
        try:
            with self._mode.another():
                return self._forward(*args, **kwargs)
        finally:
            self._inside.now = False


class _LinearMode(TorchFunctionMode):
    def __init__(self, found: dict[int, Watched], answer: _Answer, in_pieces: bool) -> None:
        super().__init__()
        self._found, self._answer, self._in_pieces = found, answer, in_pieces

    def another(self) -> "_LinearMode":
        """A new mode with the same settings: a mode object has state, so every thread needs its own."""
        return _LinearMode(self._found, self._answer, self._in_pieces)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reader = _READERS.get(func)
        out = None
        if reader is not None:
            use = reader(self._found, args, kwargs)
            out = self._of_stack(use) if use is not None and use.weight.dim() == 3 else self._of(use)
        return func(*args, **kwargs) if out is None else out

    def _of(self, use: "_Use | None") -> Tensor | None:
        if use is None:
            return None
        layer = self._found[use.weight.data_ptr()]
        if use.weight.numel() != layer.weight.numel():
            # Only the first rows of the weight; the other rows could not be recognised.
            return None
        _check_side(layer, use)
        out = self._answer(layer.key, use.x, use.weight, use.bias)
        return None if out is None else use.finish(out)

    def _of_stack(self, use: "_Use") -> Tensor | None:
        """A batched product with all experts, or with all pieces of one weight; unwatched weights are not affected."""
        whole = self._found[use.weight.data_ptr()]
        pieces = whole.expert is None and use.weight.numel() == whole.weight.numel()
        if (pieces and not self._in_pieces) or use.x.shape[0] != use.weight.shape[0]:
            return None
        answers: list[Tensor | None] = []
        for x, weight in zip(use.x, use.weight, strict=True):
            layer = whole if pieces else self._found.get(weight.data_ptr())
            if layer is not None:
                _check_side(layer, use)
            answers.append(None if layer is None else self._answer(layer.key, x, weight, None))
        if all(answer is None for answer in answers):
            return None
        pairs = zip(answers, use.x, use.weight, strict=True)
        outs = [linear(x, weight) if answer is None else answer for answer, x, weight in pairs]
        return use.finish(torch.stack(outs))


@dataclass(frozen=True)
class _Use:
    """A function call that is a linear layer.

    x: inputs `(..., in)`. weight: `(out, in)`, or a batch of these. bias: `(out,)`. finish: converts `(..., out)` to
    the form of the call's result.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    finish: Callable[[Tensor], Tensor] = field(default=lambda out: out)


def _check_side(layer: Watched, use: _Use) -> None:
    """Raise FewbitError if the network uses a weight the other way round than the checkpoint was read."""
    stored, read = layer.weight, use.weight
    if layer.transposed is None or stored.shape[0] == 1 or stored.shape[1] == 1:
        return
    as_stored = read.stride()[-2:] == stored.stride() and read.shape[-1] == stored.shape[-1]
    if as_stored == layer.transposed:
        kind = "(out, in)" if as_stored else "(in, out)"
        raise FewbitError(
            f"{layer.key}: the network stores it as {kind}, which is the transpose of what the checkpoint's shapes "
            "suggest: keep it with --exclude"
        )


def _of_linear(found: dict[int, Watched], args: Any, kwargs: Any) -> _Use | None:
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    if weight.data_ptr() not in found:
        return None
    x = args[0] if args else kwargs["input"]
    return _Use(x, weight, args[2] if len(args) > 2 else kwargs.get("bias"))


def _of_addmm(found: dict[int, Watched], args: Any, kwargs: Any) -> _Use | None:
    if len(args) != 3 or kwargs or args[2].data_ptr() not in found:
        return None
    return _Use(args[1], args[2].t(), args[0])


def _of_product(found: dict[int, Watched], args: Any, kwargs: Any) -> _Use | None:
    if len(args) != 2 or kwargs or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
        return None
    first, second = args
    if second.data_ptr() in found and second.dim() in (2, 3) and (second.dim() == 2 or first.dim() == 3):
        return _Use(first, second.transpose(-1, -2))
    if first.data_ptr() in found and first.dim() in (2, 3) and (first.dim() == 2 or second.dim() == 3):
        if second.dim() == 1:
            return _Use(second, first)
        return _Use(second.transpose(-1, -2), first, finish=lambda out: out.transpose(-1, -2))
    return None


_Reader = Callable[[dict[int, Watched], Any, Any], _Use | None]
_READERS: dict[Any, _Reader] = {
    nn.functional.linear: _of_linear,
    linear: _of_linear,
    torch.addmm: _of_addmm,
    torch.matmul: _of_product,
    torch.Tensor.matmul: _of_product,
    torch.Tensor.__matmul__: _of_product,
    torch.mm: _of_product,
    torch.Tensor.mm: _of_product,
    torch.bmm: _of_product,
    torch.Tensor.bmm: _of_product,
}
"""Functions that can be a linear layer, and their readers; a reader returns None if no weight is watched."""


class _Observed(torch.autograd.Function):
    """A linear layer that passes its inputs and output gradients to an observer and computes no weight gradient."""

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
