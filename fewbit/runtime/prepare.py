"""Prepare packed weights for their kernels when a model is loaded, instead of when it first runs."""

from torch import nn

from fewbit.runtime.packed_linear import PackedLinear, parts_of
from fewbit.runtime.packed_parameter import Held


def prepare(model: nn.Module) -> None:
    """Prepare every packed layer, embedding and head of the model, for inputs in its dtype; experts wait for tokens.

    Then the first token takes no longer than others, and all memory that is needed only for preparing is free again
    before the model runs.
    """
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.ready.get(parts_of(module), module.stored, module.like.dtype)
        elif isinstance(module, Held):
            for _, value in module.all():
                table = value.table
                if table is not None:
                    table.ready.get(parts_of(table), table.stored, value.like.dtype)
