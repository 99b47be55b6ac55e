"""Prepare packed weights for their kernels when a model is loaded, instead of when it first runs."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fewbit.grids.scheme import StoredWeight
from fewbit.memory import available_bytes
from fewbit.paging import page_in, page_out_between
from fewbit.runtime.kernels.ready import Ready
from fewbit.runtime.packed_linear import PackedLinear, parts_of
from fewbit.runtime.packed_parameter import Held


def prepare(model: nn.Module) -> None:
    """Prepare every packed layer, embedding and head of the model, for inputs in its dtype; experts wait for tokens.

    Then the first token takes no longer than others, and all memory that is needed only for preparing is free again
    before the model runs: that of the parts of layers which no kernel reads again, too. They come back from the file if
    they are needed, as for saving the model.
    """
    packed = list(_packed(model))
    # Reading all of a model that does not fit would only push out what was read first.
    fits = sum(part.nbytes for _, parts, *_ in packed for part in parts.values()) < available_bytes()
    unread: list[Tensor] = []
    for ready, parts, stored, dtype, is_layer in packed:
        ready.get(parts, stored, dtype)
        if not is_layer or stored.scheme.transform != "none":
            # Looking up rows without a kernel and transforming inputs read all parts.
            continue
        kept, rest = ready.sorted_parts()
        unread += rest
        if fits:
            for part in kept:
                page_in(part)
            page_out_between(rest)
    if fits:
        # Some have come back with what lies beside them.
        page_out_between(unread)


def _packed(model: nn.Module) -> Iterator[tuple[Ready, Mapping[str, Tensor], StoredWeight, torch.dtype, bool]]:
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield module.ready, parts_of(module), module.stored, module.like.dtype, True
        elif isinstance(module, Held):
            for _, value in module.all():
                table = value.table
                if table is not None:
                    yield table.ready, parts_of(table), table.stored, value.like.dtype, False
