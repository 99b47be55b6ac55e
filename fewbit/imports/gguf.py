"""Read a GGUF file as a list of stored weights: blocks become parts of the grids with the same levels, bit for bit."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.coverage import WeightTensor
from fewbit.checkpoints.gguf import check_complete
from fewbit.checkpoints.gguf_header import GgufHeader, GgufTensor
from fewbit.checkpoints.gguf_parts import read_gguf
from fewbit.checkpoints.read_at import open_to_read, read_at
from fewbit.errors import CannotImportError, FewbitError
from fewbit.exports.gguf_architectures import reordered
from fewbit.exports.gguf_file import import_gguf
from fewbit.exports.gguf_types import PLAIN
from fewbit.formats.gguf_blocks import BLOCK_TYPES, from_blocks
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import GRIDS
from fewbit.imports.gguf_config import CONFIG_ADVICE, Model, extra_tensors, read_model, shapes_of
from fewbit.imports.source import PackedTensor, PlainTensor, Source, check_some_packed, cover_logical

_KINDS = {kind.number: name for name, kind in BLOCK_TYPES.items()}
_DTYPES = {number: dtype for dtype, (_, number) in PLAIN.items()}
_AT_ONCE = 1 << 24
"""Weights that are converted at one time."""


def open_gguf(path: Path, config: Path | None, scratch: Path) -> Source:
    """The tensors of a GGUF file. config: a folder with the model's config and tokenizer, or None for the file's own.

    scratch: an empty folder that exists as long as the source is used. Raises FewbitError for a file that is damaged,
    or that has an architecture or a type of tensor that fewbit lacks.
    """
    gguf = import_gguf()
    header = read_gguf(path, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    check_complete(path, header)
    if header.order != "<":
        raise FewbitError(f"{path}: is big-endian: convert it with  gguf-convert-endian FILE little")
    types = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    _check_tensors(path, header, types)
    model = read_model(path, header, config, scratch)
    _check_names(path, header, model)
    logical = cover_logical(shapes_of(model.names), model.config, path)
    reader = _Reader(path, model, logical)
    _check_computed(reader, header)
    tensors = [reader.tensor(header.tensors[called], name) for called, (name, _) in _in_order(header, model)]
    check_some_packed(tensors, path)
    counts = Counter(types[tensor.kind].lower() for tensor in header.tensors.values())
    facts: dict[str, Any] = {"types": dict(counts)}
    return Source(path, "GGUF", model.config, tensors, header.files, model.companions, model.left, facts)


def _check_tensors(path: Path, header: GgufHeader, types: Mapping[int, str]) -> None:
    """Raise FewbitError for types that fewbit lacks, rows that are no blocks, and tensors that lie over each other."""
    end, before = 0, ""
    place = path
    for tensor in sorted(header.tensors.values(), key=lambda one: (str(one.file), one.start)):
        if tensor.start < end and tensor.file == place:
            raise FewbitError(f"{place}: the tensors {before} and {tensor.name} overlap: the file is damaged")
        end, before, place = tensor.start + tensor.bytes, tensor.name, tensor.file
        if 0 in tensor.shape or not tensor.shape:
            raise FewbitError(f"{path}: the tensor {tensor.name} has no weights: the file is damaged")
        kind = BLOCK_TYPES.get(_KINDS.get(tensor.kind, ""))
        if kind is None and tensor.kind not in _DTYPES:
            raise CannotImportError(
                f"{path}: the tensor {tensor.name} has the type {types[tensor.kind]}, which fewbit has no grid for: "
                f"import a file with the types {', '.join(BLOCK_TYPES)}, or  fewbit quantize  this one"
            )
        if kind is not None and (len(tensor.shape) != 2 or tensor.shape[-1] % kind.weights):
            raise FewbitError(
                f"{path}: the tensor {tensor.name} has the shape {list(tensor.shape)}, which is no matrix with rows of "
                f"blocks of {kind.weights} weights: the file is damaged"
            )


def _in_order(header: GgufHeader, model: Model) -> list[tuple[str, tuple[str, tuple[int, ...]]]]:
    return [(called, model.names[called]) for called in header.tensors if called in model.names]


def _check_names(path: Path, header: GgufHeader, model: Model) -> None:
    """Raise FewbitError unless the file has exactly the tensors of its network, in their shapes."""
    computed = extra_tensors(model)
    for called, tensor in header.tensors.items():
        if called in computed and called not in model.names:
            continue
        if called not in model.names:
            raise CannotImportError(f"{path}: {called} has no place in a {model.config['model_type']}: {CONFIG_ADVICE}")
        name, shape = model.names[called]
        if tensor.shape != shape:
            raise CannotImportError(
                f"{path}: {called} is {list(tensor.shape)}, but its config gives {list(shape)} for {name}: the file is "
                f"damaged, or {CONFIG_ADVICE}"
            )
    missing = model.names.keys() - header.tensors.keys()
    if missing:
        raise FewbitError(f"{path}: has no tensor {min(missing)}: the file is incomplete")


def _check_computed(reader: "_Reader", header: GgufHeader) -> None:
    """Raise FewbitError unless the tensors that transformers computes from the config are those of the file."""
    for called, ours in extra_tensors(reader.model).items():
        tensor = header.tensors.get(called)
        if tensor is None or tensor.kind not in _DTYPES:
            raise CannotImportError(f"{reader.path}: has no {called}, which its config needs: {CONFIG_ADVICE}")
        theirs = reader.plain(tensor, 0, 0.0).float()
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-4):
            raise CannotImportError(f"{reader.path}: its {called} are not those of its config: {CONFIG_ADVICE}")


@dataclass(frozen=True)
class _Reader:
    path: Path
    model: Model
    logical: Mapping[str, WeightTensor]

    def tensor(self, tensor: GgufTensor, name: str) -> PackedTensor | PlainTensor:
        """A tensor of the file under its name in the network."""
        heads = self.model.architecture.heads(name, self.model.config)
        if heads and tensor.shape[0] % (2 * heads):
            raise CannotImportError(
                f"{self.path}: {tensor.name} does not have the rows of {heads} heads: {CONFIG_ADVICE}"
            )
        if tensor.kind in _DTYPES:
            offset = self.model.architecture.norm_offset if tensor.name.endswith("_norm.weight") else 0.0
            read = partial(self.plain, tensor, heads, offset)
            return PlainTensor(name, tensor.shape, _DTYPES[tensor.kind], read)
        kind, found = _KINDS[tensor.kind], self.logical[name]
        grid = GRIDS[kind]
        scheme = Scheme(grid.widths[0], int(grid.brings["group_size"]), kind, scale_format=grid.scales)
        rows, columns = tensor.shape
        stored = StoredWeight(scheme, (rows, columns), original_shape=found.original_shape)
        return PackedTensor(found.module, stored, partial(self.parts, tensor, scheme, heads), found.is_vocabulary)

    def bytes(self, tensor: GgufTensor, first: int, count: int) -> Tensor:
        """So many bytes of a tensor from byte `first`."""
        data = torch.empty(count, dtype=torch.uint8)
        view, position = memoryview(data.numpy()), tensor.start + first  # type: ignore[arg-type]
        descriptor = open_to_read(tensor.file)
        try:
            while len(view):
                got = read_at(descriptor, view, position)
                if got == 0:
                    raise FewbitError(f"{tensor.file}: the file ends inside {tensor.name}: fetch or copy it again")
                view, position = view[got:], position + got
        finally:
            os.close(descriptor)
        return data

    def plain(self, tensor: GgufTensor, heads: int, offset: float) -> Tensor:
        """A tensor that is not quantized."""
        value = self.bytes(tensor, 0, tensor.bytes).view(_DTYPES[tensor.kind]).view(tensor.shape)
        return restored(value - offset if offset else value, heads).contiguous()

    def parts(self, tensor: GgufTensor, scheme: Scheme, heads: int) -> dict[str, Tensor]:
        """The parts of a quantized tensor."""
        rows, columns = tensor.shape
        width, pieces = tensor.bytes // rows, []
        step = max(1, _AT_ONCE // columns)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            blocks = self.bytes(tensor, first * width, count * width).view(count, width)
            pieces.append(from_blocks(blocks, scheme))
        joined = {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}
        return {part: restored(value, heads).contiguous() for part, value in joined.items()}


def restored(rows: Tensor, heads: int) -> Tensor:
    """Inverse of :func:`fewbit.exports.gguf_architectures.reordered`."""
    if not heads:
        return rows
    order = reordered(torch.arange(rows.shape[0]), heads)
    back = torch.empty_like(order)
    back[order] = torch.arange(rows.shape[0])
    return rows[back]
