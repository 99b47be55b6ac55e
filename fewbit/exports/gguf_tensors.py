"""The tensors of a .gguf file: their names in llama.cpp, their types, and how to read their bytes.

The experts of a layer are one tensor there, with a third dimension.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoints.safetensors_io import FileReader, TensorEntry
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError, missing_extra
from fewbit.exports.gguf_architectures import Architecture, experts_of, reordered
from fewbit.exports.gguf_types import PLAIN, BlockForm, blocks_of, form_of, plain_bytes
from fewbit.formats.config import weights_of
from fewbit.formats.gguf_blocks import BLOCK_TYPES, to_blocks
from fewbit.formats.native import part_layout
from fewbit.grids.grid import ScaleSearch
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import GRIDS
from fewbit.runtime.unpack import read_parts, read_weight
from fewbit.runtime.whole import plain_dtype
from fewbit.solvers.settled import NotFiniteError, WeightChoices, round_rows

_EMBEDDINGS = ("token_embd.weight", "output.weight")
_COMPUTED = (".rotary_emb.inv_freq",)
"""Endings of tensors that older checkpoints hold, and that are computed from the config."""
_ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
"""llama.cpp computes with them in float32."""
_EXPERT = re.compile(r"(?P<before>.+\.experts)\.(?P<index>\d+)\.(?P<after>.+)")
_ROWS = 1 << 14


@dataclass(frozen=True)
class Item:
    """One tensor of the file. shape: in weights. read(): its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    bytes_shape: tuple[int, ...]
    read: Callable[[], Tensor]


