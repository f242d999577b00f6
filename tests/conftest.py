"""Set before anything imports triton: its kernels then run on CPU tensors, in the interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"
