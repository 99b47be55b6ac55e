"""Parts between a checkpoint's names and the network's, past all that transformers does to names.

Its renamings and converters are meant for weights. One that turns `experts.gate_up_proj` or splits `attn.qkv` would do
that to codes. So parts travel under names that none of them matches: `PartNames` gives each a number, the first
renaming of a load puts the number in place of the name, and the last converter takes it out again. A save runs through
the same list backwards.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

_NUMBER = "fewbit_part_"
_NUMBERED = re.compile(rf"{_NUMBER}(\d+)_")


@dataclass
class PartNames:
    """Names of parts in the checkpoint, and in the network ("" where it has no place for one).

    tensors: what the packed weights were made from. seen: the parts that were loaded.
    """

    checkpoint: list[str] = field(default_factory=list)
    network: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._of_checkpoint = {name: number for number, name in enumerate(self.checkpoint)}
        self._of_network = {name: number for number, name in enumerate(self.network) if name}

    def hide(self, name: str) -> str | None:
        """The numbered name of a part of the checkpoint."""
        return _numbered(self._of_checkpoint.get(name))

    def place(self, name: str) -> str | None:
        """The network's name for a numbered one."""
        number = _number(name)
        if number is None:
            return None
        self.seen.add(self.checkpoint[number])
        return self.network[number] or self.checkpoint[number]

    def lift(self, name: str) -> str | None:
        """The numbered name of a part of the network."""
        return _numbered(self._of_network.get(name))

    def show(self, name: str) -> str | None:
        """The checkpoint's name for a numbered one."""
        number = _number(name)
        return None if number is None else self.checkpoint[number]

    def missing(self) -> list[str]:
        """Parts that have a place in the network and were not loaded."""
        return [name for name, to in zip(self.checkpoint, self.network, strict=True) if to and name not in self.seen]

    def __deepcopy__(self, memo: Any) -> "PartNames":
        """Itself: transformers copies a converter for every tensor."""
        return self


def _numbered(number: int | None) -> str | None:
    return None if number is None else f"{_NUMBER}{number}_"


def _number(name: str) -> int | None:
    match = _NUMBERED.search(name)
    return None if match is None else int(match[1])


class Hide(WeightRenaming):
    """Renames parts of the checkpoint to numbers; saving, numbers to parts of the checkpoint."""

    __slots__ = ("names", "saving")

    def __init__(self, names: PartNames, saving: bool = False) -> None:
        super().__init__(_NUMBER, _NUMBER)
        self.names, self.saving = names, saving

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        found = self.names.show(source_key) if self.saving else self.names.hide(source_key)
        self._was_used |= found is not None
        return found or source_key, None

    def reverse_transform(self) -> "Hide":
        return Hide(self.names, not self.saving)


class Settle(WeightConverter):
    """Renames numbers to parts of the network; saving, parts of the network to numbers."""

    __slots__ = ("names", "saving")

    def __init__(self, names: PartNames, saving: bool = False) -> None:
        super().__init__(_NUMBER, _NUMBER, [_Nothing()])
        self.names, self.saving = names, saving

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        found = self.names.lift(source_key) if self.saving else self.names.place(source_key)
        self._was_used |= found is not None
        return found or source_key, None if found is None else _NUMBER

    def reverse_transform(self) -> "Settle":
        return Settle(self.names, not self.saving)

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        ((tensor, *_),) = self.materialize_tensors().values()
        return {layer_name: tensor}

    def __deepcopy__(self, memo: Any) -> "Settle":
        return Settle(self.names, self.saving)


class _Nothing(ConversionOps):
    """A converter must have an operation."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict
