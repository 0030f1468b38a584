"""transformers' MiniMax-M3 as the oracle: fp32, CPU, from the same directory that the engine reads.

One unpadded sequence at a time: its left padding moves block boundaries. Reuse layers, which transformers
does not have, are made by hooks that replace the output of a layer's indexer by its source's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MiniMaxM3SparseForConditionalGeneration
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import apply_rotary_pos_emb

from engine.msa.plan import IndexPlan, Role

BLOCK = 128

# (layer_id, index head, token) -> the blocks to attend with, ascending: overrules the indexer in that place.
Forced = Mapping[tuple[int, int, int], Sequence[int]]


@dataclass(frozen=True)
class OracleRun:
    """What transformers computes on one sequence.

    logprobs: float32 [num_tokens, vocab_size], of the next token.
    attended, fresh: per sparse layer, int64 [num_index_heads, num_tokens, topk_blocks], ascending, -1 at the
    right: the blocks that the layer attended with, and those that its own indexer picked.
    inputs: per sparse layer, what its indexer was given.
    """

    logprobs: Tensor
    attended: dict[int, Tensor]
    fresh: dict[int, Tensor]
    inputs: dict[int, tuple[Tensor, Tensor, Tensor]]


class Oracle:
    """One loaded checkpoint with a plan; `plan` None: every sparse layer selects, as transformers does."""

    def __init__(self, path: Path, plan: IndexPlan | None = None) -> None:
        model, loading = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
        # A name that transformers does not find is left random with only a log line.
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := loading[kind]:
                raise AssertionError(f"transformers did not load the checkpoint: {kind} {sorted(names)}")
        self._model = model.eval()
        config = model.config.text_config
        self._topk = config.index_topk_blocks
        is_sparse = [kind == "minimax_m3_sparse" for kind in config.layer_types]
        self.plan = IndexPlan.build(is_sparse) if plan is None else plan
        if [role is not Role.DENSE for role in self.plan.roles] != is_sparse:
            raise AssertionError(f"plan {self.plan} does not fit the layers {config.layer_types}")

    def run(self, token_ids: Sequence[int], forced: Forced | None = None) -> OracleRun:
        """Run the text decoder on one sequence."""
        raw: dict[int, Tensor] = {}
        fresh: dict[int, Tensor] = {}
        inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def hook(layer_id: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
            def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                hidden, (cos, sin), *_ = args
                inputs[layer_id] = (hidden, cos, sin)
                fresh[layer_id] = self._normal(output)
                source = self.plan.source(layer_id)
                raw[layer_id] = output.clone() if source == layer_id else raw[source]
                for (layer, head, token), blocks in (forced or {}).items():
                    if layer == layer_id:
                        raw[layer_id][0, head, token, : len(blocks)] = torch.tensor(blocks)
                return raw[layer_id]

            return replace

        layers = self._model.model.language_model.layers
        handles = [
            layers[layer_id].self_attn.indexer.register_forward_hook(hook(layer_id))
            for layer_id, role in enumerate(self.plan.roles)
            if role is not Role.DENSE
        ]
        try:
            with torch.inference_mode():
                ids = torch.tensor([list(token_ids)])
                hidden = self._model.model.language_model(ids, use_cache=False).last_hidden_state
                logprobs = self._model.lm_head(hidden)[0].log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()
        attended = {layer_id: self._normal(blocks) for layer_id, blocks in raw.items()}
        return OracleRun(logprobs, attended, fresh, inputs)

    def block_scores(self, run: OracleRun, layer_id: int, head: int, token: int) -> Tensor:
        """float32 [token // 128 + 1]: the scores of one (token, head)'s candidate blocks."""
        hidden, cos, sin = run.inputs[layer_id]
        indexer = self._model.model.language_model.layers[layer_id].self_attn.indexer
        dim = indexer.head_dim
        with torch.inference_mode():
            query = indexer.q_norm(indexer.q_proj(hidden[:, token : token + 1]).view(1, 1, -1, dim))
            keys = indexer.k_norm(indexer.k_proj(hidden[:, : token + 1]).view(1, token + 1, 1, dim))
            here, past = slice(token, token + 1), slice(token + 1)
            query, _ = apply_rotary_pos_emb(query, query, cos[:, here], sin[:, here], unsqueeze_dim=2)
            keys, _ = apply_rotary_pos_emb(keys, keys, cos[:, past], sin[:, past], unsqueeze_dim=2)
            scores = keys[0, :, 0] @ query[0, 0, head]
        return torch.stack([block.max() for block in scores.split(BLOCK)])

    def _normal(self, blocks: Tensor) -> Tensor:
        """[1, heads, tokens, k] in any order -> [heads, tokens, topk_blocks], ascending, -1 at the right."""
        _, heads, tokens, width = blocks.shape
        out = torch.full((heads, tokens, self._topk), -1)
        last = torch.iinfo(torch.int64).max
        ascending = blocks[0].masked_fill(blocks[0] < 0, last).sort(-1).values
        out[..., :width] = ascending.masked_fill(ascending == last, -1)
        return out
