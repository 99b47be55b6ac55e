"""A tiny model for the formats of evenly spaced integers, and readers of these formats written from their descriptions.

GPTQ: https://github.com/AutoGPTQ/AutoGPTQ (first format), AWQ: https://github.com/casper-hansen/AutoAWQ (gemm), MLX:
https://ml-explore.github.io/mlx (quantize). Words of 32 bits hold codes as one stream of bits, low bits first.
"""

from pathlib import Path
from typing import Any

import numpy as np
from conftest import build_tiny
from numpy.typing import NDArray
from safetensors import safe_open

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
Numbers = NDArray[Any]


def build(folder: Path, dtype: str = "float16", **changes: Any) -> Path:
    """A random Llama whose columns all group sizes up to 128 divide."""
    return build_tiny(folder, dtype, shard_size="1GB", **{**SIZES, **changes})


def tensors_of(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder with one weight file, as torch has it."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def numbers(tensor: Any) -> Numbers:
    """A tensor as an array, floating-point numbers in float32."""
    return tensor.float().numpy() if tensor.dtype.is_floating_point else tensor.numpy()


def stream(words: Numbers, bits: int) -> Numbers:
    """The codes in the words of each row."""
    plain = words.astype(np.int64) & 0xFFFFFFFF
    count = words.shape[1] * 32 // bits
    codes = np.zeros((words.shape[0], count), np.int64)
    for index in range(count):
        for bit in range(bits):
            word, place = divmod(index * bits + bit, 32)
            codes[:, index] |= ((plain[:, word] >> place) & 1) << bit
    return codes


def read_gptq(tensors: dict[str, Any], module: str, bits: int) -> Numbers:
    """The weight `(out, in)` float32 of a layer in GPTQ's first format."""
    words, zeros, scales, groups = (
        numbers(tensors[f"{module}.{end}"]) for end in ("qweight", "qzeros", "scales", "g_idx")
    )
    codes = stream(words.T, bits).T
    zero = stream(zeros, bits) + 1
    return ((codes - zero[groups]).astype(np.float32) * scales[groups]).T


def read_awq(tensors: dict[str, Any], module: str, group: int) -> Numbers:
    """The weight `(out, in)` float32 of a layer in AWQ's gemm format: place p of a word has column ORDER[p]."""
    words, zeros, scales = (numbers(tensors[f"{module}.{end}"]) for end in ("qweight", "qzeros", "scales"))
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def plain(packed: Numbers) -> Numbers:
        placed = stream(packed, 4)
        found = np.zeros_like(placed)
        for column in range(placed.shape[1]):
            word, place = divmod(column, 8)
            found[:, word * 8 + order[place]] = placed[:, column]
        return found

    of = np.arange(words.shape[0]) // group
    return ((plain(words) - plain(zeros)[of]).astype(np.float32) * scales[of]).T


def read_mlx(tensors: dict[str, Any], module: str, bits: int) -> Numbers:
    """The weight `(out, in)` float32 of a layer in MLX's affine format, computed in float32."""
    words, scales, biases = (numbers(tensors[f"{module}.{end}"]) for end in ("weight", "scales", "biases"))
    codes = stream(words, bits).astype(np.float32)
    group = codes.shape[1] // scales.shape[1]
    scale, bias = (np.repeat(values, group, axis=1) for values in (scales, biases))
    return (codes * scale + bias).astype(np.float32)
