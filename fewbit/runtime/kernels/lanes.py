"""Vectors of 16 numbers for numba: two types, and the operations that LLVM turns into the processor's vector code.

numba's own loops do not become table lookups in a register, which is what decoding packed weights needs. All addresses
are integers of 64 bits, in bytes; nothing is checked here, so callers must stay inside the memory that they own.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16
_BYTE, _SHORT, _INT, _LONG = (ir.IntType(width) for width in (8, 16, 32, 64))
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)


class _Floats(types.Type):
    """16 float32."""

    def __init__(self) -> None:
        super().__init__("fewbit_floats")


class _Integers(types.Type):
    """16 integers of 32 bits."""

    def __init__(self) -> None:
        super().__init__("fewbit_integers")


floats, integers = _Floats(), _Integers()


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, FLOATS)


@register_model(_Integers)
class _IntegersModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _INTS)


def _load(builder: Any, address: Any, kind: Any, align: int = 1) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _store(builder: Any, value: Any, address: Any, align: int = 1) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def constant(values: Any) -> Any:
    """16 integers that are known when code is compiled."""
    return ir.Constant(_INTS, [ir.Constant(_INT, value) for value in values])


def repeated(builder: Any, value: Any) -> Any:
    """A vector of 16 times a number."""
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(one, one, constant([0] * LANES))


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """A call of one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(builder.module.declare_intrinsic(name, (), kind), arguments)


@intrinsic
def fetch(_: Any, address: Any) -> Any:
    """Ask for the 64 bytes around an address, which are read soon; any address is allowed."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, read, near, data = builder.inttoptr(args[0], _BYTE.as_pointer()), _INT(0), _INT(3), _INT(1)
        kind = ir.FunctionType(ir.VoidType(), [place.type, _INT, _INT, _INT])
        builder.call(builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind), [place, read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def long_at(_: Any, address: Any) -> Any:
    """The 64-bit integer at an address."""
    return types.int64(types.int64), lambda context, builder, signature, args: _load(builder, args[0], _LONG, 8)


@intrinsic
def int_at(_: Any, address: Any) -> Any:
    """The signed 32-bit integer at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(_load(builder, args[0], _INT, 4), _LONG)

    return types.int64(types.int64), generate


@intrinsic
def byte_at(_: Any, address: Any) -> Any:
    """The byte at an address, from 0 to 255."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(_load(builder, args[0], _BYTE), _LONG)

    return types.int64(types.int64), generate


@intrinsic
def signed_at(_: Any, address: Any) -> Any:
    """The signed byte at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(_load(builder, args[0], _BYTE), _LONG)

    return types.int64(types.int64), generate


@intrinsic
def float_at(_: Any, address: Any) -> Any:
    """The float32 at an address."""
    return types.float32(types.int64), lambda context, builder, signature, args: _load(builder, args[0], _FLOAT, 4)


@intrinsic
def half_at(_: Any, address: Any) -> Any:
    """The float16 at an address, as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(_load(builder, args[0], _HALF, 2), _FLOAT)

    return types.float32(types.int64), generate


@intrinsic
def bfloat_at(_: Any, address: Any) -> Any:
    """The bfloat16 at an address, as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.zext(_load(builder, args[0], _SHORT, 2), _INT)
        return builder.bitcast(builder.shl(wide, _INT(16)), _FLOAT)

    return types.float32(types.int64), generate


@intrinsic
def put_float(_: Any, address: Any, value: Any) -> Any:
    """Store a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[1], args[0], 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def put_half(_: Any, address: Any, value: Any) -> Any:
    """Store a float32 as float16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, builder.fptrunc(args[1], _HALF), args[0], 2)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def put_bfloat(_: Any, address: Any, value: Any) -> Any:
    """Store a float32 as bfloat16, rounded half to even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[1], _INT)
        odd = builder.and_(builder.lshr(bits, _INT(16)), _INT(1))
        up = builder.add(builder.add(bits, _INT(0x7FFF)), odd)
        # Adding to a NaN could make it a number.
        quiet = builder.or_(bits, _INT(0x400000))
        chosen = builder.select(builder.fcmp_unordered("uno", args[1], args[1]), quiet, up)
        _store(builder, builder.trunc(builder.lshr(chosen, _INT(16)), _SHORT), args[0], 2)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def put_long(_: Any, address: Any, value: Any) -> Any:
    """Store 8 bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def floats_at(_: Any, address: Any) -> Any:
    """16 float32 at an address."""
    return floats(types.int64), lambda context, builder, signature, args: _load(builder, args[0], FLOATS, 4)


@intrinsic
def put_floats(_: Any, address: Any, values: Any) -> Any:
    """Store 16 float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[1], args[0], 4)
        return context.get_dummy_value()

    return types.void(types.int64, floats), generate


@intrinsic
def put_halves(_: Any, address: Any, values: Any) -> Any:
    """Store 16 float32 as float16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, builder.fptrunc(args[1], ir.VectorType(_HALF, LANES)), args[0], 2)
        return context.get_dummy_value()

    return types.void(types.int64, floats), generate


@intrinsic
def put_bfloats(_: Any, address: Any, values: Any) -> Any:
    """Store 16 float32 that are already rounded to bfloat16 as such."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.lshr(builder.bitcast(args[1], _INTS), constant([16] * LANES))
        _store(builder, builder.trunc(bits, ir.VectorType(_SHORT, LANES)), args[0], 2)
        return context.get_dummy_value()

    return types.void(types.int64, floats), generate


@intrinsic
def splat(_: Any, value: Any) -> Any:
    """16 times the same float32."""
    return floats(types.float32), lambda context, builder, signature, args: repeated(builder, args[0])


@intrinsic
def no_floats(_: Any) -> Any:
    """16 zeros."""
    return floats(), lambda context, builder, signature, args: ir.Constant(FLOATS, None)


@intrinsic
def add(_: Any, a: Any, b: Any) -> Any:
    """The sums, lane by lane."""
    return floats(floats, floats), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def subtract(_: Any, a: Any, b: Any) -> Any:
    """The differences, lane by lane."""
    return floats(floats, floats), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def multiply(_: Any, a: Any, b: Any) -> Any:
    """The products, lane by lane."""
    return floats(floats, floats), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def multiply_add(_: Any, a: Any, b: Any, c: Any) -> Any:
    """``a b + c``, lane by lane, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return call(builder, f"llvm.fmuladd.v{LANES}f32", FLOATS, *args)

    return floats(floats, floats, floats), generate


@intrinsic
def total(_: Any, values: Any) -> Any:
    """The sum of 16 float32, always in the same order."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (value,), width = args, LANES
        while width > 1:
            width //= 2
            low, high = (
                builder.shuffle_vector(
                    value, value, ir.Constant(ir.VectorType(_INT, width), [_INT(start + i) for i in range(width)])
                )
                for start in (0, width)
            )
            value = builder.fadd(low, high)
        return builder.extract_element(value, _INT(0))

    return types.float32(floats), generate


@intrinsic
def to_bfloat(_: Any, values: Any) -> Any:
    """Finite float32 rounded to bfloat16, half to even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _INTS)
        odd = builder.and_(builder.lshr(bits, constant([16] * LANES)), constant([1] * LANES))
        up = builder.add(builder.add(bits, constant([0x7FFF] * LANES)), odd)
        return builder.bitcast(builder.and_(up, constant([0xFFFF0000] * LANES)), FLOATS)

    return floats(floats), generate


@intrinsic
def to_half(_: Any, values: Any) -> Any:
    """Float32 rounded to float16, half to even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.fptrunc(args[0], ir.VectorType(_HALF, LANES)), FLOATS)

    return floats(floats), generate


def _plane(builder: Any, address: Any, width: int) -> Any:
    """16 codes of one plane of `width` bits in the low bits of 16 integers; what stands above them is not cleared."""
    if width == 8:
        return builder.zext(_load(builder, address, ir.VectorType(_BYTE, LANES)), _INTS)
    shifts = [width * lane % 32 for lane in range(LANES)]
    if width == 4:
        first = repeated(builder, _load(builder, address, _INT))
        second = repeated(builder, _load(builder, builder.add(address, _LONG(4)), _INT))
        ahead = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [ir.IntType(1)(lane >= 8) for lane in range(LANES)])
        words = builder.select(ahead, second, first)
    else:
        word = _load(builder, address, {2: _INT, 1: _SHORT}[width])
        words = repeated(builder, word if width == 2 else builder.zext(word, _INT))
    return builder.lshr(words, constant(shifts))


def _low(builder: Any, codes: Any, width: int) -> Any:
    return builder.and_(codes, constant([2**width - 1] * LANES))


@intrinsic(prefer_literal=True)
def codes_at(_: Any, width: Any, address: Any) -> Any:
    """16 codes of a plane of 8, 4, 2 or 1 bits; bits above those are of no meaning."""
    width = width.literal_value
    signature = integers(types.literal(width), types.int64)
    return signature, lambda context, builder, signature, args: _plane(builder, args[1], width)


@intrinsic(prefer_literal=True)
def more_bits_at(_: Any, codes: Any, below: Any, width: Any, address: Any) -> Any:
    """Codes with the bits of the next plane, of 4, 2 or 1 bits, above their lowest `below` bits."""
    below, width = below.literal_value, width.literal_value
    signature = integers(integers, types.literal(below), types.literal(width), types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low = _low(builder, args[0], below)
        if width == 1:
            mask = builder.bitcast(_load(builder, args[3], _SHORT), ir.VectorType(ir.IntType(1), LANES))
            return builder.select(mask, builder.or_(low, constant([2**below] * LANES)), low)
        high = builder.shl(_plane(builder, args[3], width), constant([below] * LANES))
        return builder.or_(low, high)

    return signature, generate


@intrinsic(prefer_literal=True)
def exact(_: Any, codes: Any, bits: Any) -> Any:
    """Codes without what stands above their lowest `bits` bits."""
    bits = bits.literal_value
    signature = integers(integers, types.literal(bits))
    return signature, lambda context, builder, signature, args: _low(builder, args[0], bits)


@intrinsic
def as_floats(_: Any, codes: Any) -> Any:
    """Integers as float32."""
    return floats(integers), lambda context, builder, signature, args: builder.sitofp(args[0], FLOATS)


@intrinsic
def integers_at(_: Any, address: Any) -> Any:
    """16 integers of 32 bits at an address."""
    return integers(types.int64), lambda context, builder, signature, args: _load(builder, args[0], _INTS, 4)


@intrinsic
def gather(_: Any, table: Any, codes: Any) -> Any:
    """The float32 at the places `codes` of the table at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = ir.Constant(FLOATS, ir.Undefined)
        for lane in range(LANES):
            index = builder.zext(builder.extract_element(args[1], _INT(lane)), _LONG)
            found = _load(builder, builder.add(args[0], builder.shl(index, _LONG(2))), _FLOAT, 4)
            value = builder.insert_element(value, found, _INT(lane))
        return value

    return floats(types.int64, integers), generate
