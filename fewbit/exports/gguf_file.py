"""Write a model as one .gguf file: metadata, tokenizer, and every tensor under llama.cpp's name."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.checkpoints.safetensors_io import FileReader, TensorEntry
from fewbit.checkpoints.source import Checkpoint
from fewbit.choices import check_name
from fewbit.errors import FewbitError, missing_extra
from fewbit.exports.gguf_architectures import Architecture, architecture_of, metadata, reordered
from fewbit.exports.gguf_tokenizer import tokenizer_facts
from fewbit.exports.gguf_types import PLAIN, BlockForm, blocks_of, form_of, plain_bytes
from fewbit.formats.config import recipe_of, weights_of
from fewbit.formats.gguf_blocks import BLOCK_TYPES, to_blocks
from fewbit.formats.native import part_layout
from fewbit.grids.grid import ScaleSearch
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import GRIDS
from fewbit.progress import Progress
from fewbit.runtime.unpack import read_parts, read_weight
from fewbit.runtime.whole import plain_dtype
from fewbit.solvers.settled import NotFiniteError, WeightChoices, round_rows
from fewbit.version import __version__

EMBEDDING_TYPES = (
    "keep",
    "f16",
    *(name for name, kind in BLOCK_TYPES.items() if name in ("q8_0", "q6_k", "q5_k", "q4_k")),
)
"""What embeddings and head can be rounded to. keep: as they are, or, if no type holds their packed form, as 16-bit
weights, with which they run."""
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_COMPUTED = (".rotary_emb.inv_freq",)
"""Endings of tensors that older checkpoints hold, and that are computed from the config."""
_ROWS = 1 << 14
_PHI_3 = re.compile("phi-?3", re.IGNORECASE)
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10}
_FILE_TYPES |= {"q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "tq2_0": 37}
"""The type of most weights -> `general.file_type`, which programs show."""


@dataclass(frozen=True)
class _Item:
    """One tensor of the file. shape: in weights. read(): its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    bytes_shape: tuple[int, ...]
    read: Callable[[], Tensor]


def gguf_problem(checkpoint: Checkpoint, embeddings: str) -> str | None:
    """Why a model cannot be written as GGUF; None if it can. Nothing is read but headers and the tokenizer.

    embeddings: as in :func:`write_gguf`.
    """
    try:
        check_name("embeddings", embeddings, EMBEDDING_TYPES)
        where = str(checkpoint.folder)
        found = architecture_of(checkpoint.config, where)
        dict(metadata(found, checkpoint.config, where))
        tokenizer_facts(checkpoint.folder, checkpoint.config)
        _check_schemes(checkpoint, _names(found, checkpoint))
    except FewbitError as error:
        return str(error)
    return None


def write_gguf(
    checkpoint: Checkpoint, path: Path, embeddings: str = "keep", progress: Progress | None = None
) -> dict[str, Any]:
    """Write a native folder, or a 16-bit one, to `path`.

    embeddings: the type to which embeddings and head are rounded, however they are stored, one of EMBEDDING_TYPES; all
    other tensors are written without loss. Returns the number of tensors by type, the bytes, and the relative squared
    errors of what was rounded. Raises FewbitError for what GGUF cannot hold.
    """
    gguf = import_gguf()
    check_name("embeddings", embeddings, EMBEDDING_TYPES)
    where = str(checkpoint.folder)
    found = architecture_of(checkpoint.config, where)
    _check_schemes(checkpoint, _names(found, checkpoint))
    facts = dict(metadata(found, checkpoint.config, where))
    tokenizer = tokenizer_facts(checkpoint.folder, checkpoint.config)
    errors: dict[str, float] = {}
    with FileReader() as reader:
        items = [*_own_tensors(found, checkpoint), *_items(found, checkpoint, reader, embeddings, errors)]
        types = Counter(item.kind for item in items)
        weights: Counter[str] = Counter()
        for item in items:
            weights[item.kind] += item.shape[0] * item.shape[1] if len(item.shape) == 2 else 0
        writer = gguf.GGUFWriter(None, found.name)
        _add(writer, "general.type", "model")
        _add(writer, "general.name", _model_name(path.stem, found, tokenizer.values["ggml.tokens"]))
        _add(writer, "general.quantized_by", f"fewbit {__version__}")
        _add(writer, "general.quantization_version", 2)
        _add(writer, "general.file_type", _FILE_TYPES[weights.most_common(1)[0][0]])
        for key, value in facts.items():
            _add(writer, key, value)
        for key, value in tokenizer.values.items():
            _add(writer, f"tokenizer.{key}", value)
        if recipe := recipe_of(checkpoint):
            _add(writer, "fewbit.recipe", json.dumps(recipe, sort_keys=True))
        for item in items:
            kind = gguf.GGMLQuantizationType(_number(item.kind))
            size = math.prod(item.bytes_shape)
            writer.add_tensor_info(item.name, item.bytes_shape, np.dtype(np.uint8), size, kind)
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for index, item in enumerate(items):
                writer.write_tensor_data(item.read().numpy())
                if progress:
                    progress(index + 1, len(items), item.name)
        finally:
            writer.close()
    return {"tensors": dict(types), "bytes": path.stat().st_size, "rounded": errors}


