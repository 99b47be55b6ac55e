"""The inputs of a layer, rounded while the model runs: the choice in a recipe, and the rounding."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.choices import check_values
from fewbit.errors import FewbitError
from fewbit.grids import integer

KEPT = 16
"""Bits of inputs that are not rounded."""
INPUT_BITS = (8, KEPT)


@dataclass(frozen=True)
class InputChoice:
    """How the inputs of the linear layers are rounded at run time. bits: 8, or 16 for not at all."""

    bits: int = KEPT

    def __post_init__(self) -> None:
        check_values(self, {"bits": "input_bits"})
        if self.bits not in INPUT_BITS:
            raise FewbitError(f"input_bits must be {' or '.join(map(str, INPUT_BITS))}, not {self.bits}")

    @property
    def stored(self) -> int:
        """The bits as a :class:`fewbit.grids.scheme.Scheme` has them: 0 if inputs are not rounded."""
        return 0 if self.bits == KEPT else self.bits


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Inputs `(..., in)` rounded symmetrically, each token with a float32 scale of its own, in the dtype of `x`.

    ``s = max|x| / (2^(b-1) - 1)`` and ``x' = s round(x / s)``. Gradients pass unchanged.
    """
    return _Rounded.apply(x, bits) if torch.is_grad_enabled() and x.requires_grad else _rounded(x, bits)


def _rounded(x: Tensor, bits: int) -> Tensor:
    wide = x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    scale, middle = integer.symmetric_grid(-largest, largest, bits), float(2 ** (bits - 1))
    return integer.encode(wide, scale, middle, bits).sub_(middle).mul_(scale).to(x.dtype)


class _Rounded(torch.autograd.Function):
    """The rounding, straight through which gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        return _rounded(x, bits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
