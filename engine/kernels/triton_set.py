"""The KernelSet of the triton backend: one source for NVIDIA and AMD."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from engine.kernels import (
    launch,
    triton_decode,
    triton_dense,
    triton_index,
    triton_linear,
    triton_moe,
    triton_norm,
    triton_prepare,
    triton_reduce,
    triton_route,
    triton_sample,
    triton_sparse,
)
from engine.kernels.api import DecodeKernels, ExchangeKernels, KernelSet
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import KVPages, Selection
from engine.quant_config import FORMATS


def resolve() -> KernelSet:
    """Kernels for the device of this process. Raises ConfigError where there is none that Triton runs on."""
    target = launch.detect()
    return bind(target, torch.device("cpu" if target.interpreted else "cuda"))


def bind(target: launch.Target, device: torch.device) -> KernelSet:
    """The operations with their target filled in."""
    return KernelSet(
        name="triton",
        device=device,
        # gfx942 computes with the fnuz encoding.
        fp8_dtype=torch.float8_e4m3fnuz if target.arch == launch.GFX942 else torch.float8_e4m3fn,
        group_tokens=partial(triton_sparse.group_tokens, target),
        pack_linear=partial(triton_linear.pack_linear, target),
        linear=partial(triton_linear.linear, target),
        pack_experts=partial(triton_moe.pack_experts, target),
        experts=partial(triton_moe.experts, target),
        swiglu=partial(triton_norm.swiglu, target),
        route=partial(triton_route.route, target),
        rms_norm=partial(triton_norm.rms_norm, target),
        add_rms_norm=partial(triton_norm.add_rms_norm, target),
        qk_norm_rope_insert=partial(triton_norm.qk_norm_rope_insert, target),
        select_blocks=partial(triton_index.select_blocks, target),
        attend_dense=partial(_attend_dense, target),
        attend_sparse=partial(_attend_sparse, target),
        power_of_two_dims=True,
        mx_formats=FORMATS,
        decode=DecodeKernels(partial(triton_prepare.prepare, target), partial(triton_sample.sample, target)),
        # On AMD it would need stores that other devices see at once, which Triton does not promise.
        exchange=None
        if target.is_hip
        else ExchangeKernels(
            partial(triton_reduce.all_reduce, target),
            partial(triton_reduce.all_reduce_add_rms_norm, target),
            partial(triton_sample.exchange_width, target),
        ),
    )


def _attend_dense(
    target: launch.Target,
    q: Tensor,
    pages: KVPages,
    batch: StepBatch,
    segment: Segment,
    scale: float,
    out: Tensor,
) -> None:
    attend = triton_decode.attend_dense if segment.phase == "decode" else triton_dense.attend_dense
    attend(target, q, pages, batch, segment, scale, out)


def _attend_sparse(
    target: launch.Target,
    q: Tensor,
    pages: KVPages,
    selection: Selection,
    batch: StepBatch,
    segment: Segment,
    scale: float,
    out: Tensor,
) -> None:
    attend = triton_decode.attend_sparse if segment.phase == "decode" else triton_sparse.attend_sparse
    attend(target, q, pages, selection, batch, segment, scale, out)
