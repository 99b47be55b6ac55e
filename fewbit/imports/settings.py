"""Read another tool's description of its quantization: known keys, and no others that could change a meaning."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import CannotImportError, FewbitError
from fewbit.printable import one_line

_EMPTY: tuple[Any, ...] = (None, False, {}, [], "")
_LONGEST = 40


@dataclass(frozen=True)
class Settings:
    """The keys of a description. place: where they are, for messages."""

    place: str
    values: Mapping[str, Any]

    def refuse(self, key: str, why: str) -> FewbitError:
        """The error for a key whose value cannot be imported."""
        value = one_line(self.values.get(key), _LONGEST)
        return CannotImportError(f"{self.place}: {key} is {value}: {why}: give the 16-bit original to  fewbit quantize")

    def only(self, known: Collection[str]) -> None:
        """Raise FewbitError for a key that is not known and not empty: it may change what the codes mean."""
        for key, value in self.values.items():
            if key not in known and value not in _EMPTY:
                raise self.refuse(key, "fewbit does not know this key, which may change the meaning of the codes")

    def one_of(self, key: str, allowed: Collection[Any], default: Any = None) -> Any:
        """The value of a key. Raises FewbitError for one that is not allowed."""
        value = self.values.get(key, default)
        if not any(value == one and type(value) is type(one) for one in allowed):
            names = " or ".join(map(str, allowed))
            raise self.refuse(key, f"only {names} can be imported")
        return value

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, "it must be a whole number")
        return value

    def empty(self, key: str, why: str) -> None:
        """Raise FewbitError unless a key is absent or empty."""
        if self.values.get(key) not in _EMPTY:
            raise self.refuse(key, why)

    def inside(self, key: str) -> "Settings":
        """The description in a key, an object."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.refuse(key, "it must be an object")
        return Settings(f"{self.place}: {key}", value)


def settings_of(folder: Path, values: Any) -> Settings:
    """The `quantization_config` of a folder. Raises FewbitError if it is no object, or empty."""
    if not isinstance(values, dict) or not values:
        raise CannotImportError(f"{folder}: no quantization_config describes its codes: fetch the checkpoint again")
    return Settings(f"{folder}: quantization_config", values)
