"""The KernelSet: every operation of the model, as one frozen bundle of functions.

A backend provides all of them; `resolve` picks the backend once, at load. Functions write into the tensors they are
handed where a buffer must keep its address, and return new tensors otherwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels import torch_attention, torch_index, torch_linear, torch_norm
from engine.kernels.exchange import Exchange
from engine.kernels.params import KVPages, QKVLayout, RouteParams, Selection, SelectParams, SwigluParams, Weight

__all__ = [
    "DecodeKernels",
    "ExchangeKernels",
    "KVPages",
    "KernelSet",
    "QKVLayout",
    "RouteParams",
    "SelectParams",
    "Selection",
    "SwigluParams",
    "resolve",
]


@dataclass(frozen=True, slots=True)
class DecodeKernels:
    """What a captured decode step runs besides the model: from slots to a batch, and from logits to tokens."""

    prepare: Callable[..., None]
    sample: Callable[..., None]


@dataclass(frozen=True, slots=True)
class ExchangeKernels:
    """What reaches the memory of the other ranks of a group, through an `exchange.Exchange`.

    sample_width: the width that an Exchange of `DecodeKernels.sample` has, by the tokens of a rank's share.
    """

    all_reduce: Callable[[Tensor, Exchange], None]
    all_reduce_add_rms_norm: Callable[[Tensor, Tensor, Tensor, float, Exchange], tuple[Tensor, Tensor]]
    sample_width: Callable[[int], int]


def _same_gains(gains: tuple[Tensor, ...], layout: QKVLayout) -> tuple[Tensor, ...]:
    return gains


def _never_shuffles(layout: QKVLayout, dtype: torch.dtype, pages: KVPages) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class KernelSet:
    """What a backend computes. The docstrings of the torch functions, the oracle, have shapes and rules.

    device: where all tensors live.  fp8_dtype: of fp8 pages.  group_tokens: how many neighbouring prefill tokens
    attend together through Selection.unions; 0 where the backend has no use for them.  decode: None where steps
    cannot be captured.  exchange: None where kernels do not reach other ranks.  power_of_two_dims: heads of other sizes
    are not supported.  mx_formats: block-scaled formats that are multiplied as they are stored; the model converts
    weights of others to its compute dtype before packing.
    pack_gains: from gains as the torch qk_norm_rope_insert takes them to what this one takes.  shuffles: whether a
    sparse layer's pages, by its layout, the dtype of activations and its pools, are to be `KVPages.shuffled`.
    custom_reduce: AITER's CustomAllreduce, where it is installed.  report: what computes each operation, where a
    backend has a choice.
    """

    name: str
    device: torch.device
    fp8_dtype: torch.dtype
    group_tokens: Callable[[int], int]
    pack_linear: Callable[[Weight], Any]
    linear: Callable[[Tensor, Any], Tensor]
    pack_experts: Callable[[Weight, Weight], Any]
    experts: Callable[[Tensor, Any, Tensor, Tensor, SwigluParams], Tensor]
    swiglu: Callable[[Tensor, SwigluParams], Tensor]
    route: Callable[[Tensor, Any, Tensor, RouteParams], tuple[Tensor, Tensor]]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    qk_norm_rope_insert: Callable[..., tuple[Tensor, Tensor | None]]
    select_blocks: Callable[..., None]
    attend_dense: Callable[..., None]
    attend_sparse: Callable[..., None]
    decode: DecodeKernels | None = None
    exchange: ExchangeKernels | None = None
    custom_reduce: Callable[..., Any] | None = None
    power_of_two_dims: bool = False
    mx_formats: frozenset[str] = frozenset()
    pack_gains: Callable[[tuple[Tensor, ...], QKVLayout], Any] = _same_gains
    shuffles: Callable[[QKVLayout, torch.dtype, KVPages], bool] = _never_shuffles
    report: Mapping[str, str] = field(default_factory=dict)


def resolve(backend: str) -> KernelSet:
    """The KernelSet of `backend`; "auto" takes the best one this machine can run. Raises ConfigError."""
    if backend == "auto":
        backend = "triton" if torch.cuda.is_available() else "torch"
        if backend == "triton" and torch.version.hip and importlib.import_module("engine.kernels.aiter").is_usable():
            backend = "aiter"
    if backend == "torch":
        return KernelSet(
            name="torch",
            device=torch.device("cpu"),
            fp8_dtype=torch.float8_e4m3fn,
            group_tokens=lambda heads_per_group: 0,
            pack_linear=torch_linear.pack_linear,
            linear=torch_linear.linear,
            pack_experts=torch_linear.pack_experts,
            experts=torch_linear.experts,
            swiglu=torch_linear.swiglu,
            route=torch_linear.route,
            rms_norm=torch_norm.rms_norm,
            add_rms_norm=torch_norm.add_rms_norm,
            qk_norm_rope_insert=torch_norm.qk_norm_rope_insert,
            select_blocks=torch_index.select_blocks,
            attend_dense=torch_attention.attend_dense,
            attend_sparse=torch_attention.attend_sparse,
        )
    if backend in ("triton", "aiter"):
        # By name: importing Triton takes a second that machines without a GPU need not spend.
        module = {"triton": "engine.kernels.triton_set", "aiter": "engine.kernels.aiter"}[backend]
        kernels: KernelSet = importlib.import_module(module).resolve()
        return kernels
    raise ConfigError(f"backend must be auto, torch, triton or aiter, got {backend!r}")
