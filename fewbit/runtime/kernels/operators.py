"""Products with packed weights as operators of torch: what a graph of `torch.compile` calls.

A graph holds tensors and numbers, no Python objects. So every prepared weight has a number, by which an operator finds
it; the entry goes with the weight. In a CUDA graph the operators are recorded as any other.
"""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fewbit.errors import FewbitError

_COUNT = itertools.count()
_NUMBERED: "WeakValueDictionary[int, Any]" = WeakValueDictionary()
"""What was numbered, as long as something else refers to it."""


def number(holder: Any) -> int:
    """A number of this process under which the operators find `holder`.

    That has `multiply(parts, x, bias)` and `take(parts, ids, dtype)`, for parts in the order of their layout.
    """
    found = next(_COUNT)
    _NUMBERED[found] = holder
    return found


def _numbered(place: int) -> Any:
    found = _NUMBERED.get(place)
    if found is None:
        raise FewbitError("a compiled model was kept longer than the packed weights that it uses; compile it again")
    return found


@torch.library.custom_op(
    "fewbit::packed_product",
    mutates_args=(),
    schema="(Tensor x, Tensor? bias, Tensor[] parts, SymInt place, SymInt outputs) -> Tensor",
)
def packed_product(x: Tensor, bias: Tensor | None, parts: list[Tensor], place: int, outputs: int) -> Tensor:
    """``x W^T + b`` `(..., outputs)` for x `(..., in)`, in the dtype of x."""
    return _numbered(place).multiply(parts, x, bias).contiguous()


@packed_product.register_fake
def _(x: Tensor, bias: Tensor | None, parts: list[Tensor], place: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.custom_op(
    "fewbit::packed_rows",
    mutates_args=(),
    schema="(Tensor ids, Tensor[] parts, SymInt place, SymInt columns, ScalarType dtype) -> Tensor",
)
def packed_rows(ids: Tensor, parts: list[Tensor], place: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows `(n, columns)` of a weight, in `dtype`, at ids `(n,)`."""
    return _numbered(place).take(parts, ids, dtype).contiguous()


@packed_rows.register_fake
def _(ids: Tensor, parts: list[Tensor], place: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(ids.shape[0], columns, dtype=dtype, device=ids.device)


def in_a_graph() -> bool:
    """Whether torch.compile is tracing; torch.export is not meant, since exported programs run without this package."""
    # `torch.compiler.is_exporting()` is no help: up to torch 2.12 it is true wherever a graph is traced.
    return torch.compiler.is_compiling() and not getattr(torch.compiler, "_is_exporting_flag", False)
