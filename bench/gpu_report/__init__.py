"""Properties of the Triton kernels' machine code on each GPU, which needs none: spills, fusion, widths of accesses."""
