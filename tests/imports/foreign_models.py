"""Small checkpoints in the layouts of GPTQ, AWQ and compressed-tensors, written slowly, number by number."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import build_tiny
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Layer:
    """A layer as integers: codes `(out, in)`, scales and zeros `(out, groups)`, and the group of each column."""

    codes: np.ndarray
    scales: torch.Tensor
    zeros: np.ndarray
    groups: np.ndarray

    @property
    def weight(self) -> torch.Tensor:
        """What the codes stand for, `(out, in)` float32."""
        distance = torch.tensor(self.codes - self.zeros[:, self.groups], dtype=torch.float32)
        return distance * self.scales.float()[:, torch.tensor(self.groups)]


def words_of(codes: Any, bits: int, whole: bool = False) -> list[int]:
    """Signed 32-bit words of a row of codes. whole: no code lies in two words."""
    per = 32 // bits if whole else len(codes)
    words: list[int] = []
    for first in range(0, len(codes), per):
        number, count = 0, 0
        for place, code in enumerate(codes[first : first + per]):
            number, count = number | (int(code) << (bits * place)), count + bits
        for place in range(-(-count // 32)):
            word = (number >> (32 * place)) & 0xFFFFFFFF
            words.append(word - 2**32 if word >= 2**31 else word)
    return words


def rows_of_words(codes: np.ndarray, bits: int, whole: bool = False) -> torch.Tensor:
    return torch.tensor([words_of(row, bits, whole) for row in codes], dtype=torch.int32)


def layer_of(weight: torch.Tensor, bits: int, size: int, symmetric: bool, order: bool, dtype: torch.dtype) -> Layer:
    """Round a weight `(out, in)` to a layer. order: groups are scattered over the columns."""
    rows, columns = weight.shape
    size = columns if size == -1 else size
    groups, random = np.arange(columns) // size, np.random.default_rng(rows)
    if order:
        groups = random.permutation(groups)
    count, top = columns // size, 2**bits - 1
    scales, zeros = torch.empty(rows, count, dtype=dtype), np.empty((rows, count), dtype=np.int64)
    codes = np.empty((rows, columns), dtype=np.int64)
    for group in range(count):
        part = weight[:, torch.tensor(groups == group)].double()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scales[:, group] = (torch.maximum(high, -low) / (2 ** (bits - 1))).to(dtype)
            zeros[:, group] = 2 ** (bits - 1)
        else:
            scales[:, group] = ((high - low) / top).to(dtype)
            zeros[:, group] = (-low / scales[:, group].double()).round().clamp(1, top).numpy()
        rounded = (part / scales[:, group : group + 1].double()).round().numpy() + zeros[:, group : group + 1]
        codes[:, groups == group] = np.clip(rounded, 0, top)
    return Layer(codes, scales, zeros, groups)


Tensors = dict[str, torch.Tensor]


def gptq(layer: Layer, bits: int, version: int = 1) -> Tensors:
    """Version 1 holds zero-points minus one; the writer subtracts whole words."""
    stored = layer.zeros.T
    if version == 1 and 32 % bits == 0:
        ones = sum(1 << at for at in range(0, 32, bits))
        plain = rows_of_words(stored, bits).tolist()
        less = [[((word - ones + 2**31) % 2**32) - 2**31 for word in row] for row in plain]
        zeros = torch.tensor(less, dtype=torch.int32)
    else:
        zeros = rows_of_words((stored - (version == 1)) % 2**bits, bits)
    return {
        "qweight": rows_of_words(layer.codes, bits).t().contiguous(),
        "qzeros": zeros,
        "scales": layer.scales.t().contiguous(),
        "g_idx": torch.tensor(layer.groups, dtype=torch.int32),
    }


def awq(layer: Layer, bits: int) -> Tensors:
    def turned(codes: np.ndarray) -> torch.Tensor:
        ordered = codes.T.reshape(codes.shape[1], -1, 8)[:, :, list(AWQ_ORDER)]
        return rows_of_words(ordered.reshape(codes.shape[1], -1), bits)

    return {
        "qweight": turned(layer.codes),
        "qzeros": turned(layer.zeros),
        "scales": layer.scales.t().contiguous(),
    }


def compressed(layer: Layer, bits: int, symmetric: bool, whole: bool = False) -> Tensors:
    found = {
        "weight_packed": rows_of_words(layer.codes, bits, whole),
        "weight_scale": layer.scales,
        "weight_shape": torch.tensor(layer.codes.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = rows_of_words(layer.zeros.T, bits, whole).t().contiguous()
    if not np.array_equal(layer.groups, np.sort(layer.groups)):
        found["weight_g_idx"] = torch.tensor(layer.groups, dtype=torch.int32)
    return found


def write(
    folder: Path,
    config: dict[str, Any],
    make: Callable[[torch.Tensor], Layer],
    store: Callable[[Layer], Tensors],
    dtype: str = "float16",
    is_built: bool = False,
) -> Tensors:
    """A tiny Llama whose layers are stored by `store`; returns all its weights, decoded.

    is_built: the folder has a model already, whose layers are (in, out).
    """
    if not is_built:
        build_tiny(folder, dtype, shard_size="1GB")
    before = load_file(folder / "model.safetensors")
    stored, decoded = {}, {}
    for name, tensor in before.items():
        if ("_proj" in name or "c_" in name) and tensor.ndim == 2:
            layer = make(tensor.t().float() if is_built else tensor.float())
            decoded[name] = layer.weight.t() if is_built else layer.weight
            stored |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in store(layer).items()}
        else:
            stored[name] = decoded[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, "quantization_config": config}))
    return decoded


def weight_bytes(folder: Path) -> int:
    """Bytes of all tensors; headers would count too much in so small models."""
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    return sum(tensor.numel() * tensor.element_size() for tensors in files for tensor in tensors.values())
