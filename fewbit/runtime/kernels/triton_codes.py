"""What decodes packed weights in Triton: codes from planes, and weights from codes.

In all functions `packed` is a :class:`fewbit.runtime.kernels.triton_form.Packed`, and `reading` a
:class:`fewbit.runtime.kernels.triton_form.Reading`. A unit is a word of eight columns, or one column where codes are
read byte by byte. Rows, and columns or units, broadcast to the shape of the result.
"""

# mypy: disable-error-code="no-untyped-def"

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
        half = (word if place < 4 else word >> 32).to(tl.int32)
        bits = (half >> (8 * (place % 4))) & 255
    else:
        bits = (word.to(tl.int32) >> (width * place)) & ((1 << width) - 1)
    return bits


@triton.jit
def bits_at(
    plane, step, rows, columns, unit: tl.constexpr, width: tl.constexpr, base: tl.constexpr, digits: tl.constexpr
):
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
def rounded(value, kind: tl.constexpr, reading: tl.constexpr):
    """Float32 rounded to the dtype `kind`, as float32."""
    if reading.in_pairs:
        # The instruction that rounds two numbers is many times as fast as the one for one.
        value = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,r,r", [value], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        value = value.to(kind).to(tl.float32)
    return value


@triton.jit
def by_formula(level, scale, zero, minimum, packed):
    """Weights, float32 not yet rounded, from levels and the terms of their groups."""
    if packed.zero is not None:
        level = level - zero
    level = level * scale
    if packed.minimum is not None:
        level = level + minimum
    return level


@triton.jit
def weights_of(code, scale, zero, minimum, packed, group, reading: tl.constexpr):
    """The weights of codes, float32 not yet rounded. group: the numbers of their groups, which have these terms."""
    if packed.ladder is None:
        # In the mantissa of 2^23, a whole number is a float without a conversion.
        offset: tl.constexpr = 8388608.0 - reading.first
        level = (code | 0x4B000000).to(tl.float32, bitcast=True) - offset
    else:
        level = tl.load(packed.ladder + code)
    if reading.magnitudes > 1:
        scale = tl.load(packed.scale + group * reading.magnitudes + code // reading.each).to(tl.float32)
    return by_formula(level, scale, zero, minimum, packed)


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
def weights_at(packed, rows, columns, reading: tl.constexpr):
    """The weights without outliers at single columns, float32 not yet rounded."""
    group = rows * packed.groups + columns // reading.group
    scale, zero, minimum = terms_of(packed, rows, group, reading)
    code = codes_at(packed, rows, columns, reading)
    return weights_of(code, scale, zero, minimum, packed, group, reading)


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
def weights_in(found, place: tl.constexpr, packed, reading: tl.constexpr):
    """The weights at a place, 0 to 7, of units that :func:`units_at` has read; float32 not yet rounded."""
    one, two, three, group, scale, zero, minimum = found
    code = bits_in(one, place, reading.one)
    if packed.two is not None:
        code = code | (bits_in(two, place, reading.two) << reading.one)
    if packed.three is not None:
        code = code | (bits_in(three, place, reading.three) << (reading.one + reading.two))
    return weights_of(code, scale, zero, minimum, packed, group, reading)


@triton.jit
def level_at(packed, code: tl.constexpr, reading: tl.constexpr):
    """The level of one code."""
    return reading.first + code if packed.ladder is None else tl.load(packed.ladder + code)


@triton.jit
def tables_of(found, packed, kind: tl.constexpr, reading: tl.constexpr):
    """The four weights that units with one plane of one or two bits can have, rounded, as float32."""
    scale, zero, minimum = found[4], found[5], found[6]
    a = rounded(by_formula(level_at(packed, 0, reading), scale, zero, minimum, packed), kind, reading)
    b = rounded(by_formula(level_at(packed, 1, reading), scale, zero, minimum, packed), kind, reading)
    c, d = a, b
    if reading.one == 2:
        c = rounded(by_formula(level_at(packed, 2, reading), scale, zero, minimum, packed), kind, reading)
        d = rounded(by_formula(level_at(packed, 3, reading), scale, zero, minimum, packed), kind, reading)
    return a, b, c, d


@triton.jit
def chosen_in(found, tables, place: tl.constexpr, reading: tl.constexpr):
    """The weights at a place of units with the tables of :func:`tables_of`."""
    a, b, c, d = tables
    word = found[0].to(tl.int32)
    low = (word & (1 << (place * reading.one))) != 0
    weight = tl.where(low, b, a)
    if reading.one == 2:
        weight = tl.where((word & (2 << (place * 2))) != 0, tl.where(low, d, c), weight)
    return weight


@triton.jit
def inputs_in(four, place: tl.constexpr, kind: tl.constexpr):
    """One of four numbers of 16 bits in words of 64, at a place 0 to 3, as float32."""
    half = (four if place < 2 else four >> 32).to(tl.int32)
    if kind == tl.bfloat16:
        number = ((half << 16) if place % 2 == 0 else (half & -65536)).to(tl.float32, bitcast=True)
    else:
        bits = (half if place % 2 == 0 else half >> 16).to(tl.int16)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def outliers_at(sparse, packed, rows, at, live, kind: tl.constexpr, reading: tl.constexpr):
    """Columns of outliers, and how much larger they are than the weights in their place, float32.

    at: their numbers, where `live`; elsewhere the difference is 0.
    """
    columns = tl.load(sparse.columns + at, mask=live, other=0).to(tl.int32)
    if sparse.columns.dtype.element_ty == tl.int16:
        columns = columns & 0xFFFF
    value = tl.load(sparse.numbers + at, mask=live, other=0).to(tl.float32)
    if sparse.steps is not None:
        value = rounded((value - sparse.middle) * tl.load(sparse.steps + rows), kind, reading)
    core = rounded(weights_at(packed, rows, columns, reading), kind, reading)
    return columns, tl.where(live, value - core, 0.0)
