"""Operations on 64 codes of a byte, and on 32 bfloat16, for numba: with AVX512-BF16 (and -VBMI), or with AVX2.

Both are kept in the same type as 16 integers of 32 bits. See :mod:`fewbit.runtime.kernels.lanes`.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from fewbit.runtime.kernels import half_lanes
from fewbit.runtime.kernels.description import BFLOAT, BYTE, FLOAT, HALF, SIGNED
from fewbit.runtime.kernels.lanes import FLOATS, LANES, call, constant, floats, integers, repeated
from fewbit.runtime.kernels.look_up import features
from fewbit.runtime.kernels.order import by_halves, by_words, column_of_byte, widest

_BYTE, _SHORT, _INT, _LONG = (ir.IntType(width) for width in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_INTS, _BYTES = ir.VectorType(_INT, LANES), ir.VectorType(_BYTE, 64)
_SHORTS, _LONGS = ir.VectorType(_SHORT, 32), ir.VectorType(_LONG, 8)
_NEEDED = frozenset(("avx512bw", "avx512vbmi", "avx512bf16"))
_MAGIC = 0x4B000000
"""2^23 as float32: the bits of a smaller integer are its last ones."""


class _BFloatType(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(type(self))


_PAIRS = ir.VectorType(_BFloatType(), 32)


def has_pairs() -> bool:
    """Whether the processor, as numba sees it, multiplies by pairs. Earlier versions of LLVM have other types."""
    return features() >= _NEEDED and binding.llvm_version_info >= (20,)


def block_order() -> Callable[[tuple[int, ...], bool], list[int]] | None:
    """The order of a block's columns, given the widths of the planes and whether there is a table.

    None if the processor has neither what multiplies by pairs nor AVX2, or has another AVX-512, whose lookups of 16
    float32 are faster than those of bytes with AVX2.
    """
    if has_pairs():
        return by_words
    return by_halves if features() >= half_lanes.NEEDED and "avx512f" not in features() else None


def _constants(kind: Any, values: Any) -> Any:
    return ir.Constant(kind, [ir.Constant(kind.element, value) for value in values])


def _digits(widths: Any) -> tuple[int, ...]:
    return tuple(int(digit) for digit in str(widths.literal_value))


def _plane(builder: Any, every: tuple[int, ...], number: int, address: Any) -> Any:
    """64 codes of one plane as bytes, shifted to above those of the lower planes; other bits mean nothing."""
    width, below = every[number], sum(every[:number])
    if width == 8:
        return builder.load(builder.inttoptr(address, _INTS.as_pointer()), align=1)
    whole = width == widest(every) and not below
    if not whole and not has_pairs():
        return half_lanes.upper_plane(builder, every, number, address)
    kind = ir.VectorType(_LONG, width)
    some = builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)
    bits = [width * column_of_byte(every, byte) for byte in range(64)]
    longs = builder.shuffle_vector(some, some, _constants(ir.VectorType(_INT, 8), [bit // 64 for bit in bits[::8]]))
    if whole:
        # Processors can shift while they look up what was shifted before.
        words = builder.bitcast(longs, _SHORTS)
        return builder.bitcast(builder.lshr(words, _constants(_SHORTS, [bit % 16 for bit in bits[::2]])), _INTS)
    shifts = _constants(_BYTES, [(bit - below) % 64 for bit in bits])
    found = call(builder, "llvm.x86.avx512.pmultishift.qb.512", _BYTES, shifts, builder.bitcast(longs, _BYTES))
    return builder.bitcast(found, _INTS)


@intrinsic(prefer_literal=True)
def block_at(_: Any, widths: Any, first: Any, second: Any, third: Any) -> Any:
    """64 codes as bytes, in the order of a block, from the addresses of their planes; bits above them mean nothing.

    widths: of the planes, from the lowest bits: a decimal digit for each.
    """
    every = _digits(widths)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = _plane(builder, every, 0, args[1])
        for number in range(1, len(every)):
            mask = (2 ** sum(every[:number]) - 1) * 0x01010101
            found = builder.or_(
                builder.and_(found, constant([mask] * LANES)),
                builder.and_(_plane(builder, every, number, args[1 + number]), constant([mask ^ 0xFFFFFFFF] * LANES)),
            )
        return found

    return integers(widths, types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def byte_of(_: Any, codes: Any, byte: Any, bits: Any) -> Any:
    """Of every four bytes one, of which the lowest bits count, as float32 above 2^23."""
    place, count = byte.literal_value, bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        moved = builder.lshr(args[0], constant([8 * place] * LANES))
        low = builder.and_(moved, constant([2**count - 1] * LANES))
        return builder.bitcast(builder.or_(low, constant([_MAGIC] * LANES)), FLOATS)

    return floats(integers, byte, bits), generate


@intrinsic(prefer_literal=True)
def signed_bytes(_: Any, codes: Any, first: Any, bits: Any) -> Any:
    """64 codes, whose lowest bits count, plus `first`, as signed bytes."""
    count = bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low = builder.bitcast(builder.and_(args[0], constant([(2**count - 1) * 0x01010101] * LANES)), _BYTES)
        one = builder.insert_element(ir.Constant(_BYTES, ir.Undefined), builder.trunc(args[1], _BYTE), _INT(0))
        every = builder.shuffle_vector(one, one, _constants(ir.VectorType(_INT, 64), [0] * 64))
        return builder.bitcast(builder.add(low, every), _INTS)

    return integers(integers, types.int64, bits), generate


@intrinsic(prefer_literal=True)
def signed_byte_of(_: Any, values: Any, byte: Any) -> Any:
    """One of every four signed bytes, times 2^24, as float32: that takes two instructions."""
    place = byte.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places = [4 * lane + place if top else 64 for lane in range(LANES) for top in (0, 0, 0, 1)]
        some, none = builder.bitcast(args[0], _BYTES), ir.Constant(_BYTES, None)
        moved = builder.shuffle_vector(some, none, _constants(ir.VectorType(_INT, 64), places))
        return builder.sitofp(builder.bitcast(moved, _INTS), FLOATS)

    return floats(integers, byte), generate


def _pairs(builder: Any, first: Any, second: Any) -> Any:
    found = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, second, first)
    return builder.bitcast(found, _INTS)


@intrinsic
def pairs(_: Any, first: Any, second: Any) -> Any:
    """Twice 16 float32 as 32 bfloat16, rounded half to even.

    By pairs, numbers below 2^-126 become zeros; with AVX2, numbers have to be finite.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pairs(builder, *args) if has_pairs() else half_lanes.pairs(builder, *args)

    return integers(floats, floats), generate


