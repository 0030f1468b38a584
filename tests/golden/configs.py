"""The checkpoints of the golden tests, and their prompts."""

from __future__ import annotations

import random
from typing import Any

PROMPT_LENGTHS = (1, 127, 128, 129, 300, 1500, 3000)


def _sizes(**sizes: Any) -> dict[str, Any]:
    return sizes


# Each differs from the others in several of: heads, KV heads, index heads, head sizes, blocks, patterns,
# experts and scalars. `seed` is that of the weights, chosen so that no expert choice is within 1e-6 of a tie on the
# prompts below: rounding, which differs between processors, would decide it.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": _sizes(seed=11, head_dim=64, rotary_dim=32, index_dim=64),
    "one_kv_head": _sizes(
        seed=2, layers=4, hidden_size=96, heads=4, kv_heads=1, head_dim=128, rotary_dim=64, index_dim=128,
        topk_blocks=6, local_blocks=2, experts=4, experts_per_token=1, shared_width=64,
    ),
    "more_index_heads": _sizes(
        seed=23, kv_heads=2, index_heads=4, index_dim=48, topk_blocks=3, experts=16, experts_per_token=4,
        vocab_size=640,
    ),
    "fewer_index_heads": _sizes(
        seed=4, hidden_size=80, kv_heads=4, index_heads=1, head_dim=48, rotary_dim=24, topk_blocks=5,
        local_blocks=2, dense_width=96,
    ),
    "patterns_differ": _sizes(
        seed=22, layers=6, sparse=(1, 0, 1, 1, 0, 1), moe=(0, 1, 1, 0, 1, 0), heads=6, kv_heads=3,
        topk_blocks=2, local_blocks=0, shared_width=48, expert_width=80,
    ),
    "full_rotary": _sizes(
        seed=6, layers=4, sparse=(0, 1, 1, 1), moe=(1, 1, 1, 1), hidden_size=128, heads=4, kv_heads=4,
        head_dim=32, rotary_dim=32, topk_blocks=8, experts=6, experts_per_token=3,
        routed_scale=1.5, swiglu_alpha=0.4, swiglu_limit=4.0, norm_eps=1e-4, rope_theta=10000.0,
    ),
}  # fmt: skip


def make_prompt(length: int, *, vocab_size: int, seed: int = 0) -> list[int]:
    """Random token ids. Uniform, so that no two key blocks look alike."""
    source = random.Random(f"{length}/{seed}")
    return [source.randrange(vocab_size) for _ in range(length)]
