"""Put trainable weights into a loaded network in place of its packed layers, and take their stored form out again."""

import copy
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import FewbitError
from fewbit.runtime.packed_linear import PackedLinear, parts_of
from fewbit.runtime.packed_parameter import PackedWeight
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.report import Originals
from fewbit.tuning.tuned_table import TunedTensor, product
from fewbit.tuning.tuned_weight import TunedWeight


class TunedLinear(nn.Module):
    """``y = x W^T + b`` with W as it would be stored now."""

    def __init__(self, weight: TunedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.tuned = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(self.tuned, x, self.bias)


def make_trainable(
    model: nn.Module, choice: TuningChoice, original: Originals, fixed: Container[str] = ()
) -> dict[str, str]:
    """Replace every packed weight of `model` by a trainable one, in place; nothing else of it will be trained.

    fixed: names in the checkpoint of packed weights that stay as they are; gradients pass through them. Returns the
    names of the others in the checkpoint, and the module of the network that each is now in.
    """
    model.requires_grad_(False)
    places = {}
    for place, packed in list(model.named_modules()):
        if not isinstance(packed, PackedLinear | PackedWeight):
            continue
        if packed.name in fixed:
            # What does not change is part of no state: processes that share a model need not send it to each other.
            packed._non_persistent_buffers_set.update(packed._buffers)
            continue
        weight = TunedWeight(packed.stored, parts_of(packed), original(packed.name), choice)
        tuned = TunedLinear(weight, packed.bias) if isinstance(packed, PackedLinear) else TunedTensor(weight)
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, tuned)
        places[packed.name] = place
    if not places:
        raise FewbitError("there is no packed weight to train: give a folder that fewbit quantize wrote")
    return places


def without_dropout(model: nn.Module) -> nn.Module:
    """`model` with all dropout at 0, in place: it is to follow the original, whose predictions have none.

    Whatever holds a rate under a name with "drop" in it is set, module or config: a forward pass may read either.
    """
    for holder in [*model.modules(), model.config]:
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(holder, name, 0.0)
        if isinstance(holder, nn.Dropout):
            holder.p = 0.0
    return model


def stored_parts(
    model: nn.Module, places: Mapping[str, str], state: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The stored form of every trained weight by its name in the checkpoint, on the CPU.

    places: as :func:`make_trainable` returns them. state: the model's parameters in full, on the CPU, by name; in
    `model` itself they may be sharded.
    """
    found = {}
    for name, place in places.items():
        module = model.get_submodule(place)
        assert isinstance(module, TunedLinear | TunedTensor)
        whole = copy.copy(module.tuned)
        values = {key: state[f"{place}.tuned.{key}"] for key, _ in module.tuned.named_parameters(recurse=False)}
        whole._parameters = {key: nn.Parameter(value, requires_grad=False) for key, value in values.items()}
        whole._parameters.update({key: None for key in module.tuned._parameters if key not in values})
        whole._buffers = {key: None if b is None else b.cpu() for key, b in module.tuned._buffers.items()}
        found[name] = whole.parts()
    return found


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_rates(optimizer: Any, share: float) -> None:
    """Set each group's learning rate to this share of its full one."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["rate"]


def groups_for(model: nn.Module, choice: TuningChoice) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: latent weights at one rate; scales, offsets and outliers at another."""
    rates = {True: choice.lr, False: choice.scale_lr}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in trained(model).items():
        groups[name.endswith(".latent")].append(parameter)
    return [{"params": members, "rate": rates[kind]} for kind, members in groups.items() if members]


def optimizer_for(model: nn.Module, choice: TuningChoice) -> torch.optim.AdamW:
    """The optimizer of what is trained in `model`; rates are set by :func:`set_rates`."""
    groups = groups_for(model, choice)
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True)


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set trained parameters to kept values."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(state[name])
