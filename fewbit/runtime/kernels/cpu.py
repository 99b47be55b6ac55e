"""The kernel for the CPU: numba code that reads packed rows once, on as many threads as torch uses."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from os import getpid
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from fewbit.grids.scheme import StoredWeight
from fewbit.grids.table import grid_of
from fewbit.runtime.kernels.description import ROWS, Description, Reading, describe, room
from fewbit.runtime.kernels.kernel import Kernel

# Products of a weight and an input below which a second thread costs more than it saves.
_WORTH_A_THREAD = 1 << 20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(stored: StoredWeight) -> bool:
    grid = grid_of(stored.scheme)
    return grid.formula is not None and grid.formula(stored.scheme).planes != () and stored.weights > 0


def _prepare(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> Description:
    from fewbit.runtime.kernels import pair_lanes, pairs, products

    def compiled(reading: Reading) -> Callable[..., int]:
        return pairs.kernel(reading) if reading.by_blocks else products.kernel(reading)

    return describe(parts, stored, dtype, compiled, pair_lanes.block_order())


def _product(about: Description, x: Tensor, bias: Tensor | None) -> Tensor:
    (rows, columns), run = about.shape, about.run
    x, out, tokens, shift = x.contiguous(), x.new_empty(*x.shape[:-1], rows), x.numel() // columns, 0
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
        shift = bias.data_ptr()
    fixed = (about.address, x.data_ptr(), tokens, out.data_ptr(), rows)
    if rows * columns * tokens < 2 * _WORTH_A_THREAD:
        # A small layer takes little more time than what is around its product.
        work = _work(get_ident(), room(about, tokens))
        run(*fixed, 0, rows, shift, work.data_ptr())
        return out
    _in_threads(lambda start, end, work: run(*fixed, start, end, shift, work), about, 0, rows, tokens)
    return out


@lru_cache(maxsize=16)
def _work(thread: int, size: int) -> Tensor:
    """Working memory of a thread: small layers are multiplied thousands of times a second."""
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _rows(about: Description, first: int, last: int) -> Tensor:
    out, run = torch.empty(last - first, about.shape[1], dtype=about.dtype), about.run
    step = about.shape[1] * about.dtype.itemsize

    def some(start: int, end: int, work: int) -> None:
        run(about.address, 0, 0, out.data_ptr() + (start - first) * step, 0, start, end, 0, work)

    _in_threads(some, about, first, last, 0)
    return out


def _gather(about: Description, ids: Tensor) -> Tensor:
    rows, columns = about.shape
    out, run, places = ids.new_empty(len(ids), columns, dtype=about.dtype), about.run, ids.tolist()
    work = _work(get_ident(), room(about, 0))
    to, at, step = out.data_ptr(), work.data_ptr(), columns * about.dtype.itemsize
    for number, row in enumerate(places):
        if not 0 <= row < rows:
            raise IndexError(f"there is no row {row}: the weight has {rows} rows")
        run(about.address, 0, 0, to + number * step, 0, row, row + 1, 0, at)
    return out


def _in_threads(some: Callable[[int, int, int], Any], about: Description, first: int, last: int, tokens: int) -> None:
    """Call `some(first, last, address of working memory)` for all rows, on several threads if there is much to do.

    Python's own threads: numba's end the process if it is forked, or if two threads of it compute at the same time.
    """
    size = room(about, tokens)
    threads = min(torch.get_num_threads(), (last - first) * about.shape[1] * max(1, tokens) // _WORTH_A_THREAD)
    if threads < 2:
        work = torch.empty(size, dtype=torch.uint8)
        some(first, last, work.data_ptr())
        return
    # A row is computed in the same way whatever the number of threads.
    step = -(-(last - first) // (threads * ROWS)) * ROWS
    works = torch.empty(threads, size, dtype=torch.uint8)
    starts = list(range(first, last, step))
    jobs = [
        _pool(getpid(), threads).submit(some, start, min(start + step, last), works[index].data_ptr())
        for index, start in enumerate(starts[1:], 1)
    ]
    some(starts[0], min(starts[0] + step, last), works[0].data_ptr())
    for job in jobs:
        job.result()


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="fewbit")


NUMBA = Kernel(
    "numba",
    "decodes and multiplies a few rows at a time in the processor's vectors",
    device="cpu",
    package="numba",
    extra="fast",
    dtypes=_DTYPES,
    most_tokens=8,
    # So few that caches hold them. The memory of larger ones would not go back to the system, because what is kept of
    # later layers lies behind it.
    weights_at_once=1 << 20,
    supports=_supports,
    prepare=_prepare,
    product=_product,
    rows=_rows,
    gather=_gather,
    reads=lambda about: about.kept,
)
