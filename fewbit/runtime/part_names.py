"""Map the names of parts in a checkpoint to those in the network, without transformers' conversions.

transformers' renamings and converters are meant for weights. One that transposes `experts.gate_up_proj` or splits
`attn.qkv` would do the same to codes. So parts get temporary names that no converter matches: `PartNames` assigns each
a number, the first renaming of a load replaces the name by the number, and the last converter replaces the number by
the name in the network. Saving goes through the same list backwards.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

_NUMBER = "fewbit_part_"
_NUMBERED = re.compile(rf"{_NUMBER}(\d+)_")


@dataclass
class PartNames:
    """Names of parts in the checkpoint, and in the network ("" if it has no place for one).

    tensors: names of the original tensors of the packed weights. seen: the parts that were loaded.
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
        """The network's name for a numbered name."""
        number = _number(name)
        if number is None:
            return None
        self.seen.add(self.checkpoint[number])
        return self.network[number] or self.checkpoint[number]

    def lift(self, name: str) -> str | None:
        """The numbered name of a part of the network."""
        return _numbered(self._of_network.get(name))

    def show(self, name: str) -> str | None:
        """The checkpoint's name for a numbered name."""
        number = _number(name)
        return None if number is None else self.checkpoint[number]

    def missing(self) -> list[str]:
        """Parts that have a place in the network and were not loaded."""
        return [name for name, to in zip(self.checkpoint, self.network, strict=True) if to and name not in self.seen]

    def __deepcopy__(self, memo: Any) -> "PartNames":
        """Return itself: transformers copies a converter for every tensor, and the copies share the names."""
        return self


def _numbered(number: int | None) -> str | None:
    return None if number is None else f"{_NUMBER}{number}_"


def _number(name: str) -> int | None:
    match = _NUMBERED.search(name)
    return None if match is None else int(match[1])


class Hide(WeightRenaming):
    """When loading, renames parts of the checkpoint to numbers; when saving, the reverse."""

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
    """When loading, renames numbers to parts of the network; when saving, the reverse."""

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
    """An operation that does nothing, because a converter must have one."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict
