"""Lookups in a table of 16 numbers: one instruction with AVX-512, a few with AVX2, comparisons elsewhere."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from fewbit.runtime.kernels.lanes import FLOATS, LANES, call, constant, floats, integers, repeated

_INT, _FLOAT = ir.IntType(32), ir.FloatType()


def features() -> frozenset[str]:
    """The processor's features for which numba compiles, such as avx2."""
    features = cpu_target.target_context.codegen().magic_tuple()[2]
    return frozenset(one[1:] for one in features.split(",") if one.startswith("+"))


@intrinsic(prefer_literal=True)
def look_up(_: Any, table: Any, codes: Any, bits: Any) -> Any:
    """The numbers at the places `codes` of a table of 16; only the lowest `bits` bits of a code count, 4 at most.

    A table of fewer numbers is repeated to 16.
    """
    bits = bits.literal_value
    signature = floats(floats, integers, types.literal(bits))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        table, codes, _ = args
        known = features()
        if "avx512f" in known:
            return call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, table, codes)
        if "avx2" in known and bits > 2:
            return _look_up_in_halves(builder, table, codes, bits)
        return _look_up_by_bits(builder, table, codes, bits)

    return signature, generate


def _part(builder: Any, vector: Any, start: int, count: int) -> Any:
    mask = ir.Constant(ir.VectorType(_INT, count), [_INT(start + i) for i in range(count)])
    return builder.shuffle_vector(vector, vector, mask)


def _look_up_in_halves(builder: Any, table: Any, codes: Any, bits: int) -> Any:
    """With the lookup of AVX2, which finds 8 numbers among 8."""
    eight, count = ir.VectorType(_FLOAT, 8), 8
    found = []
    for start in (0, 8):
        part = _part(builder, codes, start, count)
        tables = [_part(builder, table, at, count) for at in ((0, 8) if bits == 4 else (0,))]
        low, *high = (call(builder, "llvm.x86.avx2.permps", eight, one, part) for one in tables)
        if high:
            fourth = builder.shl(part, ir.Constant(part.type, [_INT(28)] * count))
            above = builder.icmp_signed("<", fourth, ir.Constant(part.type, [_INT(0)] * count))
            low = builder.select(above, high[0], low)
        found.append(low)
    return builder.shuffle_vector(*found, constant(range(LANES)))


def _look_up_by_bits(builder: Any, table: Any, codes: Any, bits: int) -> Any:
    """With comparisons alone, for any processor: halve the candidates bit by bit."""
    left = [repeated(builder, builder.extract_element(table, _INT(place))) for place in range(2**bits)]
    for bit in range(bits):
        test = builder.and_(codes, constant([2**bit] * LANES))
        is_set = builder.icmp_unsigned("!=", test, constant([0] * LANES))
        left = [builder.select(is_set, high, low) for low, high in zip(left[::2], left[1::2], strict=True)]
    return left[0]
