"""A foreign checkpoint as a list of tensors in fewbit's own stored form; nothing but headers is read to make it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.coverage import Coverage, WeightTensor, cover
from fewbit.checkpoints.companions import Companion
from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.errors import CannotImportError
from fewbit.formats.native import part_layout, stored_bytes
from fewbit.grids.scheme import StoredWeight


@dataclass(frozen=True)
class PackedTensor:
    """A quantized weight under the name `module`. read(): its parts.

    The parts are checked by the caller. `read` raises ValueError for content that the stored form cannot hold.
    """

    module: str
    stored: StoredWeight
    read: Callable[[], dict[str, Tensor]]
    is_table: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of its parts."""
        return stored_bytes(self.stored)

    @property
    def output(self) -> list[str]:
        """Names of its tensors in the output."""
        return [self.stored.tensor_name(self.module), *(f"{self.module}.{part}" for part in part_layout(self.stored))]


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is not quantized. read(): the tensor, in its shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def output(self) -> list[str]:
        """Names of its tensors in the output."""
        return [self.name]


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint.

    place: the file or folder. config: for config.json, without a description of the quantization. companions, left: the
    files that go with the weights, and the names of those that do not. files: all weight files. facts: what the report
    says about the foreign quantization.
    """

    place: Path
    tool: str
    config: dict[str, Any]
    tensors: list[PackedTensor | PlainTensor]
    files: list[Path]
    companions: tuple[Companion, ...] = ()
    left: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(path.stat().st_size for path in self.files)


def cover_logical(
    shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], place: Path
) -> dict[str, WeightTensor]:
    """Classify the tensors of the original model by their names and shapes, as if they were not quantized.

    Raises FewbitError for a config that does not describe a model.
    """
    entries = [TensorEntry(name, place, torch.float16, shape, 0, 0) for name, shape in shapes.items()]
    found: Coverage = cover(entries, config)
    return {tensor.entry.name: tensor for tensor in found.tensors}


def check_some_packed(tensors: Iterable[PackedTensor | PlainTensor], place: Path) -> None:
    """Raise CannotImportError if no layer is quantized."""
    if not any(isinstance(one, PackedTensor) and not one.is_table for one in tensors):
        raise CannotImportError(f"{place}: contains no quantized layers: give it to  fewbit quantize")
