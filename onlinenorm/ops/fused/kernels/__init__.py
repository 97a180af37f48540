"""Triton kernels of the two-pass path: reduce, scan, apply, forward and backward.

The mathematics is that of ``onlinenorm.ops.vectorized``. Tensors are indexed (sample n, pixel p, channel c) through
their strides, so one kernel serves channels_last and channels-first. Tables are float32:

    moments (N, C, 2)       mean and variance of each sample's channel
    state (N, C, 2)         mean m and variance that sample n is normalised with
    partial (N, S, C, 2)    a pair for each slice of rows: (mean, sum of squares around it) or (sum g, sum g y)
    control (N, C, 2)       (B, D) of the input gradient A g + B (x - m) + D, before layer scaling's projection
    rzeta, kappa (N, C / group)   layer scaling: 1 / zeta, and the projection of the gradient on z

Every sum has a fixed order and no atomics, so equal input gives equal bits.
"""
