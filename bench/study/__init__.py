"""The convergence study: what each compression costs in loss, by `make study`."""
