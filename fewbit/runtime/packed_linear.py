"""A linear layer whose weight stays packed in memory and is unpacked only while it is used."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewbit.formats import native
from fewbit.formats.native import GUARD, part_layout
from fewbit.grids.scheme import StoredWeight
from fewbit.runtime.decoded import to_look_at
from fewbit.runtime.kernels.ready import Ready, at_once, product
from fewbit.runtime.kernels.ready import back as for_inputs

_BUFFER = "packed_"
"""Prefix of a buffer's name, because a part may have a name that a module already uses, such as `weight`."""
_SKIPPED = len(_BUFFER)
GUARD_BUFFER = "guard"
"""The buffer that is saved as the guard (:data:`fewbit.formats.native.GUARD`)."""


def add_parts(module: nn.Module, stored: StoredWeight, device: torch.device | str) -> None:
    """Register a buffer in `module` for every part, so that `.to(device)`, device maps and offloading move them."""
    for name, (dtype, shape) in part_layout(stored).items():
        module.register_buffer(buffer_name(name), torch.empty(shape, dtype=dtype, device=device))
    module.register_buffer(GUARD_BUFFER, torch.empty(GUARD[1], dtype=GUARD[0], device=device))


def buffer_name(part: str) -> str:
    """The name of the buffer of a part."""
    return _BUFFER + part


def parts_of(module: nn.Module) -> dict[str, Tensor]:
    """The parts in `module` itself, by name."""
    found = module._buffers.items()
    return {name[_SKIPPED:]: buffer for name, buffer in found if buffer is not None and name.startswith(_BUFFER)}


def remember_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Store the module's floating-point dtype as `module.like.dtype`, so that `.to(dtype)` changes it."""
    module.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)


class PackedLinear(nn.Linear):
    """``y = x W^T + b`` with W in its stored form.

    The result equals that of a plain linear layer with the decoded weight in the dtype of `x`. Gradients are computed
    for `x` and the bias; the backward pass keeps the packed weight, not the decoded one. name: the weight's name in the
    checkpoint, without the names of its parts.
    """

    like: Tensor

    def __init__(
        self,
        stored: StoredWeight,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        name: str = "",
    ) -> None:
        nn.Module.__init__(self)
        self.stored, self.name = stored, name
        self.out_features, self.in_features = stored.shape
        add_parts(self, stored, device)
        remember_dtype(self, dtype)
        self.ready = Ready(stored, _BUFFER)
        self.takes_inputs_as_they_are = stored.scheme.transform == "none" and not stored.scheme.input_bits
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight `(out, in)`, decoded at each access; it cannot be changed in place."""
        return to_look_at(self.decode(self.like.dtype))

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight `(out, in)` in `dtype`, on the layer's device."""
        return native.decode(parts_of(self), self.stored, dtype)

    def decode_stored(self, dtype: torch.dtype) -> Tensor:
        """The weight `(out, in)` for transformed inputs, in `dtype`."""
        return native.decode_stored(parts_of(self), self.stored, dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        has_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if not has_gradient and self.takes_inputs_as_they_are:
            found = at_once(self.ready, self._buffers, x, bias)
            if found is not None:
                return found
        parts = parts_of(self)
        x = native.transform_inputs(x, parts, self.stored)
        if has_gradient:
            return _Product.apply(x, bias, self)
        return product(self.ready, parts, self.stored, x, bias)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # The parts may move: what was prepared must not keep the old ones.
        self.ready.forget()
        return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        scheme = self.stored.scheme
        shape = f"{self.in_features} -> {self.out_features}"
        return f"{shape}, {scheme.bits:g} bits, {scheme.grid}, {self.stored.outliers} outliers"


class _Product(torch.autograd.Function):
    """The product of a packed layer. The backward pass decodes the weight again, so that no 16-bit model is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return product(layer.ready, parts_of(layer), layer.stored, x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        for_x, for_bias, _ = ctx.needs_input_grad
        layer = ctx.layer
        back = for_inputs(layer.ready, parts_of(layer), layer.stored, gradient).to(ctx.dtype) if for_x else None
        flat = gradient.reshape(-1, gradient.shape[-1])
        return back, flat.sum(0, dtype=torch.float32).to(ctx.layer.bias.dtype) if for_bias else None, None
