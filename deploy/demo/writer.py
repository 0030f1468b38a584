"""Writes random-weight M3 checkpoints in the layout of released ones, at any size.

The weights are random but not degenerate: linears are scaled by fan-in, norm weights differ from 0 (so that
the (1 + w) rule matters), the router bias differs from 0, index norms are raised so that blocks are told
apart, some activations reach their clamps, and the output head is scaled for clear gaps between the best tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from deploy.demo.vocabulary import BEGIN_OF_DOCUMENT, END_OF_TURN, IMAGE, VIDEO

Layout = Literal["vl", "flat"]
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
# Of projections into the activation: one value in 50 reaches its clamps at 7.
_CLAMPED = 3.0
# The smallest vision tower that has the released structure; text serving drops it.
_VISION_HIDDEN, _VISION_WIDTH, _VISION_PATCH = 80, 96, 14


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one checkpoint, in elements, and the scalars of its maths.

    sparse, moe: 0 or 1 per layer, default: two dense layers, then 1.  index_heads: default kv_heads.
    expert_width, dense_width, shared_width: inner sizes of the feed-forward networks.
    """

    hidden_size: int = 64
    layers: int = 5
    heads: int = 8
    kv_heads: int = 2
    index_heads: int | None = None
    head_dim: int = 32
    rotary_dim: int = 16
    index_dim: int = 32
    topk_blocks: int = 4
    local_blocks: int = 1
    init_blocks: int = 0
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 32
    dense_width: int = 128
    shared_width: int = 32
    vocab_size: int = 512
    max_positions: int = 8192
    routed_scale: float = 2.0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    norm_eps: float = 1e-6
    rope_theta: float = 5e6
    sparse: Sequence[int] | None = None
    moe: Sequence[int] | None = None

    @property
    def num_index_heads(self) -> int:
        return self.kv_heads if self.index_heads is None else self.index_heads

    @property
    def is_sparse(self) -> list[int]:
        return self._flags(self.sparse, "sparse")

    @property
    def is_moe(self) -> list[int]:
        return self._flags(self.moe, "moe")

    def _flags(self, given: Sequence[int] | None, name: str) -> list[int]:
        if given is None:
            return [int(layer_id >= 2) for layer_id in range(self.layers)]
        if len(given) != self.layers:
            raise ValueError(f"{name} needs {self.layers} entries, one per layer, got {len(given)}")
        return list(given)


