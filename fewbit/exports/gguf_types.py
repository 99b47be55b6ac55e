"""Which type of tensor holds a stored weight, bit for bit, and its bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.formats.gguf_blocks import BLOCK_TYPES, to_blocks
from fewbit.grids.scheme import Scheme, StoredWeight

PLAIN = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 30)}
"""Dtypes of kept tensors -> name and number of their type."""
_GROUP = 32
_EVEN = {
    ("symmetric", 4, "float16"): "q4_0",
    ("symmetric", 5, "float16"): "q5_0",
    ("symmetric", 8, "float16"): "q8_0",
    ("minimum", 4, "float16"): "q4_1",
    ("minimum", 5, "float16"): "q5_1",
}
"""Grid, bits and scale format of ours -> the type with the same levels, if a group is a whole number of blocks."""


@dataclass(frozen=True)
class BlockForm:
    """The type that holds a stored weight. repeats: how many blocks share a scale of ours."""

    name: str
    repeats: int = 1


def form_of(scheme: Scheme) -> BlockForm | None:
    """The type of tensor that decodes to the same float32 weights; None if there is none."""
    if scheme.has_outliers or scheme.transform != "none":
        return None
    if scheme.grid in BLOCK_TYPES:
        return BlockForm(scheme.grid)
    name = _EVEN.get((scheme.grid, scheme.whole_bits, scheme.scale_format))
    return BlockForm(name, scheme.group_size // _GROUP) if name and scheme.group_size % _GROUP == 0 else None


def blocks_of(parts: Mapping[str, Tensor], stored: StoredWeight, form: BlockForm) -> Tensor:
    """The bytes `(rows, bytes)` of a stored weight in its type."""
    if stored.scheme.grid == form.name:
        return to_blocks(parts, stored)
    scheme = Scheme(stored.scheme.bits, _GROUP, form.name, scale_format="float16")
    spread = {
        name: part if part.dtype == torch.uint8 else part.repeat_interleave(form.repeats, dim=1)
        for name, part in parts.items()
    }
    return to_blocks(spread, replace(stored, scheme=scheme))


def plain_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8 with the last dimension in bytes."""
    return tensor.contiguous().view(torch.uint8)
