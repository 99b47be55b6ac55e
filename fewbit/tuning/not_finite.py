"""Finds where a NaN or infinity came from, for the message that ends a training run."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import FewbitError
from fewbit.tuning.tuned_model import trained
from fewbit.tuning.tuned_weight import TunedWeight

_WRAPPED = re.compile(r"\.tuned|\.held\.own\.\w+\.stored_sources\.\d+")
"""What training and packing put into names."""


class TrainingStoppedError(FewbitError):
    """The loss or a gradient is NaN or infinite: the same run would end in the same way again."""


def plain_name(name: str) -> str:
    """A module's or parameter's name as the checkpoint has it, without what training wraps around it."""
    return _WRAPPED.sub("", name.removeprefix("module."))


@torch.no_grad()
def first_output(model: nn.Module, forward: Callable[[], Any]) -> str:
    """The first module, in the order in which they run, whose output has a NaN or infinity, or "the loss"."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(plain_name(name))

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if name and not list(_inner(module))]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return f"the output of {found[0]}" if found else "the loss"


def _inner(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if not isinstance(child, TunedWeight)]


def first_gradient(model: nn.Module) -> str:
    """The first trained parameter with a gradient that holds a NaN or an infinity."""
    for name, parameter in trained(model).items():
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            if not bool(torch.isfinite(whole).all()):
                return plain_name(name)
    return "some layer"


@torch.no_grad()
def first_scale(model: nn.Module) -> str:
    """The first trained weight whose scales or offsets cannot be stored."""
    for name, module in model.named_modules():
        if isinstance(module, TunedWeight):
            try:
                module.decoded()
            except FewbitError:
                return plain_name(name)
    return "some layer"
