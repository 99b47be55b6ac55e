"""Products in bfloat16 with AVX512-BF16, which multiplies its numbers by pairs, or AVX2: 64 codes are decoded at once.

The weights are those of :mod:`fewbit.runtime.kernels.products`, and sums are in float32. The columns of each block of
64 are in another order here (:mod:`fewbit.runtime.kernels.order`), and so are the inputs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fewbit.runtime.kernels.compiled import compiled, kept, sources
from fewbit.runtime.kernels.description import (
    BFLOAT,
    BYTE,
    COLUMNS,
    FLOAT,
    GAPS,
    GROUP,
    GROUPS,
    HALF,
    LADDER,
    MIDDLE,
    MINIMUM,
    MINIMUM_KIND,
    PLANES,
    ROWS,
    SCALE,
    SCALE_KIND,
    SIGNED,
    STARTS,
    STEPS,
    UNITS,
    VALUE_KIND,
    VALUES,
    ZERO,
    ZERO_KIND,
    Reading,
)
from fewbit.runtime.kernels.lanes import (
    add,
    as_floats,
    codes_at,
    float_at,
    floats_at,
    int_at,
    integers_at,
    long_at,
    multiply,
    no_floats,
    put_bfloat,
    put_floats,
    splat,
    subtract,
)
from fewbit.runtime.kernels.look_up import look_up
from fewbit.runtime.kernels.outliers import SKIP
from fewbit.runtime.kernels.pair_lanes import (
    add_products,
    block_at,
    byte_of,
    copy_short,
    eight_totals,
    find,
    has_pairs,
    in_a_block,
    no_integers,
    numbers_at,
    ordered,
    pairs,
    parts_of,
    places_after,
    put_eight,
    put_integers,
    signed_byte_of,
    signed_bytes,
    spread_at,
    table_at,
    two_tables,
    unless,
)
from fewbit.runtime.kernels.rows import fetch_later, number_at


@compiled
def times_eight_pairs(weights: int, step: int, inputs: int, columns: int) -> Any:
    """Eight rows of bfloat16, `step` bytes apart, times one input: the first eight of 16 float32.

    columns: a multiple of 64.
    """
    a, b, c, d = no_floats(), no_floats(), no_floats(), no_floats()
    e, f, g, h = no_floats(), no_floats(), no_floats(), no_floats()
    # Two sums for each row, because a product takes longer than the next ones have to wait for otherwise.
    s, t, u, v = no_floats(), no_floats(), no_floats(), no_floats()
    w, x, y, z = no_floats(), no_floats(), no_floats(), no_floats()
    for at in range(0, 2 * columns, 128):
        one, two, row = integers_at(inputs + at), integers_at(inputs + at + 64), weights + at
        a, s = add_products(a, integers_at(row), one), add_products(s, integers_at(row + 64), two)
        row += step
        b, t = add_products(b, integers_at(row), one), add_products(t, integers_at(row + 64), two)
        row += step
        c, u = add_products(c, integers_at(row), one), add_products(u, integers_at(row + 64), two)
        row += step
        d, v = add_products(d, integers_at(row), one), add_products(v, integers_at(row + 64), two)
        row += step
        e, w = add_products(e, integers_at(row), one), add_products(w, integers_at(row + 64), two)
        row += step
        f, x = add_products(f, integers_at(row), one), add_products(x, integers_at(row + 64), two)
        row += step
        g, y = add_products(g, integers_at(row), one), add_products(y, integers_at(row + 64), two)
        row += step
        h, z = add_products(h, integers_at(row), one), add_products(z, integers_at(row + 64), two)
    a, b, c, d = add(a, s), add(b, t), add(c, u), add(d, v)
    e, f, g, h = add(e, w), add(f, x), add(g, y), add(h, z)
    return eight_totals(a, b, c, d, e, f, g, h)


@compiled
def numbers_of(address: int, index: int, kind: int) -> Any:
    """16 numbers of some kind from an index of an array on, as float32."""
    if kind == BYTE:
        return numbers_at(address, index, BYTE)
    if kind == SIGNED:
        return numbers_at(address, index, SIGNED)
    if kind == HALF:
        return numbers_at(address, index, HALF)
    return numbers_at(address, index, FLOAT)


@compiled
def times_four(weights: int, step: int, inputs: int, columns: int) -> Any:
    """Four rows of bfloat16 times one input, each 16 float32 to be added: as many sums as AVX2 has registers for."""
    a, b, c, d = no_floats(), no_floats(), no_floats(), no_floats()
    for at in range(0, 2 * columns, 64):
        some, row = integers_at(inputs + at), weights + at
        a, b = add_products(a, integers_at(row), some), add_products(b, integers_at(row + step), some)
        row += 2 * step
        c, d = add_products(c, integers_at(row), some), add_products(d, integers_at(row + step), some)
    return a, b, c, d


@compiled
def times_twice_four(weights: int, step: int, inputs: int, columns: int) -> Any:
    """As :func:`times_eight_pairs`."""
    a, b, c, d = times_four(weights, step, inputs, columns)
    e, f, g, h = times_four(weights + 4 * step, step, inputs, columns)
    return eight_totals(a, b, c, d, e, f, g, h)


def kernel(reading: Reading) -> Callable[..., int]:
    """The function of :func:`fewbit.runtime.kernels.products.kernel` for weights whose columns are in blocks."""
    zero, minimum = (FLOAT if kind else 0 for kind in (reading.zero, reading.minimum))
    return _kernel(replace(reading, scale=FLOAT, zero=zero, minimum=minimum, values=0, vectors=1))


@lru_cache
def _kernel(reading: Reading) -> Callable[..., int]:
    """As :func:`kernel`, by what is compiled in.

    Each function takes memory, so that is not what a few layers of a model have of their own, such as the kind of their
    scales. All that `run` takes from here is plain values: with functions among them, numba would never find what it
    compiled in another process.
    """
    widths = int("".join(map(str, reading.widths)))
    bits, by_table = reading.bits, reading.by_table
    one, two, three = (8 * width for width in (*reading.widths, 0, 0)[:3])
    has_zero, has_minimum = reading.zero != 0, reading.minimum != 0
    in_bytes = reading.in_bytes and not by_table
    # Bytes are taken times 2^24, and scales as much smaller. That is exact: both are powers of two, and scales are
    # large enough to stay normal numbers.
    up, down = 2.0**24, 2.0**-24
    version, by_pairs = sources(), has_pairs()
    # Groups whose tables are computed in one vector: two of eight levels at most.
    together = 1 if by_pairs or bits > 3 else 2

    @kept
    def run(
        about: int, x: int, tokens: int, out: int, outputs: int, first: int, last: int, bias: int, work: int
    ) -> int:
        columns, group, groups = long_at(about + 8 * COLUMNS), long_at(about + 8 * GROUP), long_at(about + 8 * GROUPS)
        step = 2 * columns
        sums = work + ROWS * step
        # Behind the rows is a place for what is not to be seen.
        nowhere, offsets = ROWS * columns, sums + 128
        scale_of = sums + 192
        padded = (groups + 15) // 16 * 64
        zero_of = scale_of + padded
        minimum_of = zero_of + padded
        tables = minimum_of + padded
        inputs = tables + 8 * padded
        for at in range(0, 2 * columns * tokens, 128):
            low, high = integers_at(x + at), integers_at(x + at + 64)
            put_integers(inputs + at, ordered(low, high, widths, by_table, 0))
            put_integers(inputs + at + 64, ordered(low, high, widths, by_table, 1))
        ladder, planes_at = long_at(about + 8 * LADDER), about + 8 * PLANES
        scales, zeros, minima = long_at(about + 8 * SCALE), long_at(about + 8 * ZERO), long_at(about + 8 * MINIMUM)
        starts, gaps, values = long_at(about + 8 * STARTS), long_at(about + 8 * GAPS), long_at(about + 8 * VALUES)
        units, steps = long_at(about + 8 * UNITS), long_at(about + 8 * STEPS)
        scale_kind, value_kind = long_at(about + 8 * SCALE_KIND), long_at(about + 8 * VALUE_KIND)
        zero_kind, minimum_kind = long_at(about + 8 * ZERO_KIND), long_at(about + 8 * MINIMUM_KIND)
        in_units, by_code = scale_kind == SIGNED, value_kind == BYTE
        middle = splat(long_at(about + 8 * MIDDLE))
        levels = floats_at(ladder)
        least_level = int(float_at(ladder))
        lowest = splat(8388608.0 - float_at(ladder))
        share = 1 / columns
        step_one, step_two, step_three = long_at(planes_at + 8), long_at(planes_at + 48), long_at(planes_at + 88)
        for start in range(first // ROWS * ROWS, last, ROWS):
            count = min(ROWS, last - start)
            # The places of outliers go on from row to row.
            skipped = 0 if value_kind else max(0, first - start)
            for number in range(skipped, count):
                row, target = start + number, work + number * step
                some, more = long_at(planes_at) + row * step_one, long_at(planes_at + 40) + row * step_two
                most = long_at(planes_at + 80) + row * step_three
                fetch_later(some, step_one, columns * one >> 6)
                fetch_later(more, step_two, columns * two >> 6)
                fetch_later(most, step_three, columns * three >> 6)
                unit = splat(float_at(units + 4 * row)) if in_units else no_floats()
                for each in range(0, groups, 16):
                    index = row * groups + each
                    scale = numbers_of(scales, index, scale_kind)
                    if in_units:
                        scale = multiply(scale, unit)
                    put_floats(scale_of + 4 * each, multiply(scale, splat(down)) if in_bytes else scale)
                    if has_zero:
                        zero = numbers_of(zeros, index, zero_kind)
                        put_floats(zero_of + 4 * each, multiply(zero, splat(up)) if in_bytes else zero)
                    if has_minimum:
                        put_floats(minimum_of + 4 * each, numbers_of(minima, index, minimum_kind))
                if by_table:
                    for each in range(0, groups, 2 * together):
                        known, other, next_one = levels, levels, 4 * (each + together)
                        if has_zero:
                            known = subtract(known, spread_at(zero_of + 4 * each, together))
                            other = subtract(other, spread_at(zero_of + next_one, together))
                        known = multiply(known, spread_at(scale_of + 4 * each, together))
                        other = multiply(other, spread_at(scale_of + next_one, together))
                        if has_minimum:
                            known = add(known, spread_at(minimum_of + 4 * each, together))
                            other = add(other, spread_at(minimum_of + next_one, together))
                        put_integers(tables + 32 // together * each, two_tables(known, other))
                    for each in range(groups):
                        known = table_at(tables + 32 * (each // together) + 8 * (each % together), together)
                        for _ in range(0, group, 64):
                            code = block_at(widths, some, more, most)
                            put_integers(target, find(known, code, 0))
                            put_integers(target + 64, find(known, code, 1))
                            some, more, most, target = some + one, more + two, most + three, target + 128
                else:
                    for each in range(groups):
                        scale = splat(float_at(scale_of + 4 * each))
                        for _ in range(0, group, 64):
                            code = block_at(widths, some, more, most)
                            if in_bytes:
                                signed = signed_bytes(code, least_level, bits)
                                a, b = signed_byte_of(signed, 0), signed_byte_of(signed, 1)
                                c, d = signed_byte_of(signed, 2), signed_byte_of(signed, 3)
                            else:
                                a = subtract(byte_of(code, 0, bits), lowest)
                                b = subtract(byte_of(code, 1, bits), lowest)
                                c = subtract(byte_of(code, 2, bits), lowest)
                                d = subtract(byte_of(code, 3, bits), lowest)
                            if has_zero:
                                zero = splat(float_at(zero_of + 4 * each))
                                a, b, c, d = subtract(a, zero), subtract(b, zero), subtract(c, zero), subtract(d, zero)
                            a, b = multiply(a, scale), multiply(b, scale)
                            c, d = multiply(c, scale), multiply(d, scale)
                            if has_minimum:
                                least = splat(float_at(minimum_of + 4 * each))
                                a, b, c, d = add(a, least), add(b, least), add(c, least), add(d, least)
                            put_integers(target, in_a_block(a, b))
                            put_integers(target + 64, in_a_block(c, d))
                            some, more, most, target = some + one, more + two, most + three, target + 128
            if value_kind:
                run_at = starts + start // ROWS * 4
                first_of_them, behind, places = int_at(run_at), int_at(run_at + 4), no_integers()
                of_rows = floats_at(steps + 4 * start) if by_code else levels
                for index in range(first_of_them & -16, behind & -16, 16):
                    gap = codes_at(8, gaps + index)
                    places = places_after(gap, places)
                    if first_of_them & 1:
                        put_integers(offsets, unless(places, gap, SKIP, nowhere))
                    else:
                        put_integers(offsets, places)
                    source = values + 2 * index
                    if by_code:
                        value = subtract(as_floats(codes_at(8, values + index)), middle)
                        value = multiply(value, look_up(of_rows, parts_of(places, share), 3))
                        source = sums
                        put_integers(sums, pairs(value, value))
                    for each in range(16):
                        copy_short(work + 2 * int_at(offsets + 4 * each), source + 2 * each)
            if tokens == 0:
                for number in range(max(0, first - start), count):
                    of_row, to = work + number * step, out + 2 * columns * (start + number - first)
                    for at in range(0, 2 * columns, 128):
                        low, high = integers_at(of_row + at), integers_at(of_row + at + 64)
                        put_integers(to + at, ordered(low, high, widths, by_table, 2))
                        put_integers(to + at + 64, ordered(low, high, widths, by_table, 3))
            for token in range(tokens):
                source = inputs + step * token
                if by_pairs:
                    found = times_eight_pairs(work, step, source, columns)
                else:
                    found = times_twice_four(work, step, source, columns)
                to = out + 2 * (outputs * token + start)
                if by_pairs and count == ROWS and not bias:
                    put_eight(to, pairs(found, found))
                else:
                    put_floats(sums, found)
                    for number in range(count):
                        sum_of_row = float_at(sums + 4 * number)
                        if bias:
                            sum_of_row += number_at(bias, start + number, BFLOAT)
                        put_bfloat(to + 2 * number, sum_of_row)
        return version

    return run
