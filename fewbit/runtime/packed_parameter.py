"""Packed parameters of any module: fused experts, embeddings, tied heads, or parameters made from several tensors.

The module keeps its name and its forward pass; only the parameter becomes a property that decodes. Each parameter is
decoded once per call of the module. Of experts that are packed one by one, only those that receive tokens are decoded.
The values are those of the plain parameter, so the logits are the same.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewbit.architecture.orientation import from_matrix
from fewbit.formats import native
from fewbit.grids.scheme import StoredWeight
from fewbit.linear import Linear
from fewbit.runtime.decoded import to_look_at
from fewbit.runtime.kernels.ready import Ready, decode
from fewbit.runtime.kernels.ready import gather as rows_at
from fewbit.runtime.packed_linear import add_parts, parts_of, remember_dtype
from fewbit.runtime.packed_table import DIRECT, Work, has_rows, rows_on_demand


class PackedWeight(nn.Module):
    """A packed tensor of the checkpoint; a call with a dtype returns the decoded tensor in its original shape.

    All of its work is done by calls, because accelerate loads offloaded parts when a module is called.
    """

    def __init__(self, name: str, stored: StoredWeight) -> None:
        super().__init__()
        self.name, self.stored = name, stored
        add_parts(self, stored, "meta")
        self.ready = Ready(stored)

    def forward(self, dtype: torch.dtype, work: Work | None = None) -> Tensor:
        """The tensor in `dtype`; with `work`, what that computes from this weight."""
        if work is not None:
            return work(self, dtype)
        return from_matrix(self.decode(dtype), self.stored.tensor_shape, self.stored.transposed)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight `(out, in)` in `dtype`."""
        parts = parts_of(self)
        if native.read_transform(parts, self.stored):
            return native.decode(parts, self.stored, dtype)
        return decode(self.ready, parts, self.stored, dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `(n, in)` of a weight that has separate rows, for ids `(n,)`."""
        return rows_at(self.ready, parts_of(self), self.stored, ids, dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.ready.forget()
        return super()._apply(*args, **kwargs)


class KeptWeight(nn.Module):
    """A plain tensor of the checkpoint that is merged with packed ones into one parameter."""

    value: Tensor

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("value", torch.empty(shape, dtype=dtype, device="meta"))

    def forward(self, dtype: torch.dtype) -> Tensor:
        return self.value.to(dtype)


@dataclass(frozen=True)
class Merge:
    """How transformers makes parameters of the network from tensors of the checkpoint.

    conversion: transformers' converter, not yet used. patterns: for every source, the converter's pattern that its name
    matches. config: of the network.
    """

    conversion: Any
    patterns: tuple[str, ...]
    config: Any = field(repr=False)

    def __call__(
        self, target: str, tensors: Sequence[Tensor], chosen: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Parameters by name, with gradients. chosen: the indices of the sources in `tensors`; None for all."""
        made: dict[str, Any] = {}
        for index, tensor in zip(range(len(tensors)) if chosen is None else chosen, tensors, strict=True):
            made.setdefault(self.patterns[index], []).append(tensor)
        facts = {"full_layer_name": target, "model": None, "config": self.config, "missing_keys": None}
        sources, targets = self.conversion.source_patterns, self.conversion.target_patterns
        for operation in self.conversion.operations:
            # Unwrapped, because transformers converts without gradients, and tuning needs them.
            step = inspect.unwrap(type(operation).convert)
            made = step(operation, made, source_patterns=sources, target_patterns=targets, **facts)
        first = next((pattern for pattern in made if pattern in target), None)
        before, _, after = target.partition(first) if first is not None else ("", "", "")
        return {before + name + after: v[0] if isinstance(v, list) else v for name, v in made.items()}

    def experts(self) -> int | None:
        """Number of experts, if every expert has one source per pattern and no step mixes experts; otherwise None.

        Only then can some experts be made without the others.
        """
        first, *rest = self.conversion.operations
        if type(first).__name__ != "MergeModulelist" or first.dim != 0 or not all(map(_leaves_first_axis, rest)):
            return None
        counts = {self.patterns.count(pattern) for pattern in set(self.patterns)}
        return counts.pop() if len(counts) == 1 else None


def _leaves_first_axis(operation: Any) -> bool:
    if type(operation).__name__ == "Transpose":
        return 0 not in (operation.dim0, operation.dim1)
    return type(operation).__name__ in ("Concatenate", "Interleave") and operation.dim != 0


class PackedParameter(nn.Module):
    """The parameter `target` of the network, from one source or from several that are merged.

    A call returns the parameter in its own dtype (`like.dtype`). sources: the sources, or another parameter that is
    made from the same sources, stores them, and moves them between devices.
    """

    like: Tensor

    def __init__(
        self, target: str, sources: "Sequence[nn.Module] | PackedParameter", merge: Merge | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.target, self.merge = target, merge
        if isinstance(sources, PackedParameter):
            # In a tuple, so that it is not registered a second time.
            self.shared = (sources,)
        else:
            self.stored_sources = nn.ModuleList(sources)
        self.experts = merge.experts() if merge is not None else None
        remember_dtype(self, dtype)

    @property
    def sources(self) -> nn.ModuleList:
        """The sources, in transformers' order."""
        return self.shared[0].sources if hasattr(self, "shared") else self.stored_sources

    @property
    def table(self) -> Any:
        """The only source, if it is a matrix `(out, in)` as the network has it; otherwise None.

        That is a :class:`PackedWeight`, or what stands in for it while it is trained.
        """
        if self.merge is not None or isinstance(source := self.sources[0], KeptWeight):
            return None
        stored: Any = source.stored
        plain = len(stored.tensor_shape) == 2 and not stored.transposed
        return source if plain else None

    def forward(self, experts: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The whole parameter. experts: ascending indices of the experts that are needed; others may be all zeros."""
        dtype = dtype or self.like.dtype
        if self.merge is None:
            return self.sources[0](dtype)
        count = self.experts
        if experts is None or count is None or len(experts) >= count:
            return self.merge(self.target, [source(dtype) for source in self.sources])[self.target]
        wanted = set(experts.tolist())
        seen: dict[str, int] = {}
        chosen = []
        for index, pattern in enumerate(self.merge.patterns):
            seen[pattern] = number = seen.get(pattern, -1) + 1
            if number in wanted:
                chosen.append(index)
        some = self.merge(self.target, [self.sources[index](dtype) for index in chosen], chosen)[self.target]
        whole = some.new_zeros((count, *some.shape[1:]))
        whole[experts] = some
        return whole


class Held(nn.Module):
    """The packed parameters of one module: its own, and those of modules to which it is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleDict()
        self.borrowed: dict[str, tuple[PackedParameter]] = {}
        """In tuples, so that they are not registered a second time."""

    def of(self, name: str) -> PackedParameter:
        """The packed parameter called `name`."""
        return self.own[name] if name in self.own else self.borrowed[name][0]  # type: ignore[return-value]

    def all(self) -> list[tuple[str, PackedParameter]]:
        """All packed parameters with their names."""
        return [(name, self.of(name)) for name in [*self.own, *self.borrowed]]


def hold(module: nn.Module, name: str, value: PackedParameter, borrowed: bool = False) -> None:
    """Replace the parameter `name` of `module` by a packed one, in place.

    borrowed: the packed parameter belongs to another module, which stores it and moves it between devices.
    """
    held = getattr(module, "held", None)
    base = type(module)
    if isinstance(held, Held):
        base = base.__mro__[1]
    else:
        held = Held()
        module.held = held
        # A packed head multiplies as fast as the other layers do.
        base = Linear if base is nn.Linear else base
    if borrowed:
        held.borrowed[name] = (value,)
    else:
        held.own[name] = value
    module._parameters.pop(name, None)
    module.__class__ = _holding(base, tuple(sorted([*held.own, *held.borrowed])))  # type: ignore[arg-type]
    # Then the module has nothing that transformers must initialise. It may have buffers of its own, such as a scale.
    if not list(module.named_buffers(recurse=False)):
        module._is_hf_initialized = True  # type: ignore[assignment]


def release(module: nn.Module, plain: Mapping[str, nn.Parameter]) -> None:
    """Give `module` its own class back, with plain parameters in place of the packed ones, in place."""
    module.__class__ = type(module).__mro__[1]
    del module._modules["held"]
    for name, parameter in plain.items():
        module.register_parameter(name, parameter)


_Running = tuple[dict[int, Tensor], Tensor | None]
_DECODED: ContextVar[_Running | None] = ContextVar("decoded", default=None)
"""While a module with packed parameters runs: the parameters decoded so far, and the experts that it will use."""


@contextmanager
def _decoding_once(experts: Tensor | None) -> Iterator[None]:
    token = _DECODED.set(({}, experts))
    try:
        yield
    finally:
        _DECODED.reset(token)


def _read(module: nn.Module, name: str) -> Tensor:
    value = module.held.of(name)  # type: ignore[union-attr,operator]
    running = _DECODED.get()
    if running is None:
        return to_look_at(value())
    if isinstance(module, nn.Embedding) and has_rows(value) and not torch.compiler.is_compiling():
        return rows_on_demand(value)
    known, experts = running
    if id(value) not in known:
        known[id(value)] = value(experts)
    return known[id(value)]


@functools.cache
def _holding(base: type, names: tuple[str, ...]) -> type:
    """A subclass of `base` for modules whose parameters `names` are packed."""
    routed = "top_k_index" in inspect.signature(base.forward).parameters  # type: ignore[attr-defined]
    direct = DIRECT.get(base.forward) if names == ("weight",) else None  # type: ignore[attr-defined]

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        experts = None
        if routed:
            bound = inspect.signature(base.forward).bind(self, *args, **kwargs).arguments  # type: ignore[attr-defined]
            experts = _routed_to(bound.get("top_k_index"), getattr(self, "num_experts", None))
        with _decoding_once(experts):
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass; the backward pass runs it again, so that no decoded weight is kept."""
        if direct is not None and (found := direct(self, self.held.of("weight"), *args, **kwargs)) is not None:
            return found
        if torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())
        ):
            return checkpoint(functools.partial(run, self), *args, use_reentrant=False, **kwargs)
        return run(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (base, names), self.__dict__

    properties = {name: property(functools.partial(_read, name=name)) for name in names}
    return type(base)(base.__name__, (base,), {**properties, "forward": forward, "__reduce_ex__": reduce})


def _routed_to(index: Any, count: Any) -> Tensor | None:
    if not isinstance(index, Tensor) or not isinstance(count, int) or torch.compiler.is_compiling():
        return None
    found = index.unique()
    return found[found < count]


def _rebuild(base: type, names: tuple[str, ...]) -> Any:
    return object.__new__(_holding(base, names))
