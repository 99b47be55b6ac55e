"""Read FP8 weights: 8-bit floats with scales, read as the products of the two.

Scales per block (DeepSeek, Qwen), per row (FBGEMM) or per tensor are supported; the shape of the scales shows which. A
description in config.json or in ModelOpt's hf_quant_config.json must state that the model is FP8.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoints.config_dtype import stated_dtype
from fewbit.checkpoints.quantized_by import modelopt_config, quantization_configs
from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.checkpoints.scaled import Scaled
from fewbit.errors import FewbitError

_CODES = {
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
}
_SCALES = ("_scale_inv", "_scale")
_ACTIVATIONS = {"input_scale", "activation_scale", "output_scale", "input_scale_ub", "k_scale", "v_scale", "q_scale"}
"""Last parts of names of scales for inputs and the KV cache, which 16-bit weights do not need."""
_MODELOPT = {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL"}
_BLOCK = (128, 128)
"""Rows and columns that share a scale if the description does not state them."""


@dataclass(frozen=True)
class Fp8:
    """A description of FP8 weights: rows and columns of a block, and the dtype in which the model computes."""

    block: tuple[int, int]
    dtype: torch.dtype


def described_fp8(config: Mapping[str, Any], folder: Path) -> Fp8 | None:
    """A folder's description of its FP8 weights; None if it has none, or describes another quantization."""
    found = [value for _, value in quantization_configs(config)] or [modelopt_config(folder)]
    blocks = {_block_of(value) for value in found}
    if len(blocks) != 1 or None in blocks:
        return None
    block = blocks.pop()
    assert block is not None
    return Fp8(block, stated_dtype(config) or torch.bfloat16)


def _block_of(description: dict[str, Any]) -> tuple[int, int] | None:
    method = str(description.get("quant_method", "modelopt"))
    read = {
        "fp8": _plain_block,
        "fbgemm_fp8": _plain_block,
        "compressed-tensors": _compressed_block,
        "modelopt": _modelopt_block,
    }.get(method)
    return read(description) if read else None


def _plain_block(description: dict[str, Any]) -> tuple[int, int] | None:
    return _pair(description.get("weight_block_size"))


def _compressed_block(description: dict[str, Any]) -> tuple[int, int] | None:
    groups, sparse = description.get("config_groups"), description.get("sparsity_config")
    if not isinstance(groups, dict) or not groups:
        return None
    if sparse and not (isinstance(sparse, dict) and sparse.get("format") in (None, "dense")):
        return None
    blocks = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type") != "float" or weights.get("num_bits") != 8:
            return None
        if weights.get("symmetric") is False:
            return None
        in_groups = weights.get("strategy") == "group"
        blocks.add(_pair([1, weights.get("group_size")] if in_groups else weights.get("block_structure")))
    return blocks.pop() if len(blocks) == 1 else None


def _modelopt_block(description: dict[str, Any]) -> tuple[int, int] | None:
    layers = description.get("quantized_layers")
    parts = layers.values() if isinstance(layers, dict) else ()
    named = {str(part.get("quant_algo")) for part in parts if isinstance(part, dict)}
    algorithm = str(description.get("quant_algo"))
    asked = named if algorithm == "MIXED_PRECISION" else {algorithm, *named}
    return _BLOCK if asked and asked <= _MODELOPT else None


def _pair(block: Any) -> tuple[int, int] | None:
    """Rows and columns of a block, from a list or, in older releases, from text such as 128x128."""
    if block is None:
        return _BLOCK
    if isinstance(block, str):
        block = [int(size) if size.isdecimal() else 0 for size in block[:20].split("x")]
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return (block[0], block[1])
    return None


def read_as_products(entries: Mapping[str, TensorEntry], described: Fp8, where: Path) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint, with FP8 weights as products of codes and scales, and without the scales.

    Raises FewbitError, with the weight's name, if a weight has no scale, or a scale of a shape that cannot be applied.
    """
    result: dict[str, TensorEntry] = {}
    used: set[str] = set()
    for name, entry in entries.items():
        if entry.dtype not in _CODES:
            result[name] = entry
            continue
        found = [name + ending for ending in _SCALES if name + ending in entries]
        if len(found) != 1:
            lack = "no scale" if not found else "two scales"
            raise FewbitError(f"{where}: {name} is in FP8 but has {lack} beside it: the folder is damaged")
        result[name] = _scaled(entry, entries[found[0]], described, where)
        used.add(found[0])
    if not used:
        return result
    return {name: entry for name, entry in result.items() if name not in used and not _is_of_activations(entry)}


def _is_of_activations(entry: TensorEntry) -> bool:
    return len(entry.shape) <= 1 and entry.name.rpartition(".")[2] in _ACTIVATIONS


def _scaled(entry: TensorEntry, scale: TensorEntry, described: Fp8, where: Path) -> TensorEntry:
    if not scale.dtype.is_floating_point or scale.dtype.itemsize > 4:
        raise FewbitError(
            f"{where}: {scale.name} cannot contain scales: its dtype is {str(scale.dtype).removeprefix('torch.')}"
        )
    shape = _aligned(scale.shape, entry.shape)
    block = _blocks(shape, entry.shape, described.block) if shape is not None else None
    if shape is None or block is None:
        raise FewbitError(
            f"{where}: scales {list(scale.shape)} do not fit {entry.name} {list(entry.shape)} in blocks of "
            f"{described.block[0]} x {described.block[1]}"
        )
    return replace(entry, dtype=described.dtype, scaled=Scaled(entry.dtype, scale, shape, block))


def _aligned(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the scales, extended to the weight's number of dimensions; None if that is not certain."""
    if all(size == 1 for size in scale):
        return (1,) * len(weight)
    if len(scale) == 1:
        # One scale per row, or per expert. If there are as many rows as experts, it is not known which.
        fits = scale[0] == weight[0] and (len(weight) == 2 or scale[0] != weight[1])
        return (*scale, *(1,) * (len(weight) - 1)) if fits else None
    if len(scale) > len(weight):
        scale = tuple(size for size in scale if size != 1)
    return scale if len(scale) == len(weight) else None


def _blocks(scale: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...] | None:
    """How many elements of each dimension share a scale; None if the shapes do not fit together."""
    sizes = (1,) * (len(weight) - 2) + block if len(weight) >= 2 else block[1:]
    found = []
    for count, size, span in zip(scale, weight, sizes, strict=True):
        if count == 1:
            found.append(max(1, size))
        elif count == -(-size // span):
            found.append(span)
        elif count == size:
            found.append(1)
        else:
            return None
    return tuple(found)
