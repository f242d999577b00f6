"""Sixty-four float32 to one word of signs, and back, on vectors of eight (LLVM's portable ones)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

_LANES = 8
_BYTE = ir.IntType(8)
_WORD = ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_INTS = ir.VectorType(ir.IntType(32), _LANES)
_MASK = ir.VectorType(ir.IntType(1), _LANES)


@intrinsic
def pack_word(typingctx: Any, values: Any, first: Any, parity_word: Any) -> Any:
    """uint64 of values[first : first + 64]: bit k is 1 where > 0, parity_word's bit where zero or NaN (rule 2)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _pointer(context, builder, signature.args[0], args[0], args[1])
        byte = builder.trunc(args[2], _BYTE)
        # the sign of 1 - 2*bit stands in for a value without one, and then every code is a sign bit
        stand_in = builder.select(builder.bitcast(byte, _MASK), _splat_constant(1.0), _splat_constant(-1.0))
        word = ir.Constant(_WORD, 0)
        for lane in range(0, 64, _LANES):
            lanes = builder.load(_at(builder, base, lane), align=4)
            undecided = builder.fcmp_unordered("==", lanes, _splat_constant(0.0))
            decided = builder.bitcast(builder.select(undecided, stand_in, lanes), _INTS)
            negative = builder.icmp_signed("<", decided, ir.Constant(_INTS, [0] * _LANES))
            byte = builder.zext(builder.bitcast(negative, _BYTE), _WORD)
            word = builder.or_(word, builder.shl(byte, ir.Constant(_WORD, lane)))
        return builder.not_(word)

    return types.uint64(values, types.intp, types.uint64), codegen


@intrinsic
def any_nonfinite(typingctx: Any, values: Any, first: Any) -> Any:
    """Non-zero uint8 where one of values[first : first + 64] is NaN or Inf."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _pointer(context, builder, signature.args[0], args[0], args[1])
        largest = ir.Constant(_INTS, [0] * _LANES)
        for lane in range(0, 64, _LANES):
            bits = builder.bitcast(builder.load(_at(builder, base, lane), align=4), _INTS)
            magnitude = builder.and_(bits, ir.Constant(_INTS, [0x7FFFFFFF] * _LANES))
            larger = builder.icmp_signed(">", magnitude, largest)
            largest = builder.select(larger, magnitude, largest)
        nonfinite = builder.icmp_signed(">=", largest, ir.Constant(_INTS, [0x7F800000] * _LANES))
        return builder.bitcast(nonfinite, _BYTE)

    return types.uint8(values, types.intp), codegen


@intrinsic
def unpack_word(typingctx: Any, word: Any, plus: Any, minus: Any, values: Any, first: Any) -> Any:
    """values[first : first + 64] = plus where the word's bit is 1, else minus."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _pointer(context, builder, signature.args[3], args[3], args[4])
        plus, minus = (_splat(builder, args[i]) for i in (1, 2))
        for lane in range(0, 64, _LANES):
            byte = builder.trunc(builder.lshr(args[0], ir.Constant(_WORD, lane)), _BYTE)
            chosen = builder.select(builder.bitcast(byte, _MASK), plus, minus)
            builder.store(chosen, _at(builder, base, lane), align=4)
        return context.get_dummy_value()

    return types.void(types.uint64, types.float32, types.float32, values, types.intp), codegen


@intrinsic
def count_ones(typingctx: Any, word: Any) -> Any:
    """Number of bits set in a uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, first: Any) -> Any:
    return builder.gep(make_array(array_type)(context, builder, array).data, [first])


def _at(builder: Any, base: Any, lane: int) -> Any:
    place = builder.gep(base, [ir.Constant(_WORD, lane)])
    return builder.bitcast(place, _FLOATS.as_pointer())


def _splat_constant(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * _LANES)


def _splat(builder: Any, value: Any) -> Any:
    vector = ir.Constant(_FLOATS, ir.Undefined)
    for lane in range(_LANES):
        vector = builder.insert_element(vector, value, ir.Constant(ir.IntType(32), lane))
    return vector
