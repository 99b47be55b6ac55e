"""A read-only decoded weight: changing it in place would change a copy, and the change would be lost."""

from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError

_ASSIGNMENTS = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__"}


class DecodedWeight(Tensor):
    """A tensor that can be read like any other and raises FewbitError on writes.

    For example, merging an adapter adds to `layer.weight.data`; on a packed layer the change would be silently lost.
    """

    _is_hf_initialized: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        written = args[0] if args else None
        if (in_place or name in _ASSIGNMENTS) and isinstance(written, DecodedWeight) and name != "requires_grad_":
            raise FewbitError(
                "a packed weight cannot be changed in place: call model.dequantize() first, or write plain 16-bit "
                "weights with  fewbit unpack FOLDER OUT  and load those"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return result.as_subclass(DecodedWeight) if func == Tensor.data.__get__ else result  # type: ignore[attr-defined]


def to_look_at(weight: Tensor) -> Tensor:
    """`weight` as a tensor that cannot be changed in place, and that transformers does not try to initialize."""
    decoded = weight.as_subclass(DecodedWeight)
    decoded._is_hf_initialized = True
    return decoded
