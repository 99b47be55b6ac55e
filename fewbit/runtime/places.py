"""Find the parameters for a checkpoint's weights in a network that transformers built, by transformers' own mapping."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fewbit.grids.scheme import StoredWeight


@dataclass(frozen=True)
class Place:
    """A tensor of the checkpoint in the network.

    name: of the tensor. target: the parameter that it becomes, or the first of several that are made from it. pattern,
    conversion: of the converter that makes them; None if the tensor is loaded as it is.
    """

    name: str
    target: str
    pattern: str | None = None
    conversion: Any = None


def find_places(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """The place of every tensor, in the order in which transformers reads them; the target may not exist."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = copy.deepcopy(get_model_conversion_mapping(model))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, known = model.base_model_prefix, model.state_dict()
    found = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        found[name] = Place(name, target, pattern, by_pattern.get(pattern))
    return found


def place_weights(model: Any, weights: Mapping[str, StoredWeight], kept: Iterable[str]) -> dict[str, Place]:
    """The place of every packed weight, by its own name, and of every kept tensor.

    A packed weight is the `.weight` of the layer with its name. If it has an `original_shape`, it is the tensor with
    its name.
    """
    either = {name: (name, f"{name}.weight") for name in weights}
    found = find_places(model, [*kept, *(tensor for pair in either.values() for tensor in pair)])
    known = model.state_dict()
    for name, (own, layer) in either.items():
        first, second = (own, layer) if weights[name].original_shape else (layer, own)
        unknown = found[first].target not in known and found[second].target in known
        found[name] = found[second if unknown else first]
        found.update({layer: found[name]} if unknown else {})
    mine = {*weights, *kept}
    return {name: place for name, place in found.items() if name in mine}


def mark_used(conversions: Iterable[Any], tensors: Iterable[str]) -> None:
    """Mark the conversions of these tensors as used, so that transformers reverses them when it saves the model."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    for tensor in sorted(tensors, key=dot_natural_key):
        rename_source_key(tensor, renamings, converters)


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
