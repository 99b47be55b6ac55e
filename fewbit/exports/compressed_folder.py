"""Write a quantized folder in the format compressed-tensors, which transformers and vLLM load."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.checkpoints.json_file import write_json
from fewbit.checkpoints.output import CONFIG
from fewbit.checkpoints.safetensors_io import FileReader, ShardWriter, TensorEntry, header_room
from fewbit.checkpoints.shards import shard_name, split_by_size
from fewbit.checkpoints.source import INDEX_NAME, Checkpoint
from fewbit.checkpoints.workdir import WorkFolder, copy_companions, write_index
from fewbit.errors import ChangedError
from fewbit.exports.compressed_weights import FORMS, InexactError, arguments_of, form_of, input_arguments_of
from fewbit.formats.config import tables_of, tied_of, weights_of
from fewbit.formats.native import part_layout, stored_bytes
from fewbit.grids.scheme import StoredWeight
from fewbit.grids.table import GRIDS
from fewbit.progress import Progress
from fewbit.runtime.unpack import read_parts, read_weight
from fewbit.runtime.whole import plain_dtype

PACKAGE_VERSION = "0.17.0"
"""The release of compressed-tensors whose files are written."""
EXPERT = re.compile(r"(.*\.experts\.)[0-9]+(\..*)")
"""The name of a module in one of several experts."""
_SHARD_BYTES = 5_000_000_000
_HEAD = "lm_head"
_DENSE_SINCE = "0.18"


@dataclass(frozen=True)
class _Item:
    """What is written for one tensor or packed weight of the folder.

    kind: for the report. entry: the tensor to copy; otherwise stored: the packed weight to convert, or to decode if it
    is_table.
    """

    name: str
    bytes: int
    kind: str
    entry: TensorEntry | None = None
    stored: StoredWeight | None = None
    is_table: bool = False


def compressed_problem(checkpoint: Checkpoint, embeddings: str) -> str | None:
    """Why a model cannot be written in this format; None if it can, as far as headers tell.

    embeddings: only keep; those that are packed are decoded.
    """
    where = str(checkpoint.folder)
    if embeddings != "keep":
        return "--embeddings is for --format gguf: compressed-tensors has embeddings and heads in 16 bits"
    if not checkpoint.is_native:
        return f"{where}: is not quantized by fewbit: quantize the original with  --for transformers --bits 4"
    weights, tables = weights_of(checkpoint), tables_of(checkpoint)
    for module, stored in weights.items():
        problem = None if module in tables else _refusal(stored)
        if problem:
            return f"{where}: {module}: compressed-tensors holds no {problem}"
    return None


def _refusal(stored: StoredWeight) -> str | None:
    scheme = stored.scheme
    advice = f"quantize the original with  --for transformers --bits {_nearest_bits(scheme.whole_bits)}"
    if stored.original_shape is not None:
        return "experts that are fused in one tensor: keep them in 16 bits with  --exclude"
    if stored.transposed:
        return "weights that are stored as (in, out): use  fewbit unpack"
    form = form_of(scheme)
    if form is not None and form.of_rows and stored.groups > 1:
        return (
            f"rounded inputs with weights in groups of {scheme.group_size}: quantize the original with  --method w8a8"
        )
    if form is not None:
        return None
    if scheme.input_bits:
        return (
            f"rounded inputs with {scheme.bits:g} bits on the {GRIDS[scheme.grid].choice} grid: quantize the original "
            "with  --method w8a8"
        )
    outliers = " with outliers" if scheme.has_outliers else ""
    changed = " and a transform of its inputs" if scheme.transform != "none" else ""
    return (
        f"{scheme.bits:g} bits on the {GRIDS[scheme.grid].choice} grid{outliers}{changed} and {scheme.scale_format} "
        f"scales, only evenly spaced levels with plain scales ({', '.join(FORMS)}): {advice}"
    )


def _nearest_bits(bits: int) -> int:
    return min((2, 3, 4, 8), key=lambda held: (abs(held - bits), held))


def write_compressed(
    checkpoint: Checkpoint, work: WorkFolder, embeddings: str = "keep", progress: Progress | None = None
) -> dict[str, Any]:
    """Write a native folder into the folder of `work`: config, weights, tokenizer and companions.

    All weights decode to what `fewbit unpack` gives; packed embeddings and heads are written that way. Returns the
    number of tensors by kind, the bytes, and notes for the user. Raises ChangedError, which names the tensor, for a
    scale that is no number of the model's dtype.
    """
    dtype = plain_dtype(checkpoint)
    items = list(_items(checkpoint, dtype))
    shards = split_by_size(items, lambda item: item.bytes, _SHARD_BYTES)
    names = [shard_name(index, len(shards)) for index in range(len(shards))]
    written: dict[str, list[str]] = {}
    with FileReader() as reader:
        done = 0
        for shard, name in zip(shards, names, strict=True):
            # Up to four tensors replace a weight.
            room = header_room([f"{item.name}.weight_global_scale" for item in shard for _ in range(4)])
            writer = ShardWriter(work.shard(name), room)
            try:
                written[name] = []
                for item in shard:
                    written[name] += _write(writer, checkpoint, reader, item, dtype)
                    done += 1
                    if progress:
                        progress(done, len(items), item.name)
                writer.close()
            except BaseException:
                writer.abandon()
                raise
    copy_companions(checkpoint.companions, work)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    write_json(work.file(CONFIG), {**config, "quantization_config": quantization_config(checkpoint)})
    write_index(work, written)
    return {
        "file": names[0] if len(names) == 1 else INDEX_NAME,
        "tensors": dict(Counter(item.kind for item in items)),
        "bytes": work.shard_bytes,
        "rounded": {},
        "notes": list(_notes(items)),
    }


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `quantization_config` of a native folder as the package writes it.

    Weights that are stored alike are a config group: with the target Linear if there is one group, otherwise each with
    the names of its modules. What is not packed is ignored.
    """
    weights, tables = weights_of(checkpoint), tables_of(checkpoint)
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for module, stored in weights.items():
        if module in tables:
            continue
        form = form_of(stored.scheme)
        assert form is not None
        scheme = {
            "weights": arguments_of(form, stored),
            "input_activations": input_arguments_of(form),
            "output_activations": None,
            "format": form.format,
        }
        known = next((members for one, members in groups if one == scheme), None)
        if known is None:
            groups.append((scheme, [module]))
        else:
            known.append(module)
    formats = {scheme["format"] for scheme, _ in groups}
    targets = [["Linear"]] if len(groups) == 1 else [_targets(members) for _, members in groups]
    return {
        "quant_method": "compressed-tensors",
        "version": PACKAGE_VERSION,
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {"targets": named, **scheme}
            for index, (named, (scheme, _)) in enumerate(zip(targets, groups, strict=True))
        },
        "ignore": sorted(_kept_modules(checkpoint, weights)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _targets(members: list[str]) -> list[str]:
    """Targets for these modules: their names, and one regular expression for each weight of all experts of a layer.

    By such an expression, transformers finds the group of the experts.
    """
    found: dict[str, None] = {}
    for name in members:
        match = EXPERT.fullmatch(name)
        found[f"re:{re.escape(match[1])}[0-9]+{re.escape(match[2])}$" if match else name] = None
    return list(found)


def _kept_modules(checkpoint: Checkpoint, weights: Mapping[str, StoredWeight]) -> set[str]:
    """The modules with matrices that are not packed, among them a head that is tied and has no tensor of its own."""
    parts = {f"{module}.{part}" for module, stored in weights.items() for part in part_layout(stored)}
    kept = [name for name, entry in checkpoint.entries.items() if name not in parts and len(entry.shape) > 1]
    names = {name.removesuffix(".weight") for name in (*kept, *tied_of(checkpoint))}
    return {*names, *tables_of(checkpoint), _HEAD}


def _items(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[_Item]:
    """What is written, in storage order."""
    weights, tables = weights_of(checkpoint), tables_of(checkpoint)
    parts = {f"{module}.{part}": module for module, stored in weights.items() for part in part_layout(stored)}
    seen = set()
    for name, entry in checkpoint.entries.items():
        module = parts.get(name)
        if module is None:
            yield _Item(name, entry.bytes, _short(entry.dtype), entry=entry)
        elif module not in seen:
            seen.add(module)
            stored = weights[module]
            form = None if module in tables else form_of(stored.scheme)
            if form is None:
                yield _Item(module, stored.weights * dtype.itemsize, f"decoded {_short(dtype)}", None, stored, True)
            else:
                yield _Item(module, stored_bytes(stored), form.kind(stored.scheme), None, stored)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(
    writer: ShardWriter, checkpoint: Checkpoint, reader: FileReader, item: _Item, dtype: torch.dtype
) -> list[str]:
    """Write an item; returns the names of its tensors."""
    if item.entry is not None:
        writer.copy(item.entry, reader)
        return [item.name]
    stored = item.stored
    assert stored is not None
    if item.is_table:
        name = stored.tensor_name(item.name)
        writer.add(name, read_weight(checkpoint, reader, item.name, stored).to(dtype).view(stored.tensor_shape))
        return [name]
    form = form_of(stored.scheme)
    assert form is not None
    try:
        tensors = form.tensors(read_parts(checkpoint, reader, item.name, stored), stored, dtype)
    except InexactError as error:
        bits = _nearest_bits(stored.scheme.whole_bits)
        raise ChangedError(
            f"{checkpoint.folder}: {item.name}: {error}, in which compressed-tensors stores them: quantize the "
            f"original with  --for transformers --bits {bits}  or with  --scale-format {_short(dtype)}"
        ) from error
    for end, tensor in tensors.items():
        writer.add(f"{item.name}.{end}", tensor)
    return [f"{item.name}.{end}" for end in tensors]


def expert_problem(weights: Mapping[str, StoredWeight]) -> str | None:
    """Why transformers does not read the experts among these weights, which it joins while it loads them, or None."""
    experts = {name: stored.scheme for name, stored in weights.items() if EXPERT.fullmatch(name)}
    if len(set(experts.values())) > 1:
        return f"{next(iter(experts))}: transformers reads experts only if all are stored alike"
    for name, scheme in experts.items():
        form = form_of(scheme)
        if form is not None and not form.as_expert:
            kind = form.kind(scheme)
            return f"{name}: transformers does not read experts in {kind}: it joins them without their other numbers"
    return None


def _notes(items: list[_Item]) -> Iterator[str]:
    for item in items:
        if item.is_table and item.stored is not None:
            yield (
                f"{item.name}: its {item.stored.scheme.bits:g} bits are written decoded, in 16 bits: "
                "compressed-tensors folders have no packed embeddings"
            )
    experts = expert_problem(
        {item.name: item.stored for item in items if item.stored is not None and not item.is_table}
    )
    if experts:
        yield experts
    packed = [item.stored.scheme for item in items if item.stored is not None and not item.is_table]
    if any(scheme.input_bits for scheme in packed):
        yield (
            "inputs are rounded to 8 bits per token at run time: vLLM multiplies whole numbers, transformers rounds "
            "and multiplies in the model's dtype"
        )
    split = sorted({scheme.whole_bits for scheme in packed if 32 % scheme.whole_bits})
    if split:
        yield (
            f"{' and '.join(map(str, split))} bits are packed as compressed-tensors up to 0.17 reads them: releases "
            f"from {_DENSE_SINCE} on refuse or misread them"
        )
