"""Patterns for tensor names: a tensor's exact name, or shell-style with ``*``, ``?`` and ``[...]``."""

import fnmatch
from collections.abc import Collection, Iterable

from fewbit.errors import FewbitError


def matching(patterns: Iterable[str], names: Collection[str]) -> set[str]:
    """Names that match one of the patterns completely.

    A pattern that is the name of a tensor matches only that tensor, whatever characters it contains. Raises FewbitError
    for a pattern that matches nothing.
    """
    known = set(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {pattern} if pattern in known else {name for name in known if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise FewbitError(f"pattern {pattern!r} matches no tensor: list the names with  fewbit inspect")
        found |= hits
    return found
