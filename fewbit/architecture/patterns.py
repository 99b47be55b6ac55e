"""Patterns for tensors, as in ``--include``, ``--exclude`` and ``--set``.

A pattern matches a tensor if it matches the tensor's whole name, or the name of a module that holds the tensor:
``model.layers.0.mlp.up_proj.weight``, ``model.layers.0.mlp.up_proj`` and ``model.layers.0`` all match the first one.
It is shell-style, with ``*`` (also across dots), ``?`` and ``[...]``, and case-sensitive. A pattern that is exactly the
name of a tensor or of a module of the model stands only for that, whatever characters it contains.
"""

from collections.abc import Collection, Container, Iterable
from fnmatch import fnmatchcase

from fewbit.errors import FewbitError


def names_within(name: str) -> list[str]:
    """A tensor's name, and the names of the modules that hold it, innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def exact_names(names: Iterable[str]) -> frozenset[str]:
    """The names of all tensors and of all modules of a model."""
    return frozenset(one for name in names for one in names_within(name))


def matches(name: str, pattern: str, exact: Container[str] = ()) -> bool:
    """Whether a pattern matches the tensor `name`. exact: the model's :func:`exact_names`."""
    own = names_within(name)
    return pattern in own or (pattern not in exact and any(fnmatchcase(one, pattern) for one in own))


def matching(pattern: str, names: Collection[str], exact: Container[str]) -> list[str]:
    """The tensors of a model that a pattern matches. Raises FewbitError if there are none."""
    found = [name for name in names if matches(name, pattern, exact)]
    if not found:
        raise FewbitError(f"pattern {pattern!r} matches no tensor: list the names with  fewbit inspect")
    return found