def import_gguf() -> Any:
    """The package gguf. Raises FewbitError that names the extra if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise missing_extra(error.name or "gguf", "gguf") from error
    return gguf


def check_schemes(checkpoint: Checkpoint, names: dict[str, str]) -> None:
    """Raises FewbitError for a packed weight that no type of GGUF holds, but for embeddings and heads."""
    weights = weights_of(checkpoint) if checkpoint.is_native else {}
    for module, stored in weights.items():
        if _as_it_is(stored) or names.get(module) in _EMBEDDINGS:
            continue
        scheme = stored.scheme
        outliers = " with outliers" if scheme.has_outliers else ""
        raise FewbitError(
            f"{checkpoint.folder}: {module}: no type of GGUF holds {scheme.bits:g} bits on the {scheme.grid} grid"
            f"{outliers} in groups of {scheme.group_size}: "
            f"quantize the original with  --for llama.cpp --bits {scheme.whole_bits}"
        )


def _as_it_is(stored: StoredWeight) -> bool:
    """Whether a type of GGUF holds a packed weight bit for bit."""
    return form_of(stored.scheme) is not None and stored.original_shape is None and not stored.transposed


def tensor_names(found: Architecture, checkpoint: Checkpoint) -> dict[str, str]:
    """The tensors and packed modules of a checkpoint -> llama.cpp's names; experts of a layer have the same.

    Raises FewbitError for an unknown one, and for a model that another tool quantized.
    """
    if checkpoint.foreign is not None or not (checkpoint.quantization is None or checkpoint.is_native):
        raise FewbitError(f"{checkpoint.folder}: quantized by another tool, which cannot be written as GGUF")
    gguf = import_gguf()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)
    known = gguf.get_tensor_name_map(architecture, int(checkpoint.config["num_hidden_layers"]))
    names = {}
    for source in _sources(checkpoint):
        base = source if source.endswith((".weight", ".bias")) else f"{source}.weight"
        called = known.get_name(_EXPERT.sub(r"\g<before>.\g<after>", base), try_suffixes=(".weight", ".bias"))
        if called is None:
            raise FewbitError(f"{checkpoint.folder}: {source}: llama.cpp has no such tensor in {found.name}")
        names[source] = called
    return names


def _sources(checkpoint: Checkpoint) -> Iterator[str]:
    """The names of tensors, and of modules in place of their packed parts, in storage order."""
    weights = weights_of(checkpoint) if checkpoint.is_native else {}
    parts = {f"{module}.{part}": module for module, stored in weights.items() for part in part_layout(stored)}
    seen = set()
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    for name in checkpoint.entries:
        source = parts.get(name, name)
        left_out = source.endswith(_COMPUTED) or (tied and source in ("lm_head.weight", "lm_head"))
        if source not in seen and not left_out:
            seen.add(source)
            yield source


def own_tensors(found: Architecture, checkpoint: Checkpoint) -> Iterator[Item]:
    """The float32 tensors that llama.cpp expects and no checkpoint has, such as factors of rotary embeddings."""
    for name, tensor in found.tensors(checkpoint.config).items():
        yield Item(name, tuple(tensor.shape), "F32", (tensor.numel() * 4,), partial(plain_bytes, tensor))


def items_of(
    found: Architecture, checkpoint: Checkpoint, reader: FileReader, embeddings: str, errors: dict[str, float]
) -> Iterator[Item]:
    """The tensors of a checkpoint; the errors of what is rounded go into `errors`.

    Raises FewbitError for experts of a layer that cannot be one tensor.
    """
    weights = weights_of(checkpoint) if checkpoint.is_native else {}
    config = checkpoint.config

    def item(source: str, name: str) -> Item:
        stored = weights.get(source)
        kind = embeddings
        if embeddings == "keep" and stored is not None and not _as_it_is(stored):
            kind = PLAIN[plain_dtype(checkpoint)][0]
        if name in _EMBEDDINGS and kind != "keep":
            return _rounded(_table(checkpoint, reader, source, stored), name, kind, errors)
        if stored is not None:
            return _packed(checkpoint, reader, source, stored, (name, found.heads(f"{source}.weight", config)))
        return _kept(checkpoint.entries[source], reader, name, found, found.heads(source, config))

    together: dict[str, list[str]] = {}
    for source, name in tensor_names(found, checkpoint).items():
        together.setdefault(name, []).append(source)
    for name, sources in together.items():
        experts = sorted(sources, key=_expert_of)
        items = [item(source, name) for source in experts]
        yield _joined(items, experts, config) if _EXPERT.fullmatch(sources[0]) else items[0]


def _expert_of(source: str) -> int:
    found = _EXPERT.fullmatch(source)
    return int(found["index"]) if found else 0


def _joined(items: Sequence[Item], sources: Sequence[str], config: dict[str, Any]) -> Item:
    """The experts of a layer as one tensor."""
    first, source = items[0], sources[0]
    if [_expert_of(one) for one in sources] != list(range(experts_of(config))):
        raise FewbitError(f"{source}: {len(items)} experts, but config.json says {experts_of(config)}")
    if {(one.kind, one.shape) for one in items} != {(first.kind, first.shape)}:
        kinds = ", ".join(sorted({one.kind for one in items}))
        raise FewbitError(f"{source}: GGUF has one type for all experts of a layer, not {kinds}: quantize them alike")

    def read() -> Tensor:
        return torch.stack([one.read() for one in items])

    return replace(first, shape=(len(items), *first.shape), bytes_shape=(len(items), *first.bytes_shape), read=read)


@dataclass(frozen=True)
class _Table:
    """An embedding or a head. rows(first, count): some of its rows."""

    name: str
    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]


def _table(checkpoint: Checkpoint, reader: FileReader, source: str, stored: StoredWeight | None) -> _Table:
    if stored is None:
        entry = checkpoint.entries[source]
        rows, columns = entry.shape
        return _Table(
            source,
            (rows, columns),
            lambda first, count: reader.read(entry, first * columns, count * columns).view(count, columns),
        )
    decoded: list[Tensor] = []

    def read(first: int, count: int) -> Tensor:
        if not decoded:
            decoded.append(read_weight(checkpoint, reader, source, stored))
        piece = decoded[0][first : first + count]
        if first + count == stored.shape[0]:
            decoded.clear()
        return piece

    return _Table(source, stored.shape, read)


def _packed(
    checkpoint: Checkpoint, reader: FileReader, module: str, stored: StoredWeight, called: tuple[str, int]
) -> Item:
    form, (name, heads) = form_of(stored.scheme), called
    assert form is not None
    rows, columns = stored.shape
    kind = BLOCK_TYPES[form.name]

    def read(form: BlockForm = form) -> Tensor:
        return reordered(blocks_of(read_parts(checkpoint, reader, module, stored), stored, form), heads).contiguous()

    return Item(name, stored.shape, form.name, (rows, columns // kind.weights * kind.bytes), read)


def _kept(entry: TensorEntry, reader: FileReader, name: str, found: Architecture, heads: int) -> Item:
    if entry.dtype not in PLAIN:
        raise FewbitError(f"{entry.name}: GGUF has no tensors of the type {entry.dtype}")
    # llama.cpp computes with norms, biases and routers in float32.
    dtype = torch.float32 if len(entry.shape) == 1 or name.endswith(_ROUTERS) else entry.dtype
    offset = found.norm_offset if name.endswith("_norm.weight") else 0.0

    def read() -> Tensor:
        tensor = reader.tensor(entry).to(dtype)
        return plain_bytes(reordered(tensor + offset if offset else tensor, heads))

    return Item(name, entry.shape, PLAIN[dtype][0], (*entry.shape[:-1], entry.shape[-1] * dtype.itemsize), read)


def _rounded(table: _Table, name: str, kind: str, errors: dict[str, float]) -> Item:
    """An embedding or a head in another type; its relative squared error goes into `errors` when it is read."""
    rows = table.shape[0]
    encode, width = _encoding(table, kind)

    def read() -> Tensor:
        pieces, lost, total = [], 0.0, 0.0
        for first in range(0, rows, _ROWS):
            data, error, norm = encode(table.rows(first, min(_ROWS, rows - first)))
            pieces.append(data)
            lost, total = lost + error, total + norm
        errors[table.name] = lost / total if total else 0.0
        return torch.cat(pieces)

    return Item(name, table.shape, kind if kind in BLOCK_TYPES else kind.upper(), (rows, width), read)


def _encoding(table: _Table, kind: str) -> tuple[Callable[[Tensor], tuple[Tensor, float, float]], int]:
    """The function from rows to their bytes, squared error and squared norm, and the bytes of a row."""
    columns = table.shape[1]

    def plain(piece: Tensor, dtype: torch.dtype) -> tuple[Tensor, float, float]:
        after = piece.to(dtype)
        if not bool(torch.isfinite(after).all()):
            raise FewbitError(f"{table.name}: a weight is too large for {kind}: give --embeddings q8_0")
        error, norm = (float(one.double().square().sum()) for one in (after.float() - piece.float(), piece.float()))
        return plain_bytes(after), error, norm

    if kind not in BLOCK_TYPES:
        dtype = next(dtype for dtype, (name, _) in PLAIN.items() if name == kind.upper())
        return partial(plain, dtype=dtype), dtype.itemsize * columns
    grid, block = GRIDS[kind], BLOCK_TYPES[kind]
    if columns % grid.block:
        raise FewbitError(f"{table.name}: {kind} needs a multiple of {grid.block} columns, not {columns}: use q8_0")
    scheme = Scheme(grid.widths[0], int(grid.brings["group_size"]), kind, scale_format=grid.scales)
    choices = WeightChoices(scheme, ScaleSearch())

    def blocks(piece: Tensor) -> tuple[Tensor, float, float]:
        try:
            found = round_rows(piece, choices, None, None)
        except NotFiniteError as error:
            raise FewbitError(f"{table.name}: a weight is NaN or infinite: the model is damaged") from error
        return (
            to_blocks(found.parts, StoredWeight(scheme, (len(piece), columns))),
            found.squared_error,
            found.squared_norm,
        )

    return blocks, columns // block.weights * block.bytes
