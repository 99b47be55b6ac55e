"""From the names in a checkpoint to those in the network that transformers builds, by transformers' own mapping.

Published names and the network's differ: wrappers around a text model were renamed, and experts that are stored one by
one are stacked while they are loaded. transformers has rules for both, which are asked here, never guessed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """The parameters that a tensor becomes (all or a part of); none when the network has no place for it.

    converted: it may be turned, split or stacked on the way.
    """

    parameters: tuple[str, ...]
    converted: bool = False


def names_in_network(model: Any, names: Iterable[str]) -> dict[str, Target]:
    """Where transformers puts every tensor of a checkpoint; model: the transformers model that is built from it."""
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
    # Some rules hold from a certain name on, so they are asked in the order in which transformers loads.
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
    """The rules for this model; None where transformers has no such thing for it."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return None
    try:
        return list(get_model_conversion_mapping(model))
    except (AttributeError, TypeError):
        # No model of transformers' own, such as a plain module in a test.
        return None


def _plain(model: Any, name: str, known: Mapping[str, bool]) -> Target:
    prefix = getattr(model, "base_model_prefix", "")
    tried = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return Target(tuple(dict.fromkeys(one for one in tried if one in known))[:1])
