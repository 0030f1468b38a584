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
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine import capacity
from engine.config import PAGE_SIZE, ModelConfig
from engine.kernels.api import KernelSet, KVPages, SelectParams
from engine.kernels.batch import StepBatch
from engine.kernels.torch_pages import FP8_DTYPES
from engine.model.layers import MLP, Attention, Build
from engine.model.moe import MoE
from engine.model.rope import rope_table
from engine.model.weights import WeightSource
from engine.msa.audit import Audit
from engine.msa.cache import IndexCache
from engine.msa.plan import IndexKnobs, IndexPlan, Role
from engine.msa.selector import (
    AuditedSelector,
    ComparedSelector,
    ComputeSelector,
    ReuseSelector,
    Selector,
    SourceSelector,
)
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
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, pages: KVPages, batch: StepBatch
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) -> (this layer's output, the residual stream without it), both [num_tokens, hidden].

        x and the output are partial sums of this rank: the norm behind them adds up the ranks'.
        residual: None in the first layer, where x is the whole stream, on every rank.
        """
        if residual is None:
            normed, residual = self.kernels.rms_norm(x, self.input_gain, self.eps), x
        else:
            normed, residual = self._add_norm(x, residual, self.input_gain)
        x = self.attention(normed, cos_sin, pages, batch)
        normed, residual = self._add_norm(x, residual, self.post_gain)
        return self.feed_forward(normed), residual

    def _add_norm(self, x: Tensor, residual: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        return self.parallel.add_rms_norm(self.kernels, x, residual, gain, self.eps)


class MiniMaxM3:
    """One rank's shard of the decoder, its pages and its selection buffers.

    plan: the role of every layer, as loaded.  active_plan: the letters of that by which the next step runs.
    index_cache: the step's shared selection.  pages: per layer, after `allocate_pages`.  ledger: what became of every
    checkpoint tensor.
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
        max_num_rows: int,
        audited: bool,
        kv_dtype: torch.dtype | None = None,
        index_dtype: torch.dtype | None = None,
    ) -> None:
        """max_num_tokens, max_num_rows: of a step.  kv_dtype, index_dtype: of the pages, default: `dtype`."""
        parallel.check(config)
        self.config = config
        self.parallel = parallel
        self.kernels = kernels
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.index_dtype = index_dtype or dtype
        self.plan = knobs.build_plan(config.is_sparse)
        self.active_plan = str(self.plan)
        self.audit = Audit()
        num_index_heads = parallel.num_heads(config.num_index_heads)
        groups = max(parallel.num_heads(config.num_key_value_heads), num_index_heads)
        self.index_cache = IndexCache(
            self.plan,
            num_index_heads=num_index_heads,
            max_num_tokens=max_num_tokens,
            max_num_rows=max_num_rows,
            topk_blocks=config.topk_blocks,
            device=kernels.device,
            group_tokens=kernels.group_tokens(config.num_attention_heads // parallel.size // groups),
            audited=audited,
        )
        build = Build(config, weights, kernels, parallel, dtype)
        vocab = (config.vocab_size, config.hidden_size)
        self._vocab_part = parallel.part(config.vocab_size)
        self.embedding = build.weights.take("model.embed_tokens.weight", vocab, dtype, rows=self._vocab_part)
        self._selectors = [self._make_selectors(layer_id, audited) for layer_id in range(len(self.plan.roles))]
        self.layers = [
            DecoderLayer(build, layer_id, self._selectors[layer_id].get(role))
            for layer_id, role in enumerate(self.plan.roles)
        ]
        self.final_gain = build.gain("model.norm.weight", config.hidden_size)
        self.lm_head = kernels.pack_linear(build.weights.take("lm_head.weight", vocab, dtype, rows=self._vocab_part))
        self.ledger = weights.finish()
        self.weight_bytes = weights.num_bytes
        table = rope_table(max_model_len, config.rotary_dim, config.rope_theta, config.rope_scaling)
        self.cos_sin = table.to(kernels.device)
        self.pages: list[KVPages] = []

    def _make_selectors(self, layer_id: int, audited: bool) -> dict[Role, Selector]:
        """By the roles that the layer can have: in an audited model each sparse layer either, else that of the plan."""
        config, cache, kernels, role = self.config, self.index_cache, self.kernels, self.plan.roles[layer_id]
        params = SelectParams(config.topk_blocks, config.init_blocks, config.local_blocks)
        if role is Role.DENSE:
            return {}
        if not audited:
            if role is Role.REUSE:
                return {role: ReuseSelector(layer_id, cache)}
            return {role: ComputeSelector(layer_id, cache, kernels, params)}
        if role is Role.REUSE:
            return {
                Role.COMPUTE: ComparedSelector(layer_id, cache, kernels, params, self.audit),
                Role.REUSE: AuditedSelector(layer_id, cache, kernels, params, self.audit),
            }
        compute = SourceSelector if self.plan.layers(Role.REUSE) else ComputeSelector
        return {
            Role.COMPUTE: compute(layer_id, cache, kernels, params),
            Role.REUSE: ReuseSelector(layer_id, cache),
        }

    def set_plan(self, letters: str) -> None:
        """Run the steps that follow by the plan with these letters: no weights move and no device work happens. Audited
        models only, since every layer must own its indexer and have index keys in all its pages.

        Keys and values of layers behind the first S depend on the plan: a request should not change it on its way, and
        pages of another plan must not be found. Captured graphs keep the plan of their capture. Audits are of the
        loaded plan, and mean something while that runs, or the one without an S.
        """
        plan = IndexPlan.parse(letters)
        assert [role is Role.DENSE for role in plan.roles] == [role is Role.DENSE for role in self.plan.roles]
        self.active_plan, self.index_cache.plan = letters, plan
        for layer, selectors, role in zip(self.layers, self._selectors, plan.roles, strict=True):
            layer.attention.selector = selectors[role] if selectors else None

    def page_bytes(self) -> int:
        """Bytes of one page over all layers of this rank, the scales of fp8 pages included."""
        owners = sum(layer.attention.layout.num_index_heads > 0 for layer in self.layers)
        return capacity.page_bytes(
            self.config, self.parallel.size, owners, self.kv_dtype.itemsize, self.index_dtype.itemsize
        )

    def allocate_pages(self, num_pages: int) -> None:
        """Make the pools; index-K pages only in layers that own an indexer."""
        config, device = self.config, self.kernels.device
        kv = (num_pages, self.parallel.num_heads(config.num_key_value_heads), PAGE_SIZE)
        index = (num_pages, PAGE_SIZE)

        def pool(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
            scale = _zeros(shape, torch.float32, device) if dtype in FP8_DTYPES else None
            return _zeros((*shape, dim), dtype, device), scale

        def pages(layer: DecoderLayer) -> KVPages:
            attention = layer.attention
            made = pools(attention.layout.num_index_heads > 0)
            if attention.selector is not None and self.kernels.shuffles(attention.layout, self.dtype, made):
                return replace(made, shuffled=True)
            return made

        def pools(owns_index: bool) -> KVPages:
            k, k_scale = pool(kv, config.head_dim, self.kv_dtype)
            v, v_scale = pool(kv, config.head_dim, self.kv_dtype)
            if not owns_index:
                return KVPages(k, v, None, k_scale, v_scale)
            index_k, index_k_scale = pool(index, config.index_dim, self.index_dtype)
            return KVPages(k, v, index_k, k_scale, v_scale, index_k_scale)

        self.pages = [pages(layer) for layer in self.layers]

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
        x, residual = self.embed(token_ids), None
        for layer, pages in zip(self.layers, self.pages, strict=True):
            x, residual = layer(x, residual, self.cos_sin, pages, batch)
        assert residual is not None, "a model has layers"
        eps = self.config.rms_norm_eps
        normed, _ = self.parallel.add_rms_norm(self.kernels, x, residual, self.final_gain, eps)
        return normed

    def logits_share(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] -> [rows, vocab_size / ranks] of the compute dtype, of this rank's share of the
        vocabulary; `parallel.all_gather_last` makes them whole."""
        logits: Tensor = self.kernels.linear(hidden, self.lm_head)
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] -> [rows, vocab_size] of the compute dtype, the same on every rank."""
        return self.parallel.all_gather_last(self.logits_share(hidden))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A pool of pages; on CPU it takes memory only as pages are written, where torch.zeros would touch it all."""
    if device.type != "cpu":
        # Not every fp8 dtype has a fill kernel everywhere; its zero is a zero byte.
        return torch.zeros(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype).view(shape)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
