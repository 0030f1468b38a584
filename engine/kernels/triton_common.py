# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What several Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def operand(x, UPCAST: tl.constexpr):
    """`x` as a dot or arithmetic operand. Triton's interpreter computes garbage with bf16 and says nothing, so
    UPCAST (set when interpreting) converts right after the load."""
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Wait until the kernel before this one has ended, then let the next one start (programmatic dependent launch).

    Before it a kernel may read weights, and what was written by the kernel before the last or earlier: that one has
    ended, since the last kernel too called this before it let this one start. Every kernel with OVERLAP calls it.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def swiglu_oai(gate, up, alpha, limit, beta):
    """(clamp(up, -limit, limit) + beta) * g * sigmoid(alpha * g) with g = min(gate, limit), of float32 tensors.

    The clamps pass NaN on, so that a broken activation still shows in the logits.
    """
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL), limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.sigmoid(gate * alpha) * gate * (up + beta)
