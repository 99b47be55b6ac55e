"""Codes times scales: a tensor that is stored as numbers of few bits, with one scale for a block of them."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Scaled(Generic[Entry]):
    """How a tensor is read from codes.

    dtype: of the codes. scale: where the scales lie. shape: of the scales, with one dimension for each of the tensor's.
    block: how many elements of each dimension share a scale.
    """

    dtype: torch.dtype
    scale: Entry
    shape: tuple[int, ...]
    block: tuple[int, ...]


def product(codes: Tensor, scale: Tensor, scaled: Scaled[Any], shape: tuple[int, ...], first: int) -> Tensor:
    """Some rows of a tensor: codes times their scales, float32.

    codes: `(rows, columns)`, from row `first` on of the tensor of `shape`, all but its last dimension seen as one.
    scale: of any shape, with the elements of `scaled.shape`.
    """
    rows = torch.arange(first, first + codes.shape[0])
    places: list[Tensor] = []
    for size, block in zip(reversed(shape[:-1]), reversed(scaled.block[:-1]), strict=True):
        places.insert(0, torch.remainder(rows, size) // block)
        rows = rows // size
    factors = scale.to(torch.float32).reshape(scaled.shape)[tuple(places)].view(codes.shape[0], -1)
    if factors.shape[1] != 1:
        factors = factors.repeat_interleave(scaled.block[-1], dim=1)[:, : codes.shape[1]]
    return codes.to(torch.float32) * factors
