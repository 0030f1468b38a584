"""The model of `bench slice`: one of four tensor-parallel ranks' share of 12 of the 60 layers of MiniMax-M3, which one
GPU holds in bf16; and what a step of it must read and compute at the least."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from service.bench import floors
from service.bench.floors import FP32, Floor, Kind, RankShape

DENSE_LAYERS, SPARSE_LAYERS = 3, 9
# Toy sizes with the same structure, for machines without a GPU.
TINY_RANK = RankShape(
    hidden=64,
    heads=4,
    dim=32,
    rotary_dim=16,
    topk_blocks=3,
    dense_width=64,
    experts=8,
    experts_per_token=2,
    expert_width=32,
    vocab=256,
)


# What released checkpoints leave in bf16 or fp32: of MXFP8 ones, and of MXFP4 ones, whose experts alone are quantised.
_UNQUANTISED = {
    "mxfp8": ["lm_head", "model.embed_tokens", "block_sparse_moe.gate"],
    # In memory transformers calls a MoE "mlp" too: the dense layers must be named one by one.
    "mxfp4": [
        *("lm_head", "model.embed_tokens", "block_sparse_moe.gate", "*self_attn*"),
        *(f"model.layers.{layer_id}.mlp" for layer_id in range(DENSE_LAYERS)),
    ],
}


def _quantization_config(kind: str) -> dict[str, Any]:
    if kind == "mxfp8":
        return {
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [1, 32],
            "ignored_layers": _UNQUANTISED[kind],
        }
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": False}
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight},
        "exclude": _UNQUANTISED[kind],
        "export": {"weight_format": "real_quantized"},
    }


def group_shape(shape: RankShape, ranks: int) -> RankShape:
    """The model that `ranks` ranks of this shape share: experts are as many, and as much wider."""
    return replace(
        shape,
        heads=shape.heads * ranks,
        kv_heads=shape.kv_heads * ranks,
        index_heads=shape.index_heads * ranks,
        dense_width=shape.dense_width * ranks,
        expert_width=shape.expert_width * ranks,
        vocab=shape.vocab * ranks,
    )


def hf_config(shape: RankShape, kind: Kind = "bf16") -> dict[str, Any]:
    """config.json in the released layout. Scalars are those of MiniMax-M3; widths and heads are one rank's. kind: the
    format of weights."""
    sparse = [0] * DENSE_LAYERS + [1] * SPARSE_LAYERS
    text = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "model_type": "minimax_m3_text",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": len(sparse),
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.dim,
        "rotary_dim": shape.rotary_dim,
        "rope_theta": 5000000,
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "hidden_act": "swigluoai",
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "intermediate_size": shape.expert_width,
        "dense_intermediate_size": shape.dense_width,
        "shared_intermediate_size": shape.expert_width,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "n_shared_experts": 1,
        "moe_layer_freq": sparse,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": 2.0,
        "num_mtp_modules": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": shape.dim,
            "sparse_num_index_heads": shape.index_heads,
            "sparse_topk_blocks": shape.topk_blocks,
            "sparse_block_size": floors.PAGE,
            "sparse_disable_index_value": sparse,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_attention_freq": sparse,
        },
    }
    outer: dict[str, Any] = {
        "architectures": text["architectures"],
        "model_type": "minimax_m3_vl",
        "torch_dtype": "bfloat16",
    }
    if kind != "bf16":
        outer["quantization_config"] = _quantization_config(kind)
    return {**outer, "text_config": text, "vision_config": {}}


@dataclass(frozen=True, slots=True)
class SliceFloors:
    """Floors of whole steps. plan: one letter per layer, D, F or S.  element: bytes of a weight that is not quantised;
    kv_element, index_element: of a stored number.  kind: the format of weights, a key of floors.WEIGHT_BYTES."""

    shape: RankShape
    plan: str
    element: int
    kv_element: int
    index_element: int
    kind: Kind = "bf16"

    def _linear_elements(self, role: str) -> int:
        """Weights of a layer besides its experts; a reuse layer (S) and a dense one project no index columns."""
        shape = self.shape
        index = (shape.index_heads + 1) * shape.dim if role == "F" else 0
        qkv = (shape.heads + 2 * shape.kv_heads) * shape.dim + index
        dense = 3 * shape.dense_width * shape.hidden if role == "D" else 0
        return shape.hidden * (qkv + shape.heads * shape.dim) + dense

    @property
    def num_moe(self) -> int:
        return sum(role != "D" for role in self.plan)

    def weight_bytes(self, distinct: float) -> float:
        """Read by one step whose tokens hit `distinct` routed experts in every layer."""
        shape = self.shape
        quantised = self.element if self.kind == "bf16" else floors.WEIGHT_BYTES[self.kind]
        linear = quantised if self.kind == "mxfp8" else self.element
        num_bytes = linear * sum(self._linear_elements(role) for role in self.plan)
        num_bytes += self.element * shape.vocab * shape.hidden
        num_bytes += quantised * round(self.num_moe * (distinct + 1) * shape.expert_elements)
        return num_bytes + FP32 * self.num_moe * shape.experts * shape.hidden

    def decode(self, rows: int, context: int, distinct: float) -> Floor:
        """One decode step: weights, keys and values, and index keys of the layers that select."""
        shape, kv = self.shape, self.kv_element
        num_bytes = self.weight_bytes(distinct)
        num_bytes += self.plan.count("D") * floors.dense_decode(shape, rows, context, kv).num_bytes
        num_bytes += self.num_moe * floors.sparse_decode(shape, rows, context, kv).num_bytes
        num_bytes += self.plan.count("F") * floors.indexer_decode(shape, rows, context, self.index_element).num_bytes
        return Floor(num_bytes)

    def prefill(self, tokens: int) -> Floor:
        """A prompt of `tokens` tokens in one go, with one token sampled behind it."""
        shape = self.shape
        active = sum(self._linear_elements(role) for role in self.plan)
        active += self.num_moe * ((shape.experts_per_token + 1) * shape.expert_elements + shape.experts * shape.hidden)
        flops = 2.0 * active * tokens
        flops += self.plan.count("D") * floors.dense_prefill(shape, tokens, tokens).flops
        flops += self.num_moe * floors.sparse_prefill(shape, tokens, tokens).flops
        flops += self.plan.count("F") * floors.indexer_prefill(shape, tokens, tokens).flops
        return Floor(self.weight_bytes(float(shape.experts)), flops)
