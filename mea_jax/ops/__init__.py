"""Pure functions of arrays: attention, head-level linear composition, norms, losses, kernels."""
