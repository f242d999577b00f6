"""Sixty-four values, signs, levels or codes at a time, on vectors (LLVM's portable ones).

Signs go eight at a time, levels thirty-two; of packed codes the lanes are the codes of a byte. As loops these are not
vectorized: Numba cannot tell that floats and codes are in different memory.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from lioncub.kernels.numba_cpu.compiling import device_function

_BYTE, _WORD = ir.IntType(8), ir.IntType(64)
_INT = ir.IntType(32)
# of signs
_LANES = 8
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(_INT, _LANES)
_MASK = ir.VectorType(ir.IntType(1), _LANES)
# of levels
_WIDE = 32
_WIDE_FLOATS, _WIDE_INTS = ir.VectorType(ir.FloatType(), _WIDE), ir.VectorType(_INT, _WIDE)
_WIDE_BYTES = ir.VectorType(_BYTE, _WIDE)
# a float32 from 2^23 on has no fraction: added to this, a small one is rounded to even and is in the low bits
_ROUNDER = 12582912.0


@intrinsic
def pack_word(typingctx: Any, values: Any, parity_word: Any) -> Any:
    """uint64 of values[64]: bit k is 1 where > 0, parity_word's bit where zero or NaN (rule 2)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _data(context, builder, signature.args[0], args[0])
        byte = builder.trunc(args[1], _BYTE)
        # the sign of 1 - 2*bit stands in for a value without one, and then every code is a sign bit
        stand_in = builder.select(
            builder.bitcast(byte, _MASK), *(ir.Constant(_FLOATS, [one] * _LANES) for one in (1.0, -1.0))
        )
        word = ir.Constant(_WORD, 0)
        for lane in range(0, 64, _LANES):
            lanes = _load(builder, base, lane, _FLOATS)
            undecided = builder.fcmp_unordered("==", lanes, ir.Constant(_FLOATS, [0.0] * _LANES))
            decided = builder.bitcast(builder.select(undecided, stand_in, lanes), _INTS)
            negative = builder.icmp_signed("<", decided, ir.Constant(_INTS, [0] * _LANES))
            byte = builder.zext(builder.bitcast(negative, _BYTE), _WORD)
            word = builder.or_(word, builder.shl(byte, ir.Constant(_WORD, lane)))
        return builder.not_(word)

    return types.uint64(values, types.uint64), codegen


@intrinsic
def any_nonfinite(typingctx: Any, values: Any) -> Any:
    """Non-zero uint8 where one of values[64] is NaN or Inf."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _data(context, builder, signature.args[0], args[0])
        largest = ir.Constant(_INTS, [0] * _LANES)
        for lane in range(0, 64, _LANES):
            bits = builder.bitcast(_load(builder, base, lane, _FLOATS), _INTS)
            magnitude = builder.and_(bits, ir.Constant(_INTS, [0x7FFFFFFF] * _LANES))
            larger = builder.icmp_signed(">", magnitude, largest)
            largest = builder.select(larger, magnitude, largest)
        nonfinite = builder.icmp_signed(">=", largest, ir.Constant(_INTS, [0x7F800000] * _LANES))
        return builder.bitcast(nonfinite, _BYTE)

    return types.uint8(values), codegen


@intrinsic
def unpack_word(typingctx: Any, word: Any, plus: Any, minus: Any, values: Any) -> Any:
    """values[64] = plus where the word's bit is 1, else minus."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _data(context, builder, signature.args[3], args[3])
        plus, minus = (_splat(builder, args[i], _FLOATS) for i in (1, 2))
        for lane in range(0, 64, _LANES):
            byte = builder.trunc(builder.lshr(args[0], ir.Constant(_WORD, lane)), _BYTE)
            chosen = builder.select(builder.bitcast(byte, _MASK), plus, minus)
            _store(builder, chosen, base, lane)
        return context.get_dummy_value()

    return types.void(types.uint64, types.float32, types.float32, values), codegen


