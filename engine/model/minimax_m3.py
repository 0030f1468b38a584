"""The MiniMax-M3 text decoder. Its peculiarities:

- Gemma RMS norms everywhere (the stored weight is the gain minus one), per head on q and k;
- RoPE on the first half of a head only, none of it on v;
- the first layers attend densely, the others to 16 key blocks of 128 tokens that a lightning indexer selects per
  token and KV head, or that the nearest layer above already selected (the index cache);
- SwiGLU with clamps and an offset; a sigmoid router whose bias decides the choice but not the weights;
- no biases in linear layers, untied output head.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config import PAGE_SIZE, ModelConfig
from engine.kernels.api import KernelSet, KVPages, SelectParams
from engine.kernels.batch import StepBatch
from engine.model.layers import MLP, Attention, Build
from engine.model.moe import MoE
from engine.model.weights import WeightSource
from engine.msa.audit import Audit
from engine.msa.cache import IndexCache
from engine.msa.plan import IndexKnobs, Role
from engine.msa.selector import AuditedSelector, ComputeSelector, ReuseSelector, Selector
from engine.parallel import TensorParallel


class DecoderLayer:
    """Pre-norm attention and feed-forward; the residual additions are fused into the norms that follow them."""

    def __init__(self, build: Build, layer_id: int, selector: Selector | None) -> None:
        config, prefix = build.config, f"model.layers.{layer_id}."
        self.kernels = build.kernels
        self.parallel = build.parallel
        self.eps = config.rms_norm_eps
        self.input_gain = build.gain(f"{prefix}input_layernorm.weight", config.hidden_size)
        self.post_gain = build.gain(f"{prefix}post_attention_layernorm.weight", config.hidden_size)
        self.attention = Attention(build, layer_id, selector)
        self.feed_forward: MLP | MoE = (
            MoE(build, layer_id)
            if config.is_moe[layer_id]
            else MLP(build, f"{prefix}mlp.", config.dense_intermediate_size)
        )

    def __call__(
        self, x: Tensor, residual: Tensor, cos_sin: Tensor, pages: KVPages, batch: StepBatch
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) -> (this layer's output, the residual stream without it), both [num_tokens, hidden]."""
        normed, residual = self.kernels.add_rms_norm(x, residual, self.input_gain, self.eps)
        x = self.attention(normed, cos_sin, pages, batch)
        normed, residual = self.kernels.add_rms_norm(x, residual, self.post_gain, self.eps)
        return self.parallel.all_reduce(self.feed_forward(normed)), residual


class MiniMaxM3:
    """One rank's shard of the decoder, its pages and its selection buffers.

    plan: the role of every layer.  index_cache: the step's shared selection.  pages: per layer, after
    `allocate_pages`.  ledger: what became of every checkpoint tensor.
    """

    def __init__(
        self,
        config: ModelConfig,
        knobs: IndexKnobs,
        weights: WeightSource,
        kernels: KernelSet,
        parallel: TensorParallel,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        max_num_tokens: int,
        audited: bool,
    ) -> None:
        parallel.check(config)
        self.config = config
        self.parallel = parallel
        self.kernels = kernels
        self.dtype = dtype
        self.plan = knobs.build_plan(config.is_sparse)
        self.audit = Audit()
        self.index_cache = IndexCache(
            self.plan,
            num_index_heads=parallel.num_heads(config.num_index_heads),
            max_num_tokens=max_num_tokens,
            topk_blocks=config.topk_blocks,
            audited=audited,
        )
        build = Build(config, weights, kernels, parallel, dtype)
        vocab = (config.vocab_size, config.hidden_size)
        self._vocab_part = parallel.part(config.vocab_size)
        self.embedding = weights.take("model.embed_tokens.weight", vocab, dtype, rows=self._vocab_part)
        self.layers = [
            DecoderLayer(build, layer_id, self._selector(layer_id, role, audited))
            for layer_id, role in enumerate(self.plan.roles)
        ]
        self.final_gain = build.gain("model.norm.weight", config.hidden_size)
        self.lm_head = kernels.pack_linear(weights.take("lm_head.weight", vocab, dtype, rows=self._vocab_part))
        self.ledger = weights.finish()
        self.weight_bytes = weights.num_bytes
        self.cos_sin = rope_table(max_model_len, config.rotary_dim, config.rope_theta)
        self.pages: list[KVPages] = []

    def _selector(self, layer_id: int, role: Role, audited: bool) -> Selector | None:
        config = self.config
        params = SelectParams(config.topk_blocks, config.init_blocks, config.local_blocks)
        if role is Role.DENSE:
            return None
        if role is Role.COMPUTE:
            return ComputeSelector(layer_id, self.index_cache, self.kernels, params)
        if audited:
            return AuditedSelector(layer_id, self.index_cache, self.kernels, params, self.audit)
        return ReuseSelector(layer_id, self.index_cache)

    def page_bytes(self) -> int:
        """Bytes of one page over all layers of this rank."""
        kv_width = 2 * self.parallel.num_heads(self.config.num_key_value_heads) * self.config.head_dim
        widths = sum(
            kv_width + (self.config.index_dim if layer.attention.layout.num_index_heads else 0) for layer in self.layers
        )
        return widths * PAGE_SIZE * self.dtype.itemsize

    def allocate_pages(self, num_pages: int) -> None:
        """Make the pools; index-K pages only in layers that own an indexer."""
        config = self.config
        kv = (num_pages, self.parallel.num_heads(config.num_key_value_heads), PAGE_SIZE, config.head_dim)
        index = (num_pages, PAGE_SIZE, config.index_dim)
        self.pages = [
            KVPages(
                _zeros(kv, self.dtype),
                _zeros(kv, self.dtype),
                _zeros(index, self.dtype) if layer.attention.layout.num_index_heads else None,
            )
            for layer in self.layers
        ]

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: int64 [num_tokens] -> [num_tokens, hidden]; each rank holds a part of the vocabulary."""
        if self.parallel.size == 1:
            return F.embedding(token_ids, self.embedding)
        local = token_ids - self._vocab_part.start
        mine = (local >= 0) & (local < len(self.embedding))
        rows = F.embedding(local.where(mine, 0), self.embedding)
        return self.parallel.all_reduce(rows * mine.unsqueeze(-1))

    def forward(self, token_ids: Tensor, batch: StepBatch) -> Tensor:
        """Run all layers over the step. token_ids: int64 [num_tokens].  Returns normed hidden states."""
        self.index_cache.begin_step()
        residual = self.embed(token_ids)
        x = torch.zeros_like(residual)
        for layer, pages in zip(self.layers, self.pages, strict=True):
            x, residual = layer(x, residual, self.cos_sin, pages, batch)
        normed, _ = self.kernels.add_rms_norm(x, residual, self.final_gain, self.config.rms_norm_eps)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] -> float32 [rows, vocab_size], the same on every rank."""
        return self.parallel.all_gather_last(self.kernels.linear(hidden, self.lm_head)).float()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A pool of pages that takes memory only as pages are written: torch.zeros would touch all of it at once."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def rope_table(num_positions: int, rotary_dim: int, theta: float) -> Tensor:
    """float32 [num_positions, rotary_dim]: cosines of the rotary_dim / 2 frequencies, then their sines."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequencies = 1.0 / (theta**exponents)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
