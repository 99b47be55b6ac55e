"""Products with packed weights in Triton, and decoded rows. Each packed weight is read once for all tokens."""

# mypy: disable-error-code="no-untyped-def"

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.runtime.kernels.triton_codes import (
    chosen_in,
    inputs_in,
    outliers_at,
    rounded,
    tables_of,
    units_at,
    weights_at,
    weights_in,
)
from fewbit.runtime.kernels.triton_form import Form

_PROGRAMS = 4
"""Programs for each multiprocessor, below which columns are split among several."""
_MOST_SPLITS = 8
_AT_ONCE = 1024
"""Results that one program sums up."""
_OUTLIERS = 32
"""Outliers of a row that a program takes at a time."""


@dataclass(frozen=True)
class Tile:
    """What a program computes at a time: `rows` times `units` words, or times `columns` where there are no words."""

    rows: int
    units: int
    columns: int
    warps: int


ONE_TOKEN = Tile(8, 128, 256, 4)
"""The fastest of eight that `benchmarks/decode_cuda.py --products` times on an H200, at 3 and at 4 bits."""
FEW_TOKENS = Tile(64, 32, 64, 4)
DECODED = Tile(16, 32, 256, 4)


@triton.jit
def _outlier_sums(
    x, sparse, packed, rows, split, splits, kind: tl.constexpr, many: tl.constexpr, reading: tl.constexpr
):
    """What outliers add to the products of one token with some rows `(R,)`: this split's share of them."""
    starts, ends = tl.load(sparse.starts + rows), tl.load(sparse.starts + rows + 1)
    below = tl.expand_dims(rows, 1)
    sums = tl.zeros((rows.shape[0], many), tl.float32)
    for first in range(split * many, tl.max(ends - starts), splits * many):
        at = tl.expand_dims(starts + first, 1) + tl.expand_dims(tl.arange(0, many), 0)
        live = at < tl.expand_dims(ends, 1)
        columns, more = outliers_at(sparse, packed, below, at, live, kind, reading)
        sums += more * tl.load(x + columns).to(tl.float32)
    return tl.sum(sums, 1)


@triton.jit
def _one_token(
    x, out, bias, packed, sparse, outputs, splits, R: tl.constexpr, U: tl.constexpr, MANY: tl.constexpr,
    EVEN: tl.constexpr, PARTIAL: tl.constexpr, OUTLIERS: tl.constexpr, reading: tl.constexpr,
):  # fmt: skip
    """The product of one token with R rows; if PARTIAL, sums `(splits, outputs)` of it, without the bias.

    EVEN: whether all tiles are whole.
    """
    kind: tl.constexpr = x.dtype.element_ty
    # So few weights in a group that choosing among them is faster than computing each.
    SMALL: tl.constexpr = reading.two == 0 and reading.one <= 2 and reading.magnitudes == 1
    split = tl.program_id(1)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    # Rows and columns behind the end are computed as copies of the last ones, which nothing adds to.
    safe = rows if EVEN else tl.minimum(rows, outputs - 1)
    units_in_all = packed.columns // reading.unit
    # Units come first: where no dimension is contiguous, Triton prefers the first one.
    beside = tl.expand_dims(safe, 0)
    sums = tl.zeros((U, R), tl.float32)
    for first in range(split * U, units_in_all, splits * U):
        units = first + tl.arange(0, U)
        known = units if EVEN else tl.minimum(units, units_in_all - 1)
        below = tl.expand_dims(known, 1)
        inside = units < units_in_all
        if reading.unit == 8:
            found = units_at(packed, beside, below, reading)
            tables = tables_of(found, packed, kind, reading) if SMALL else (0, 0, 0, 0)
            if kind != tl.float32:
                fours = x.to(tl.pointer_type(tl.int64), bitcast=True) + known * 2
                left, right = tl.load(fours), tl.load(fours + 1)
                if not EVEN:
                    left, right = tl.where(inside, left, 0), tl.where(inside, right, 0)
            for place in tl.static_range(8):
                if kind == tl.float32:
                    part = tl.load(x + known * 8 + place, mask=inside, other=0)
                else:
                    part = inputs_in(left if place < 4 else right, place % 4, kind)
                if SMALL:
                    w = chosen_in(found, tables, place, reading)
                else:
                    w = rounded(weights_in(found, place, packed, reading), kind, reading)
                sums = tl.fma(w, tl.broadcast_to(tl.expand_dims(part, 1), (U, R)), sums)
        else:
            part = tl.load(x + known, mask=inside, other=0).to(tl.float32)
            w = rounded(weights_at(packed, beside, below, reading), kind, reading)
            sums = tl.fma(w, tl.broadcast_to(tl.expand_dims(part, 1), (U, R)), sums)
    total = tl.sum(sums, 0)
    if OUTLIERS:
        total += _outlier_sums(x, sparse, packed, safe, split, splits, kind, MANY, reading)
    if PARTIAL:
        tl.store(out + split * outputs + rows, total, mask=rows < outputs)
    else:
        if bias is not None:
            total += tl.load(bias + safe).to(tl.float32)
        tl.store(out + rows, total.to(out.dtype.element_ty), mask=rows < outputs)


