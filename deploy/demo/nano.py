"""The sizes of m3-nano, the demo checkpoint."""

from __future__ import annotations

from deploy.demo.writer import Sizes

NAME = "m3-nano"
# One dense layer: it can shift keys by a token, but not look anything up; that is left to layers with an indexer.
SIZES = Sizes(
    hidden_size=320,
    layers=10,
    heads=8,
    kv_heads=2,
    head_dim=64,
    rotary_dim=32,
    index_dim=64,
    topk_blocks=8,
    experts=8,
    experts_per_token=2,
    expert_width=96,
    dense_width=896,
    shared_width=96,
    vocab_size=8192,
    max_positions=8192,
    rope_theta=5e4,
    sparse=[0] + [1] * 9,
    moe=[0] + [1] * 9,
)
