"""The KernelSet: every operation of the model, as one frozen bundle of functions.

A backend provides all of them; `resolve` picks the backend once, at load. Functions write into the tensors they are
handed where a buffer must keep its address, and return new tensors otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.errors import ConfigError
from engine.kernels import torch_attention, torch_index, torch_linear, torch_norm
from engine.kernels.params import KVPages, QKVLayout, SelectParams, SwigluParams

__all__ = ["KVPages", "KernelSet", "QKVLayout", "SelectParams", "SwigluParams", "resolve"]


@dataclass(frozen=True, slots=True)
class KernelSet:
    """What a backend computes. The docstrings of the torch functions, the oracle, have shapes and rules."""

    name: str
    pack_linear: Callable[[Tensor], Any]
    linear: Callable[[Tensor, Any], Tensor]
    pack_experts: Callable[[Tensor, Tensor], Any]
    experts: Callable[[Tensor, Any, Tensor, Tensor, SwigluParams], Tensor]
    swiglu: Callable[[Tensor, SwigluParams], Tensor]
    route: Callable[[Tensor, Any, Tensor, int, float], tuple[Tensor, Tensor]]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    qk_norm_rope_insert: Callable[..., tuple[Tensor, Tensor | None]]
    select_blocks: Callable[..., None]
    attend_dense: Callable[..., None]
    attend_sparse: Callable[..., None]


def resolve(backend: str) -> KernelSet:
    """The KernelSet of `backend`; "auto" takes the best one this machine can run. Raises ConfigError."""
    if backend in ("auto", "torch"):
        return KernelSet(
            name="torch",
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
    raise ConfigError(f"backend must be auto or torch, got {backend!r}")