@intrinsic
def count_ones(typingctx: Any, word: Any) -> Any:
    """Number of bits set in a uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


@intrinsic
def even_codes(typingctx: Any, values: Any, factor: Any, level: Any, codes: Any) -> Any:
    """codes[64] = level + values * factor clipped to -level..level (0 for NaN) and rounded, half to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, _, _, target = _pointers(context, builder, signature, args)
        factor, level = _splat(builder, args[1], _WIDE_FLOATS), _splat(builder, args[2], _WIDE_INTS)
        bounds = _bounds(builder, level)
        for lane in range(0, 64, _WIDE):
            ratio = _clip(builder, builder.fmul(_load(builder, source, lane, _WIDE_FLOATS), factor), bounds)
            rounded = builder.bitcast(builder.fadd(ratio, ir.Constant(_WIDE_FLOATS, [_ROUNDER] * _WIDE)), _WIDE_INTS)
            _store(builder, builder.trunc(builder.add(rounded, level), _WIDE_BYTES), target, lane)
        return context.get_dummy_value()

    return types.void(values, types.float32, types.int32, codes), codegen


@intrinsic
def random_codes(typingctx: Any, values: Any, factor: Any, level: Any, codes: Any, words: Any) -> Any:
    """Fill codes as `even_codes`, but round up sizes whose fraction exceeds the 24 high bits of words[64]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, _, _, target, random = _pointers(context, builder, signature, args)
        factor, level = _splat(builder, args[1], _WIDE_FLOATS), _splat(builder, args[2], _WIDE_INTS)
        bounds = _bounds(builder, level)
        for lane in range(0, 64, _WIDE):
            ratio = _clip(builder, builder.fmul(_load(builder, source, lane, _WIDE_FLOATS), factor), bounds)
            sign = builder.ashr(builder.bitcast(ratio, _WIDE_INTS), ir.Constant(_WIDE_INTS, [31] * _WIDE))
            size = builder.bitcast(
                builder.and_(builder.bitcast(ratio, _WIDE_INTS), ir.Constant(_WIDE_INTS, [0x7FFFFFFF] * _WIDE)),
                _WIDE_FLOATS,
            )
            whole = builder.fptosi(size, _WIDE_INTS)
            fraction = builder.fsub(size, builder.sitofp(whole, _WIDE_FLOATS))
            word = builder.lshr(_load(builder, random, lane, _WIDE_INTS), ir.Constant(_WIDE_INTS, [8] * _WIDE))
            uniform = builder.fmul(builder.sitofp(word, _WIDE_FLOATS), ir.Constant(_WIDE_FLOATS, [2.0**-24] * _WIDE))
            more = builder.zext(builder.fcmp_ordered("<", uniform, fraction), _WIDE_INTS)
            rounded = builder.add(whole, more)
            # -rounded where the sign is all ones
            signed = builder.sub(builder.xor(rounded, sign), sign)
            _store(builder, builder.trunc(builder.add(signed, level), _WIDE_BYTES), target, lane)
        return context.get_dummy_value()

    return types.void(values, types.float32, types.int32, codes, words), codegen


@intrinsic
def levels_times(typingctx: Any, codes: Any, level: Any, unit: Any, values: Any) -> Any:
    """values[64] = (codes - level) * unit in float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, _, _, target = _pointers(context, builder, signature, args)
        level, unit = _splat(builder, args[1], _WIDE_INTS), _splat(builder, args[2], _WIDE_FLOATS)
        for lane in range(0, 64, _WIDE):
            code = builder.zext(_load(builder, source, lane, _WIDE_BYTES), _WIDE_INTS)
            _store(builder, builder.fmul(builder.sitofp(builder.sub(code, level), _WIDE_FLOATS), unit), target, lane)
        return context.get_dummy_value()

    return types.void(codes, types.int32, types.float32, values), codegen


