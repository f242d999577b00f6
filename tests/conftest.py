"""Set before anything imports triton: its kernels then run on CPU tensors, interpreted, unless told otherwise."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
