"""Tensors as kernels see them: addresses, and arrays made from an address and a dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

# how kernels tell the three apart: numba has no float16 arithmetic on CPUs, numpy has no bfloat16
STORAGE = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(np.uint16),
    torch.float16: np.dtype(np.int16),
}
WORDS = np.dtype(np.uint64)
STATUS = np.dtype(np.int32)


@intrinsic
def array_at(typingctx: Any, address: Any, first: Any, size: Any, dtype: Any) -> Any:
    """Elements ``first`` to ``first + size`` of ``dtype`` at an address of any alignment; owns no memory.

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