def write_checkpoint(
    path: Path,
    sizes: Sizes,
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    layout: Layout = "vl",
    shards: int = 2,
    decoder: dict[str, Tensor] | None = None,
) -> None:
    """Write config, shards and their index, tokenizer and chat template into `path`, made if missing.

    decoder: the text decoder's tensors by their names on disk, in place of random ones.
    """
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", hf_config(sizes, tokenizer, layout))
    generation = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 40}
    begin, end = (tokenizer.token_to_id(text) for text in (BEGIN_OF_DOCUMENT, END_OF_TURN))
    write_json(path / "generation_config.json", {"bos_token_id": begin, "eos_token_id": end, **generation})
    tokenizer.save(str(path / "tokenizer.json"))
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_OF_DOCUMENT,
        "eos_token": END_OF_TURN,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sizes.max_positions,
        "chat_template": template,
    }
    write_json(path / "tokenizer_config.json", tokenizer_config)
    tensors = make_tensors(sizes, seed=seed, layout=layout)
    write_shards(path, tensors | (decoder or {}), shards)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_shards(path: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Write tensors to `shards` files of about equal sizes, and the index that maps names to files."""
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    written = 0
    for name in sorted(tensors):
        middle = written + tensors[name].nbytes / 2
        parts[min(shards - 1, int(shards * middle / total_size))][name] = tensors[name]
        written += tensors[name].nbytes
    weight_map: dict[str, str] = {}
    for shard, part in enumerate(parts):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index)


def hf_config(sizes: Sizes, tokenizer: Tokenizer, layout: Layout) -> dict[str, Any]:
    """config.json: the vision-language wrapper around `text_config`, or the text config alone."""
    flags = sizes.is_sparse
    text: dict[str, Any] = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        # Released checkpoints leave the wrapped config's type empty.
        "model_type": "minimax_m3_vl_text" if layout == "flat" else "",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.expert_width,
        "dense_intermediate_size": sizes.dense_width,
        "shared_intermediate_size": sizes.shared_width,
        "n_shared_experts": 1,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": sizes.routed_scale,
        "moe_layer_freq": sizes.is_moe,
        "hidden_act": "swigluoai",
        "swiglu_alpha": sizes.swiglu_alpha,
        "swiglu_limit": sizes.swiglu_limit,
        "rms_norm_eps": sizes.norm_eps,
        "use_gemma_norm": True,
        "attention_output_gate": False,
        "rope_theta": sizes.rope_theta,
        "rotary_dim": sizes.rotary_dim,
        "partial_rotary_factor": sizes.rotary_dim / sizes.head_dim,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "tie_word_embeddings": False,
        "max_position_embeddings": sizes.max_positions,
        "num_mtp_modules": 0,
        "bos_token_id": tokenizer.token_to_id(BEGIN_OF_DOCUMENT),
        "eos_token_id": tokenizer.token_to_id(END_OF_TURN),
        "torch_dtype": "bfloat16",
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": sizes.index_dim,
            "sparse_num_index_heads": sizes.num_index_heads,
            "sparse_topk_blocks": sizes.topk_blocks,
            "sparse_block_size": 128,
            "sparse_score_type": "max",
            "sparse_init_block": sizes.init_blocks,
            "sparse_local_block": sizes.local_blocks,
            "sparse_attention_freq": flags,
            "sparse_disable_index_value": flags,
        },
    }
    if layout == "flat":
        return text
    merge = {"spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = {
        "model_type": "minimax_m3_vl_vision",
        "hidden_size": _VISION_HIDDEN,
        "intermediate_size": _VISION_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_channels": 3,
        "image_size": 4 * _VISION_PATCH,
        "patch_size": _VISION_PATCH,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        **merge,
    }
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": tokenizer.token_to_id(IMAGE),
        "video_token_index": tokenizer.token_to_id(VIDEO),
        "projector_hidden_size": sizes.hidden_size,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "img_token_compression_config": {"image_token_compression_method": "patch_merge", **merge},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def make_tensors(sizes: Sizes, *, seed: int, layout: Layout) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name on disk; bf16, the router and its bias fp32."""
    source = _Random(seed)
    prefix = "" if layout == "flat" else "language_model."
    tensors: dict[str, Tensor] = {}
    hidden = sizes.hidden_size
    tensors[f"{prefix}model.embed_tokens.weight"] = source.normal(sizes.vocab_size, hidden)
    for layer_id in range(sizes.layers):
        layer = _layer_tensors(source, sizes, sparse=sizes.is_sparse[layer_id], moe=sizes.is_moe[layer_id])
        tensors |= {f"{prefix}model.layers.{layer_id}.{name}": tensor for name, tensor in layer.items()}
    tensors[f"{prefix}model.norm.weight"] = source.norm(hidden)
    tensors[f"{prefix}lm_head.weight"] = source.linear(sizes.vocab_size, hidden, gain=3.0)
    if layout == "vl":
        tensors |= _vision_tensors(source, hidden)
    return tensors


class _Random:
    """Seeded tensors of the shapes and scales that a decoder layer has."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*shape, generator=self._generator) * std).to(dtype)

    def linear(self, rows: int, columns: int, *, gain: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self.normal(rows, columns, std=gain / math.sqrt(columns), dtype=dtype)

    def norm(self, size: int, *, mean: float = 0.0) -> Tensor:
        return (torch.randn(size, generator=self._generator) * 0.1 + mean).to(torch.bfloat16)


def _layer_tensors(source: _Random, sizes: Sizes, *, sparse: int, moe: int) -> dict[str, Tensor]:
    hidden, query = sizes.hidden_size, sizes.heads * sizes.head_dim
    key_value = sizes.kv_heads * sizes.head_dim
    layer = {
        "input_layernorm.weight": source.norm(hidden),
        "post_attention_layernorm.weight": source.norm(hidden),
        "self_attn.q_proj.weight": source.linear(query, hidden),
        "self_attn.k_proj.weight": source.linear(key_value, hidden),
        "self_attn.v_proj.weight": source.linear(key_value, hidden),
        "self_attn.o_proj.weight": source.linear(hidden, query, gain=2.0),
        "self_attn.q_norm.weight": source.norm(sizes.head_dim, mean=0.3),
        "self_attn.k_norm.weight": source.norm(sizes.head_dim, mean=0.3),
    }
    if sparse:
        index_query = sizes.num_index_heads * sizes.index_dim
        layer["self_attn.index_q_proj.weight"] = source.linear(index_query, hidden)
        layer["self_attn.index_k_proj.weight"] = source.linear(sizes.index_dim, hidden)
        layer["self_attn.index_q_norm.weight"] = source.norm(sizes.index_dim, mean=0.2)
        layer["self_attn.index_k_norm.weight"] = source.norm(sizes.index_dim, mean=0.2)
    if not moe:
        return layer | _gated(source, "mlp", hidden, sizes.dense_width)
    router = "block_sparse_moe"
    layer[f"{router}.gate.weight"] = source.linear(sizes.experts, hidden, gain=1.5, dtype=torch.float32)
    layer[f"{router}.e_score_correction_bias"] = source.normal(sizes.experts, std=0.05, dtype=torch.float32)
    for expert in range(sizes.experts):
        name = f"{router}.experts.{expert}"
        layer[f"{name}.w1.weight"] = source.linear(sizes.expert_width, hidden, gain=_CLAMPED)
        layer[f"{name}.w3.weight"] = source.linear(sizes.expert_width, hidden, gain=_CLAMPED)
        layer[f"{name}.w2.weight"] = source.linear(hidden, sizes.expert_width, gain=0.1)
    return layer | _gated(source, f"{router}.shared_experts", hidden, sizes.shared_width)


def _gated(source: _Random, name: str, hidden: int, width: int) -> dict[str, Tensor]:
    return {
        f"{name}.gate_proj.weight": source.linear(width, hidden, gain=_CLAMPED),
        f"{name}.up_proj.weight": source.linear(width, hidden, gain=_CLAMPED),
        f"{name}.down_proj.weight": source.linear(hidden, width, gain=0.15),
    }


def _vision_tensors(source: _Random, hidden: int) -> dict[str, Tensor]:
    size = _VISION_HIDDEN
    tower, layer = "vision_tower.vision_model", "vision_tower.vision_model.encoder.layers.0"
    patch = source.normal(size, 3, 2, _VISION_PATCH, _VISION_PATCH, std=0.02, dtype=torch.float32)
    tensors = {f"{tower}.embeddings.patch_embedding.weight": patch}
    for norm in (f"{tower}.pre_layrnorm", f"{layer}.layer_norm1", f"{layer}.layer_norm2"):
        tensors[f"{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        tensors[f"{norm}.bias"] = torch.zeros(size, dtype=torch.bfloat16)
    linears = {f"{layer}.self_attn.{name}_proj": (size, size) for name in ("q", "k", "v", "out")}
    linears[f"{layer}.mlp.fc1"] = (_VISION_WIDTH, size)
    linears[f"{layer}.mlp.fc2"] = (size, _VISION_WIDTH)
    for name, width in (("multi_modal_projector", size), ("patch_merge_mlp", 4 * hidden)):
        linears[f"{name}.linear_1"] = (hidden, width)
        linears[f"{name}.linear_2"] = (hidden, hidden)
    for name, (rows, columns) in linears.items():
        tensors[f"{name}.weight"] = source.linear(rows, columns)
        tensors[f"{name}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    return tensors
