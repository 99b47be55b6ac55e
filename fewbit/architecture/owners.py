"""Check the kind of module that owns a weight in the network: some kinds are known not to be linear layers."""

import re
from typing import Any

from torch import nn

from fewbit.errors import FewbitError

_NO_LAYER = re.compile(r"Embedding|Conv\dd|Norm$|Norm\d?|Router|TopK|MoEGate")


def refuse_owner(name: str, module: Any, transposed: bool | None) -> None:
    """Raise FewbitError if `name` is not the weight of a linear layer, or is a transposed stack of experts.

    transposed: how a stack of experts was read (None: it is not a stack).
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Linear) and _NO_LAYER.search(kind):
        raise FewbitError(
            f"{name}: in the network this is the weight of a {kind}, not of a linear layer: keep it with --exclude"
        )
    stored = getattr(module, "is_transposed", None)
    if transposed is not None and isinstance(stored, bool) and stored != transposed:
        shape = "(experts, in, out)" if stored else "(experts, out, in)"
        raise FewbitError(
            f"{name}: its shape in the network is {shape}, which is the transpose of what the checkpoint's shapes "
            "suggest: keep it with --exclude"
        )
