"""The operators of `warploom.kernels` beside their peers: time, share of the roof, host time."""
