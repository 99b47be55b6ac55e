"""Trainable embeddings and heads: rows of tokens are looked up, and a head is multiplied some rows at a time.

As for packed ones, the whole weight is decoded only for a module that does something else with it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewbit.architecture.orientation import from_matrix
from fewbit.formats import native
from fewbit.linear import linear
from fewbit.runtime.packed_table import Work
from fewbit.tuning.tuned_weight import TunedWeight


class TunedTensor(nn.Module):
    """A tensor of the checkpoint as it would be stored now, for a parameter that is made from it.

    Such a parameter may be that of fused experts, or a table: embeddings, or a head that is tied to them.
    """

    def __init__(self, weight: TunedWeight) -> None:
        super().__init__()
        self.tuned = weight

    @property
    def stored(self) -> Any:
        """Its stored form, as a packed weight has it."""
        return self.tuned.stored

    def forward(self, dtype: torch.dtype, work: Work | None = None) -> Tensor:
        """The tensor in `dtype`; with `work`, what that computes from this weight."""
        if work is not None:
            return work(self, dtype)
        return from_matrix(self.tuned.plain().to(dtype), self.stored.tensor_shape, self.stored.transposed)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `(n, in)` for ids `(n,)`. The gradient of a row is the sum over the ids that name it."""
        once, places = ids.unique(return_inverse=True)
        return nn.functional.embedding(places, self.tuned.rows(once).decoded().to(dtype))

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b`` for x `(..., in)`."""
        return product(self.tuned, x, bias)


def product(tuned: TunedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` with W as it would be stored now, for x `(..., in)`; gradients reach all three.

    If W is large, some of its rows are decoded at a time, again in the backward pass, so that nothing of it is kept.
    """
    stored = tuned.stored
    if stored.weights <= native.AT_ONCE or not native.has_separate_rows(stored):
        return linear(tuned.inputs(x), tuned.decoded().to(x.dtype), bias)
    trained = {name: value for name, value in tuned.named_parameters(recurse=False) if value.requires_grad}
    out: Tensor = _Product.apply(x, bias, tuned, tuple(trained), *trained.values())
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, tuned: TunedWeight, names: tuple[str, ...], *trained: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *trained)
        ctx.tuned, ctx.names, ctx.bias_dtype = tuned, names, None if bias is None else bias.dtype
        out = x.new_empty(*x.shape[:-1], tuned.stored.shape[0])
        for rows in native.row_slices(tuned.stored):
            weight = tuned.rows(rows).decoded().to(x.dtype)
            out[..., rows] = linear(x, weight, None if bias is None else bias[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, *trained = ctx.saved_tensors
        flat, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1]).t()
        back = torch.zeros(flat.shape[0], x.shape[-1], device=x.device)
        moved = [torch.empty_like(value) for value in trained]
        for rows in native.row_slices(ctx.tuned.stored):
            part = flat[:, rows]
            leaves = {name: value[rows].detach() for name, value in zip(ctx.names, trained, strict=True)}
            with torch.enable_grad():
                for leaf in leaves.values():
                    leaf.requires_grad_()
                weight = ctx.tuned.rows(rows, leaves).decoded()
            plain = weight.detach().to(x.dtype)
            back += linear(part, plain.t())
            # In the dtype of the inputs, as for a weight that is decoded as a whole.
            of_weight = linear(part.t().contiguous(), inputs.contiguous()).to(weight.dtype)
            for total, found in zip(moved, torch.autograd.grad(weight, list(leaves.values()), of_weight), strict=True):
                total[rows] = found
        of_bias = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return back.to(x.dtype).view(x.shape), of_bias, None, None, *moved
