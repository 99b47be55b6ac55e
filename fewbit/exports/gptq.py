"""GPTQ and AWQ: the tensors of a weight, and `quantization_config` as their tools write it.

Both have ``w = (code - zero) * scale``, with scales in float16, whole zero-points, and codes in words of 32 bits.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoints.config_dtype import stated_dtype
from fewbit.exports.integer_format import IntegerFormat, Layers, NotHeldError, exactly
from fewbit.exports.words import to_words
from fewbit.grids.packing import unpack
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.scheme import StoredWeight
from fewbit.grids.table import grid_of
from fewbit.version import __version__

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring codes is at each place of an AWQ word, from the lowest bits on."""
_HEAD = "lm_head"
_DTYPES = ("dtype", "torch_dtype")


def _levels(parts: Mapping[str, Tensor], stored: StoredWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `(rows, columns)`, scales and zero-points float32 `(rows, groups)`."""
    scheme, (rows, columns) = stored.scheme, stored.shape
    values = grid_of(scheme).read(parts, scheme, stored.groups)
    scales = values["scale"].reshape(rows, stored.groups)
    zeros = values["offset"].reshape(rows, stored.groups) if "offset" in values else None
    middle = torch.full_like(scales, float(2 ** (scheme.whole_bits - 1)))
    return unpack(parts["codes"], scheme.whole_bits, columns), scales, middle if zeros is None else zeros


def gptq_tensors(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight in GPTQ's first format, which stores zero-points minus 1.

    Codes are packed along the columns, `(columns * bits / 32, rows)`, zero-points along the rows, `(groups, rows * bits
    / 32)`. g_idx is the group of each column. Raises NotHeldError for a zero-point of 0 and for scales that float16
    does not have.
    """
    bits, (_, columns) = stored.scheme.whole_bits, stored.shape
    codes, scales, zeros = _levels(parts, stored)
    # Where the scale is 0 the weights are 0, whatever the zero-point is.
    zeros = torch.where((scales == 0) & (zeros == 0), 1.0, zeros)
    if bool((zeros == 0).any()):
        raise NotHeldError("it has zero-points of 0, which GPTQ stores minus 1")
    return {
        "qweight": to_words(codes, bits).t(),
        "qzeros": to_words((zeros - 1).to(torch.uint8).t(), bits),
        "scales": exactly(scales, torch.float16, "it has scales").t(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // stored.scheme.group_size,
    }


def awq_tensors(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight as AutoAWQ's GEMM kernels have them: codes `(columns, rows / 8)`, zero-points `(groups,
    rows / 8)`, scales `(groups, rows)`. Raises NotHeldError for scales that float16 does not have.
    """
    codes, scales, zeros = _levels(parts, stored)
    return {
        "qweight": _awq_words(codes.t()),
        "qzeros": _awq_words(zeros.to(torch.uint8).t()),
        "scales": exactly(scales, torch.float16, "it has scales").t(),
    }


def _awq_words(codes: Tensor) -> Tensor:
    """Words of 4-bit codes in AWQ's order, packed along the last dimension."""
    eights = codes.reshape(codes.shape[0], -1, len(_AWQ_ORDER))
    return to_words(eights[..., list(_AWQ_ORDER)].reshape(codes.shape), 4)


def gptq_config(config: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """The config.json of a GPTQ folder.

    Modules in the blocks that are kept in 16 bits are named twice: for GPTQModel and vLLM with patterns of what is left
    out (`dynamic`), for transformers with what is packed (`modules_in_block_to_quantize`).
    """
    scheme = layers.schemes[0]
    described: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.whole_bits,
        "group_size": scheme.group_size,
        "sym": not any(grid_of(one).offset for one in layers.schemes),
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"fewbit:{__version__}"]},
    }
    if layers.kept:
        described["dynamic"] = {f"-:{re.escape(name)}$": {} for name in layers.kept}
        described["modules_in_block_to_quantize"] = [list(layers.packed)]
    return {**_in_half(config, layers), "quantization_config": described}


def awq_config(config: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """The config.json of an AWQ folder; `modules_to_not_convert` names what is kept in 16 bits."""
    described = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": layers.schemes[0].group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [*layers.kept, _HEAD],
    }
    return {**_in_half(config, layers), "quantization_config": described}


def _in_half(config: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """The config with the dtype float16, in which loaders keep all scales, unless the model's own has them all too."""
    stated = stated_dtype(config)
    formats = {SCALE_FORMATS[scheme.scale_format].floats for scheme in layers.schemes}
    if stated == torch.float16 or formats == {str(stated).removeprefix("torch.")}:
        return config
    changed = _with_half(config)
    return changed if stated is not None else {**changed, "torch_dtype": "float16"}


def _with_half(config: dict[str, Any]) -> dict[str, Any]:
    """The config with float16 in place of every dtype that it states."""
    return {
        key: "float16" if key in _DTYPES else _with_half(value) if isinstance(value, dict) else value
        for key, value in config.items()
    }


_SCALES = ("float16", "bfloat16")
_EXPERT_NOTE = (
    "experts: transformers does not read them in this format and goes on with random ones; GPTQModel.load reads those "
    "of Qwen 3 MoE"
)
GPTQ = IntegerFormat(
    "gptq",
    "GPTQ",
    "a folder for GPTQModel, vLLM and transformers, with zero-points as in GPTQ's first format",
    (2, 3, 4, 8),
    ("signed", "symmetric", "zero-point"),
    (16, 32, 64, 128, 256, 512, 1024),
    _SCALES,
    gptq_tensors,
    gptq_config,
    one_for_all=True,
    fills_words=True,
    turned=True,
    expert_note=_EXPERT_NOTE,
)
AWQ = IntegerFormat(
    "awq",
    "AWQ",
    "a folder for AutoAWQ, vLLM and transformers, with codes in the order of the GEMM kernels",
    (4,),
    ("zero-point", "signed", "symmetric"),
    (32, 64, 128),
    _SCALES,
    awq_tensors,
    awq_config,
    one_for_all=True,
    fills_words=True,
    expert_note=_EXPERT_NOTE,
)
