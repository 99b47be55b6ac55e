"""Put packed weights into a network on the meta device, before transformers loads it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fewbit.architecture.names import Placement
from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.errors import FewbitError
from fewbit.formats.native import part_layout
from fewbit.grids.scheme import StoredWeight
from fewbit.linear import Linear
from fewbit.runtime.packed_linear import GUARD_BUFFER, PackedLinear, buffer_name
from fewbit.runtime.packed_parameter import KeptWeight, Merge, PackedParameter, PackedWeight, hold
from fewbit.runtime.part_names import PartNames
from fewbit.runtime.places import is_ignored, is_inside, place_weights

_UNPACK = "write plain 16-bit weights with  fewbit unpack FOLDER OUT  and load those"


@dataclass
class _Network:
    """The model, the shapes of its original parameters, the checkpoint, and the names that parts get in the model."""

    model: Any
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    weights: Mapping[str, StoredWeight]
    entries: Mapping[str, TensorEntry]
    places: Mapping[str, Placement]
    guards: frozenset[str]
    names: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return type(self.model).__name__

    def dtype_of(self, target: str) -> torch.dtype:
        """The dtype in which transformers would load a parameter: some stay in float32."""
        plan = self.model._get_dtype_plan(self.dtype) if hasattr(self.model, "_get_dtype_plan") else {}
        kept = (to for glob, to in plan.items() if re.search(glob.replace("*", ".*"), target))
        return next(kept, self.dtype)

    def owner(self, target: str) -> tuple[nn.Module, str]:
        """The module that has the parameter `target`, and the parameter's name in it."""
        path, _, parameter = target.rpartition(".")
        return self.model.get_submodule(path), parameter


def install(
    model: Any, weights: Mapping[str, StoredWeight], entries: Mapping[str, TensorEntry], dtype: torch.dtype
) -> PartNames:
    """Replace every parameter of `model` that is in `weights` by a packed one; returns the names of their parts.

    entries: every tensor of the checkpoint, including parts; empty if the files are not known. Raises FewbitError if a
    weight does not fit, or if the model has no place for it while another of its parameters would get no weights.
    """
    parts = [f"{name}.{part}" for name, stored in weights.items() for part in part_layout(stored)]
    guards = {stored.tensor_name(name) for name, stored in weights.items()} & entries.keys()
    entries = {name: entry for name, entry in entries.items() if name not in guards}
    places = place_weights(model, weights, entries.keys() - set(parts))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    network = _Network(model, shapes, dtype, weights, entries, places, frozenset(guards))
    groups: dict[str, list[str]] = {}
    for name, place in places.items():
        if place.target in shapes:
            groups.setdefault(place.target, []).append(name)
    packed = {target: members for target, members in groups.items() if _is_packed(network, members)}
    if entries:
        _check_nothing_is_empty(network, groups)
        _check_rest_of_layers(network, packed, groups)
    ties = dict(_ties(network, packed, groups))
    values: dict[str, PackedParameter] = {}
    for target, members in packed.items():
        values |= _pack(network, target, members, is_shared=target in ties.values())
    for target, source in ties.items():
        module, parameter = network.owner(target)
        hold(module, parameter, values[source], borrowed=True)
    checkpoint = list(dict.fromkeys([*parts, *network.names]))
    tensors = [places[name].name for name in weights]
    return PartNames(checkpoint, [network.names.get(name, "") for name in checkpoint], tensors)


def _is_packed(network: _Network, members: list[str]) -> bool:
    """Whether a parameter gets packed weights; if several tensors have its name, transformers takes the first."""
    merged = network.places[members[0]].conversion is not None
    return any(name in network.weights for name in (members if merged else members[:1]))


def _check_nothing_is_empty(network: _Network, groups: Mapping[str, list[str]]) -> None:
    """Raise FewbitError if a parameter of the base model would get no weights while a packed weight has no place.

    A head that a class does not have, or adds anew, is allowed.
    """
    model = network.model
    targets = {name: network.places[name].target for name in network.weights}
    lost = [
        name
        for name, target in targets.items()
        if target not in network.shapes and is_inside(model, target) and not is_ignored(model, target)
    ]
    if not lost:
        return
    conversions = [place.conversion for place in network.places.values() if place.conversion is not None]
    made = {pattern for conversion in conversions for pattern in conversion.target_patterns}
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, shape in network.shapes.items():
        known = name in groups or name in tied or any(pattern in name for pattern in made)
        if len(shape) >= 2 and is_inside(model, name) and not known:
            raise FewbitError(
                f"{network.kind} has no module for the packed {lost[0]}, and nothing else provides its {name}: load "
                f"the folder with the class that its config.json names, or {_UNPACK}"
            )


def _check_rest_of_layers(network: _Network, packed: Mapping[str, list[str]], groups: Mapping[str, list[str]]) -> None:
    """Raise FewbitError if the bias of a packed layer is missing; transformers would initialise it randomly."""
    for target in packed:
        module, _ = network.owner(target)
        path = target.rpartition(".")[0]
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if full not in groups and full not in getattr(network.model, "all_tied_weights_keys", {}):
                made = any(full in network.places[members[0]].parameters for members in packed.values())
                if not made:
                    raise FewbitError(f"{full} is missing: the folder is incomplete")


