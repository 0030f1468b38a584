"""Ahead-of-time compilation of every kernel for every architecture, on a machine that has none of them.

`python -m tests.kernels.aot` records what the operations launch on tensors without storage, compiles it for sm_90,
gfx942 and gfx950, and checks registers, shared memory and instructions against fixed limits and against
resources.json. `--write` renews resources.json.
"""
