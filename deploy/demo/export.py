"""The trained decoder by its names on disk, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from deploy.demo.train_model import NanoModel
from deploy.demo.writer import write_checkpoint

_PREFIX = "language_model."
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
_INDEX = {
    "index_q": "index_q_proj",
    "index_k": "index_k_proj",
    "index_q_norm": "index_q_norm",
    "index_k_norm": "index_k_norm",
}
_EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def disk_views(model: NanoModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the decoder on disk, as a view of the model's parameters and buffers."""
    yield f"{_PREFIX}model.embed_tokens.weight", model.embedding.data
    yield f"{_PREFIX}model.norm.weight", model.final_norm.data
    yield f"{_PREFIX}lm_head.weight", model.head.data
    for layer_id, layer in enumerate(model.decoder_layers()):
        prefix = f"{_PREFIX}model.layers.{layer_id}."
        yield f"{prefix}input_layernorm.weight", layer.input_norm.data
        yield f"{prefix}post_attention_layernorm.weight", layer.post_norm.data
        for mine, name in (_ATTENTION | (_INDEX if layer.sparse else {})).items():
            yield f"{prefix}self_attn.{name}.weight", getattr(layer, mine).data
        if not layer.moe:
            for name in ("gate", "up", "down"):
                yield f"{prefix}mlp.{name}_proj.weight", getattr(layer, name).data
            continue
        prefix += "block_sparse_moe."
        yield f"{prefix}gate.weight", layer.router.data
        yield f"{prefix}e_score_correction_bias", layer.bias
        for mine, shared in _EXPERT.items():
            *experts, last = getattr(layer, mine).data
            yield f"{prefix}shared_experts.{shared}.weight", last
            for expert, weight in enumerate(experts):
                yield f"{prefix}experts.{expert}.{mine}.weight", weight


def _is_router(name: str) -> bool:
    return name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias"))


def write_model(
    path: Path, model: NanoModel, tokenizer: Tokenizer, *, shards: int = 4, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a checkpoint directory: matrices and norms in `dtype`, router and bias in float32, as released."""
    decoder = {
        name: view.detach().cpu().to(torch.float32 if _is_router(name) else dtype).contiguous()
        for name, view in disk_views(model)
    }
    write_checkpoint(path, model.sizes, tokenizer, shards=shards, decoder=decoder)


def read_model(path: Path, model: NanoModel) -> None:
    """Fill `model` from a checkpoint directory that `write_model` wrote."""
    views = dict(disk_views(model))
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name in views:
                views.pop(name).copy_(tensor)
    if views:
        raise ValueError(f"{path} misses {sorted(views)[0]} and {len(views) - 1} more tensors")
