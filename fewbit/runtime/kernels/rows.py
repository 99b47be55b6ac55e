"""What decodes one row of packed weights, in numba: numbers of the groups, bytes for codes, outliers, rounding."""

from typing import Any

from fewbit.runtime.kernels.compiled import compiled
from fewbit.runtime.kernels.description import BFLOAT, BYTE, FLOAT, HALF, PLANES, ROWS, SIGNED
from fewbit.runtime.kernels.lanes import (
    bfloat_at,
    byte_at,
    fetch,
    float_at,
    floats_at,
    half_at,
    long_at,
    put_bfloat,
    put_bfloats,
    put_float,
    put_floats,
    put_half,
    put_halves,
    put_long,
    signed_at,
    to_bfloat,
    to_half,
)


@compiled
def number_at(address: int, index: int, kind: int) -> Any:
    """The number at an index of an array of numbers of some kind, as float32."""
    if kind == HALF:
        return half_at(address + 2 * index)
    if kind == BFLOAT:
        return bfloat_at(address + 2 * index)
    if kind == BYTE:
        return byte_at(address + index)
    if kind == SIGNED:
        return signed_at(address + index)
    return float_at(address + 4 * index)


@compiled
def rounded(values: Any, to: int) -> Any:
    """16 float32 rounded to a kind of number."""
    if to == BFLOAT:
        return to_bfloat(values)
    if to == HALF:
        return to_half(values)
    return values


@compiled
def fetch_later(address: int, step: int, size: int) -> None:
    """Ask for what is as far behind an address as the next rows that are decoded together: `size` bytes.

    step: bytes from one row to the next. Memory is slower than decoding, and the processor foresees no further than to
    the end of a page.
    """
    for at in range(address + ROWS * step, address + ROWS * step + size, 64):
        fetch(at)


@compiled
def expand(about: int, planes: int, row: int, codes: int) -> None:
    """One byte per code of a row, at `codes`, from each plane's table of what a byte stands for."""
    for plane in range(planes):
        at = about + 8 * (PLANES + 5 * plane)
        step = long_at(at + 8)
        source = long_at(at) + row * step
        per_byte, table, count = long_at(at + 16), long_at(at + 24), long_at(at + 32)
        fetch_later(source, step, count)
        for index in range(count):
            found = long_at(table + 8 * byte_at(source + index))
            to = codes + per_byte * index
            # The bytes behind a byte's codes are overwritten by the next ones; later planes add nothing to them.
            put_long(to, found if plane == 0 else found | long_at(to))


@compiled
def put_number(address: int, value: float, kind: int) -> None:
    """Store a float32, rounded to a kind of number."""
    if kind == BFLOAT:
        put_bfloat(address, value)
    elif kind == HALF:
        put_half(address, value)
    else:
        put_float(address, value)


@compiled
def widen(source: int, columns: int, whole: int, out: int, kind: int) -> None:
    """Numbers of some kind as float32, and zeros up to `whole` of them."""
    for column in range(columns):
        put_float(out + 4 * column, number_at(source, column, kind))
    for column in range(columns, whole):
        put_float(out + 4 * column, 0.0)


@compiled
def write_row(source: int, columns: int, out: int, kind: int) -> None:
    """Store float32 at `source`, already rounded to a kind of number, as that kind at `out`."""
    whole = columns // 16 * 16
    if kind == BFLOAT:
        for column in range(0, whole, 16):
            put_bfloats(out + 2 * column, floats_at(source + 4 * column))
        for column in range(whole, columns):
            put_bfloat(out + 2 * column, float_at(source + 4 * column))
    elif kind == HALF:
        for column in range(0, whole, 16):
            put_halves(out + 2 * column, floats_at(source + 4 * column))
        for column in range(whole, columns):
            put_half(out + 2 * column, float_at(source + 4 * column))
    elif kind == FLOAT:
        for column in range(0, whole, 16):
            put_floats(out + 4 * column, floats_at(source + 4 * column))
        for column in range(whole, columns):
            put_float(out + 4 * column, float_at(source + 4 * column))
