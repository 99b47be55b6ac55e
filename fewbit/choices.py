"""What the choice on one axis may know about the others, and checks that all choices share."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Protocol, get_args, get_origin

from fewbit.errors import FewbitError


class Choices(Protocol):
    """All axes of a recipe: see :class:`fewbit.recipe.Recipe`."""

    @property
    def method(self) -> str: ...
    @property
    def transform(self) -> Any: ...
    @property
    def outliers(self) -> Any: ...
    @property
    def curvature(self) -> Any: ...
    @property
    def grid(self) -> Any: ...
    @property
    def scales(self) -> Any: ...
    @property
    def solver(self) -> Any: ...


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint with the nearest known name, or an empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raises FewbitError unless `name` is one of `known`."""
    known = list(known)
    if name not in known:
        raise FewbitError(f"{what} must be one of {', '.join(known)}, not {name!r}{nearest(name, known)}")


_FITS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: (
        "a finite number",
        lambda value: isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value),
    ),
    str: ("text", lambda value: isinstance(value, str)),
    NoneType: ("None", lambda value: value is None),
}


def check_values(choice: Any, names: Mapping[str, str] | None = None) -> None:
    """Raises FewbitError if a plain field of a dataclass does not hold its type, or a number that is not finite.

    Choices come from the command line, from JSON files and from Python alike, so types alone do not hold. Numbers of
    other libraries, such as NumPy, are replaced by Python's own, which JSON has. names: what users call a field, if
    different. What a tuple contains is not checked.
    """
    for field in fields(choice):
        kinds = get_args(field.type) if get_origin(field.type) is UnionType else (field.type,)
        value = plain_number(getattr(choice, field.name))
        if value is not getattr(choice, field.name):
            object.__setattr__(choice, field.name, value)
        described = [_FITS.get(kind) or _instance_of(kind) for kind in kinds]
        if not any(fits(value) for _, fits in described):
            words = " or ".join(words for words, _ in described)
            raise FewbitError(f"{(names or {}).get(field.name, field.name)} must be {words}, not {value!r}")


def plain_number(value: Any) -> Any:
    """Python's own number for one of another library; anything else unchanged."""
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


def _instance_of(kind: Any) -> tuple[str, Callable[[Any], bool]]:
    origin = get_origin(kind) or kind
    if kind is Any or not isinstance(origin, type):
        return "", lambda value: True
    return f"a {origin.__name__}", lambda value: isinstance(value, origin)


def flag_names(choice: Any) -> dict[str, str]:
    """The fields of a dataclass as they are spelled on the command line."""
    return {field.name: f"--{field.name.replace('_', '-')}" for field in fields(choice)}
