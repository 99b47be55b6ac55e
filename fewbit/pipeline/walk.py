"""Run a network block by block: all sequences through one block, then through the next; hidden states are stored in
between.

The hidden states of all sequences are one tensor, in memory up to a limit and on disk beyond it. The other arguments of
a block (masks, position embeddings) are the same for all sequences of one length, so they are recorded in one run.
"""

import contextlib
import math
import operator
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.checkpoints.whole_file import reserve
from fewbit.checkpoints.workdir import SPILLED
from fewbit.curvature.observe import Watched, watching
from fewbit.curvature.products import products
from fewbit.errors import FewbitError
from fewbit.parallel import over_cores
from fewbit.pipeline.observers import Divisible, EnoughSeenError, Observing, PerThread, Step, UntilLast

_MOST_WORKERS = 8
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Walk:
    """The hidden states that enter the next block. A block may move to another device before it is run."""

    def __init__(
        self, model: Any, blocks: Sequence[nn.Module], ids: Tensor, memory_bytes: int, spill: Path | None = None
    ) -> None:
        """Run the part before the blocks. ids: `(samples, length)`.

        memory_bytes: larger hidden states are stored on disk, in the folder `spill` (None: the folder for temporary
        files). Raises OSError if the disk is too small, and FewbitError if the blocks cannot be run one by one.
        """
        self._blocks, self._memory, self._model, self._ids = blocks, memory_bytes, model, ids
        self._beside: tuple[Any, ...] | None = None
        first, self._calls = self._record(model, ids[:1])
        if ids.shape[0] > 1:
            _, other = self._record(model, ids[1:2])
            if not _equal(self._calls, other):
                raise FewbitError(
                    f"{type(model).__name__}: its blocks take arguments that depend on the text, so they cannot be run "
                    "one by one: choose a method with a Fisher, such as precal+oac"
                )
        shape = (ids.shape[0], *first.shape[1:])
        self._states = _allocate(shape, first.dtype, first.device, memory_bytes, spill)
        with torch.inference_mode():
            for index in range(ids.shape[0]):
                self._states[index : index + 1] = _until_first_block(model, blocks[0], ids[index : index + 1])

    def _record(self, model: Any, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden states that enter the first block, and the other arguments of every block."""
        entering: list[Tensor] = []
        leaving: list[Tensor] = []
        calls: list[Call] = []
        order: list[nn.Module] = []
        handles = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states, call = _split(args, kwargs)
            entering.append(states)
            calls.append(call)
            order.append(module)

        def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            leaving.append(_states(out))
            self._beside = tuple(out[1:]) if isinstance(out, tuple | list) else None

        try:
            for block in self._blocks:
                handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(block.register_forward_hook(leave))
            with torch.no_grad():
                model(ids.to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        in_order = len(order) == len(self._blocks) and all(map(operator.is_, order, self._blocks))
        if not in_order or not all(map(_are_same, leaving[:-1], entering[1:])):
            raise FewbitError(
                f"{type(model).__name__}: its blocks do not each run once on the output of the preceding block, so "
                "they cannot be run one by one: choose a method with a Fisher, such as precal+oac"
            )
        return entering[0], calls

    def observe(self, index: int, layers: list[Watched], observer: Observing, step: Step) -> None:
        """Run block `index` over all sequences to observe the inputs of its layers; the states stay unchanged.

        From the second sequence on, the block's run ends when the last of the layers is called.
        """
        self._watched(index, layers, observer, step, keep=False)

    def observe_and_advance(self, index: int, layers: list[Watched], observer: Observing, step: Step) -> None:
        """Both in one pass: observed inputs and next states are computed with the current weights."""
        self._watched(index, layers, observer, step, keep=True)

    def advance(self, index: int, step: Step) -> None:
        """Run block `index` with its current weights; its outputs become the states."""
        self._run(index, step, True, self._workers(index))

    def observe_head(self, head: Watched, observer: Observing, step: Step) -> None:
        """Observe the inputs of the head, a layer after the blocks, once the states have passed through all blocks.

        Its outputs, one for each token of a vocabulary, are not computed. The blocks may be released.
        """
        model, beside = self._model, self._beside

        def observe(key: str, x: Tensor, gradient: Tensor | None) -> None:
            observer.observe(key, x, gradient)
            raise _StopError

        for sample in range(self._states.shape[0]):
            states = self.states(sample)

            def passed(*args: Any, out: Tensor = states, **kwargs: Any) -> Any:
                return out if beside is None else (out, *beside)

            with (
                _called_instead(self._blocks, passed),
                watching([head], observe, backward=False),
                contextlib.suppress(_StopError),
                torch.inference_mode(),
                products(states.dtype),
            ):
                model(self._ids[sample : sample + 1].to(model.device), use_cache=False)
            step()

    def states(self, sample: int) -> Tensor:
        """The states of one sequence that enter the next block, `(1, length, hidden)`, on the device of the states."""
        return self._states[sample : sample + 1]

    def call(self, index: int, states: Tensor) -> Tensor:
        """Outputs of block `index` for any states `(1, length, hidden)` on its device; gradients can be computed."""
        args, kwargs = _converted(self._calls[index], states.device)
        out = self._blocks[index](states, *args, **kwargs)
        return _states(out)

    def change(self, index: int) -> Tensor:
        """The change that block `index` makes to the first sequence's states, in float32; the states stay unchanged.

        The block's parameters must be in float32.
        """
        device = self._device(index)
        args, kwargs = _converted(self._calls[index], device, torch.float32)
        states = self._states[:1].to(device, torch.float32)
        with torch.inference_mode():
            out = self._blocks[index](states, *args, **kwargs)
        return _states(out) - states

    def _device(self, index: int) -> torch.device:
        return next(self._blocks[index].parameters()).device

    def _watched(self, index: int, layers: list[Watched], observer: Observing, step: Step, keep: bool) -> None:
        size = max(1, 4 * sum(layer.inputs**2 for layer in layers))
        workers = min(self._workers(index), max(1, self._memory // size)) if isinstance(observer, Divisible) else 1
        parts: list[Any] = [observer, *(observer.another() for _ in range(workers - 1))]  # type: ignore[attr-defined]
        shown = [UntilLast(part, layers) for part in parts] if not keep else parts
        mine = PerThread(shown)
        # Observers set the precision of products for the whole process. It is set here first, so that no observer
        # changes it while another is running.
        with products(self._states.dtype), watching(layers, mine.observe, backward=False):
            self._run(index, step, keep, workers, mine.begin)
        for part in parts[1:]:
            observer.add(part)  # type: ignore[attr-defined]

    def _workers(self, index: int) -> int:
        """Number of sequences that run in parallel: one per core, if there are many sequences."""
        if self._device(index).type != "cpu" or self._states.shape[0] < 2 * _MOST_WORKERS:
            return 1
        return min(torch.get_num_threads(), _MOST_WORKERS)

    def _run(
        self, index: int, step: Step, keep: bool, workers: int, begin: Callable[[int], Any] = lambda worker: None
    ) -> None:
        device, lock = self._device(index), threading.Lock()
        args, kwargs = _converted(self._calls[index], device)

        def one(sample: int, worker: int) -> None:
            ended = begin(worker)
            with torch.inference_mode():
                states = self._states[sample : sample + 1]
                try:
                    out = self._blocks[index](states.to(device), *args, **kwargs)
                    if keep:
                        states.copy_(_states(out))
                except EnoughSeenError:
                    pass
            if ended is not None:
                ended()
            with lock:
                step()

        over_cores(one, self._states.shape[0], workers)


def _are_same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors contain the same numbers; NaN counts as equal to NaN, since it is reported elsewhere."""
    return torch.equal(left.nan_to_num(), right.nan_to_num())


def _states(out: Any) -> Tensor:
    """The states in the result of a block."""
    return out[0] if isinstance(out, tuple | list) else out


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The states that a block is called with, and the rest of the call."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {key: value for key, value in kwargs.items() if key != "hidden_states"})


def _equal(one: Any, other: Any) -> bool:
    """Whether nested arguments contain the same values; other objects than tensors are assumed to be equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True


@contextlib.contextmanager
def _called_instead(blocks: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, calls of the blocks are answered by `forward`."""
    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


class _StopError(Exception):
    """Ends a forward pass early."""


def _until_first_block(model: Any, block: nn.Module, ids: Tensor) -> Tensor:
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_split(args, kwargs)[0])
        raise _StopError

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(ids.to(model.device), use_cache=False)
    except _StopError:
        pass
    finally:
        handle.remove()
    return found[0]


def _allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, memory_bytes: int, spill: Path | None
) -> Tensor:
    count = math.prod(shape)
    if count * dtype.itemsize <= memory_bytes:
        return torch.empty(shape, dtype=dtype, device=device)
    with tempfile.NamedTemporaryFile(suffix=SPILLED, dir=spill) as file:
        # The space is reserved now: if the disk filled up later, writing to the mapping would kill the process.
        reserve(file.fileno(), count * dtype.itemsize)
        # The mapping remains valid after the file is deleted, so no file is left behind, however the process ends.
        flat = torch.from_file(str(Path(file.name)), shared=True, size=count, dtype=dtype)
    return flat.view(shape)


def _converted(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Nested arguments with every tensor on `device`, and floating-point tensors in `dtype` if it is given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if dtype and value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: _converted(inner, device, dtype) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_converted(inner, device, dtype) for inner in value)
    return value
