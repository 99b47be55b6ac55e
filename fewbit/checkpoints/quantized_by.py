"""Determine the tool that quantized a checkpoint, from its config, other files in its folder, or only its tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoints.json_in import read_json_object
from fewbit.checkpoints.safetensors_io import TensorEntry

MODELOPT_FILE = "hf_quant_config.json"


@dataclass(frozen=True)
class Foreign:
    """Another tool's quantization: the tool's name, the evidence, and its `quant_method` in transformers, if any."""

    tool: str
    sign: str
    method: str | None = None


_TOOLS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "hqq": "HQQ",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "modelopt": "NVIDIA ModelOpt",
    "modelopt_fp4": "NVIDIA ModelOpt",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2 (EXL2)",
    "exl3": "ExLlamaV3 (EXL3)",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "quark": "AMD Quark",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "higgs": "HIGGS",
    "bitnet": "BitNet",
    "mlx": "MLX",
}
"""`quant_method` -> the tool's name as it is shown; a method that is not listed is shown unchanged."""

IMPORTED = ("GPTQ", "AWQ", "compressed-tensors")
"""Tools whose folders `fewbit import` reads, if they hold what the native format has."""

_SIDE_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "quanto_qmap.json": "optimum-quanto",
    "quantization_map.json": "optimum-quanto",
}
"""Files of older releases, from before quantization was described in config.json."""

_ENDINGS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8 or compressed-tensors",
    "weight_scale_2": "NVIDIA ModelOpt",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "nested_absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "q_weight": "ExLlamaV2 (EXL2)",
    "trellis": "ExLlamaV3 (EXL3)",
    "W_q": "HQQ",
    "qscale_weight": "FP8",
    "_weight_qdata": "torchao",
}
"""Last part of a tensor's name -> the tool whose codes and scales have such names."""

_PAIRS = (
    ("_blocks", "_scales", "MXFP4"),
    (".weight._data", ".weight._scale", "optimum-quanto"),
    (".codes", ".codebooks", "AQLM"),
    (".codes", ".scales", "fewbit"),
    (".codes", ".scale_codes", "fewbit"),
    (".weight", ".biases", "MLX"),
)
"""Endings of names of codes and of their scales, which identify a tool only together."""


def described_in(config: Mapping[str, Any], folder: Path) -> Foreign | None:
    """The tool that config.json or another file in the folder names, or None."""
    for place, found in quantization_configs(config):
        if found.get("load_in_4bit") or found.get("load_in_8bit"):
            return Foreign("bitsandbytes", f"{place} of config.json", "bitsandbytes")
        method = found.get("quant_method") or found.get("quant_algo")
        if method is None:
            return Foreign("MLX" if "bits" in found else "an unknown tool", f"{place} of config.json")
        return Foreign(_TOOLS.get(str(method), str(method)), f"{place} of config.json", str(method))
    if modelopt_config(folder):
        return Foreign("NVIDIA ModelOpt", MODELOPT_FILE)
    return None


def quantization_configs(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a config that describes a quantization, with its path; including those of parts of the model."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if isinstance(config.get(key), dict) and config[key]:
            yield key, config[key]
    for name, part in config.items():
        if name.endswith("_config") and name not in ("quantization_config", "compression_config"):
            for place, found in quantization_configs(part) if isinstance(part, dict) else ():
                yield f"{name}.{place}", found


def modelopt_config(folder: Path) -> dict[str, Any]:
    """The quantization in ModelOpt's own file; empty if there is none."""
    path = folder / MODELOPT_FILE
    if not path.is_file():
        return {}
    found = read_json_object(path).get("quantization")
    return found if isinstance(found, dict) and (found.get("quant_algo") or found.get("quantized_layers")) else {}


def seen_in(entries: Mapping[str, TensorEntry], folder: Path) -> Foreign | None:
    """The tool that the tensors show, if no config describes it: by names of codes and scales, or by 8-bit matrices."""
    side = next((tool for name, tool in _SIDE_FILES.items() if (folder / name).is_file()), None)
    for name in entries:
        tool = _ENDINGS.get(name.rpartition(".")[2])
        if tool:
            return Foreign(side or tool, f"tensor {name}")
    for codes, scales, tool in _PAIRS:
        for name in entries:
            if name.endswith(scales) and name.removesuffix(scales) + codes in entries:
                return Foreign(side or tool, f"tensor {name}")
    for name, entry in entries.items():
        if len(entry.shape) >= 2 and _is_codes(entry.dtype) and ("weight" in name or entry.dtype.is_floating_point):
            shown = str(entry.dtype).removeprefix("torch.")
            return Foreign(side or f"an unknown tool ({shown} codes without known scales)", f"tensor {name}")
    return None


def _is_codes(dtype: torch.dtype) -> bool:
    """Whether a matrix of this dtype contains codes and not weights."""
    return (dtype.itemsize == 1 and dtype != torch.bool) or dtype in _WORDS


_WORDS = {getattr(torch, name) for name in ("int16", "int32", "uint16", "uint32") if hasattr(torch, name)}
