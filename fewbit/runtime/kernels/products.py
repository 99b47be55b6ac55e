"""Products with packed weights, and decoded rows, in numba: a few rows at a time are decoded where caches hold them."""

from collections.abc import Callable
from functools import lru_cache

from fewbit.runtime.kernels.compiled import compiled, kept, sources
from fewbit.runtime.kernels.description import (
    COLUMNS,
    FLOAT,
    GROUP,
    GROUPS,
    LADDER,
    MAGNITUDES,
    MINIMUM,
    PICKS,
    PLANES,
    SCALE,
    ZERO,
    Reading,
)
from fewbit.runtime.kernels.lanes import (
    add,
    as_floats,
    codes_at,
    exact,
    float_at,
    floats_at,
    gather,
    integers_at,
    long_at,
    more_bits_at,
    multiply,
    multiply_add,
    no_floats,
    put_float,
    put_floats,
    splat,
    subtract,
    total,
)
from fewbit.runtime.kernels.look_up import look_up
from fewbit.runtime.kernels.rows import expand, number_at, put_outliers, rounded, write_row

ROWS = 8
"""Rows that are decoded, and then multiplied, together."""


def room(columns: int) -> int:
    """Bytes of working memory for one call: decoded rows, and a byte for each code of a row."""
    return ROWS * _step(columns) + padded(columns) + 64


def padded(columns: int) -> int:
    """Columns of the input, filled up with zeros to whole vectors."""
    return (columns + 15) // 16 * 16


def _step(columns: int) -> int:
    # The last vector of a group that does not end with one is written too.
    return 4 * (padded(columns) + 16)


@compiled
def times_eight(weights: int, step: int, x: int, columns: int, out: int) -> None:
    """Eight rows of weights, `step` bytes apart, times one input: eight float32 at `out`."""
    a, b, c, d = no_floats(), no_floats(), no_floats(), no_floats()
    e, f, g, h = no_floats(), no_floats(), no_floats(), no_floats()
    for at in range(0, 4 * columns, 64):
        part, w = floats_at(x + at), weights + at
        a = multiply_add(floats_at(w), part, a)
        b = multiply_add(floats_at(w + step), part, b)
        c = multiply_add(floats_at(w + 2 * step), part, c)
        d = multiply_add(floats_at(w + 3 * step), part, d)
        e = multiply_add(floats_at(w + 4 * step), part, e)
        f = multiply_add(floats_at(w + 5 * step), part, f)
        g = multiply_add(floats_at(w + 6 * step), part, g)
        h = multiply_add(floats_at(w + 7 * step), part, h)
    put_float(out, total(a))
    put_float(out + 4, total(b))
    put_float(out + 8, total(c))
    put_float(out + 12, total(d))
    put_float(out + 16, total(e))
    put_float(out + 20, total(f))
    put_float(out + 24, total(g))
    put_float(out + 28, total(h))


@compiled
def times_one(weights: int, x: int, columns: int, out: int) -> None:
    """One row of weights times one input, summed in the order of :func:`times_eight`."""
    a = no_floats()
    for at in range(0, 4 * columns, 64):
        a = multiply_add(floats_at(weights + at), floats_at(x + at), a)
    put_float(out, total(a))


@lru_cache
def kernel(reading: Reading) -> Callable[..., None]:
    """The function `(about, x, tokens, out, outputs, first, last, work, to)` for weights that are read this way.

    It computes ``x W^T`` for the rows `first` to `last` of the weight. about: address of a description. x: of float32
    `(tokens, padded columns)`, 0 beyond the last column. out: of float32 `(tokens, outputs)`. work: of :func:`room`
    bytes. to: the kind of number to which the weights are rounded. With 0 tokens, it writes the rows themselves as
    numbers of that kind, the first at `out`.
    """
    one, two, three = (*((8,) if reading.expanded else reading.widths), 0, 0)[:3]
    planes, bits = len(reading.widths), reading.bits
    by_table, by_levels, expanded = reading.by_table, reading.by_levels, reading.expanded
    below, version = one + two, sources()

    @kept
    def run(about: int, x: int, tokens: int, out: int, outputs: int, first: int, last: int, work: int, to: int) -> int:
        columns, group, groups = long_at(about + 8 * COLUMNS), long_at(about + 8 * GROUP), long_at(about + 8 * GROUPS)
        whole = (columns + 15) // 16 * 16
        step, magnitudes = 4 * (whole + 16), long_at(about + 8 * MAGNITUDES)
        codes = work + ROWS * step
        ladder, planes_at = long_at(about + 8 * LADDER), about + 8 * PLANES
        scales, scale_kind = long_at(about + 8 * SCALE), long_at(about + 8 * (SCALE + 1))
        zeros, zero_kind = long_at(about + 8 * ZERO), long_at(about + 8 * (ZERO + 1))
        minima, minimum_kind = long_at(about + 8 * MINIMUM), long_at(about + 8 * (MINIMUM + 1))
        for start in range(first, last, ROWS):
            count = min(ROWS, last - start)
            for number in range(count):
                row, decoded = start + number, work + number * step
                at_one = long_at(planes_at) + row * long_at(planes_at + 8)
                at_two = long_at(planes_at + 40) + row * long_at(planes_at + 48)
                at_three = long_at(planes_at + 80) + row * long_at(planes_at + 88)
                if expanded:
                    expand(about, planes, row, codes)
                    at_one = codes
                for each in range(groups):
                    index = row * groups + each
                    zero, minimum, known = no_floats(), no_floats(), no_floats()
                    if zeros != 0:
                        zero = splat(number_at(zeros, index, zero_kind))
                    if minima != 0:
                        minimum = splat(number_at(minima, index, minimum_kind))
                    if magnitudes > 1:
                        picks = integers_at(long_at(about + 8 * PICKS))
                        scale = gather(scales + 4 * magnitudes * index, picks)
                    else:
                        scale = splat(number_at(scales, index, scale_kind))
                    if by_table:
                        known = rounded(add(multiply(subtract(floats_at(ladder), zero), scale), minimum), to)
                    for column in range(each * group, (each + 1) * group, 16):
                        code = codes_at(one, at_one + (column * one >> 3))
                        if two:
                            code = more_bits_at(code, one, two, at_two + (column * two >> 3))
                        if three:
                            code = more_bits_at(code, below, three, at_three + (column * three >> 3))
                        if by_table:
                            value = look_up(known, code, bits)
                        else:
                            if by_levels:
                                level = gather(ladder, exact(code, bits))
                            else:
                                level = add(as_floats(exact(code, bits)), splat(float_at(ladder)))
                            value = rounded(add(multiply(subtract(level, zero), scale), minimum), to)
                        put_floats(decoded + 4 * column, value)
                put_outliers(about, row, decoded)
                for column in range(columns, whole):
                    put_float(decoded + 4 * column, 0.0)
                if tokens == 0:
                    write_row(decoded, columns, out + (row - first) * columns * (4 if to == FLOAT else 2), to)
            for token in range(tokens):
                source, target = x + 4 * whole * token, out + 4 * (outputs * token + start)
                if count == ROWS:
                    times_eight(work, step, source, whole, target)
                else:
                    for number in range(count):
                        times_one(work + number * step, source, whole, target + 4 * number)
        return version

    return run
