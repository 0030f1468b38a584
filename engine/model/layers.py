"""Attention and MLP of one decoder layer, each built from its own tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.api import KernelSet, KVPages, QKVLayout, SwigluParams
from engine.kernels.batch import StepBatch
from engine.kernels.params import MXWeight, Weight
from engine.model.quant import agreed_format, dequantise, empty_weight, view
from engine.model.weights import WeightSource
from engine.msa.selector import Selector
from engine.parallel import TensorParallel


@dataclass(frozen=True, slots=True)
class Build:
    """What every layer needs while it is built: the model's facts and where its tensors come from."""

    config: ModelConfig
    weights: WeightSource
    kernels: KernelSet
    parallel: TensorParallel
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where all tensors live."""
        return self.kernels.device

    def gain(self, name: str, size: int) -> Tensor:
        """A Gemma norm's gain, float32 [size]: the checkpoint stores it minus one."""
        return self.weights.take(name, (size,), torch.float32).add_(1.0)

    def linear_of_rows(self, parts: Sequence[tuple[str, int, slice]]) -> Any:
        """Weights [rows, hidden] of one input, one below the other, packed for `kernels.linear`.

        parts: name, number of rows in the checkpoint, and which of them are this rank's. All are of one format.
        """
        hidden, kind = self.config.hidden_size, agreed_format(self.weights, [name for name, _, _ in parts])
        total = sum(rows.stop - rows.start for _, _, rows in parts)
        weight = empty_weight(kind, (total, hidden), self.dtype, self.device)
        start = 0
        for name, size, rows in parts:
            stop = start + rows.stop - rows.start
            out = view(weight, slice(start, stop))
            self.weights.take_weight(name, (size, hidden), self.dtype, rows=rows, out=out)
            start = stop
        return self.kernels.pack_linear(self._as_multiplied(weight))

    def linear_of_columns(self, name: str, columns: int, part: slice) -> Any:
        """A weight [hidden, columns], cut to this rank's columns, packed for `kernels.linear`."""
        shape = (self.config.hidden_size, columns)
        weight = self.weights.take_weight(name, shape, self.dtype, columns=part)
        return self.kernels.pack_linear(self._as_multiplied(weight))

    def pack_experts(self, w13: Weight, w2: Weight) -> Any:
        """See KernelSet.pack_experts."""
        return self.kernels.pack_experts(self._as_multiplied(w13), self._as_multiplied(w2))

    def _as_multiplied(self, weight: Weight) -> Weight:
        """A format that the backend cannot multiply is converted once, here."""
        if isinstance(weight, MXWeight) and weight.format not in self.kernels.mx_formats:
            return dequantise(weight, self.dtype)
        return weight


class Attention:
    """GQA with per-head QK norm and partial RoPE: dense without a selector, block-sparse with one."""

    def __init__(self, build: Build, layer_id: int, selector: Selector | None) -> None:
        config, parallel = build.config, build.parallel
        prefix = f"model.layers.{layer_id}.self_attn."
        owns_index = selector is not None and selector.owns_index
        self.layer_id = layer_id
        self.selector = selector
        self.kernels = build.kernels
        self.scale = config.head_dim**-0.5
        self.layout = QKVLayout(
            num_heads=config.num_attention_heads // parallel.size,
            num_kv_heads=parallel.num_heads(config.num_key_value_heads),
            head_dim=config.head_dim,
            num_index_heads=parallel.num_heads(config.num_index_heads) if owns_index else 0,
            index_dim=config.index_dim,
            rotary_dim=config.rotary_dim,
            eps=config.rms_norm_eps,
        )

        def head_rows(name: str, num_heads: int, dim: int) -> tuple[str, int, slice]:
            return f"{prefix}{name}_proj.weight", num_heads * dim, parallel.head_rows(num_heads, dim)

        parts = [
            head_rows("q", config.num_attention_heads, config.head_dim),
            head_rows("k", config.num_key_value_heads, config.head_dim),
            head_rows("v", config.num_key_value_heads, config.head_dim),
        ]

        def head_gains(names: tuple[str, str], counts: tuple[int, int], dim: int) -> Tensor:
            """float32 [sum(counts), dim]: each head's gain."""
            gains = torch.empty(sum(counts), dim, dtype=torch.float32, device=build.device)
            for name, heads in zip(names, gains.split(counts), strict=True):
                heads.copy_(build.gain(f"{prefix}{name}_norm.weight", dim).expand_as(heads))
            return gains

        gains = [head_gains(("q", "k"), (self.layout.num_heads, self.layout.num_kv_heads), config.head_dim)]
        index_names = ("index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm")
        if owns_index:
            parts.append(head_rows("index_q", config.num_index_heads, config.index_dim))
            parts.append((f"{prefix}index_k_proj.weight", config.index_dim, slice(0, config.index_dim)))
            gains.append(head_gains(("index_q", "index_k"), (self.layout.num_index_heads, 1), config.index_dim))
        elif selector is not None:
            for name in index_names:
                build.weights.drop(f"{prefix}{name}.weight", "index weights of a reuse layer")
        self.gains = build.kernels.pack_gains(tuple(gains), self.layout)
        self.qkv = build.linear_of_rows(parts)
        width = config.num_attention_heads * config.head_dim
        self.o_proj = build.linear_of_columns(f"{prefix}o_proj.weight", width, parallel.part(width))

    def __call__(self, x: Tensor, cos_sin: Tensor, pages: KVPages, batch: StepBatch) -> Tensor:
        """x: [num_tokens, hidden], normed.  Returns this rank's partial sum, [num_tokens, hidden]."""
        kernels = self.kernels
        q, index_q = kernels.qk_norm_rope_insert(
            kernels.linear(x, self.qkv), self.gains, cos_sin, batch, self.layout, pages
        )
        out = torch.empty_like(q)
        if self.selector is None:
            for segment in batch.segments:
                kernels.attend_dense(q, pages, batch, segment, self.scale, out)
        else:
            selection = self.selector(index_q, pages, batch)
            for segment in batch.segments:
                started = batch.probe.start() if batch.probe is not None else None
                kernels.attend_sparse(q, pages, selection, batch, segment, self.scale, out)
                if batch.probe is not None:
                    batch.probe.stop(started, "sparse_attention", self.layer_id, segment.phase)
        return kernels.linear(out.view(out.shape[0], -1), self.o_proj)


class MLP:
    """SwiGLU-OAI feed-forward: a dense layer's, or the shared expert of a MoE layer."""

    def __init__(self, build: Build, prefix: str, width: int) -> None:
        config, part = build.config, build.parallel.part(width)
        self.kernels = build.kernels
        self.act = SwigluParams(config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta)
        self.gate_up = build.linear_of_rows([(f"{prefix}{name}_proj.weight", width, part) for name in ("gate", "up")])
        self.down = build.linear_of_columns(f"{prefix}down_proj.weight", width, part)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden].  Returns this rank's partial sum, [num_tokens, hidden]."""
        kernels = self.kernels
        return kernels.linear(kernels.swiglu(kernels.linear(x, self.gate_up), self.act), self.down)
