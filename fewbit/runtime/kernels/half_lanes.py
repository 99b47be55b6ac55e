"""The operations of :mod:`fewbit.runtime.kernels.pair_lanes` with AVX2 alone, which looks up 32 bytes at once.

What is 64 bytes there is two registers here. A table of 16 bfloat16 is two tables of bytes: the low ones, then the high
ones.
"""

from typing import Any

from llvmlite import ir

from fewbit.runtime.kernels.lanes import FLOATS, LANES, call, constant
from fewbit.runtime.kernels.order import column_of_byte

_BYTE, _SHORT, _INT = (ir.IntType(width) for width in (8, 16, 32))
_INTS, _SHORTS = ir.VectorType(_INT, LANES), ir.VectorType(_SHORT, 32)
_BYTES, _HALF = ir.VectorType(_BYTE, 64), ir.VectorType(_BYTE, 32)
NEEDED = frozenset(("avx2", "fma", "f16c"))


def _numbers(kind: Any, values: Any) -> Any:
    return ir.Constant(kind, [kind.element(value) for value in values])


def _places(values: Any) -> Any:
    values = list(values)
    return _numbers(ir.VectorType(_INT, len(values)), values)


def upper_plane(builder: Any, every: tuple[int, ...], number: int, address: Any) -> Any:
    """64 codes of one plane as bytes, above those of the lower planes, where shifting whole words is not enough."""
    width, below = every[number], sum(every[:number])
    kind = ir.VectorType(_BYTE, 8 * width)
    some = builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)
    if every[:2] == (4, 2) and number == 1:
        return _two_bits(builder, some)
    bits = [width * column_of_byte(every, byte) for byte in range(64)]
    found = builder.shuffle_vector(some, some, _places(bit // 8 for bit in bits))
    if width == 1:
        mask = _numbers(_BYTES, [1 << bit % 8 for bit in bits])
        is_set = builder.icmp_unsigned("==", builder.and_(found, mask), mask)
        return builder.bitcast(builder.sext(is_set, _BYTES), _INTS)
    down, up = ([max(0, sign * (bit % 8 - below)) for bit in bits] for sign in (1, -1))
    found = builder.lshr(found, _numbers(_BYTES, down))
    return builder.bitcast(builder.shl(found, _numbers(_BYTES, up)), _INTS)


def _two_bits(builder: Any, some: Any) -> Any:
    """64 codes of 2 bits above those of 4: 32 nibbles, once with their lower and once with their upper bits there."""
    words = ir.VectorType(_SHORT, 8)
    upper = builder.lshr(builder.bitcast(some, words), _numbers(words, [4] * 8))
    places = [place + source for place in range(16) for source in (0, 16)]
    nibbles = builder.shuffle_vector(some, builder.bitcast(upper, some.type), _places(places))
    words = ir.VectorType(_SHORT, 16)
    twice = (builder.shl(builder.bitcast(nibbles, words), _numbers(words, [shift] * 16)) for shift in (4, 2))
    return builder.bitcast(builder.shuffle_vector(*twice, _places(range(32))), _INTS)


def rounded(builder: Any, values: Any) -> Any:
    """16 finite float32 as integers whose upper halves are the nearest bfloat16, half to even."""
    bits = builder.bitcast(values, _INTS)
    odd = builder.and_(builder.lshr(bits, constant([16] * LANES)), constant([1] * LANES))
    return builder.add(builder.add(bits, constant([0x7FFF] * LANES)), odd)


def pairs(builder: Any, first: Any, second: Any) -> Any:
    """Twice 16 finite float32 as 32 bfloat16."""
    kind = ir.VectorType(_SHORT, LANES)
    low, high = (
        builder.trunc(builder.lshr(rounded(builder, one), constant([16] * LANES)), kind) for one in (first, second)
    )
    return builder.bitcast(builder.shuffle_vector(low, high, _places(range(32))), _INTS)


def in_turn(builder: Any, first: Any, second: Any) -> Any:
    """Twice 16 finite float32 as 32 bfloat16: the first of each, the second of each, and so on."""
    low = builder.lshr(rounded(builder, first), constant([16] * LANES))
    return builder.or_(low, builder.and_(rounded(builder, second), constant([0xFFFF0000] * LANES)))


def tables(builder: Any, first: Any, second: Any) -> Any:
    """Twice 16 finite float32 as two tables of bfloat16: 16 low bytes, 16 high bytes, and again."""
    found = []
    for one in (first, second):
        given = builder.bitcast(rounded(builder, one), _BYTES)
        places = [4 * lane + byte for byte in (2, 3) for lane in range(LANES)]
        found.append(builder.shuffle_vector(given, given, _places(places)))
    return builder.bitcast(builder.shuffle_vector(*found, _places(range(64))), _INTS)


def table_at(builder: Any, address: Any) -> Any:
    """One of those tables, low bytes twice and then high bytes twice."""
    some = builder.load(builder.inttoptr(address, _HALF.as_pointer()), align=1)
    return builder.bitcast(builder.shuffle_vector(some, some, _places([*range(16)] * 2 + [*range(16, 32)] * 2)), _INTS)


def small_table_at(builder: Any, address: Any) -> Any:
    """As :func:`table_at`, for the first or, 8 bytes on, the last eight of the 16."""
    some = builder.load(builder.inttoptr(address, ir.VectorType(_BYTE, 24).as_pointer()), align=1)
    return builder.bitcast(builder.shuffle_vector(some, some, _places([*range(8)] * 4 + [*range(16, 24)] * 4)), _INTS)


def find(builder: Any, table: Any, codes: Any, number: int) -> Any:
    """The bfloat16 at the first eight of every 16 codes in bytes, or at the last eight."""
    given, codes = (builder.bitcast(one, _BYTES) for one in (table, codes))
    low, high = (builder.shuffle_vector(given, given, _places(range(start, start + 32))) for start in (0, 32))
    found = []
    for start in (0, 32):
        some = builder.shuffle_vector(codes, codes, _places(range(start, start + 32)))
        some = builder.and_(some, _numbers(_HALF, [15] * 32))
        each = (call(builder, "llvm.x86.avx2.pshuf.b", _HALF, one, some) for one in (low, high))
        places = [lane + 8 * number + source + part for part in (0, 16) for lane in range(8) for source in (0, 32)]
        found.append(builder.shuffle_vector(*each, _places(places)))
    return builder.bitcast(builder.shuffle_vector(*found, _places(range(64))), _INTS)


def add_products(builder: Any, sums: Any, first: Any, second: Any) -> Any:
    """16 sums, and the products of 32 bfloat16 with 32 others, two to a sum."""
    for part in (_low, _high):
        a, b = (part(builder, one) for one in (first, second))
        sums = call(builder, f"llvm.fma.v{LANES}f32", FLOATS, a, b, sums)
    return sums


def _low(builder: Any, pairs: Any) -> Any:
    return builder.bitcast(builder.shl(pairs, constant([16] * LANES)), FLOATS)


def _high(builder: Any, pairs: Any) -> Any:
    return builder.bitcast(builder.and_(pairs, constant([0xFFFF0000] * LANES)), FLOATS)
