"""Checkpoints for tests: the on-disk layout of released ones, tiny sizes, seeded random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from deploy.demo.vocabulary import train_tokenizer
from deploy.demo.writer import Layout, Sizes, write_checkpoint
from engine.config import EngineConfig

_EMBEDDING = "embed_tokens.weight"


def make_checkpoint(path: Path, *, seed: int = 0, layout: Layout = "vl", shards: int = 2, **sizes: Any) -> Path:
    """Write a checkpoint to the directory `path` and return it. sizes: the fields of `Sizes`."""
    chosen = Sizes(**sizes)
    tokenizer = train_tokenizer(chosen.vocab_size)
    write_checkpoint(path, chosen, tokenizer, seed=seed, layout=layout, shards=shards)
    return path


def poison(path: Path, token_id: int) -> Path:
    """Make the embedding of one token NaN: whoever uses it has keys, values and logits that are not finite."""
    [(file, name)] = [
        (file, name) for file in path.glob("*.safetensors") for name in load_file(file) if name.endswith(_EMBEDDING)
    ]
    tensors = load_file(file)
    tensors[name][token_id] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def small_engine(model: Path, **settings: Any) -> EngineConfig:
    """Settings of a small fp32 engine on CPU, one thread a rank; `settings` go over them."""
    defaults: dict[str, Any] = {
        "backend": "torch",
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "num_pages": 64,
        "num_threads": 1,
    }
    return EngineConfig.from_kwargs(model, **(defaults | settings))
