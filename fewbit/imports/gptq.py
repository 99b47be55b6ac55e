"""Read checkpoints of GPTQ (AutoGPTQ, GPTQModel, transformers), with act-order too.

qweight int32 (in bits / 32, out)       codes, down the columns
qzeros  int32 (groups, out bits / 32)   zero-points; version 1 holds them minus one
scales  (groups, out)
g_idx   int32 (in,)                     the group of each column
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoints.json_in import read_json_object
from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.checkpoints.source import Checkpoint
from fewbit.imports.layers import (
    FLOATS,
    WORDS,
    Entries,
    EvenLayer,
    checked,
    each,
    gather,
    middle,
    tensors_of,
    whole,
    with_config,
    without_order,
)
from fewbit.imports.settings import Settings, settings_of
from fewbit.imports.source import Source, check_some_packed
from fewbit.imports.words import add_one, dense_words, from_words

SIDE_FILE = "quantize_config.json"
_BITS = (2, 3, 4, 8)
_WORD = 32
_ENDINGS = ("qweight", "qzeros", "scales", "g_idx")
MADE_WITH = {
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path", "tokenizer"),
    *("model_file_base_name", "dataset", "batch_size", "module_name_preceding_first_block", "model_seqlen", "meta"),
    *("block_name_to_quantize", "use_cuda_fp16", "use_exllama", "disable_exllama", "max_input_length", "mse"),
    *("exllama_config", "cache_block_outputs", "modules_in_block_to_quantize", "pad_token_id", "hyb_act", "backend"),
    *("act_group_aware", "offload_to_disk", "offload_to_disk_path", "use_exllama_v2", "pack_impl", "parallel_packing"),
    *("v2", "v2_alpha", "v2_memory_device", "gptaq", "fail_safe", "failsafe", "moe", "lm_head", "inside_layer_modules"),
    *(
        "auto_gc",
        "compute_device_filter",
        "wait_for_submodule_finalizers",
        "vram_strategy",
        "device",
        "mock_quantization",
    ),
}
"""Keys that say how codes were made and computed with, and not what they mean."""
_MEANING = {"bits", "group_size", "desc_act", "sym", "quant_method", "method", "checkpoint_format", "format", "dynamic"}
_MEANING |= {"pack_dtype", "is_marlin_format", "adapter", "rotation"}


def open_gptq(checkpoint: Checkpoint) -> Source:
    """The tensors of a checkpoint. Raises FewbitError for other layouts, and for what the native format cannot hold."""
    side = checkpoint.folder / SIDE_FILE
    described = checkpoint.config.get("quantization_config")
    settings = settings_of(checkpoint.folder, described or (read_json_object(side) if side.is_file() else None))
    version = _check(settings)
    found, rest = gather(checkpoint, _ENDINGS, "qweight")
    layers = each(checkpoint, found, partial(_layer, settings, version))
    config = with_config(checkpoint)
    tensors = tensors_of(checkpoint, config, layers, rest)
    check_some_packed(tensors, checkpoint.folder)
    facts = {"bits": settings.values["bits"], "group_size": settings.values.get("group_size"), "version": version}
    companions = tuple(one for one in checkpoint.companions if one.name != SIDE_FILE)
    return Source(checkpoint.folder, "GPTQ", config, tensors, checkpoint.files, companions, checkpoint.left, facts)


def _check(settings: Settings) -> int:
    """The version of the format: 1 or 2."""
    settings.only(MADE_WITH | _MEANING)
    settings.one_of("bits", _BITS)
    form = settings.one_of("checkpoint_format", ("gptq", "gptq_v2"), settings.values.get("format", "gptq"))
    settings.one_of("pack_dtype", ("int32",), "int32")
    settings.empty("is_marlin_format", "codes in Marlin's order cannot be imported")
    settings.empty("adapter", "an adapter would be left out")
    settings.empty("rotation", "rotated weights cannot be imported")
    return 2 if form == "gptq_v2" else 1


def _layer(settings: Settings, version: int, module: str, entries: Entries) -> EvenLayer:
    words = checked(entries, "qweight", WORDS, 2)
    scales, zeros = checked(entries, "scales", FLOATS, 2), checked(entries, "qzeros", WORDS, 2)
    count, rows = scales.shape
    g_idx = entries.get("g_idx")
    bits = settings.number("bits")
    if settings.values.get("dynamic"):
        # Layers then have bits of their own, which follow from the numbers of columns and of words.
        columns = checked(entries, "g_idx", (torch.int32, torch.int64), 1).shape[0]
        bits = next((one for one in _BITS if dense_words(columns, one) == words.shape[0]), bits)
    columns = words.shape[0] * _WORD // bits
    size = settings.number("group_size", -1)
    expected = columns if size == -1 else size
    if words.shape[1] != rows or count < 1 or columns % count or rows < 1:
        raise ValueError(f"qweight {list(words.shape)} and scales {list(scales.shape)} do not fit each other")
    if dense_words(columns, bits) != words.shape[0]:
        raise ValueError(f"qweight has {words.shape[0]} rows, which are no columns of {bits} bits")
    if zeros.shape != (count, dense_words(rows, bits)):
        raise ValueError(f"qzeros {list(zeros.shape)} do not fit {count} groups of {rows} rows at {bits} bits")
    if columns // count != expected and not settings.values.get("dynamic"):
        raise ValueError(f"{count} groups of {columns} columns are no groups of {expected}")
    if g_idx is None and settings.values.get("desc_act") and count > 1:
        raise ValueError("g_idx is missing, but desc_act is true")
    return EvenLayer(
        shape=(rows, columns),
        bits=bits,
        group_size=columns // count,
        scale_dtype=scales.dtype,
        codes=partial(_codes, words, bits, columns),
        scales=partial(_turned, scales),
        zeros=middle(_zeros(zeros, bits, rows, version), bits),
        groups=_groups(entries, columns, columns // count),
    )


def _groups(entries: Mapping[str, TensorEntry], columns: int, group_size: int) -> Tensor | None:
    if "g_idx" not in entries:
        return None
    entry = checked(entries, "g_idx", (torch.int32, torch.int64), 1)
    if entry.shape != (columns,):
        raise ValueError(f"g_idx has {entry.shape[0]} numbers, but there are {columns} columns")
    return without_order(whole(entry), columns, group_size)


def _zeros(entry: TensorEntry, bits: int, rows: int, version: int) -> Tensor:
    words = whole(entry)
    codes: Any = from_words(words, bits, rows) if version == 2 else add_one(words, bits, rows)
    return codes.t().contiguous()


def _codes(entry: TensorEntry, bits: int, columns: int) -> Tensor:
    return from_words(whole(entry).t().contiguous(), bits, columns)


def _turned(entry: TensorEntry) -> Tensor:
    return whole(entry).t().contiguous()
