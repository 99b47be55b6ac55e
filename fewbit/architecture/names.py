"""Map names in a checkpoint to names in the network that transformers builds, with transformers' own rules.

The two differ: wrappers around a text model were renamed, and experts that are stored separately are stacked when they
are loaded. transformers has rules for both. They are used here, and names are never guessed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """The parameters that a tensor becomes, or becomes a part of; empty if the network has no such parameter.

    converted: the tensor may be transposed, split or stacked when it is loaded.
    """

    parameters: tuple[str, ...]
    converted: bool = False


def names_in_network(model: Any, names: Iterable[str]) -> dict[str, Target]:
    """The parameters into which transformers loads every tensor. model: the transformers model of the checkpoint."""
    known = dict.fromkeys(model.state_dict(), True)
    rules = _rules(model)
    if rules is None:
        return {name: _plain(model, name, known) for name in names}
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, Target] = {}
    # Some rules depend on the names before, so they are applied in the order in which transformers loads.
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        if pattern is None:
            found[name] = Target((renamed,) if renamed in known else ())
            continue
        first, *others = by_pattern[pattern].target_patterns
        targets = [renamed, *(renamed.replace(first, other) for other in others)]
        found[name] = Target(tuple(target for target in targets if target in known), converted=True)
    return found


def _rules(model: Any) -> list[Any] | None:
    """The rules for this model; None if transformers has none."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return None
    try:
        return list(get_model_conversion_mapping(model))
    except (AttributeError, TypeError):
        # Not a transformers model, such as a plain module in a test.
        return None


def _plain(model: Any, name: str, known: Mapping[str, bool]) -> Target:
    prefix = getattr(model, "base_model_prefix", "")
    tried = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return Target(tuple(dict.fromkeys(one for one in tried if one in known))[:1])
