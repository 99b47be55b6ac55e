"""Faster attention for two cases in which torch's own is slow on a CPU.

Gradients of 16-bit models on processors without 16-bit arithmetic: computed in float32. Torch's backward pass
multiplies 16-bit numbers one by one there, which takes as long as all linear layers together; its forward pass does
not. One new token with grouped queries, on any processor: the heads that share keys are computed as tokens of one head,
because torch's own reads the keys again for every head.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fewbit.linear import is_native


@contextmanager
def fast_attention(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which 16-bit attention in `modules` is computed in float32 on processors without 16-bit products."""
    if is_native(torch.bfloat16) and is_native(torch.float16):
        yield
        return
    changed = list(dict.fromkeys(part for module in modules for part in (module, *_holders(module))))
    before = [module.__dict__.get("forward") for module in changed]
    try:
        for module in changed:
            module.forward = _Attending(module.forward)
        yield
    finally:
        for module, forward in zip(changed, before, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _holders(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside that hold others, as an attention does its layers.

    What recomputes a part of the network may call any of them by itself; and where transformers checkpoints a block, it
    does so within the forward of its class, behind a forward of the instance.
    """
    return (part for part in module.modules() if next(part.children(), None) is not None)


class SharedKeys(TorchFunctionMode):
    """While inside, attention of one query `(batch, heads, 1, size)` to keys `(batch, fewer heads, tokens, size)` on a
    processor is computed for all heads that share keys at once; the same but for the order of sums.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not kwargs.get("enable_gqa"):
            return func(*args, **kwargs)
        query, key, value, *others = args if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
        batch, heads, tokens, _ = query.shape
        plain = not others and kwargs.get("attn_mask") is None and not kwargs.get("is_causal")
        if tokens != 1 or query.device.type != "cpu" or not plain:
            return func(*args, **kwargs)
        shared = query.view(batch, key.shape[1], heads // key.shape[1], -1)
        out = func(shared, key, value, dropout_p=kwargs.get("dropout_p", 0.0), scale=kwargs.get("scale"))
        return out.reshape(batch, heads, 1, -1)


class _Attending:
    """A module's forward under the mode; again when a checkpoint recomputes it, which no mode outside would see."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _WideAttention():
            return self._forward(*args, **kwargs)


class _WideAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        if torch.compiler.is_compiling() or query.device.type != "cpu" or is_native(query.dtype):
            return func(*args, **kwargs)
        wide = {name: _widened(value) for name, value in kwargs.items()}
        return func(*map(_widened, args), **wide).to(query.dtype)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
