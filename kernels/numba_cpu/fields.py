"""p-bit codes to words and back: 64 bytes of one code each, on vectors whose lanes are the codes of a packed byte."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from lioncub.kernels.numba_cpu.compiling import device_function

_BYTE = ir.IntType(8)


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
    """Bytes 8*i to 8*i + 7; a view of words would cost more than all that is done with them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_word_at(context, builder, signature, args), align=1)

    return types.uint64(codes, types.intp), codegen


@intrinsic
def _set_word(typingctx: Any, codes: Any, i: Any, word: Any) -> Any:
    """Bytes 8*i to 8*i + 7 = those of ``word``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _word_at(context, builder, signature, args), align=1)
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.uint64), codegen


@intrinsic(prefer_literal=True)
def _fold(typingctx: Any, codes: Any, bits: Any) -> Any:
    """The low ``bits`` of each of 64 bytes, moved together at the front; their other bits are 0."""
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
    """Vectors of packed bytes, wide with a byte for each code and narrow; by how much codes but the first one move."""
    codes = 8 // bits
    wide = ir.VectorType(ir.IntType(8 * codes), 64 // codes)
    gaps = [ir.Constant(wide, [(8 - bits) * i] * wide.count) for i in range(1, codes)]
    return wide, ir.VectorType(_BYTE, wide.count), gaps


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return make_array(kind)(context, builder, array).data


def _word_at(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    base = _data(context, builder, signature.args[0], args[0])
    return builder.gep(builder.bitcast(base, ir.IntType(64).as_pointer()), [args[1]])
