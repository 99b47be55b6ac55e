"""What decodes packed weights in Triton: codes from planes, and weights from codes.

In all functions `packed` is a :class:`fewbit.runtime.kernels.triton_form.Packed`, and `reading` a
:class:`fewbit.runtime.kernels.triton_form.Reading`. A unit is a word of eight columns, or one column where codes are
read byte by byte. Rows, and columns or units, broadcast to the shape of the result.
"""

import triton
import triton.language as tl


@triton.jit
def words_at(plane, step, rows, units):
    """The words of a plane, or its bytes, at some places of rows."""
    return tl.load(plane + rows.to(tl.int64) * step + units)


@triton.jit
def bits_in(word, place: tl.constexpr, width: tl.constexpr):
    """The bits at a place, 0 to 7, of words of a plane."""
    if width == 8:
        # Halves of 32 bits, because shifts of 64 bits are slow.
        if place < 4:
            bits = (word.to(tl.int32) >> (8 * place)) & 255
        else:
            bits = ((word >> 32).to(tl.int32) >> (8 * place - 32)) & 255
    else:
        bits = (word.to(tl.int32) >> (width * place)) & ((1 << width) - 1)
    return bits


@triton.jit
def bits_at(plane, step, rows, columns, unit: tl.constexpr, width: tl.constexpr, base: tl.constexpr, digits: tl.constexpr):
    """The bits of a plane at single columns. digits: how many codes are in a byte."""
    if unit == 8:
        word = words_at(plane, step, rows, columns // 8).to(tl.int64)
        bits = (word >> ((columns % 8) * width).to(tl.int64)).to(tl.int32) & ((1 << width) - 1)
    elif base == 3:
        byte = words_at(plane, step, rows, columns // digits).to(tl.int32)
        power = tl.full(columns.shape, 1, tl.int32)
        for count in tl.static_range(digits - 1):
            power = tl.where(columns % digits > count, power * base, power)
        bits = byte // power % base
    else:
        byte = words_at(plane, step, rows, columns // digits).to(tl.int32)
        bits = (byte >> (columns % digits * width)) & ((1 << width) - 1)
    return bits


@triton.jit
def codes_at(packed, rows, columns, reading: tl.constexpr):
    """The codes at single columns."""
    digits: tl.constexpr = reading.in_a_byte
    code = bits_at(packed.one, packed.by_one, rows, columns, reading.unit, reading.one, reading.base, digits[0])
    if packed.two is not None:
        more = bits_at(packed.two, packed.by_two, rows, columns, reading.unit, reading.two, 2, digits[1])
        code = code | (more << reading.one)
    if packed.three is not None:
        more = bits_at(packed.three, packed.by_three, rows, columns, reading.unit, reading.three, 2, digits[2])
        code = code | (more << (reading.one + reading.two))
    return code


@triton.jit
def weights_of(code, scale, zero, minimum, packed, group, kind: tl.constexpr, reading: tl.constexpr):
    """The weights of codes, rounded to the dtype `kind`. group: the numbers of their groups, which have these terms."""
    if packed.ladder is None:
        # In the mantissa of 2^23, a whole number is a float without a conversion.
        offset: tl.constexpr = 8388608.0 - reading.first
        value = (code | 0x4B000000).to(tl.float32, bitcast=True) - offset
    else:
        value = tl.load(packed.ladder + code)
    if packed.zero is not None:
        value = value - zero
    if reading.magnitudes > 1:
        scale = tl.load(packed.scale + group * reading.magnitudes + code // reading.each).to(tl.float32)
    value = value * scale
    if packed.minimum is not None:
        value = value + minimum
    return value.to(kind)


@triton.jit
def terms_of(packed, rows, group, reading: tl.constexpr):
    """Scale, zero and minimum of some groups of rows, float32; what there is none of is 0."""
    scale, zero, minimum = 0.0, 0.0, 0.0
    if reading.magnitudes == 1:
        scale = tl.load(packed.scale + group).to(tl.float32)
        if packed.unit is not None:
            scale = scale * tl.load(packed.unit + rows)
    if packed.zero is not None:
        zero = tl.load(packed.zero + group).to(tl.float32)
    if packed.minimum is not None:
        minimum = tl.load(packed.minimum + group).to(tl.float32)
    return scale, zero, minimum


@triton.jit
def weights_at(packed, rows, columns, kind: tl.constexpr, reading: tl.constexpr):
    """The weights without outliers at single columns, rounded to the dtype `kind`."""
    group = rows * packed.groups + columns // reading.group
    scale, zero, minimum = terms_of(packed, rows, group, reading)
    code = codes_at(packed, rows, columns, reading)
    return weights_of(code, scale, zero, minimum, packed, group, kind, reading)


@triton.jit
def units_at(packed, rows, units, reading: tl.constexpr):
    """What all eight columns of a unit need: words of the planes, the numbers of the groups, their terms."""
    one = words_at(packed.one, packed.by_one, rows, units)
    two, three = one, one
    if packed.two is not None:
        two = words_at(packed.two, packed.by_two, rows, units)
    if packed.three is not None:
        three = words_at(packed.three, packed.by_three, rows, units)
    group = rows * packed.groups + units * 8 // reading.group
    scale, zero, minimum = terms_of(packed, rows, group, reading)
    return one, two, three, group, scale, zero, minimum


@triton.jit
def weights_in(found, place: tl.constexpr, packed, kind: tl.constexpr, reading: tl.constexpr):
    """The weights at a place, 0 to 7, of units that :func:`units_at` has read."""
    one, two, three, group, scale, zero, minimum = found
    code = bits_in(one, place, reading.one)
    if packed.two is not None:
        code = code | (bits_in(two, place, reading.two) << reading.one)
    if packed.three is not None:
        code = code | (bits_in(three, place, reading.three) << (reading.one + reading.two))
    return weights_of(code, scale, zero, minimum, packed, group, kind, reading)


@triton.jit
def outliers_at(sparse, packed, rows, at, live, kind: tl.constexpr, reading: tl.constexpr):
    """Columns of outliers, and how much larger they are than the weights in their place, float32.

    at: their numbers, where `live`; elsewhere the difference is 0.
    """
    columns = tl.load(sparse.columns + at, mask=live, other=0).to(tl.int32)
    if sparse.columns.dtype.element_ty == tl.int16:
        columns = columns & 0xFFFF
    value = tl.load(sparse.values + at, mask=live, other=0).to(tl.float32)
    if sparse.steps is not None:
        value = ((value - sparse.middle) * tl.load(sparse.steps + rows)).to(kind).to(tl.float32)
    core = weights_at(packed, rows, columns, kind, reading).to(tl.float32)
    return columns, tl.where(live, value - core, 0.0)
