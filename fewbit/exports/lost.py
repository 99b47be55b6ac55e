"""What of a recipe a format does not hold: the choices at fault, and what to give in their place."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from fewbit.exports.table import Target
from fewbit.grids.inputs import KEPT
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.scheme import Scheme
from fewbit.grids.table import GRIDS

_SIZES = (128, 64, 32)
_SAID = 6


@dataclass(frozen=True)
class _Trait:
    """One choice of a recipe. choice: its name there. said: what it is in a scheme, in words.

    others: the same scheme with each other value of the choice, by that value.
    """

    choice: str
    said: Callable[[Scheme], str]
    others: Callable[[Scheme, Target], dict[str, Scheme]]


def what_is_lost(
    holds: Callable[[Scheme], bool], scheme: Scheme, target: Target, sets: Sequence[tuple[str, Mapping[str, Any]]]
) -> str:
    """The fewest choices without which a format holds a scheme, in words, and what to do.

    sets: the patterns of `--set` that match the weight, with their choices.
    """
    for count in (1, 2, 3):
        for traits in combinations(_TRAITS, count):
            fits = [given for given, other in _changed(traits, scheme, target) if holds(other)]
            if fits:
                said = " and ".join(trait.said(scheme) for trait in traits)
                wrong = [_option(trait, sets) for trait in traits]
                last = list(dict.fromkeys(given[-1] for given in fits))
                instead = f" or give {_or(last[:_SAID])}" if traits[-1].choice != "scale_format" else ""
                return f"{said}: leave out {' and '.join(wrong)}{instead}"
    return f"{', '.join(trait.said(scheme) for trait in _TRAITS)} together: leave out what was given of them"


def _changed(traits: Sequence[_Trait], scheme: Scheme, target: Target) -> Iterable[tuple[tuple[str, ...], Scheme]]:
    """A scheme with other values of all of these choices, and the values."""
    if not traits:
        yield (), scheme
        return
    for given, other in traits[0].others(scheme, target).items():
        for more, changed in _changed(traits[1:], other, target):
            yield (given, *more), changed


def _option(trait: _Trait, sets: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The option that makes a choice: the last --set that does, or else its own."""
    pattern = next((pattern for pattern, given in reversed(sets) if trait.choice in given), None)
    return f"--{trait.choice.replace('_', '-')}" if pattern is None else f"{trait.choice} in --set {pattern!r}"


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _without_transform(scheme: Scheme, target: Target) -> dict[str, Scheme]:
    return {} if scheme.transform == "none" else {"none": replace(scheme, transform="none")}


def _without_outliers(scheme: Scheme, target: Target) -> dict[str, Scheme]:
    return {"none": replace(scheme, outlier_grid="none", outlier_bits=0)} if scheme.has_outliers else {}


def _without_rounded_inputs(scheme: Scheme, target: Target) -> dict[str, Scheme]:
    return {str(KEPT): replace(scheme, input_bits=0)} if scheme.input_bits else {}


def _other_scales(scheme: Scheme, target: Target) -> dict[str, Scheme]:
    plain = replace(scheme, statistic_bits=0, statistic_rows=0)
    return {name: replace(plain, scale_format=name) for name in SCALE_FORMATS if name != scheme.scale_format}


def _other_bits(scheme: Scheme, target: Target) -> dict[str, Scheme]:
    return {str(bits): replace(scheme, bits=bits) for bits in target.bits if bits != scheme.bits}


def _other_groups(scheme: Scheme, target: Target) -> dict[str, Scheme]:
    return {str(size): replace(scheme, group_size=size) for size in _SIZES if size != scheme.group_size}


def _other_grids(scheme: Scheme, target: Target) -> dict[str, Scheme]:
    found: dict[str, Scheme] = {}
    for grid in GRIDS.values():
        if grid.choice in target.grids and grid.name != scheme.grid:
            brought = {"bits": grid.widths[0], "scale_format": grid.scales, "group_size": grid.brings.get("group_size")}
            own: dict[str, Any] = {key: value for key, value in brought.items() if value} if grid.brings else {}
            size = own.get("group_size", scheme.group_size)
            own["group_size"] = size if isinstance(size, int) else scheme.group_size
            found[grid.choice] = replace(scheme, **{**own, "grid": grid.name, "levels": ()})
    return found


_TRAITS = (
    _Trait("transform", lambda scheme: f"the transform {scheme.transform}", _without_transform),
    _Trait("outliers", lambda scheme: "outliers", _without_outliers),
    _Trait("bits", lambda scheme: f"{scheme.bits:g} bits", _other_bits),
    _Trait("group_size", lambda scheme: f"groups of {scheme.group_size}", _other_groups),
    _Trait("scale_format", lambda scheme: f"{scheme.scale_format} scales", _other_scales),
    _Trait("grid", lambda scheme: f"the grid {GRIDS[scheme.grid].choice}", _other_grids),
    _Trait("input_bits", lambda scheme: f"inputs of {scheme.input_bits} bits", _without_rounded_inputs),
)