@triton.jit
def _few_tokens(
    x, sums, packed, tokens, outputs, splits, R: tl.constexpr, U: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr,
    reading: tl.constexpr,
):  # fmt: skip
    """Sums `(splits, tokens, outputs)` of the products of at most T tokens with R rows, without outliers."""
    kind: tl.constexpr = x.dtype.element_ty
    split = tl.program_id(1)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    below = tl.expand_dims(rows if EVEN else tl.minimum(rows, outputs - 1), 1)
    token = tl.expand_dims(tl.arange(0, T), 0)
    units_in_all = packed.columns // reading.unit
    found_sums = tl.zeros((R, T), tl.float32)
    for first in range(split * U, units_in_all, splits * U):
        units = first + tl.arange(0, U)
        known = units if EVEN else tl.minimum(units, units_in_all - 1)
        beside = tl.expand_dims(known, 0)
        source = x + token * packed.columns + tl.expand_dims(known * reading.unit, 1)
        inside = (tl.expand_dims(units, 1) < units_in_all) & (token < tokens)
        if reading.unit == 8:
            found = units_at(packed, below, beside, reading)
            for place in tl.static_range(8):
                part = tl.load(source + place, mask=inside, other=0)
                w = weights_in(found, place, packed, reading).to(kind)
                found_sums = tl.dot(w, part, found_sums, input_precision="ieee")
        else:
            part = tl.load(source, mask=inside, other=0)
            w = weights_at(packed, below, beside, reading).to(kind)
            found_sums = tl.dot(w, part, found_sums, input_precision="ieee")
    to = sums + (split * tokens + token) * outputs + tl.expand_dims(rows, 1)
    tl.store(to, found_sums, mask=(tl.expand_dims(rows, 1) < outputs) & (token < tokens))


@triton.jit
def _outliers(x, sums, packed, sparse, outputs, R: tl.constexpr, MANY: tl.constexpr, reading: tl.constexpr):
    """What outliers add to the product of a token with R rows, as sums `(tokens, outputs)`."""
    token = tl.program_id(1)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    source = x + token * packed.columns
    total = _outlier_sums(
        source, sparse, packed, tl.minimum(rows, outputs - 1), 0, 1, x.dtype.element_ty, MANY, reading
    )
    tl.store(sums + token * outputs + rows, total, mask=rows < outputs)