def _ties(
    network: _Network, packed: Mapping[str, list[str]], groups: Mapping[str, list[str]]
) -> Iterator[tuple[str, str]]:
    """(parameter, the packed parameter to which it is tied) for tied parameters that are not in the checkpoint.

    If both are in the checkpoint, they stay separate, as in transformers if their values differ.
    """
    tied = getattr(network.model, "all_tied_weights_keys", {})
    before = dict(tied)
    for target, source in before.items():
        same = [source, *(name for name, of in before.items() if of == source)]
        there = next((name for name in same if name in groups), source)
        if there in packed:
            yield from ((name, there) for name in (target, source) if name not in groups)
        if {target, source, there} & packed.keys():
            del tied[target]


def _pack(network: _Network, target: str, members: list[str], is_shared: bool) -> dict[str, PackedParameter]:
    """Replace the parameters that the tensors `members` become; returns the packed ones, except plain linear layers."""
    conversion = network.places[members[0]].conversion
    if conversion is None:
        return _pack_one(network, target, members[0], is_shared)
    merge = Merge(conversion, tuple(str(network.places[name].pattern) for name in members), network.model.config)
    for name in members:
        if name in network.weights:
            _check_inputs(name, network.weights[name])
    sources = [_source(network, name) for name in members]
    made = merge(target, [torch.empty(_shape_of(source), device="meta") for source in sources])
    values: dict[str, PackedParameter] = {}
    for name, tensor in sorted(made.items(), key=lambda item: item[0] != target):
        _check_shape(network, name, members[0], tuple(tensor.shape))
        # Parameters into which one tensor is split share its parts: the first stores them, the others read them there.
        origin = next(iter(values.values())) if values else sources
        values[name] = PackedParameter(name, origin, merge, network.dtype_of(name))
        _hold(network, name, values[name])
    for number, (source, member) in enumerate(zip(sources, members, strict=True)):
        _note(network, member, source, f"{_place_of_value(next(iter(values)))}.stored_sources.{number}")
    return values


def _pack_one(network: _Network, target: str, name: str, is_shared: bool) -> dict[str, PackedParameter]:
    stored = network.weights[name]
    module, parameter = network.owner(target)
    _check_shape(network, target, name, stored.tensor_shape)
    turned = type(module).__name__ == "Conv1D"
    if (
        parameter == "weight"
        and (type(module) is nn.Linear or turned)
        and stored.transposed == turned
        and not is_shared
    ):
        packed = PackedLinear(stored, module.bias is not None, network.dtype_of(target), name=name)
        packed.requires_grad_(False)
        # It contains nothing that transformers should initialise randomly.
        packed._is_hf_initialized = True  # type: ignore[assignment]
        path = target.removesuffix(".weight")
        parent, _, child = path.rpartition(".")
        setattr(network.model.get_submodule(parent), child, packed)
        _note_parts(network, name, packed, path)
        return {}
    _check_inputs(name, stored)
    value = PackedParameter(target, [PackedWeight(name, stored)], None, network.dtype_of(target))
    _hold(network, target, value)
    _note(network, name, value.sources[0], f"{_place_of_value(target)}.stored_sources.0")
    return {target: value}


def _check_inputs(name: str, stored: StoredWeight) -> None:
    """Raises FewbitError for a weight with rounded inputs that is not the weight of a plain linear layer."""
    if stored.scheme.input_bits:
        raise FewbitError(
            f"{name}: its inputs are rounded, which only plain linear layers can do: quantize the original with "
            "--input-bits 16"
        )


def _hold(network: _Network, target: str, value: PackedParameter) -> None:
    module, parameter = network.owner(target)
    if type(module) is nn.Linear:
        module.__class__ = Linear
    hold(module, parameter, value)


def _place_of_value(target: str) -> str:
    path, dot, parameter = target.rpartition(".")
    return f"{path}{dot}held.own.{parameter}"


def _source(network: _Network, name: str) -> nn.Module:
    if name in network.weights:
        return PackedWeight(name, network.weights[name])
    entry = network.entries[name]
    return KeptWeight(name, entry.shape, network.dtype if entry.dtype.is_floating_point else entry.dtype)


def _note(network: _Network, name: str, source: nn.Module, path: str) -> None:
    """Record the names in the model of a source's parts, or of its plain tensor."""
    if isinstance(source, PackedWeight):
        _note_parts(network, name, source, path)
    else:
        network.names[name] = f"{path}.value"


def _note_parts(network: _Network, name: str, packed: PackedLinear | PackedWeight, path: str) -> None:
    network.names |= {f"{name}.{part}": f"{path}.{buffer_name(part)}" for part in part_layout(packed.stored)}
    guard = packed.stored.tensor_name(name)
    if guard in network.guards:
        network.names[guard] = f"{path}.{GUARD_BUFFER}"
    else:
        # Folders of version 1 have no guards.
        delattr(packed, GUARD_BUFFER)


def _shape_of(source: nn.Module) -> tuple[int, ...]:
    return source.stored.tensor_shape if isinstance(source, PackedWeight) else tuple(source.value.shape)  # type: ignore


def _check_shape(network: _Network, target: str, name: str, shape: tuple[int, ...]) -> None:
    there = network.shapes.get(target)
    if there != shape:
        has = f"has {list(there)} there" if there else f"has no {target}"
        raise FewbitError(
            f"{name} is packed as {list(shape)}, but {network.kind} {has}: config.json does not belong to these weights"
        )
