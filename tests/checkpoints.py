"""Checkpoints for tests: the on-disk layout of released ones, tiny sizes, seeded random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.demo.vocabulary import train_tokenizer
from deploy.demo.writer import Layout, Sizes, write_checkpoint


def make_checkpoint(path: Path, *, seed: int = 0, layout: Layout = "vl", shards: int = 2, **sizes: Any) -> Path:
    """Write a checkpoint to the directory `path` and return it. sizes: the fields of `Sizes`."""
    chosen = Sizes(**sizes)
    tokenizer = train_tokenizer(chosen.vocab_size)
    write_checkpoint(path, chosen, tokenizer, seed=seed, layout=layout, shards=shards)
    return path
