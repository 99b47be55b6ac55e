"""A linear layer whose weight stays packed in memory and is unpacked for the moment of its use."""

import torch
from torch import Tensor, nn

from fewbit.formats import native
from fewbit.formats.native import part_layout
from fewbit.grids.scheme import StoredWeight
from fewbit.linear import linear


class PackedLinear(nn.Module):
    """``y = x W^T + b`` with W in its stored form; the parts are buffers, so `.to(device)` moves them.

    The result equals that of a plain linear layer that holds the decoded weight in the dtype of `x`.
    """

    def __init__(self, stored: StoredWeight, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta"):
        super().__init__()
        self.stored = stored
        self.out_features, self.in_features = stored.shape
        for name, (part_dtype, shape) in part_layout(stored).items():
            self.register_buffer(name, torch.empty(shape, dtype=part_dtype, device=device))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None
        self._dtype = dtype

    @property
    def weight(self) -> Tensor:
        """The decoded weight `(out, in)`, made anew each time."""
        return self.decode(self._dtype)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight `(out, in)` in `dtype`, on the layer's device."""
        return native.decode(self._parts(), self.stored, dtype)

    def forward(self, x: Tensor) -> Tensor:
        parts = self._parts()
        weight = native.decode_stored(parts, self.stored, x.dtype)
        return linear(native.transform_inputs(x, parts, self.stored), weight, self.bias)

    def _parts(self) -> dict[str, Tensor]:
        return dict(self.named_buffers(recurse=False))

    def extra_repr(self) -> str:
        scheme = self.stored.scheme
        shape = f"{self.in_features} -> {self.out_features}"
        return f"{shape}, {scheme.bits:g} bits, {scheme.grid}, {self.stored.outliers} outliers"
