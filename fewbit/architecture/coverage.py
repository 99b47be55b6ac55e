"""What every tensor of a checkpoint is, told from names, shapes and their neighbours; no network is built.

Decoder blocks are what repeats under a number (``model.layers.7.…``, ``transformer.h.7.…``). Inside them every
matrix is a linear layer (three dimensions: fused experts) unless it routes tokens; everything else is kept.
"""

import fnmatch
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.errors import FewbitError

_BLOCK = re.compile(r"^(?P<prefix>(?:[^.]+\.)*?)(?P<list>layers|h|blocks|layer|block)\.(?P<number>\d+)\.(?P<rest>.+)$")
_OUTSIDE = re.compile(
    r"(^|\.)(embed_tokens(_per_layer)?|embed_in|embed_out|wte|wpe|word_embeddings|embed_positions|lm_head|output"
    r"|project_in|project_out|embeddings|per_layer_model_projection)\.weight$"
)
_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.(weight|wg|linear)(\.weight)?)?$")
_MINOR = re.compile(r"(^|[._])(conv1d|A_log|rotary_emb|inv_freq|masked_bias)($|[._])")


@dataclass(frozen=True)
class WeightTensor:
    """One tensor and what becomes of it: `action` is quantize, keep or unknown, with the reason."""

    entry: TensorEntry
    action: str
    reason: str
    block: int | None = None
    transposed: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in), with fused experts stacked as (experts * out, in)."""
        *lead, rows, columns = self.entry.shape
        rows, columns = (columns, rows) if self.transposed else (rows, columns)
        return math.prod(lead) * rows, columns

    @property
    def module(self) -> str:
        """Name under which the parts are stored: the tensor's, without `.weight`."""
        return self.entry.name.removesuffix(".weight")


@dataclass(frozen=True)
class Coverage:
    """Every tensor of a checkpoint, in storage order."""

    tensors: list[WeightTensor] = field(default_factory=list)

    def of(self, action: str) -> list[WeightTensor]:
        """The tensors with one action."""
        return [tensor for tensor in self.tensors if tensor.action == action]


def cover(
    entries: Iterable[TensorEntry],
    config: dict[str, Any],
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> Coverage:
    """Decide for every tensor. Patterns are shell-style (``*.down_proj.weight``) and match whole names.

    include: matrices outside the blocks to quantize as well. exclude: tensors to keep as they are; wins.
    """
    include, exclude = list(include), list(exclude)
    entries = list(entries)
    transposed = _stores_in_out(entries)
    names = {entry.name for entry in entries}
    for pattern in include + exclude:
        if not any(_matches(name, pattern) for name in names):
            raise FewbitError(f"pattern {pattern!r} matches no tensor: see the names with  fewbit inspect")
    return Coverage([_decide(entry, transposed, include, exclude, config) for entry in entries])


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a name; one that holds brackets or stars is also matched by itself."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def require_recognised(coverage: Coverage, model: str) -> None:
    """FewbitError naming the tensors that nothing is known about."""
    unknown = coverage.of("unknown")
    if unknown:
        listed = ", ".join(f"{t.entry.name} {list(t.entry.shape)}" for t in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise FewbitError(
            f"{model}: {len(unknown)} weights are not recognised: {listed}{more}: say what to do with "
            "--include PATTERN (quantize) or --exclude PATTERN (keep)"
        )


def _decide(
    entry: TensorEntry, transposed: bool, include: list[str], exclude: list[str], config: dict[str, Any]
) -> WeightTensor:
    name, dimensions = entry.name, len(entry.shape)
    match = _BLOCK.match(name)
    block = int(match["number"]) if match else None
    is_float = entry.dtype.is_floating_point and entry.dtype.itemsize in (2, 4)

    def decision(action: str, reason: str) -> WeightTensor:
        turned = transposed and action == "quantize" and dimensions == 2
        return WeightTensor(entry, action, reason, block, turned)

    if any(_matches(name, pattern) for pattern in exclude):
        return decision("keep", "excluded")
    if any(_matches(name, pattern) for pattern in include):
        if dimensions < 2 or not is_float:
            raise FewbitError(f"{name}: --include needs a 16 or 32-bit matrix, this is {list(entry.shape)}")
        return decision("quantize", "included")
    if not is_float:
        return decision("keep", "not a 16 or 32-bit float")
    if dimensions < 2 or (dimensions == 2 and 1 in entry.shape):
        return decision("keep", "vector (norm, bias or scale)")
    if _MINOR.search(name) or (dimensions == 4 and name.endswith((".attn.bias", ".attention.bias"))):
        return decision("keep", "not a linear layer")
    if match:
        rest = match["rest"]
        if _is_other_tower(match["prefix"], match["list"]):
            return decision("unknown", "a block outside the text decoder")
        if _ROUTER.search(rest):
            return decision("keep", "router")
        if dimensions == 2 and rest.endswith("weight"):
            return decision("quantize", "linear layer in a block")
        if dimensions == 3:
            return decision("quantize", "fused experts in a block")
        return decision("unknown", "in a block, but no linear layer")
    if dimensions == 2 and _OUTSIDE.search(name):
        return decision("keep", "embedding or head")
    return decision("unknown", "outside the blocks")


def _is_other_tower(prefix: str, list_name: str) -> bool:
    return any(word in prefix for word in ("vision", "visual", "audio", "encoder.")) and "decoder" not in prefix


def _stores_in_out(entries: list[TensorEntry]) -> bool:
    """Whether matrices are stored (in, out), as GPT-2's are: the biases of the oblong ones fit their columns."""
    shapes = {entry.name: entry.shape for entry in entries}
    votes = 0
    for name, shape in shapes.items():
        bias = shapes.get(name.removesuffix(".weight") + ".bias")
        if name.endswith(".weight") and _BLOCK.match(name) and len(shape) == 2 and bias and shape[0] != shape[1]:
            votes += (bias[0] == shape[1]) - (bias[0] == shape[0])
    return votes > 0


def prefix_of_block(name: str) -> str:
    """What stands before a block's number in a tensor's name."""
    match = _BLOCK.match(name)
    assert match is not None
    return f"{match['prefix']}{match['list']}"


def name_in_block(name: str) -> str:
    """What follows a block's number in a tensor's name."""
    match = _BLOCK.match(name)
    assert match is not None
    return match["rest"]
