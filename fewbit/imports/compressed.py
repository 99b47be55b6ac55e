"""Read checkpoints of compressed-tensors in the format "pack-quantized" (llm-compressor, vLLM).

weight_packed      int32 (out, in bits / 32)      codes, along the columns, plus half their number
weight_scale       (out, groups)
weight_zero_point  int32 (out bits / 32, groups)  likewise, down the rows; or int8 (out, groups)
weight_shape       (2,)
weight_g_idx       (in,)                          the group of each column, where it was rounded with act-order
"""

import re
from functools import partial

import torch
from torch import Tensor

from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
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
from fewbit.imports.words import dense_words, from_words, whole_words

_PACKED = "pack-quantized"
_BITS = (2, 3, 4, 5, 6, 7, 8)
_ENDINGS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_NUMBERS = (torch.int32, torch.int64)
_STRATEGIES = ("group", "channel", "tensor")
_KNOWN = {
    *("quant_method", "format", "config_groups", "quantization_status", "global_compression_ratio", "ignore"),
    *("version", "compression_ratio", "run_compressed", "sparsity_config", "moe_sparsity_config"),
}
_IN_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
_IN_WEIGHTS = {
    *("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "block_structure"),
}


def open_compressed(checkpoint: Checkpoint) -> Source:
    """The tensors of a checkpoint. Raises FewbitError for other formats, and for what the native one cannot hold."""
    described = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    settings = settings_of(checkpoint.folder, described)
    groups = _check(settings)
    found, rest = gather(checkpoint, _ENDINGS, "weight_packed")
    layers = each(checkpoint, found, partial(_layer, groups))
    config = with_config(checkpoint)
    tensors = tensors_of(checkpoint, config, layers, rest)
    check_some_packed(tensors, checkpoint.folder)
    facts = {"bits": sorted({layer.bits for layer in layers.values()}), "version": settings.values.get("version")}
    place, companions, left = checkpoint.folder, checkpoint.companions, checkpoint.left
    return Source(place, "compressed-tensors", config, tensors, checkpoint.files, companions, left, facts)


def _check(settings: Settings) -> list[Settings]:
    """The groups of layers, each with `targets` and `weights`."""
    settings.only(_KNOWN)
    form = settings.one_of("format", (_PACKED, "mixed-precision"))
    settings.empty("kv_cache_scheme", "a quantized cache cannot be imported")
    settings.empty("transform_config", "transforms cannot be imported")
    for key in ("sparsity_config", "moe_sparsity_config"):
        if settings.values.get(key):
            settings.inside(key).one_of("format", ("dense",), "dense")
    every = settings.inside("config_groups")
    groups = [every.inside(name) for name in every.values]
    for group in groups:
        group.only(_IN_GROUP)
        group.one_of("format", (_PACKED,) if form != _PACKED else (_PACKED, None), None)
        for key in ("input_activations", "output_activations"):
            group.empty(key, "a model with quantized activations would be another one without them")
        weights = group.inside("weights")
        weights.only(_IN_WEIGHTS)
        weights.one_of("num_bits", _BITS)
        weights.one_of("type", ("int",), "int")
        weights.one_of("strategy", _STRATEGIES)
        weights.empty("dynamic", "its scales are not stored")
    if not groups:
        raise settings.refuse("config_groups", "no layers are described")
    return groups


def _group_of(groups: list[Settings], module: str) -> Settings:
    """The group of a layer: the first that names it, or else the first that names a class of layers."""
    named = []
    for group in groups:
        targets = group.values.get("targets")
        if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
            raise group.refuse("targets", "it must be a list of names")
        try:
            hit = any(re.match(one[3:], module) if one.startswith("re:") else one == module for one in targets)
        except re.error as error:
            raise group.refuse("targets", f"is no pattern ({error})") from error
        if hit:
            return group
        if any("." not in one and not one.startswith("re:") for one in targets):
            named.append(group)
    if len(named) == 1 or (named and len(groups) == 1):
        return named[0]
    raise FewbitError(f"{groups[0].place.rpartition(': ')[0]}: {module}: not clear which of the groups describes it")


def _layer(groups: list[Settings], module: str, entries: Entries) -> EvenLayer:
    weights = _group_of(groups, module).inside("weights")
    bits = weights.number("num_bits")
    rows, columns = _shape(checked(entries, "weight_shape", _NUMBERS, 1))
    words = checked(entries, "weight_packed", WORDS, 2)
    widths = (dense_words(columns, bits), whole_words(columns, bits))
    if words.shape[0] != rows or words.shape[1] not in widths:
        raise ValueError(f"weight_packed {list(words.shape)} does not hold {rows} x {columns} codes of {bits} bits")
    scale = entries.get("weight_scale")
    whole_tensor = weights.values.get("strategy") == "tensor" and scale is not None and len(scale.shape) == 1
    scale = checked(entries, "weight_scale", FLOATS, 1 if whole_tensor else 2)
    count = 1 if whole_tensor else scale.shape[1]
    if (scale.shape[0] not in (rows, 1)) or count < 1 or columns % count or (scale.shape[0] != rows and count != 1):
        raise ValueError(f"weight_scale {list(scale.shape)} does not fit {rows} x {columns} codes")
    size, stated = columns // count, weights.values.get("group_size")
    if weights.values.get("strategy") == "group" and stated != size:
        raise ValueError(f"{count} groups of {columns} columns are no groups of {stated}")
    return EvenLayer(
        shape=(rows, columns),
        bits=bits,
        group_size=size,
        scale_dtype=scale.dtype,
        codes=partial(_codes, words, bits, columns),
        scales=partial(_scales, scale, rows),
        zeros=_zeros(entries, bits, (rows, count), weights, words.shape[1] == widths[0]),
        groups=_groups(entries, weights, columns, size),
    )


def _shape(entry: TensorEntry) -> tuple[int, int]:
    if entry.shape != (2,):
        raise ValueError(f"weight_shape has {entry.shape[0]} numbers, not 2")
    rows, columns = whole(entry).tolist()
    if rows < 1 or columns < 1:
        raise ValueError(f"weight_shape is {rows} x {columns}")
    return rows, columns


def _groups(entries: Entries, weights: Settings, columns: int, size: int) -> Tensor | None:
    if "weight_g_idx" not in entries:
        if weights.values.get("actorder") == "group" and size != columns:
            raise ValueError("weight_g_idx is missing, but actorder is group")
        return None
    entry = checked(entries, "weight_g_idx", _NUMBERS, 1)
    if entry.shape != (columns,):
        raise ValueError(f"weight_g_idx has {entry.shape[0]} numbers, but there are {columns} columns")
    found = whole(entry)
    # The tool fills it with -1 where there is no order.
    return None if bool((found == -1).all()) else without_order(found, columns, size)


def _zeros(entries: Entries, bits: int, shape: tuple[int, int], weights: Settings, dense: bool) -> Tensor | None:
    if "weight_zero_point" not in entries:
        if weights.values.get("symmetric", True) is not True:
            raise ValueError("weight_zero_point is missing, but symmetric is false")
        return None
    entry = checked(entries, "weight_zero_point", (torch.int32, torch.int8), 2)
    (rows, count), half = shape, 2 ** (bits - 1)
    if entry.dtype == torch.int8:
        signed = whole(entry).to(torch.int16)
        if signed.shape not in ((rows, count), (1, 1)) or bool((signed < -half).any()) or bool((signed >= half).any()):
            raise ValueError(f"weight_zero_point {list(entry.shape)} is not one number of {bits} bits for each scale")
        return middle((signed + half).to(torch.uint8).expand(rows, count).contiguous(), bits)
    wanted = dense_words(rows, bits) if dense else whole_words(rows, bits)
    if entry.shape != (wanted, count):
        raise ValueError(f"weight_zero_point {list(entry.shape)} does not hold {rows} x {count} codes of {bits} bits")
    return middle(from_words(whole(entry).t().contiguous(), bits, rows, dense).t().contiguous(), bits)


def _codes(entry: TensorEntry, bits: int, columns: int) -> Tensor:
    return from_words(whole(entry), bits, columns)


def _scales(entry: TensorEntry, rows: int) -> Tensor:
    scale = whole(entry)
    return scale.reshape(scale.shape[0], -1).expand(rows, -1)
