"""Tensors that are stored as low-bit codes with one scale per block, and read as the products of the two."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Scaled(Generic[Entry]):
    """How a tensor is read from codes.

    dtype: of the codes. scale: location of the scales. shape: of the scales, with as many dimensions as the tensor.
    block: how many elements of each dimension share a scale.
    """

    dtype: torch.dtype
    scale: Entry
    shape: tuple[int, ...]
    block: tuple[int, ...]


def product(codes: Tensor, scale: Tensor, scaled: Scaled[Any], shape: tuple[int, ...], first: int) -> Tensor:
    """Some rows of a tensor: codes times their scales, float32.

    codes: `(rows, columns)`, starting at row `first` of the tensor of `shape`, flattened except for its last dimension.
    scale: float32, of any shape with as many elements as `scaled.shape`.
    """
    rows = torch.arange(first, first + codes.shape[0])
    places: list[Tensor] = []
    for size, block in zip(reversed(shape[:-1]), reversed(scaled.block[:-1]), strict=True):
        places.insert(0, torch.remainder(rows, size) // block)
        rows = rows // size
    factors = scale.reshape(scaled.shape)[tuple(places)].view(codes.shape[0], -1)
    if factors.shape[1] != 1:
        factors = factors.repeat_interleave(scaled.block[-1], dim=1)[:, : codes.shape[1]]
    return codes.to(torch.float32) * factors