@intrinsic
def in_a_block(_: Any, first: Any, second: Any) -> Any:
    """As :func:`pairs`, in the order of a block without tables."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pairs(builder, *args) if has_pairs() else half_lanes.in_turn(builder, *args)

    return integers(floats, floats), generate


@intrinsic
def two_tables(_: Any, first: Any, second: Any) -> Any:
    """Twice 16 finite float32 as tables of bfloat16, 32 bytes each, for :func:`table_at`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pairs(builder, *args) if has_pairs() else half_lanes.tables(builder, *args)

    return integers(floats, floats), generate


@intrinsic(prefer_literal=True)
def table_at(_: Any, address: Any, together: Any) -> Any:
    """The table of 16 bfloat16 at an address; with two together, which only AVX2 has, one of two tables of eight."""
    small = together.literal_value > 1

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not has_pairs():
            return (half_lanes.small_table_at if small else half_lanes.table_at)(builder, args[0])
        half = builder.load(builder.inttoptr(args[0], ir.VectorType(_INT, 8).as_pointer()), align=1)
        return builder.shuffle_vector(half, half, constant([*range(8), *range(8)]))

    return integers(types.int64, together), generate


@intrinsic(prefer_literal=True)
def spread_at(_: Any, address: Any, together: Any) -> Any:
    """The float32 at an address 16 times; with two together, eight times, and then the next one."""
    count = together.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        some = builder.load(builder.inttoptr(args[0], ir.VectorType(_FLOAT, count).as_pointer()), align=4)
        return builder.shuffle_vector(some, some, constant([lane * count // LANES for lane in range(LANES)]))

    return floats(types.int64, together), generate


@intrinsic(prefer_literal=True)
def find(_: Any, table: Any, codes: Any, odd: Any) -> Any:
    """The numbers of a table at 32 of 64 codes in bytes, the first or the others of a block's order."""
    shift = 8 * odd.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not has_pairs():
            return half_lanes.find(builder, args[0], args[1], odd.literal_value)
        table, codes = (builder.bitcast(one, _SHORTS) for one in args[:2])
        if shift:
            codes = builder.lshr(codes, _constants(_SHORTS, [shift] * 32))
        return builder.bitcast(call(builder, "llvm.x86.avx512.permvar.hi.512", _SHORTS, table, codes), _INTS)

    return integers(integers, integers, odd), generate


@intrinsic
def add_products(_: Any, sums: Any, first: Any, second: Any) -> Any:
    """16 sums, and the products of 32 bfloat16 with 32 others, two to a sum."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not has_pairs():
            return half_lanes.add_products(builder, *args)
        a, b = (builder.bitcast(one, _PAIRS) for one in args[1:])
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, args[0], a, b)

    return floats(floats, integers, integers), generate


@intrinsic(prefer_literal=True)
def ordered(_: Any, first: Any, second: Any, widths: Any, by_table: Any, which: Any) -> Any:
    """One of two vectors of 64 bfloat16 in the order of a block, from those in the order of the columns.

    which: 0 or 1; 2 and 3 are the two vectors the other way round, in the order of the columns.
    """
    every, number = _digits(widths), which.literal_value
    is_table = bool(by_table.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        order = (block_order() or by_words)(every, is_table)
        if number > 1:
            order = [order.index(column) for column in range(64)]
        mask = ir.Constant(ir.VectorType(_INT, 32), [_INT(one) for one in order[number % 2 * 32 :][:32]])
        a, b = (builder.bitcast(one, _SHORTS) for one in args[:2])
        return builder.bitcast(builder.shuffle_vector(a, b, mask), _INTS)

    return integers(integers, integers, widths, by_table, which), generate


@intrinsic
def put_integers(_: Any, address: Any, values: Any) -> Any:
    """Store 64 bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], _INTS.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, integers), generate


@intrinsic
def copy_short(_: Any, address: Any, source: Any) -> Any:
    """Store the two bytes that are at another address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, at = (builder.inttoptr(one, _SHORT.as_pointer()) for one in args)
        builder.store(builder.load(at, align=1), to, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def numbers_at(_: Any, address: Any, index: Any, kind: Any) -> Any:
    """16 numbers of some kind from an index of an array on, as float32."""
    chosen = kind.literal_value
    of, size = {
        FLOAT: (_FLOAT, 4),
        HALF: (ir.HalfType(), 2),
        BFLOAT: (_SHORT, 2),
        BYTE: (_BYTE, 1),
        SIGNED: (_BYTE, 1),
    }[chosen]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.add(args[0], builder.mul(args[1], _LONG(size)))
        found = builder.load(builder.inttoptr(at, ir.VectorType(of, LANES).as_pointer()), align=1)
        if chosen == HALF:
            return builder.fpext(found, FLOATS)
        if chosen == BFLOAT:
            return builder.bitcast(builder.shl(builder.zext(found, _INTS), constant([16] * LANES)), FLOATS)
        if chosen == BYTE:
            return builder.uitofp(found, FLOATS)
        return builder.sitofp(found, FLOATS) if chosen == SIGNED else found

    return floats(types.int64, types.int64, kind), generate


@intrinsic
def eight_totals(_: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    """The sums of eight times 16 float32, always in the same order: the first eight of the result, and again."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, width = list(args), LANES
        while width > 1:
            # The halves of each two vectors are added; what belongs to one of the eight stays together.
            width //= 2
            places = [[lane + start for lane in range(LANES) if lane // width % 2 == 0] for start in (0, width)]
            several = [[*one, *(lane + LANES for lane in one)] for one in places]
            left = [
                builder.fadd(*(builder.shuffle_vector(one, other, constant(lanes)) for lanes in several))
                for one, other in zip(left[::2], left[1::2] or left, strict=True)
            ]
        return left[0]

    return floats(*[floats] * 8), generate


@intrinsic
def put_eight(_: Any, address: Any, values: Any) -> Any:
    """Store the first 16 bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        eight = builder.shuffle_vector(args[1], args[1], _constants(ir.VectorType(_INT, 4), range(4)))
        builder.store(eight, builder.inttoptr(args[0], eight.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, integers), generate


@intrinsic
def no_integers(_: Any) -> Any:
    """16 zeros."""
    return integers(), lambda context, builder, signature, args: ir.Constant(_INTS, None)


@intrinsic
def places_after(_: Any, gaps: Any, before: Any) -> Any:
    """The end of each of 16 gaps (bytes), counted on from the last of the places `before`."""
    half, kind = LANES // 2, ir.VectorType(_SHORT, LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # Sums of 16 bytes fit into 16 bits, and each half into a register of its own.
        found, none, step = builder.trunc(args[0], kind), ir.Constant(kind, None), 1
        while step < half:
            lanes = constant([lane - step if lane % half >= step else LANES for lane in range(LANES)])
            found = builder.add(found, builder.shuffle_vector(found, none, lanes))
            step *= 2
        lanes = constant([LANES] * half + [half - 1] * half)
        found = builder.zext(builder.add(found, builder.shuffle_vector(found, none, lanes)), _INTS)
        return builder.add(found, builder.shuffle_vector(args[1], args[1], constant([LANES - 1] * LANES)))

    return integers(integers, integers), generate


@intrinsic
def parts_of(_: Any, places: Any, share: Any) -> Any:
    """Into which equal part of `1 / share` places each of 16 falls."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        share = repeated(builder, args[1])
        half = builder.fmul(share, ir.Constant(FLOATS, [_FLOAT(0.5)] * LANES))
        found = call(builder, f"llvm.fma.v{LANES}f32", FLOATS, builder.sitofp(args[0], FLOATS), share, half)
        return builder.fptosi(found, _INTS)

    return integers(integers, types.float32), generate


@intrinsic(prefer_literal=True)
def unless(_: Any, places: Any, gaps: Any, no: Any, other: Any) -> Any:
    """16 places, but `other` for those whose gap is `no`."""
    skip = no.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = builder.icmp_unsigned("!=", args[1], constant([skip] * LANES))
        return builder.select(real, args[0], repeated(builder, builder.trunc(args[3], _INT)))

    return integers(integers, integers, no, types.int64), generate
