"""Tensors as kernels see them: addresses, and arrays made from an address and a dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

# how kernels tell the three apart: numba has no float16 arithmetic on CPUs, numpy has no bfloat16
STORAGE = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(np.uint16),
    torch.float16: np.dtype(np.int16),
}
WORDS = np.dtype(np.uint64)
NONFINITE = np.dtype(np.int32)
FLOATS, RANDOM_WORDS, CODES = np.dtype(np.float32), np.dtype(np.uint32), np.dtype(np.uint8)
# codes of 16 bits
WIDE_CODES = np.dtype(np.uint16)

_CACHE_LINE = 64
_POINTER = ir.IntType(8).as_pointer()
_INT = ir.IntType(32)


@intrinsic
def array_at(typingctx: Any, address: Any, first: Any, size: Any, dtype: Any) -> Any:
    """Return elements ``first`` to ``first + size`` of ``dtype`` at an address of any alignment; owns no memory.

    Made anew for every piece of work, since Numba vectorizes loops that count from 0 and not those that may
    wrap around.
    """
    array_type = types.Array(dtype.dtype, 1, "C", aligned=False)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, start, count, _ = args
        item = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
        itemsize = context.get_constant(types.intp, item)
        array = make_array(array_type)(context, builder)
        populate_array(
            array,
            data=builder.inttoptr(builder.add(base, builder.mul(start, itemsize)), array.data.type),
            shape=cgutils.pack_array(builder, [count]),
            strides=cgutils.pack_array(builder, [itemsize]),
            itemsize=itemsize,
            meminfo=None,
        )
        return array._getvalue()

    return array_type(types.int64, types.intp, types.intp, dtype), codegen


@intrinsic(prefer_literal=True)
def scratch(typingctx: Any, size: Any, dtype: Any) -> Any:
    """Array on the stack, filled with zeros, for use in the calling kernel alone: nothing is counted or freed.

    An array of numpy's is counted up and down at each use that is not in a straight line with the last, by calls that
    cost as much as the arithmetic on a word.
    """
    if not isinstance(size, types.IntegerLiteral):
        raise RequireLiteralValue("size: expected a literal")
    array_type = types.Array(dtype.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = context.get_constant(types.intp, size.literal_value)
        item = context.get_data_type(array_type.dtype)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(item))
        memory = cgutils.alloca_once(builder, ir.ArrayType(item, size.literal_value))
        memory.align = _CACHE_LINE
        builder.store(ir.Constant(memory.type.pointee, None), memory)
        array = make_array(array_type)(context, builder)
        populate_array(
            array,
            data=builder.bitcast(memory, array.data.type),
            shape=cgutils.pack_array(builder, [count]),
            strides=cgutils.pack_array(builder, [itemsize]),
            itemsize=itemsize,
            meminfo=None,
        )
        return array._getvalue()

    return array_type(size, dtype), codegen


@intrinsic
def prefetch_word(typingctx: Any, address: Any, first: Any, dtype: Any) -> Any:
    """Ask for elements ``first`` to ``first + 64`` of ``dtype`` at an address; past an array's end it does nothing."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, start, _ = args
        itemsize = context.get_abi_sizeof(context.get_data_type(dtype.dtype))
        place = builder.add(base, builder.mul(start, context.get_constant(types.intp, itemsize)))
        prototype = ir.FunctionType(ir.VoidType(), [_POINTER, _INT, _INT, _INT])
        prefetch = cgutils.get_or_insert_function(builder.module, prototype, "llvm.prefetch.p0")
        for line in range(0, 64 * itemsize, _CACHE_LINE):
            pointer = builder.inttoptr(builder.add(place, context.get_constant(types.intp, line)), _POINTER)
            # for reading, into the nearest cache, data
            builder.call(prefetch, [pointer, _INT(0), _INT(3), _INT(1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.intp, dtype), codegen
