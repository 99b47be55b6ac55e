"""The numbered lists of blocks in a checkpoint: which one is the decoder, and what the others are.

A list is identified by its prefix, the part of a name before the first number: ``model.layers.7.…``, ``mtp.layers.0.…``
and ``visual.blocks.3.…`` are in three different lists, even if the rest of their names is the same. Blocks of different
lists are never mixed.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fewbit.architecture.facts import TOWER_WORDS, Facts, words_of
from fewbit.checkpoints.safetensors_io import TensorEntry

_DRAFT_WORDS = re.compile(
    "mtp|nextn|draft|drafter|eagle|eagle3|medusa|hydra|speculator|speculators|talker|code2wav|token2wav"
)
_HEAD_WORDS = re.compile(
    "head|heads|score|scores|classifier|classification|pooler|cls|qa|reward|value|regression|predictions|"
    "vocab|transform"
)

DRAFT = "multi-token prediction or another output, outside the decoder"
TOWER = "vision, audio or projector, outside the text decoder"
HEAD = "a head"


@dataclass(frozen=True)
class Place:
    """The position of a tensor, from its name: in block `number` of the list `prefix`, under the name `rest`."""

    prefix: str
    number: int
    rest: str


@dataclass(frozen=True)
class BlockList:
    """A list of blocks. role: main (the decoder), text (other text blocks, such as an encoder), keep, or unknown.

    reason: why the role is keep or unknown. limit: blocks from this number on are not part of the model (None: no
    limit).
    """

    prefix: str
    role: str
    reason: str
    limit: int | None = None

    @property
    def is_text(self) -> bool:
        """Whether its linear layers are quantized."""
        return self.role in ("main", "text")


def place_of(name: str) -> Place | None:
    """The position that a name states with its first part that is a number; None for a tensor that is in no list."""
    parts = name.split(".")
    for index, part in enumerate(parts[1:-1], 1):
        if part.isdecimal():
            return Place(".".join(parts[:index]), int(part), ".".join(parts[index + 1 :]))
    return None


def is_draft(name: str) -> bool:
    """Whether a name or prefix is that of a part beside the decoder that predicts further tokens or produces speech."""
    return any(_DRAFT_WORDS.fullmatch(word) or word.startswith("mtp") for word in words_of(name))


def is_tower(name: str) -> bool:
    """Whether a name or prefix is that of a vision or audio tower or a projector."""
    return any(TOWER_WORDS.fullmatch(word) for word in words_of(name))


def is_head(name: str) -> bool:
    """Whether a name or prefix is that of a head."""
    return any(_HEAD_WORDS.fullmatch(word) for word in words_of(name))


def find_lists(entries: Iterable[TensorEntry], facts: Facts) -> dict[str, BlockList]:
    """The lists of blocks of a checkpoint by prefix, each with its role."""
    sizes: dict[str, int] = {}
    numbers: dict[str, set[int]] = {}
    for entry in entries:
        place = place_of(entry.name)
        if place is not None:
            matrix = entry.numel if len(entry.shape) > 1 else 0
            sizes[place.prefix] = sizes.get(place.prefix, 0) + matrix
            numbers.setdefault(place.prefix, set()).add(place.number)
    main = _main(sizes, {prefix for prefix, found in numbers.items() if len(found) in facts.layers})
    return {prefix: _role(prefix, found, main, facts) for prefix, found in numbers.items()}


def _main(sizes: dict[str, int], counted: set[str]) -> str | None:
    """The prefix of the main list, or None.

    Towers, drafts and heads are excluded. Lists with as many blocks as the configuration states (`counted`) are
    preferred, and among those the largest. If it is an encoder with a matching decoder, the decoder is taken.
    """
    fit = {p: size for p, size in sizes.items() if size and not (is_draft(p) or is_tower(p) or is_head(p))}
    if not fit:
        return None
    largest = max(fit, key=lambda prefix: (prefix in counted, fit[prefix]))
    twin = _decoder_of(largest)
    return twin if twin in fit else largest


def _decoder_of(prefix: str) -> str:
    return ".".join(part.replace("encoder", "decoder") for part in prefix.split("."))


def _role(prefix: str, numbers: set[int], main: str | None, facts: Facts) -> BlockList:
    limit = max(facts.layers, default=None)
    if prefix == main:
        return BlockList(prefix, "main", "", limit)
    if is_draft(prefix):
        return BlockList(prefix, "keep", DRAFT)
    if is_tower(prefix) and facts.multimodal:
        return BlockList(prefix, "keep", TOWER)
    if is_head(prefix):
        return BlockList(prefix, "keep", HEAD)
    if main is not None and _decoder_of(prefix) == main and (facts.encoder_decoder or "encoder" in _named(facts)):
        if facts.speech:
            return BlockList(prefix, "keep", TOWER)
        return BlockList(prefix, "text", "")
    if _has_own_part(prefix, numbers, facts):
        return BlockList(prefix, "text", "")
    if main is not None and _beside(prefix, main) and len(numbers) in facts.layers:
        return BlockList(prefix, "text", "")
    if facts.multimodal:
        return BlockList(prefix, "keep", TOWER)
    return BlockList(prefix, "unknown", f"{prefix} is a second list of blocks that config.json does not describe")


def _beside(prefix: str, main: str) -> bool:
    """Whether two lists belong to one module, as XLM's attention and feed-forward layers, or to similar modules."""
    ours, theirs = prefix.split("."), main.split(".")
    if len(ours) != len(theirs):
        return False
    if ours[:-1] == theirs[:-1]:
        return True
    return len(ours) > 2 and ours[0] == theirs[0] and sum(a != b for a, b in zip(ours, theirs, strict=True)) == 1


def _named(facts: Facts) -> set[str]:
    return {name for name, _ in facts.parts}


def _has_own_part(prefix: str, numbers: set[int], facts: Facts) -> bool:
    """Whether the configuration has a part with the list's name and number of blocks."""
    words = words_of(prefix)
    return any(name in words and len(numbers) in counts for name, counts in facts.parts)
