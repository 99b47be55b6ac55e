"""Linear layers for processors without 16-bit arithmetic: computed in float32, stored in 16 bits.

If a processor has no bfloat16 or float16 products (x86 without AVX-512, which includes most desktops), torch emulates
them many times more slowly than float32. Here the factors of a product are widened, some rows of the weight at a time,
and the result is rounded once. This gives the result of a processor with 16-bit products that sums in float32, and
weights and activations take no more memory than before.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

# For fewer tokens the product is as fast as its weight can be read, and torch's own reads half the bytes.
_FEWEST_TOKENS = 8
# Numbers of a weight that are float32 at one time: 64 MB.
_WIDENED_AT_ONCE = 1 << 24


@lru_cache
def is_native(dtype: torch.dtype) -> bool:
    """Whether this machine's processor multiplies matrices of `dtype` at full speed, as far as torch can tell."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    try:
        return name is None or bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):
        return True


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for x `(..., in)`, weight `(out, in)` and bias `(out,)`, in their dtype, summed in float32."""
    if has_torch_function((x, weight)):
        return handle_torch_function(linear, (x, weight), x, weight, bias)
    if torch.compiler.is_compiling():
        # A compiler chooses products of its own, and cannot ask the processor.
        return nn.functional.linear(x, weight, bias)
    tokens = x.numel() // max(1, x.shape[-1])
    if x.device.type != "cpu" or x.dtype != weight.dtype or tokens < _FEWEST_TOKENS or is_native(x.dtype):
        return nn.functional.linear(x, weight, bias)
    return _Widened.apply(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use_fast_products(model: nn.Module) -> None:
    """Make every plain linear layer of `model` a :class:`Linear`, in place; weights, names and numbers stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class _Widened(torch.autograd.Function):
    """A product in float32 by rows of the weight, and its gradients; 16-bit factors are what is kept for those."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        wide = x.float()
        out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
        for rows in _rows(weight):
            shift = bias[rows].float() if bias is not None else None
            out[..., rows] = nn.functional.linear(wide, weight[rows].float(), shift)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        back = torch.zeros(flat.shape[0], x.shape[-1]) if for_x else None
        moved = torch.empty_like(weight) if for_weight else None
        wide = x.reshape(-1, x.shape[-1]).float() if for_weight else x
        for rows in _rows(weight):
            part = flat[:, rows].float()
            if back is not None:
                back.addmm_(part, weight[rows].float())
            if moved is not None:
                moved[rows] = (part.t() @ wide).to(weight.dtype)
        return (
            back.to(x.dtype).view(x.shape) if back is not None else None,
            moved,
            flat.sum(0, dtype=torch.float32).to(weight.dtype) if for_bias and ctx.has_bias else None,
        )


def _rows(weight: Tensor) -> Iterator[slice]:
    at_once = max(1, _WIDENED_AT_ONCE // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], at_once):
        yield slice(first, first + at_once)
