"""A packed weight made ready for its kernel: prepared at the first product, and again if its parts have changed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewbit.formats import native
from fewbit.formats.native import part_layout
from fewbit.grids.scheme import StoredWeight
from fewbit.linear import linear
from fewbit.runtime.kernels import operators
from fewbit.runtime.kernels.kernel import Kernel
from fewbit.runtime.kernels.table import can_gather, kernel_for


@dataclass(frozen=True)
class _Prepared:
    """What a kernel prepared. state: of the parts, which are kept so that no other tensors take their addresses."""

    state: list[int]
    dtype: torch.dtype
    columns: int
    parts: dict[str, Tensor]
    kernel: Kernel | None
    form: Any
    watched: tuple[tuple[str, Tensor, int, int | None], ...]
    """Of each part the name of its buffer, the tensor, its address, and how often it was changed in place."""


class Ready:
    """The prepared form of one packed weight, for the module that holds its parts.

    It is never saved, copied or moved: a copy of it is empty. number: by which compiled graphs find it. prefix: of the
    names that the module's buffers have.
    """

    def __init__(self, stored: StoredWeight, prefix: str = "") -> None:
        self.stored, self.number = stored, operators.number(self)
        self._names = tuple(part_layout(stored))
        self._prefix = prefix
        self._prepared: _Prepared | None = None

    def __deepcopy__(self, memo: Any) -> "Ready":
        return Ready(self.stored, self._prefix)

    def __reduce__(self) -> tuple[Any, ...]:
        return Ready, (self.stored, self._prefix)

    def multiply(self, parts: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b`` for parts in the order of :func:`fewbit.formats.native.part_layout`."""
        return product(self, dict(zip(self._names, parts, strict=True)), self.stored, x, bias)

    def take(self, parts: Sequence[Tensor], ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows at ids `(n,)`, for parts in that order."""
        return gather(self, dict(zip(self._names, parts, strict=True)), self.stored, ids, dtype)

    def in_order(self, parts: Mapping[str, Tensor]) -> list[Tensor]:
        """The parts in that order: only looked up, since nothing is computed while a graph is traced."""
        return [parts[name] for name in self._names]

    def forget(self) -> None:
        """Release the prepared form and the parts that it refers to."""
        self._prepared = None

    def sorted_parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parts that the kernel reads at each product, and those that were needed only for preparing.

        Both are empty if the kernel does not say which.
        """
        found = self._prepared
        if found is None or found.kernel is None or found.kernel.reads is None:
            return [], []
        places = {one.data_ptr() for one in found.kernel.reads(found.form)}
        parts = list(found.parts.values())
        return [one for one in parts if one.data_ptr() in places], [
            one for one in parts if one.data_ptr() not in places
        ]

    def get(self, parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> _Prepared:
        """The prepared form for inputs in `dtype`; without a kernel if none can compute with this weight."""
        state = _state(parts)
        if self._prepared is None or self._prepared.dtype != dtype or self._prepared.state != state:
            device = next(iter(parts.values())).device
            kernel = kernel_for(stored, device, dtype) if state else None
            form = kernel.prepare(parts, stored, dtype) if kernel is not None else None
            watched = _watched(parts, state, self._prefix) if kernel is not None else ()
            self._prepared = _Prepared(state, dtype, stored.shape[1], dict(parts), kernel, form, watched)
        return self._prepared

    def still(self, buffers: Mapping[str, Tensor | None], dtype: torch.dtype) -> _Prepared | None:
        """The prepared form for inputs in `dtype`, with a kernel, if these buffers have the parts as they were then.

        It takes a fraction of the time of :meth:`get`, which matters for small layers.
        """
        found = self._prepared
        if found is None or found.dtype != dtype or not found.watched:
            return None
        for name, part, address, version in found.watched:
            if (
                buffers.get(name) is not part
                or part.data_ptr() != address
                or (version is not None and part._version != version)
            ):
                return None
        return found


def _watched(
    parts: Mapping[str, Tensor], state: list[int], prefix: str
) -> tuple[tuple[str, Tensor, int, int | None], ...]:
    versions: list[Any] = state[len(parts) :] or [None] * len(parts)
    named = zip(parts.items(), state, versions, strict=False)
    return tuple((prefix + name, part, address, version) for (name, part), address, version in named)


def _state(parts: Mapping[str, Tensor]) -> list[int]:
    """Where the parts are, and how often each was changed in place; empty if they are tensors without data."""
    tensors = parts.values()
    try:
        return [part.data_ptr() for part in tensors] + [part._version for part in tensors]
    except RuntimeError:
        if any(type(part) is not Tensor for part in tensors):
            return []
        # Tensors that were made in inference mode have no version.
        return [part.data_ptr() for part in tensors]


def product(ready: Ready, parts: Mapping[str, Tensor], stored: StoredWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for transformed inputs x `(..., in)`, in their dtype, as a plain layer computes it.

    No gradients.
    """
    found = through_kernel(ready, parts, stored, x, bias)
    return linear(x, native.decode_stored(parts, stored, x.dtype), bias) if found is None else found


def at_once(ready: Ready, buffers: Mapping[str, Tensor | None], x: Tensor, bias: Tensor | None) -> Tensor | None:
    """As :func:`product` for few tokens, from the buffers of a module whose weight is prepared already; or None."""
    if not _is_plain(x):
        return None
    found = ready.still(buffers, x.dtype)
    if found is None or (kernel := found.kernel) is None or _device(x) != kernel.device:
        return None
    columns = found.columns
    # Inputs of another size are an error, which torch reports.
    if x.shape[-1] != columns or x.numel() > kernel.most_tokens * columns:
        return None
    return kernel.product(found.form, x, bias)


def through_kernel(
    ready: Ready, parts: Mapping[str, Tensor], stored: StoredWeight, x: Tensor, bias: Tensor | None
) -> Tensor | None:
    """As :func:`product`, or None if there is no kernel for this weight and these inputs.

    Few tokens are multiplied with packed weights; for many, some rows at a time are decoded. Where torch.compile
    traces, the result is a call of an operator, which does this when the graph runs.
    """
    if operators.in_a_graph():
        return operators.packed_product(x, bias, ready.in_order(parts), ready.number, stored.shape[0])
    found = ready.get(parts, stored, x.dtype) if _is_plain(x) and x.shape[-1] == stored.shape[1] else None
    if found is None or found.kernel is None or x.device.type != found.kernel.device:
        return None
    outputs, columns = stored.shape
    if x.numel() <= found.kernel.most_tokens * columns:
        return found.kernel.product(found.form, x, bias)
    slices, flat = list(_slices(stored, found.kernel.weights_at_once)), x.reshape(-1, columns)
    if len(slices) == 1:
        return linear(x, found.kernel.rows(found.form, 0, outputs), bias)
    out = flat.new_empty(len(flat), outputs)
    for rows in slices:
        weight = found.kernel.rows(found.form, rows.start, rows.stop)
        out[:, rows] = linear(flat, weight, None if bias is None else bias[rows])
    return out.view(*x.shape[:-1], outputs)


def gather(ready: Ready, parts: Mapping[str, Tensor], stored: StoredWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `(n, in)` of a weight that has separate rows, at ids `(n,)`: as :func:`fewbit.formats.native.decode_rows`.

    A kernel for another device than the CPU gives NaN for an id that has no row, instead of an IndexError.
    """
    if operators.in_a_graph():
        return operators.packed_rows(ids, ready.in_order(parts), ready.number, stored.shape[1], dtype)
    whole = ids.dtype in (torch.int32, torch.int64)
    found = ready.get(parts, stored, dtype) if whole and can_gather(ids.device) and _is_plain(ids) else None
    if found is None or found.kernel is None or found.kernel.gather is None or ids.device.type != found.kernel.device:
        return native.decode_rows(parts, stored, ids, dtype)
    return found.kernel.gather(found.form, ids)


def back(ready: Ready, parts: Mapping[str, Tensor], stored: StoredWeight, gradient: Tensor) -> Tensor:
    """``g W`` for the gradient `(..., out)` of the outputs, in its dtype."""
    return linear(gradient, decode(ready, parts, stored, gradient.dtype).t())


def decode(ready: Ready, parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> Tensor:
    """The weight `(out, in)` for transformed inputs, in `dtype`: as :func:`fewbit.formats.native.decode_stored`."""
    found = ready.get(parts, stored, dtype) if not torch.compiler.is_compiling() else None
    if found is None or found.kernel is None:
        return native.decode_stored(parts, stored, dtype)
    weight: Tensor = found.kernel.rows(found.form, 0, stored.shape[0])
    return weight


def _slices(stored: StoredWeight, at_once: int) -> Iterator[slice]:
    step = max(1, at_once // stored.shape[1])
    for first in range(0, stored.shape[0], step):
        yield slice(first, min(first + step, stored.shape[0]))


def _device(x: Tensor) -> str:
    # The first is several times faster to ask for.
    return "cpu" if x.is_cpu else x.device.type


def _is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary tensor with data, and nothing but its values is to be computed with."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(_device(x))
        and getattr(forward_ad, "_current_level", -1) < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and x.dim() > 0
        and x.numel() > 0
    )
