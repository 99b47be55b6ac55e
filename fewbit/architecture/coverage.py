"""Classify every tensor of a checkpoint by names, shapes, neighbouring tensors and the configuration.

No network is built. The decoder is the largest list of numbered blocks (see :mod:`fewbit.architecture.block_lists`).
Matrices and stacks of experts in it are quantized, except those that :mod:`fewbit.architecture.kinds` recognises as
something else. Everything else is kept for a stated reason, or is unknown, which is an error.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fewbit.architecture import kinds
from fewbit.architecture.block_lists import (
    DRAFT,
    HEAD,
    TOWER,
    BlockList,
    Place,
    find_lists,
    is_draft,
    is_head,
    is_tower,
    place_of,
)
from fewbit.architecture.facts import Facts, gather_facts
from fewbit.architecture.orientation import experts_in_out, hidden_widths, matrices_in_out
from fewbit.architecture.patterns import exact_names, matching
from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.errors import FewbitError

_TABLE = "embedding or head"
_TABLES = (_TABLE, HEAD, "embedding")
_OUTSIDE_WORDS = re.compile("project_in|project_out|per_layer_model_projection|w|output|shared|unembed")


@dataclass(frozen=True)
class WeightTensor:
    """One tensor and what happens to it: `action` is quantize, keep or unknown, with the reason.

    block: number of its block in the decoder; None outside these blocks. place: its position in any list of blocks,
    from its name. transposed: it is stored as (in, out), or (experts, in, out). is_vocabulary: it is kept, and it is an
    embedding or an output head with one row per token of a vocabulary.
    """

    entry: TensorEntry
    action: str
    reason: str
    block: int | None = None
    transposed: bool = False
    place: Place | None = None
    is_vocabulary: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in), with fused experts stacked as (experts * out, in)."""
        *lead, rows, columns = self.entry.shape
        rows, columns = (columns, rows) if self.transposed else (rows, columns)
        return math.prod(lead) * rows, columns

    @property
    def module(self) -> str:
        """Name under which the parts are stored: that of the layer, or of the tensor if it is not a layer's `.weight`.

        A tensor without `original_shape` is the `.weight` of a layer.
        """
        return self.entry.name if self.original_shape is not None else self.entry.name.removesuffix(".weight")

    @property
    def original_shape(self) -> tuple[int, ...] | None:
        """The tensor's original shape, or None if it is the 2-D `.weight` of a layer."""
        plain = len(self.entry.shape) == 2 and self.entry.name.endswith(".weight")
        return None if plain else self.entry.shape


@dataclass(frozen=True)
class Coverage:
    """Every tensor of a checkpoint, in storage order."""

    tensors: list[WeightTensor] = field(default_factory=list)

    @cached_property
    def exact_names(self) -> frozenset[str]:
        """The names of all tensors and modules: see :mod:`fewbit.architecture.patterns`."""
        return exact_names(tensor.entry.name for tensor in self.tensors)

    def of(self, action: str) -> list[WeightTensor]:
        """The tensors with the given action."""
        return [tensor for tensor in self.tensors if tensor.action == action]


