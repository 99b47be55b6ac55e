"""Find the parameters for a checkpoint's weights in a network that transformers built, by transformers' own mapping."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fewbit.architecture.names import Placement, apply_rules, find_placements
from fewbit.grids.scheme import StoredWeight


def place_weights(model: Any, weights: Mapping[str, StoredWeight], kept: Iterable[str]) -> dict[str, Placement]:
    """The placement of every packed weight, by the name of its module, and of every kept tensor."""
    modules = {stored.tensor_name(module): module for module, stored in weights.items()}
    found = find_placements(model, [*kept, *modules])
    return {modules.get(name, name): place for name, place in found.items()}


def mark_used(conversions: Iterable[Any], tensors: Iterable[str]) -> None:
    """Mark the conversions of these tensors as used, so that transformers reverses them when it saves the model."""
    for _ in apply_rules(conversions, tensors):
        pass


def is_inside(model: Any, target: str) -> bool:
    """Whether a parameter belongs to the base model, and not to a head."""
    base = model.base_model_prefix
    if base and target.startswith(f"{base}."):
        return True
    return not (base and hasattr(model, base)) and hasattr(model, target.split(".")[0])


def is_ignored(model: Any, target: str) -> bool:
    """Whether the model's class states that it does not need this tensor of its checkpoints."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, target) for pattern in patterns)
