"""Products with packed weights, and decoded rows, in numba: a few rows at a time are decoded where caches hold them."""

from collections.abc import Callable
from functools import lru_cache

from fewbit.runtime.kernels.compiled import compiled, kept, sources
from fewbit.runtime.kernels.description import (
    BYTE,
    COLUMNS,
    FLOAT,
    GAPS,
    GROUP,
    GROUPS,
    LADDER,
    MIDDLE,
    MINIMUM,
    PICKS,
    PLANES,
    ROWS,
    SCALE,
    SIGNED,
    STARTS,
    STEPS,
    UNITS,
    VALUES,
    ZERO,
    Reading,
)
from fewbit.runtime.kernels.lanes import (
    add,
    as_floats,
    byte_at,
    codes_at,
    exact,
    float_at,
    floats_at,
    gather,
    int_at,
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
from fewbit.runtime.kernels.outliers import SKIP
from fewbit.runtime.kernels.rows import expand, fetch_later, number_at, put_number, rounded, widen, write_row


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
def kernel(reading: Reading) -> Callable[..., int]:
    """The function `(about, x, tokens, out, outputs, first, last, bias, work)` for weights that are read this way.

    It computes ``x W^T + b`` for the rows `first` to `last` of the weight. All but tokens, outputs, first and last are
    addresses: of a description, of x `(tokens, columns)`, of the result `(tokens, outputs)`, of the bias or 0, and of
    :func:`fewbit.runtime.kernels.description.room` bytes. x, bias and result are numbers of the weights' kind. With 0
    tokens, it writes the rows themselves, the first at `out`.
    """
    one, two, three = (*((8,) if reading.expanded else reading.widths), 0, 0)[:3]
    planes, bits, vectors, to = len(reading.widths), reading.bits, reading.vectors, reading.to
    by_table, by_levels, expanded = reading.by_table, reading.by_levels, reading.expanded
    scale_kind, zero_kind, minimum_kind = reading.scale, reading.zero, reading.minimum
    magnitudes, value_kind, number_bytes = reading.magnitudes, reading.values, 4 if reading.to == FLOAT else 2
    in_units, by_code = scale_kind == SIGNED, value_kind == BYTE
    below, version = one + two, sources()

    @kept
    def run(
        about: int, x: int, tokens: int, out: int, outputs: int, first: int, last: int, bias: int, work: int
    ) -> int:
        columns, group, groups = long_at(about + 8 * COLUMNS), long_at(about + 8 * GROUP), long_at(about + 8 * GROUPS)
        whole = (columns + 15) // 16 * 16
        step = 4 * (whole + 16)
        codes = work + ROWS * step
        inputs = codes + whole + 64
        sums = inputs + 4 * tokens * whole
        for token in range(tokens):
            widen(x + number_bytes * columns * token, columns, whole, inputs + 4 * whole * token, to)
        ladder, planes_at = long_at(about + 8 * LADDER), about + 8 * PLANES
        scales, zeros, minima = long_at(about + 8 * SCALE), long_at(about + 8 * ZERO), long_at(about + 8 * MINIMUM)
        starts, gaps, values = long_at(about + 8 * STARTS), long_at(about + 8 * GAPS), long_at(about + 8 * VALUES)
        units, steps = long_at(about + 8 * UNITS), long_at(about + 8 * STEPS)
        middle = splat(long_at(about + 8 * MIDDLE))
        step_one, step_two, step_three = long_at(planes_at + 8), long_at(planes_at + 48), long_at(planes_at + 88)
        for start in range(first, last, ROWS):
            count = min(ROWS, last - start)
            for number in range(count):
                row, decoded = start + number, work + number * step
                at_one, at_two = long_at(planes_at) + row * step_one, long_at(planes_at + 40) + row * step_two
                at_three = long_at(planes_at + 80) + row * step_three
                unit = splat(float_at(units + 4 * row)) if in_units else no_floats()
                if expanded:
                    expand(about, planes, row, codes)
                    at_one = codes
                else:
                    fetch_later(at_one, step_one, columns * one >> 3)
                    fetch_later(at_two, step_two, columns * two >> 3)
                    fetch_later(at_three, step_three, columns * three >> 3)
                for each in range(groups):
                    index = row * groups + each
                    zero, minimum, known = no_floats(), no_floats(), no_floats()
                    if zero_kind:
                        zero = splat(number_at(zeros, index, zero_kind))
                    if minimum_kind:
                        minimum = splat(number_at(minima, index, minimum_kind))
                    if magnitudes > 1:
                        picks = integers_at(long_at(about + 8 * PICKS))
                        scale = gather(scales + 4 * magnitudes * index, picks)
                    else:
                        scale = splat(number_at(scales, index, scale_kind))
                    if in_units:
                        scale = multiply(scale, unit)
                    if by_table:
                        known = floats_at(ladder)
                        if zero_kind:
                            known = subtract(known, zero)
                        known = multiply(known, scale)
                        if minimum_kind:
                            known = add(known, minimum)
                        known = rounded(known, to)
                    for column in range(each * group, (each + 1) * group, 16 * vectors):
                        some = at_one + (column * one >> 3)
                        more = at_two + (column * two >> 3)
                        most = at_three + (column * three >> 3)
                        target = decoded + 4 * column
                        for vector in range(vectors):
                            code = codes_at(one, some + 2 * one * vector)
                            if two:
                                code = more_bits_at(code, one, two, more + 2 * two * vector)
                            if three:
                                code = more_bits_at(code, below, three, most + 2 * three * vector)
                            if by_table:
                                value = look_up(known, code, bits)
                            else:
                                if by_levels:
                                    level = gather(ladder, exact(code, bits))
                                else:
                                    level = add(as_floats(exact(code, bits)), splat(float_at(ladder)))
                                if zero_kind:
                                    level = subtract(level, zero)
                                value = multiply(level, scale)
                                if minimum_kind:
                                    value = add(value, minimum)
                                value = rounded(value, to)
                            put_floats(target + 64 * vector, value)
                if by_code:
                    place, behind = decoded, int_at(starts + 4 * row + 4)
                    step_of_row = splat(float_at(steps + 4 * row))
                    for index in range(int_at(starts + 4 * row), behind, 16):
                        value = subtract(as_floats(codes_at(8, values + index)), middle)
                        put_floats(sums, rounded(multiply(value, step_of_row), to))
                        for each in range(min(16, behind - index)):
                            gap = byte_at(gaps + index + each)
                            place += 4 * gap
                            if gap != SKIP:
                                put_float(place, float_at(sums + 4 * each))
                elif value_kind:
                    place = decoded
                    for index in range(int_at(starts + 4 * row), int_at(starts + 4 * row + 4)):
                        gap = byte_at(gaps + index)
                        place += 4 * gap
                        if gap != SKIP:
                            put_float(place, number_at(values, index, value_kind))
                for column in range(columns, whole):
                    put_float(decoded + 4 * column, 0.0)
                if tokens == 0:
                    write_row(decoded, columns, out + number_bytes * columns * (row - first), to)
            for token in range(tokens):
                source = inputs + 4 * whole * token
                if count == ROWS:
                    times_eight(work, step, source, whole, sums)
                else:
                    for number in range(count):
                        times_one(work + number * step, source, whole, sums + 4 * number)
                for number in range(count):
                    found = float_at(sums + 4 * number)
                    if bias:
                        found += number_at(bias, start + number, to)
                    put_number(out + number_bytes * (outputs * token + start + number), found, to)
        return version

    return run
