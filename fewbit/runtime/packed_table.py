"""Embeddings and heads: rows of tokens are gathered and decoded, and a head is multiplied some rows at a time.

The whole weight is decoded only for a module that does something else with it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewbit.formats import native
from fewbit.linear import Linear, linear
from fewbit.runtime.kernels.ready import through_kernel
from fewbit.runtime.packed_linear import parts_of

Work = Callable[[Any, torch.dtype], Tensor]
"""Computes something from a :class:`fewbit.runtime.packed_parameter.PackedWeight`, in a dtype."""

# What is known of a tensor that is not decoded yet.
_KNOWN = frozenset(("__get__", "size", "dim", "numel", "stride", "is_floating_point", "get_device", "__len__"))


def has_rows(value: Any) -> bool:
    """Whether a packed parameter (:class:`fewbit.runtime.packed_parameter.PackedParameter`) can decode single rows."""
    if value.table is None:
        return False
    # What torch.compile traces cannot look into a cache.
    known = native.has_separate_rows if torch.compiler.is_compiling() else _has_separate_rows
    return known(value.table.stored)


_has_separate_rows = lru_cache(maxsize=256)(native.has_separate_rows)


def gather(value: Any, ids: Tensor) -> Tensor:
    """Rows `(..., in)` of a packed parameter, for ids `(...)`, in its dtype."""

    def work(weight: Any, dtype: torch.dtype) -> Tensor:
        found: Tensor = weight.rows(ids.reshape(-1), dtype)
        return found

    rows: Tensor = value.table(value.like.dtype, work)
    return rows.view(*ids.shape, rows.shape[-1])


def product(packed: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for a packed weight W and x `(..., in)`, some rows of W at a time if it is large."""
    parts, stored = parts_of(packed), packed.stored
    if not native.read_transform(parts, stored):
        found = through_kernel(packed.ready, parts, stored, x, bias)
        if found is not None:
            return found
    if stored.weights <= native.AT_ONCE or not native.has_separate_rows(stored):
        return linear(x, native.decode(parts, stored, x.dtype), bias)
    out = x.new_empty(*x.shape[:-1], stored.shape[0])
    for rows in native.row_slices(stored):
        weight = native.decode_rows(parts, stored, rows, x.dtype)
        out[..., rows] = linear(x, weight, None if bias is None else bias[rows])
    return out


def _back(packed: Any, gradient: Tensor) -> Tensor:
    """The gradient `(..., in)` of the inputs, for that of the outputs `(..., out)`."""
    parts, stored = parts_of(packed), packed.stored
    if stored.weights <= native.AT_ONCE or not native.has_separate_rows(stored):
        return linear(gradient, native.decode(parts, stored, gradient.dtype).t())
    total = gradient.new_zeros(*gradient.shape[:-1], stored.shape[1], dtype=torch.float32)
    for rows in native.row_slices(stored):
        total += linear(gradient[..., rows], native.decode_rows(parts, stored, rows, gradient.dtype).t())
    return total.to(gradient.dtype)


class _Product(torch.autograd.Function):
    """The product with a packed parameter. What is kept for the backward pass stays packed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, table: Any) -> Any:
        ctx.table, ctx.dtype, ctx.bias_dtype = table, x.dtype, None if bias is None else bias.dtype
        return table(x.dtype, lambda packed, dtype: product(packed, x, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        for_x, for_bias, _ = ctx.needs_input_grad
        back = for_b = None
        if for_x:
            back = ctx.table(gradient.dtype, lambda packed, dtype: _back(packed, gradient)).to(ctx.dtype)
        if for_bias:
            flat = gradient.reshape(-1, gradient.shape[-1])
            for_b = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return back, for_b, None


def _embed(module: Any, value: Any, input: Tensor) -> Any:
    if module.max_norm is not None or not has_rows(value):
        return None
    return gather(value, input)


def _multiply(module: Any, value: Any, input: Tensor) -> Any:
    if value.table is None:
        return None
    bias = module.bias
    if hasattr(value.table, "times"):
        # It is trained, and takes gradients itself.
        return value.table(input.dtype, lambda table, dtype: table.times(input, bias))
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        return _Product.apply(input, bias, value.table)
    return value.table(input.dtype, lambda packed, dtype: product(packed, input, bias))


DIRECT: dict[Any, Callable[..., Any]] = {
    nn.Embedding.forward: _embed,
    nn.Linear.forward: _multiply,
    Linear.forward: _multiply,
}
"""The forward pass of a class -> the same with a packed weight; that returns None if the weight does not allow it."""


class RowsOnDemand(Tensor):
    """A weight that is decoded when it is used: only some rows for an embedding, else all of it.

    It has the shape, dtype and device of the weight, and no memory. It is for embeddings with a forward pass of their
    own, such as those that scale what they look up.
    """

    value: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            named = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
            weight = named["weight"]
            if isinstance(weight, RowsOnDemand) and named.get("max_norm") is None:
                return gather(weight.value, named["input"])
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") in _KNOWN:
                return func(*args, **kwargs)
            args, kwargs = _decoded(args), _decoded(kwargs)
        return func(*args, **kwargs)


def rows_on_demand(value: Any) -> Tensor:
    """The weight of a packed parameter that has rows, not yet decoded."""
    shape, device = value.table.stored.tensor_shape, value.like.device
    lazy = torch.empty((), dtype=value.like.dtype, device=device).expand(shape).as_subclass(RowsOnDemand)
    lazy.value = value
    return lazy


def _decoded(given: Any) -> Any:
    if isinstance(given, RowsOnDemand):
        return given.value()
    if isinstance(given, dict):
        return {key: _decoded(one) for key, one in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(_decoded(one) for one in given)
    return given
