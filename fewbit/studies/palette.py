"""Colours of methods in the figures of a study: as different as can be, the same in every figure."""

from collections.abc import Iterable

_COLOURS = (
    *("#0b6e99", "#c8553d", "#e0a030", "#2f8f6b", "#7a5195", "#ef5675", "#4f6d7a", "#8c6d31"),
    *("#17becf", "#b5bd61", "#d67ab1", "#1d2330"),
)


def method_colours(names: Iterable[str]) -> dict[str, str]:
    """Name -> colour, in order of the names; they repeat after twelve."""
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(sorted(set(names)))}
