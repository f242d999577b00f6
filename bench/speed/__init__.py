"""How fast the kernels are on this machine, as ratios to a stream through memory, and how that changes over commits."""
