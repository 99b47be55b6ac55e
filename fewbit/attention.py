"""Attention of 16-bit models whose gradients are wanted, on processors without 16-bit arithmetic: in float32.

Going back through attention torch multiplies 16-bit numbers one by one there, which takes as long as all the linear
layers together; going forward it does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fewbit.linear import is_native


@contextmanager
def fast_attention() -> Iterator[None]:
    """While inside, 16-bit attention on a processor without such products is computed in float32, and rounded once."""
    if is_native(torch.bfloat16) and is_native(torch.float16):
        yield
        return
    with _WideAttention():
        yield


class _WideAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        if query.device.type != "cpu" or is_native(query.dtype):
            return func(*args, **kwargs)
        wide = {name: _widened(value) for name, value in kwargs.items()}
        return func(*map(_widened, args), **wide).to(query.dtype)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
