"""Map names in a checkpoint to names in the network that transformers builds, with transformers' own rules.

The two differ: wrappers around a text model were renamed, and experts that are stored separately are stacked when they
are loaded. transformers has rules for both. They are used here, and names are never guessed.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Placement:
    """Where transformers loads a tensor of the checkpoint.

    name: of the tensor. target: the parameter that it becomes, or the first of several that are made from it; the
    network may not have it. pattern, conversion: of the converter that makes them; None if the tensor is loaded as it
    is.
    """

    name: str
    target: str
    pattern: str | None = None
    conversion: Any = None

    @property
    def parameters(self) -> list[str]:
        """Every parameter that the tensor becomes, or becomes a part of."""
        if self.conversion is None:
            return [self.target]
        first, *others = self.conversion.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]


@dataclass(frozen=True)
class Target:
    """The parameters that a tensor becomes, or becomes a part of; empty if the network has no such parameter.

    converted: the tensor may be transposed, split or stacked when it is loaded.
    """

    parameters: tuple[str, ...]
    converted: bool = False


def names_in_network(model: Any, names: Iterable[str]) -> dict[str, Target]:
    """The parameters into which transformers loads every tensor. model: the transformers model of the checkpoint."""
    known = model.state_dict()
    return {
        name: Target(tuple(one for one in place.parameters if one in known), place.conversion is not None)
        for name, place in find_placements(model, names).items()
    }


def find_placements(model: Any, names: Iterable[str]) -> dict[str, Placement]:
    """The placement of every tensor, in the order in which transformers reads them."""
    known = model.state_dict()
    rules = _rules(model)
    if rules is None:
        return {name: Placement(name, _plain(model, name, known)) for name in names}
    by_pattern = {pattern: rule for rule in rules for pattern in rule.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    return {
        name: Placement(name, target, pattern, by_pattern[pattern] if pattern is not None else None)
        for name, target, pattern in apply_rules(rules, names, prefix, known)
    }


def apply_rules(
    rules: Iterable[Any], names: Iterable[str], prefix: str | None = None, known: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str, str | None]]:
    """Each name, the name that transformers' rules give it, and the pattern of the converter that matches it.

    prefix: of the base model in the network. known: the network's parameters; a name among them stays if the rules lead
    nowhere. The rules remember that they were used.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = list(rules)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    # Some rules depend on the names before, so they are applied in the order in which transformers loads.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if known is not None and target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        yield name, target, pattern


def _rules(model: Any) -> list[Any] | None:
    """Copies of the rules for this model; None if transformers has none."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return None
    try:
        return copy.deepcopy(list(get_model_conversion_mapping(model)))
    except (AttributeError, TypeError):
        # Not a transformers model, such as a plain module in a test.
        return None


def _plain(model: Any, name: str, known: Mapping[str, Any]) -> str:
    """The parameter with this name, with or without the prefix of the base model; the name itself if there is none."""
    prefix = getattr(model, "base_model_prefix", "")
    tried = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((one for one in tried if one in known), name)