def _pointers(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Return of each argument that is an array its first element, else None."""
    return [
        _data(context, builder, kind, value) if isinstance(kind, types.Array) else None
        for kind, value in zip(signature.args, args, strict=True)
    ]


def _load(builder: Any, base: Any, lane: int, vector: Any) -> Any:
    return builder.load(_place(builder, base, lane, vector), align=1)


def _store(builder: Any, value: Any, base: Any, lane: int) -> None:
    builder.store(value, _place(builder, base, lane, value.type), align=1)


def _place(builder: Any, base: Any, lane: int, vector: Any) -> Any:
    return builder.bitcast(builder.gep(base, [ir.Constant(_WORD, lane)]), vector.as_pointer())


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_INT, 0))
    lanes = ir.Constant(ir.VectorType(_INT, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)


def _bounds(builder: Any, level: Any) -> tuple[Any, Any]:
    upper = builder.sitofp(level, _WIDE_FLOATS)
    return builder.fsub(ir.Constant(_WIDE_FLOATS, [-0.0] * _WIDE), upper), upper


def _clip(builder: Any, ratio: Any, bounds: tuple[Any, Any]) -> Any:
    zero = ir.Constant(_WIDE_FLOATS, [0.0] * _WIDE)
    ratio = builder.select(builder.fcmp_unordered("uno", ratio, ratio), zero, ratio)
    lower, upper = bounds
    ratio = builder.select(builder.fcmp_ordered(">", ratio, lower), ratio, lower)
    return builder.select(builder.fcmp_ordered("<", ratio, upper), ratio, upper)


@device_function
def pack_codes(codes: Any, bits: int, out: Any) -> None:
    """out[words] = the fields of codes, uint8[64], which are overwritten; bits is 1, 2, 4 or 8."""
    if bits == 4:
        _fold(codes, 4)
    elif bits == 2:
        _fold(codes, 2)
    elif bits == 1:
        _fold(codes, 1)
    for i in range(out.size):
        out[i] = _word(codes, i)


@device_function
def unpack_codes(words: Any, bits: int, codes: Any) -> None:
    """codes, uint8[64], from the fields of words; of fewer than 64 codes the others are left without meaning."""
    if words.size == bits and bits < 8:
        _unfold_by(words, bits, codes)
        return
    for i in range(words.size):
        _set_word(codes, i, words[i])
    _unfold_by(codes, bits, codes)


@device_function
def _unfold_by(source: Any, bits: int, codes: Any) -> None:
    if bits == 4:
        _unfold(source, 4, codes)
    elif bits == 2:
        _unfold(source, 2, codes)
    elif bits == 1:
        _unfold(source, 1, codes)


@intrinsic
def _word(typingctx: Any, codes: Any, i: Any) -> Any:
    """Return bytes 8*i to 8*i + 7; a view of words would cost more than all that is done with them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_word_at(context, builder, signature, args), align=1)

    return types.uint64(codes, types.intp), codegen


@intrinsic
def _set_word(typingctx: Any, codes: Any, i: Any, word: Any) -> Any:
    """Set bytes 8*i to 8*i + 7 to those of ``word``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _word_at(context, builder, signature, args), align=1)
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.uint64), codegen


@intrinsic(prefer_literal=True)
def _fold(typingctx: Any, codes: Any, bits: Any) -> Any:
    """Return the low ``bits`` of each of 64 bytes, moved together at the front; their other bits are 0."""
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _data(context, builder, signature.args[0], args[0])
        wide, narrow, gaps = _lanes(bits.literal_value)
        apart = builder.load(builder.bitcast(base, wide.as_pointer()), align=1)
        fields = apart
        for gap in gaps:
            fields = builder.or_(fields, builder.lshr(apart, gap))
        builder.store(builder.trunc(fields, narrow), builder.bitcast(base, narrow.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(codes, bits), codegen


@intrinsic(prefer_literal=True)
def _unfold(typingctx: Any, source: Any, bits: Any, codes: Any) -> Any:
    """64 bytes from as many fields of ``bits`` at the front of ``source``, which may be ``codes``."""
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        origin = _data(context, builder, signature.args[0], args[0])
        target = _data(context, builder, signature.args[2], args[2])
        wide, narrow, gaps = _lanes(bits.literal_value)
        together = builder.zext(builder.load(builder.bitcast(origin, narrow.as_pointer()), align=1), wide)
        fields = together
        for gap in gaps:
            fields = builder.or_(fields, builder.shl(together, gap))
        low = int.from_bytes(bytes([2**bits.literal_value - 1]) * (8 // bits.literal_value))
        apart = builder.and_(fields, ir.Constant(wide, [low] * wide.count))
        builder.store(apart, builder.bitcast(target, wide.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(source, bits, codes), codegen


def _lanes(bits: int) -> tuple[ir.VectorType, ir.VectorType, list[ir.Constant]]:
    """Return vectors of packed bytes, wide with a byte per code and narrow, and shifts of all codes but the first."""
    codes = 8 // bits
    wide = ir.VectorType(ir.IntType(8 * codes), 64 // codes)
    gaps = [ir.Constant(wide, [(8 - bits) * i] * wide.count) for i in range(1, codes)]
    return wide, ir.VectorType(_BYTE, wide.count), gaps


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return make_array(kind)(context, builder, array).data


def _word_at(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    base = _data(context, builder, signature.args[0], args[0])
    return builder.gep(builder.bitcast(base, ir.IntType(64).as_pointer()), [args[1]])
