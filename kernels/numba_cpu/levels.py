"""Sixty-four float32 to codes of levels, and back, on vectors of thirty-two (LLVM's portable ones).

As loops these are not vectorized: Numba cannot tell that floats and codes lie in different memory.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

_LANES = 32
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_INTS = ir.VectorType(ir.IntType(32), _LANES)
_BYTES = ir.VectorType(ir.IntType(8), _LANES)
# a float32 from 2^23 on has no fraction: added to this, a small one is rounded to even and stands in the low bits
_ROUNDER = 12582912.0


@intrinsic
def even_codes(typingctx: Any, values: Any, factor: Any, level: Any, codes: Any) -> Any:
    """codes[64] = level + values * factor clipped to -level..level (0 for NaN) and rounded, half to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, _, _, target = _pointers(context, builder, signature, args)
        factor, level = _splat(builder, args[1], _FLOATS), _splat(builder, args[2], _INTS)
        bounds = _bounds(builder, level)
        for lane in range(0, 64, _LANES):
            ratio = _clip(builder, builder.fmul(_load(builder, source, lane, _FLOATS), factor), bounds)
            rounded = builder.bitcast(builder.fadd(ratio, ir.Constant(_FLOATS, [_ROUNDER] * _LANES)), _INTS)
            _store(builder, builder.trunc(builder.add(rounded, level), _BYTES), target, lane)
        return context.get_dummy_value()

    return types.void(values, types.float32, types.int32, codes), codegen


@intrinsic
def random_codes(typingctx: Any, values: Any, factor: Any, level: Any, codes: Any, words: Any) -> Any:
    """The same, sizes rounded up where their fraction exceeds a uniform number, the 24 high bits of words[64]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, _, _, target, random = _pointers(context, builder, signature, args)
        factor, level = _splat(builder, args[1], _FLOATS), _splat(builder, args[2], _INTS)
        bounds = _bounds(builder, level)
        for lane in range(0, 64, _LANES):
            ratio = _clip(builder, builder.fmul(_load(builder, source, lane, _FLOATS), factor), bounds)
            sign = builder.ashr(builder.bitcast(ratio, _INTS), ir.Constant(_INTS, [31] * _LANES))
            size = builder.bitcast(
                builder.and_(builder.bitcast(ratio, _INTS), ir.Constant(_INTS, [0x7FFFFFFF] * _LANES)), _FLOATS
            )
            whole = builder.fptosi(size, _INTS)
            fraction = builder.fsub(size, builder.sitofp(whole, _FLOATS))
            word = builder.lshr(_load(builder, random, lane, _INTS), ir.Constant(_INTS, [8] * _LANES))
            uniform = builder.fmul(builder.sitofp(word, _FLOATS), ir.Constant(_FLOATS, [2.0**-24] * _LANES))
            more = builder.zext(builder.fcmp_ordered("<", uniform, fraction), _INTS)
            rounded = builder.add(whole, more)
            # -rounded where the sign is all ones
            signed = builder.sub(builder.xor(rounded, sign), sign)
            _store(builder, builder.trunc(builder.add(signed, level), _BYTES), target, lane)
        return context.get_dummy_value()

    return types.void(values, types.float32, types.int32, codes, words), codegen


@intrinsic
def levels_times(typingctx: Any, codes: Any, level: Any, unit: Any, values: Any) -> Any:
    """values[64] = (codes - level) * unit in float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, _, _, target = _pointers(context, builder, signature, args)
        level, unit = _splat(builder, args[1], _INTS), _splat(builder, args[2], _FLOATS)
        for lane in range(0, 64, _LANES):
            code = builder.zext(_load(builder, source, lane, _BYTES), _INTS)
            _store(builder, builder.fmul(builder.sitofp(builder.sub(code, level), _FLOATS), unit), target, lane)
        return context.get_dummy_value()

    return types.void(codes, types.int32, types.float32, values), codegen


def _pointers(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Of each argument that is an array its first element, else None."""
    return [
        make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else None
        for kind, value in zip(signature.args, args, strict=True)
    ]


def _load(builder: Any, base: Any, lane: int, vector: Any) -> Any:
    return builder.load(_place(builder, base, lane, vector), align=1)


def _store(builder: Any, value: Any, base: Any, lane: int) -> None:
    builder.store(value, _place(builder, base, lane, value.type), align=1)


def _place(builder: Any, base: Any, lane: int, vector: Any) -> Any:
    return builder.bitcast(builder.gep(base, [ir.Constant(ir.IntType(64), lane)]), vector.as_pointer())


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)


def _bounds(builder: Any, level: Any) -> tuple[Any, Any]:
    upper = builder.sitofp(level, _FLOATS)
    return builder.fsub(ir.Constant(_FLOATS, [-0.0] * _LANES), upper), upper


def _clip(builder: Any, ratio: Any, bounds: tuple[Any, Any]) -> Any:
    zero = ir.Constant(_FLOATS, [0.0] * _LANES)
    ratio = builder.select(builder.fcmp_unordered("uno", ratio, ratio), zero, ratio)
    lower, upper = bounds
    ratio = builder.select(builder.fcmp_ordered(">", ratio, lower), ratio, lower)
    return builder.select(builder.fcmp_ordered("<", ratio, upper), ratio, upper)