@triton.jit
def _total(sums, out, bias, outputs, numbers, splits, N: tl.constexpr):
    """The sum of sums `(splits, numbers)` and of the bias `(outputs,)`, always in the same order."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    live = at < numbers
    total = tl.zeros((N,), tl.float32)
    for split in range(splits):
        total += tl.load(sums + split * numbers + at, mask=live, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % outputs, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def _decode(out, ids, packed, start, count, whole, R: tl.constexpr, U: tl.constexpr, reading: tl.constexpr):
    """Rows of the weight without outliers: `count` from `start` on, or those at `ids`, of `whole`; NaN beyond those."""
    kind: tl.constexpr = out.dtype.element_ty
    number = tl.program_id(0) * R + tl.arange(0, R)
    live = number < count
    if ids is None:
        rows = tl.where(live, number + start, start)
    else:
        rows = tl.load(ids + number, mask=live, other=0)
        known = (rows >= 0) & (rows < whole)
        rows = tl.where(known, rows, 0).to(tl.int32)
    below = tl.expand_dims(rows, 1)
    units_in_all = packed.columns // reading.unit
    units = tl.program_id(1) * U + tl.arange(0, U)
    beside = tl.expand_dims(tl.minimum(units, units_in_all - 1), 0)
    width: tl.constexpr = U * reading.unit
    if reading.unit == 8:
        found = units_at(packed, below, beside, reading)
        # The last dimension of a join is the fastest: places in the order of their bits, the highest first.
        w = tl.join(
            tl.join(
                tl.join(weights_in(found, 0, packed, reading).to(kind), weights_in(found, 4, packed, reading).to(kind)),
                tl.join(weights_in(found, 2, packed, reading).to(kind), weights_in(found, 6, packed, reading).to(kind)),
            ),
            tl.join(
                tl.join(weights_in(found, 1, packed, reading).to(kind), weights_in(found, 5, packed, reading).to(kind)),
                tl.join(weights_in(found, 3, packed, reading).to(kind), weights_in(found, 7, packed, reading).to(kind)),
            ),
        )
        w = tl.reshape(w, (R, width))
    else:
        w = weights_at(packed, below, beside, reading).to(kind)
    columns = tl.program_id(1) * width + tl.arange(0, width)
    if ids is not None:
        w = tl.where(tl.expand_dims(known, 1), w, float("nan")).to(kind)
    to = out + tl.expand_dims(number, 1).to(tl.int64) * packed.columns + tl.expand_dims(columns, 0)
    tl.store(to, w, mask=tl.expand_dims(live, 1) & (tl.expand_dims(columns, 0) < packed.columns))


@triton.jit
def _put_outliers(out, packed, sparse, start, MANY: tl.constexpr):
    """Write the outliers of a row of the weight into decoded rows, of which `start` is the first."""
    kind: tl.constexpr = out.dtype.element_ty
    row = start + tl.program_id(0)
    last = tl.load(sparse.starts + row + 1)
    for first in range(tl.load(sparse.starts + row), last, MANY):
        at = first + tl.arange(0, MANY)
        live = at < last
        columns = tl.load(sparse.columns + at, mask=live, other=0).to(tl.int32)
        if sparse.columns.dtype.element_ty == tl.int16:
            columns = columns & 0xFFFF
        value = tl.load(sparse.numbers + at, mask=live, other=0).to(tl.float32)
        if sparse.steps is not None:
            value = (value - sparse.middle) * tl.load(sparse.steps + row)
        tl.store(out + tl.program_id(0).to(tl.int64) * packed.columns + columns, value.to(kind), mask=live)


def product(form: Form, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` `(..., out)` for at most 16 tokens x `(..., in)`; nothing waits for the device."""
    (outputs, columns), dtype = form.shape, x.dtype
    x, out = x.contiguous(), torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if x.data_ptr() % 8:
        # Inputs are read four at a time.
        x = x.clone()
    bias = bias.to(dtype).contiguous() if bias is not None else None
    tokens = x.numel() // columns
    tile = ONE_TOKEN if tokens == 1 else FEW_TOKENS
    units, steps = _steps(form, tile)
    blocks = triton.cdiv(outputs, tile.rows)
    splits = max(1, min(_PROGRAMS * _multiprocessors(x.device) // blocks, steps, _MOST_SPLITS))
    even = outputs % tile.rows == 0 and columns % (units * form.reading.unit) == 0
    settings = {"R": tile.rows, "U": units, "EVEN": even, "reading": form.reading, "num_warps": tile.warps}
    with _on(x.device):
        if tokens == 1:
            partial = splits > 1
            sums = torch.empty(splits, outputs, dtype=torch.float32, device=x.device) if partial else out
            _one_token[(blocks, splits)](
                x, sums, bias, form.packed, form.sparse, outputs, splits,
                MANY=_OUTLIERS, PARTIAL=partial, OUTLIERS=form.sparse is not None, enable_fp_fusion=False, **settings,
            )  # fmt: skip
            if not partial:
                return out
        else:
            extra = form.sparse is not None
            sums = torch.empty(splits + extra, tokens, outputs, dtype=torch.float32, device=x.device)
            _few_tokens[(blocks, splits)](
                # More stages need more shared memory than GPUs have.
                x, sums, form.packed, tokens, outputs, splits, T=16, num_stages=1, enable_fp_fusion=False, **settings,
            )  # fmt: skip
            if extra:
                rows = ONE_TOKEN.rows
                _outliers[(triton.cdiv(outputs, rows), tokens)](
                    x, sums[splits], form.packed, form.sparse, outputs,
                    R=rows, MANY=_OUTLIERS, reading=form.reading, enable_fp_fusion=False,
                )  # fmt: skip
        numbers = tokens * outputs
        _total[(triton.cdiv(numbers, _AT_ONCE),)](sums, out, bias, outputs, numbers, len(sums), N=_AT_ONCE)
    return out


def rows(form: Form, first: int, last: int) -> Tensor:
    """The rows of the weight from `first` to before `last`."""
    out = torch.empty(last - first, form.shape[1], dtype=form.dtype, device=form.packed.one.device)
    with _on(out.device):
        _decode_into(out, form, None, first)
        if form.sparse is not None:
            _put_outliers[(last - first,)](
                out, form.packed, form.sparse, first, MANY=4 * _OUTLIERS, num_warps=1, enable_fp_fusion=False
            )
    return out


def gather(form: Form, ids: Tensor) -> Tensor:
    """The rows `(n, in)` of a weight without outliers at ids `(n,)`; an id that has none gives NaN."""
    out = torch.empty(len(ids), form.shape[1], dtype=form.dtype, device=form.packed.one.device)
    if len(ids):
        with _on(out.device):
            _decode_into(out, form, ids.contiguous(), 0)
    return out


def _decode_into(out: Tensor, form: Form, ids: Tensor | None, first: int) -> None:
    units, steps = _steps(form, DECODED)
    # Of a single token there is one row.
    height = min(DECODED.rows, triton.next_power_of_2(len(out)))
    _decode[(triton.cdiv(len(out), height), steps)](
        out, ids, form.packed, first, len(out), form.shape[0],
        R=height, U=units, reading=form.reading, num_warps=DECODED.warps, enable_fp_fusion=False,
    )  # fmt: skip


def _steps(form: Form, tile: Tile) -> tuple[int, int]:
    """How many units a tile has, at least the 16 of a matrix instruction, and how many tiles make a row."""
    unit = form.reading.unit
    in_all = form.shape[1] // unit
    units = max(16, min(tile.units if unit > 1 else tile.columns, triton.next_power_of_2(in_all)))
    return units, triton.cdiv(in_all, units)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton compiles and runs for torch's current device."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)
