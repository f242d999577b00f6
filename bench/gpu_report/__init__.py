"""What the Triton kernels compile to on each GPU, and the time per element that the machine code allows."""