def cover(
    entries: Iterable[TensorEntry],
    config: dict[str, Any],
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> Coverage:
    """Classify every tensor.

    Patterns are as in :mod:`fewbit.architecture.patterns`. include: matrices to quantize that would otherwise be kept
    or unknown. exclude: tensors to keep; it takes precedence. Raises FewbitError for a pattern that matches nothing, or
    one of `include` that matches no matrix.
    """
    survey = _Survey({entry.name: entry for entry in entries}, gather_facts(config))
    included, excluded = survey.included(include), survey.excluded(exclude)
    found = []
    for entry in survey.entries.values():
        if entry.name in excluded:
            action, reason = "keep", "excluded"
        elif entry.name in included:
            action, reason = "quantize", "included"
        else:
            action, reason = survey.decide(entry)
        table = action == "keep" and reason in _TABLES and survey.is_vocabulary(entry)
        turned = survey.is_turned_table(entry) if table else action == "quantize" and survey.is_transposed(entry)
        found.append(WeightTensor(entry, action, reason, survey.block(entry), turned, place_of(entry.name), table))
    return Coverage(found)


def require_recognised(coverage: Coverage, model: str) -> None:
    """Raise FewbitError, with their names, if tensors are unknown."""
    unknown = coverage.of("unknown")
    if unknown:
        listed = ", ".join(f"{t.entry.name} {list(t.entry.shape)} ({t.reason})" for t in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise FewbitError(
            f"{model}: {len(unknown)} weights are not recognised: {listed}{more}: say what to do with "
            "--include PATTERN (quantize) or --exclude PATTERN (keep)"
        )


def _can_be_included(entry: TensorEntry) -> bool:
    return len(entry.shape) > 1 and _is_float(entry) and entry.numel > 0


def _is_float(entry: TensorEntry) -> bool:
    return entry.dtype.is_floating_point and entry.dtype.itemsize in (2, 4)


@dataclass(frozen=True)
class _Survey:
    """A checkpoint's tensors, and facts that follow from all of them together."""

    entries: dict[str, TensorEntry]
    facts: Facts

    @cached_property
    def exact(self) -> frozenset[str]:
        return exact_names(self.entries)

    def excluded(self, patterns: Iterable[str]) -> set[str]:
        return {name for pattern in patterns for name in matching(pattern, self.entries, self.exact)}

    def included(self, patterns: Iterable[str]) -> set[str]:
        """The matrices that match; beside them a pattern may match biases and norms of the same modules."""
        found: set[str] = set()
        for pattern in patterns:
            hits = matching(pattern, self.entries, self.exact)
            matrices = [name for name in hits if _can_be_included(self.entries[name])]
            if not matrices:
                entry = self.entries[hits[0]]
                raise FewbitError(
                    f"{entry.name}: --include needs a 16 or 32-bit matrix, but its shape is {list(entry.shape)} "
                    f"and its dtype {str(entry.dtype).removeprefix('torch.')}"
                )
            found.update(matrices)
        return found

    @cached_property
    def lists(self) -> dict[str, BlockList]:
        return find_lists(self.entries.values(), self.facts)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @cached_property
    def blocks(self) -> dict[tuple[str, int], list[TensorEntry]]:
        """The tensors of every block."""
        found = defaultdict(list)
        for entry in self.entries.values():
            place = place_of(entry.name)
            if place is not None:
                found[place.prefix, place.number].append(entry)
        return dict(found)

    @cached_property
    def sizes(self) -> dict[tuple[str, int], Counter[int]]:
        """For every block, length -> number of its tensors that have an axis of that length."""
        return {key: Counter(n for entry in found for n in set(entry.shape)) for key, found in self.blocks.items()}

    @cached_property
    def routers(self) -> dict[tuple[str, int], list[TensorEntry]]:
        """The matrices of every block with the names of routers."""
        return {
            key: [e for e in found if len(e.shape) == 2 and kinds.ROUTERS.search(e.name) and e.shape[0] < e.shape[1]]
            for key, found in self.blocks.items()
        }

    @cached_property
    def stacks(self) -> dict[str, list[TensorEntry]]:
        """The 3-D tensors by their module; a tensor called `weight` belongs to the module one level up."""
        found = defaultdict(list)
        for entry in self.entries.values():
            if len(entry.shape) == 3:
                found[_owner(entry.name)].append(entry)
        return dict(found)

    @cached_property
    def turned(self) -> dict[str | None, bool]:
        """For every list of blocks, whether its matrices are stored as (in, out)."""
        by_list: dict[str | None, list[TensorEntry]] = defaultdict(list)
        for entry in self.entries.values():
            place = place_of(entry.name)
            by_list[place.prefix if place else None].append(entry)
        return {prefix: matrices_in_out(found, self.shapes) for prefix, found in by_list.items() if prefix is not None}

    def block(self, entry: TensorEntry) -> int | None:
        place = place_of(entry.name)
        if place is None or self.lists[place.prefix].role != "main" or is_draft(place.rest):
            return None
        limit = self.lists[place.prefix].limit
        return place.number if limit is None or place.number < limit else None

    def decide(self, entry: TensorEntry) -> tuple[str, str]:
        if not entry.numel:
            return "unknown", "no elements"
        place = place_of(entry.name)
        found = self.lists[place.prefix] if place is not None else None
        if len(entry.shape) < 2 and entry.dtype.itemsize != 1:
            return "keep", "vector (norm, bias or scale)"
        if not _is_float(entry):
            known = kinds.is_known_buffer(entry.name)
            dtype = str(entry.dtype).removeprefix("torch.")
            return ("keep", f"{dtype} buffer") if known else ("unknown", f"{dtype}, not a 16 or 32-bit float")
        if found is None or place is None:
            return self._outside(entry)
        if found.role == "keep":
            return "keep", found.reason
        if is_draft(place.rest):
            return "keep", DRAFT
        if found.limit is not None and place.number >= found.limit:
            return "keep", f"{DRAFT}: config.json has {found.limit} blocks"
        subject = self._subject(entry, place)
        reason = kinds.kept_as(subject)
        if reason:
            return "keep", reason
        return kinds.matrix_in_block(subject) if found.is_text else ("unknown", found.reason)

    def is_transposed(self, entry: TensorEntry) -> bool:
        place = place_of(entry.name)
        if len(entry.shape) == 2:
            if place is None:
                return matrices_in_out([entry], self.shapes)
            if kinds.is_row_stack(entry.name, entry.shape, self.facts):
                return experts_in_out([entry], self.shapes, set(self.facts.widths))
            return self.turned[place.prefix]
        if len(entry.shape) != 3 or place is None:
            return False
        key = (place.prefix, place.number)
        default = [e.shape[0] for e in self.blocks[key] if len(e.shape) == 1 and kinds.is_norm(e.name)]
        hidden = hidden_widths(self.routers[key], self.facts, default)
        return experts_in_out(self.stacks[_owner(entry.name)], self.shapes, hidden)

    def is_vocabulary(self, entry: TensorEntry) -> bool:
        """Whether an embedding or head has one row (or column) per token of a vocabulary."""
        fits = len(entry.shape) == 2 and min(entry.shape) >= kinds.SMALLEST and _is_float(entry)
        return fits and not kinds.is_position(entry.name) and not self.facts.vocabularies.isdisjoint(entry.shape)

    def is_turned_table(self, entry: TensorEntry) -> bool:
        """Whether a table of a vocabulary is stored as (in, out), with one column per token."""
        rows, columns = entry.shape
        return rows not in self.facts.vocabularies and columns in self.facts.vocabularies

    def _subject(self, entry: TensorEntry, place: Place) -> kinds.Subject:
        key = (place.prefix, place.number)
        alike = [e for e in self.stacks.get(_owner(entry.name), []) if e.shape[0] == entry.shape[0]]
        routed = frozenset(router.shape[0] for router in self.routers[key])
        share = entry.numel / sum(e.numel for e in self.blocks[key])
        return kinds.Subject(place.rest, entry.shape, self.facts, self.sizes[key], routed, len(alike), share)

    def _outside(self, entry: TensorEntry) -> tuple[str, str]:
        subject = kinds.Subject(entry.name, entry.shape, self.facts, {})
        if is_draft(entry.name):
            return "keep", DRAFT
        if len(subject.wide) < 2:
            return "keep", "vector (norm, bias or scale)"
        if is_tower(entry.name) and self.facts.multimodal:
            return "keep", TOWER
        if is_head(entry.name):
            return "keep", HEAD
        if entry.shape[0] in self.facts.vocabularies or _OUTSIDE_WORDS.fullmatch(subject.leaf) or "embed" in entry.name:
            return "keep", _TABLE
        reason = kinds.kept_as(subject)
        if reason:
            return "keep", _TABLE if reason == "embedding" else reason
        if self.facts.multimodal:
            return "keep", TOWER
        return "unknown", "outside the blocks"


def _owner(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]


def name_in_block(name: str) -> str:
    """The part of a tensor's name after the block's number."""
    place = place_of(name)
    assert place is not None
    return place.rest
