"""Formats of evenly spaced integers: what GPTQ, AWQ and MLX have in common."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.block_lists import place_of
from fewbit.checkpoints.source import Checkpoint
from fewbit.exports.words import WORD, whole_words
from fewbit.formats.config import tables_of, weights_of
from fewbit.formats.native import part_layout
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import GRIDS

EXPERT = re.compile(r"(.+)\.experts\.([0-9]+)\.([^.]+)(\..+)?")
"""The name of a module or tensor of one expert: what is before, its number, the layer, the end."""


class NotHeldError(Exception):
    """A value that a format cannot hold exactly. scales: the scale format whose numbers it holds, if that helps."""

    def __init__(self, what: str, scales: tuple[str, ...] = ()) -> None:
        super().__init__(what)
        self.scales = scales


@dataclass(frozen=True)
class Layers:
    """The weights of a folder. packed: module -> stored form, of the linear layers in the blocks. kept: the modules in
    the blocks whose matrices are in 16 bits. tables: embeddings and heads."""

    packed: Mapping[str, StoredWeight]
    kept: tuple[str, ...]
    tables: tuple[str, ...]

    @property
    def schemes(self) -> list[Scheme]:
        """The schemes of the packed weights, each once."""
        return list(dict.fromkeys(stored.scheme for stored in self.packed.values()))


@dataclass(frozen=True)
class IntegerFormat:
    """A format of evenly spaced integers.

    called: its name in sentences. widths, grids, groups, scales: the bits, grids (by their names in recipes), group
    sizes and scale formats that it holds. one_for_all: all weights must have the same bits and group size. fills_words:
    the rows of a weight, too, must fill whole words. turned: weights stored as (in, out) are possible. in_model_dtype:
    scales are stored in the model's dtype. tensors(parts, stored, dtype): the tensors of a weight by the ends of their
    names, for a model of that dtype; raises NotHeldError. config(config, layers): the config.json. joined(name): for
    the name of a module or tensor of one expert, that of the tensor which holds those of all experts, and its place in
    it; None for all others. expert_note: what users should know about experts in this format.
    """

    name: str
    called: str
    summary: str
    widths: tuple[int, ...]
    grids: tuple[str, ...]
    groups: tuple[int, ...]
    scales: tuple[str, ...]
    tensors: Callable[[Mapping[str, Tensor], StoredWeight, torch.dtype], dict[str, Tensor]]
    config: Callable[[dict[str, Any], Layers], dict[str, Any]]
    one_for_all: bool = False
    fills_words: bool = False
    turned: bool = False
    in_model_dtype: bool = False
    joined: Callable[[str], tuple[str, int] | None] = lambda name: None
    expert_note: str = ""


def holds(kind: IntegerFormat, scheme: Scheme) -> bool:
    """Whether a format holds weights of that scheme, if their scales and offsets are numbers that it has."""
    return not lost(kind, scheme)


def lost(kind: IntegerFormat, scheme: Scheme) -> list[str]:
    """What of a scheme a format does not have."""
    found = [
        ("the transform of its inputs", scheme.transform == "none"),
        ("the outliers", not scheme.has_outliers),
        (f"the {GRIDS[scheme.grid].choice} grid", GRIDS[scheme.grid].choice in kind.grids),
        (f"{scheme.bits:g} bits", scheme.bits in kind.widths),
        (f"groups of {scheme.group_size}", scheme.group_size in kind.groups),
        (f"{scheme.scale_format} scales", scheme.scale_format in kind.scales),
    ]
    return [what for what, held in found if not held]


def shape_problem(kind: IntegerFormat, stored: StoredWeight) -> str | None:
    """Why a weight cannot be written because of its shape, or None."""
    rows, columns = stored.shape
    bits = stored.scheme.whole_bits
    if stored.original_shape is not None:
        return f"{kind.called} has no experts fused in one tensor: keep them in 16 bits"
    if stored.transposed and not kind.turned:
        return f"{kind.called} has no weights stored as (in, out): keep it in 16 bits"
    for count, what in ((columns, "columns"), *([(rows, "rows")] if kind.fills_words else [])):
        if not whole_words(count, bits):
            return f"{count} {what} of {bits} bits do not fill words of {WORD} bits: keep it in 16 bits"
    return None


def differ(kind: IntegerFormat, weights: Mapping[str, StoredWeight]) -> str | None:
    """Why weights cannot be in one folder, or None: in some formats all have the same bits and group size."""
    said = {name: _said(stored) for name, stored in weights.items()}
    most = Counter(said.values()).most_common(1)
    other = next((name for name, size in said.items() if size != most[0][0]), None)
    if not kind.one_for_all or other is None:
        return None
    return (
        f"{other}: has {said[other]}, most others {most[0][0]}: {kind.called} has one bit-width and one group size for "
        "all weights"
    )


def join_problem(kind: IntegerFormat, weights: Mapping[str, StoredWeight], kept: Iterable[str] = ()) -> str | None:
    """Why experts cannot be joined, or None: all experts must be there, and be stored alike."""
    sizes: dict[str, list[tuple[str, str]]] = defaultdict(list)
    said = {**dict.fromkeys(kept, "16 bits"), **{name: _said(stored) for name, stored in weights.items()}}
    for name, size in said.items():
        joined = kind.joined(name)
        if joined:
            sizes[joined[0]].append((name, size))
    for members in sizes.values():
        first, size = members[0]
        other = next(((name, its) for name, its in members if its != size), None)
        if other:
            return f"{other[0]}: has {other[1]}, {first} {size}: {kind.called} has one size for all experts of a layer"
    return None


def _said(stored: StoredWeight) -> str:
    return f"{stored.scheme.bits:g} bits in groups of {stored.scheme.group_size}"


def layers_of(checkpoint: Checkpoint) -> Layers:
    """The weights of a native folder."""
    weights, tables = weights_of(checkpoint), tables_of(checkpoint)
    parts = {f"{module}.{part}" for module, stored in weights.items() for part in part_layout(stored)}
    packed = {module: stored for module, stored in weights.items() if module not in tables}
    matrices = [
        name.removesuffix(".weight")
        for name, entry in checkpoint.entries.items()
        if name not in parts and len(entry.shape) == 2 and name.endswith(".weight")
    ]
    kept = tuple(name for name in matrices if place_of(f"{name}.weight") is not None)
    return Layers(packed, kept, (*(name for name in matrices if name not in kept), *sorted(tables)))


def folder_problem(kind: IntegerFormat, checkpoint: Checkpoint, embeddings: str) -> str | None:
    """Why a model cannot be written in a format, or None. Nothing is read but headers.

    embeddings: only keep; those that are packed are written decoded.
    """
    where = str(checkpoint.folder)
    if embeddings != "keep":
        return f"--embeddings {embeddings}: {kind.called} folders have embeddings and head in 16 bits: leave it out"
    if not checkpoint.is_native:
        return f"{where}: is not quantized by fewbit: quantize the original with  --for {kind.name} --bits 4"
    layers = layers_of(checkpoint)
    weights = layers.packed
    for module, stored in weights.items():
        changed = lost(kind, stored.scheme)
        if changed:
            return f"{where}: {module}: {kind.called} does not hold {_listed(changed)}: {advice(kind, stored.scheme)}"
        if place_of(f"{module}.weight") is None:
            return f"{where}: {module}: is outside the blocks, where {kind.called} has 16 bits: leave out --include"
        problem = shape_problem(kind, stored)
        if problem:
            return f"{where}: {module}: {problem} with  --exclude {stored.tensor_name(module)}"
    problem = differ(kind, weights) or join_problem(kind, weights, layers.kept)
    return f"{where}: {problem}: quantize the original with  --for {kind.name}  and without --set" if problem else None


def advice(kind: IntegerFormat, scheme: Scheme) -> str:
    """The command that makes a folder that the format holds, at the nearest width."""
    bits = min(kind.widths, key=lambda held: (abs(held - scheme.bits), held))
    return f"quantize the original with  --for {kind.name} --bits {bits}"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def exactly(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Values in a dtype that has them all; raises NotHeldError if one would change."""
    stored = values.to(dtype)
    if not torch.equal(stored.to(values.dtype), values):
        name = str(dtype).removeprefix("torch.")
        raise NotHeldError(f"{what} that {name} does not have exactly", (name,))
    return stored
