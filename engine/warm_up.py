"""Compiles the kernels of prefill before the first request comes.

Some kernels exist once per power of two of the context; compiling one takes a second or two, which no request should
wait for. Capturing the decode graphs compiles those of decode.
"""

from __future__ import annotations

import logging
import time

import torch

from engine.config import PAGE_SIZE
from engine.kernels.batch import Segment, StepBatch
from engine.model.minimax_m3 import MiniMaxM3

log = logging.getLogger(__name__)

# A chunk with few tokens per expert and few tiles of attention, whose keys are then split as finely as any.
_SHORT_CHUNK = 128


def warm_up_chunks(max_num_tokens: int, max_model_len: int) -> list[tuple[int, int]]:
    """(tokens before, tokens) of the chunks: a full one, and short ones at the end of ever longer contexts."""
    full = min(max_num_tokens, max_model_len)
    short = min(_SHORT_CHUNK, full)
    chunks = [(0, full)]
    seq_len = 2 * PAGE_SIZE
    while seq_len < max_model_len:
        seq_len = min(2 * seq_len, max_model_len)
        chunks.append((seq_len - min(short, seq_len), min(short, seq_len)))
    return chunks


def warm_up(model: MiniMaxM3, max_num_tokens: int, max_model_len: int) -> None:
    """Run prompts that write no keys."""
    started = time.perf_counter()
    for num_computed, num_tokens in warm_up_chunks(max_num_tokens, max_model_len):
        _prefill(model, num_computed, num_tokens, max_model_len)
    torch.cuda.synchronize()
    log.info("compiled the kernels of prefill in %.1f s", time.perf_counter() - started)


def _prefill(model: MiniMaxM3, num_computed: int, num_tokens: int, max_model_len: int) -> None:
    """One row of `num_tokens` tokens behind `num_computed`, all of whose pages are page 0."""
    device = model.kernels.device
    seq_len = num_computed + num_tokens
    positions = torch.arange(num_computed, seq_len, device=device)
    batch = StepBatch(
        positions=positions,
        slot_mapping=torch.full_like(positions, -1),
        row_ids=torch.zeros_like(positions),
        block_table=torch.zeros(1, -(-max_model_len // PAGE_SIZE), dtype=torch.int32, device=device),
        seq_lens=torch.tensor([seq_len], dtype=torch.int32, device=device),
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        query_starts=[0, num_tokens],
        seq_lens_host=[seq_len],
        segments=(Segment("prefill", 0, 1, 0, num_tokens),),
    )
    model.logits(model.forward(torch.zeros_like(positions), batch)[-1:])
    model.index_cache.take_counts()
