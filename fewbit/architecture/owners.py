"""What kind of module owns a weight, where a network is built: some can be known to hold no linear layer."""

import re
from typing import Any

from torch import nn

from fewbit.errors import FewbitError

_NO_LAYER = re.compile(r"Embedding|Conv\dd|Norm$|Norm\d?|Router|TopK|MoEGate")


def refuse_owner(name: str, module: Any, transposed: bool | None) -> None:
    """Raises FewbitError if the weight `name` is not of a linear layer, or if its experts are stored the other way
    round.

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
