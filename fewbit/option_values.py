"""Values of options given in Python: names and kinds are checked as the command line would check them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from fewbit.choices import nearest
from fewbit.errors import FewbitError
from fewbit.options import Option


@dataclass(frozen=True)
class _Kind:
    """What an option of one kind accepts. convert returns None for a value that is not of this kind."""

    words: str
    convert: Callable[[Any], Any]


def checked(what: str, options: Sequence[Option], choices: Mapping[str, Any]) -> dict[str, Any]:
    """The choices, each converted to the kind of its option; None stays None.

    Raises FewbitError for an unknown option, with the nearest known name, and for a value of another kind.
    """
    known = {option.name: option for option in options}
    found: dict[str, Any] = {}
    for name, value in choices.items():
        if name not in known:
            raise FewbitError(f"{what} has no option {name!r}{nearest(name, known)}")
        found[name] = None if value is None else _converted(known[name], value)
    return found


def _converted(option: Option, value: Any) -> Any:
    kind = _KINDS[option.kind]
    found = kind.convert(value)
    if found is None:
        raise FewbitError(f"{option.name} must be {kind.words}, not {value!r}")
    return found


def _text(value: Any) -> str | None:
    # A group size is often given as a number, a text file as a path, and a device as torch's.
    fits = isinstance(value, str | Path | torch.device) or (isinstance(value, Integral) and not isinstance(value, bool))
    return str(value) if fits else None


def _whole(value: Any) -> int | None:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    found = _number(value)
    return int(found) if found is not None and found.is_integer() else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping):
        return value
    return tuple(value) if isinstance(value, Sequence | set | frozenset) else None


_KINDS: dict[Any, _Kind] = {
    str: _Kind("a string", _text),
    int: _Kind("a whole number", _whole),
    float: _Kind("a number", _number),
    bool: _Kind("True or False", lambda value: value if isinstance(value, bool) else None),
    Path: _Kind("a path", lambda value: Path(value) if isinstance(value, str | Path) else None),
    list[str]: _Kind("a string or a list of strings", _texts),
}