def import_gguf() -> Any:
    """The package gguf. Raises FewbitError that names the extra if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise missing_extra(error.name or "gguf", "gguf") from error
    return gguf


def _model_name(stem: str, found: Architecture, tokens: list[str]) -> str:
    """The file's name, which must say "phi-3" if the tokens are those of Phi-3, and must not otherwise.

    llama.cpp decides by the name whether spaces after these tokens are dropped, and fails if it lacks one of them.
    """
    has_them = {"<unk>", "<s>", "<|endoftext|>"} <= set(tokens)
    named = _PHI_3.search(stem) is not None
    if has_them and found.name == "phi3" and not named:
        return f"{stem} phi-3"
    return _PHI_3.sub("phi 3", stem) if named and not has_them else stem


def _number(kind: str) -> int:
    plain = dict(PLAIN.values())
    return plain[kind] if kind in plain else BLOCK_TYPES[kind].number


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a value with the type that llama.cpp expects: whole numbers are unsigned, other numbers are float32."""
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def _check_schemes(checkpoint: Checkpoint, names: dict[str, str]) -> None:
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


def _names(found: Architecture, checkpoint: Checkpoint) -> dict[str, str]:
    """The tensors and packed modules of a checkpoint -> llama.cpp's names.

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
        called = known.get_name(base, try_suffixes=(".weight", ".bias"))
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


def _own_tensors(found: Architecture, checkpoint: Checkpoint) -> Iterator[_Item]:
    for name, tensor in found.tensors(checkpoint.config).items():
        yield _Item(name, tuple(tensor.shape), "F32", (tensor.numel() * 4,), partial(plain_bytes, tensor))


def _items(
    found: Architecture, checkpoint: Checkpoint, reader: FileReader, embeddings: str, errors: dict[str, float]
) -> Iterator[_Item]:
    weights = weights_of(checkpoint) if checkpoint.is_native else {}
    config = checkpoint.config
    for source, name in _names(found, checkpoint).items():
        stored, entry = weights.get(source), checkpoint.entries.get(source)
        kind = embeddings
        if embeddings == "keep" and stored is not None and not _as_it_is(stored):
            kind = PLAIN[plain_dtype(checkpoint)][0]
        if name in _EMBEDDINGS and kind != "keep":
            yield _rounded(_table(checkpoint, reader, source, stored), name, kind, errors)
        elif stored is not None:
            yield _packed(checkpoint, reader, source, stored, (name, found.heads(f"{source}.weight", config)))
        elif entry is not None:
            yield _kept(entry, reader, name, found, found.heads(source, config))


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
) -> _Item:
    form, (name, heads) = form_of(stored.scheme), called
    assert form is not None
    rows, columns = stored.shape
    kind = BLOCK_TYPES[form.name]

    def read(form: BlockForm = form) -> Tensor:
        return reordered(blocks_of(read_parts(checkpoint, reader, module, stored), stored, form), heads).contiguous()

    return _Item(name, stored.shape, form.name, (rows, columns // kind.weights * kind.bytes), read)


def _kept(entry: TensorEntry, reader: FileReader, name: str, found: Architecture, heads: int) -> _Item:
    if entry.dtype not in PLAIN:
        raise FewbitError(f"{entry.name}: GGUF has no tensors of the type {entry.dtype}")
    # llama.cpp computes with norms and biases in float32.
    dtype = torch.float32 if len(entry.shape) == 1 else entry.dtype
    offset = found.norm_offset if name.endswith("_norm.weight") else 0.0

    def read() -> Tensor:
        tensor = reader.tensor(entry).to(dtype)
        return plain_bytes(reordered(tensor + offset if offset else tensor, heads))

    return _Item(name, entry.shape, PLAIN[dtype][0], (*entry.shape[:-1], entry.shape[-1] * dtype.itemsize), read)


def _rounded(table: _Table, name: str, kind: str, errors: dict[str, float]) -> _Item:
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

    return _Item(name, table.shape, kind if kind in BLOCK_TYPES else kind.upper(), (rows, width), read)


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
