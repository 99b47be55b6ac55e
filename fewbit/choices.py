"""What the choice on one axis may know about the others to say which combinations are not possible."""

import difflib
from collections.abc import Iterable
from typing import Any, Protocol

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
