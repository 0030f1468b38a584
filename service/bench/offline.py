"""The engine alone: prefill speed by prompt length, decode speed by batch size."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import engine
from engine.config import PAGE_SIZE
from engine.types import SamplingParams
from service.bench.report import Row, machine, progress, table, write


def run(
    model: str,
    *,
    prefill_tokens: Sequence[int],
    decode_batches: Sequence[int],
    context_tokens: int,
    decode_steps: int,
    repeats: int,
    settings: dict[str, Any],
    out: str | None,
) -> int:
    """Run every case on one engine; prompts are random token ids, decoding is greedy."""
    started = time.perf_counter()

    def pages(tokens: int) -> int:
        return -(-tokens // PAGE_SIZE)

    needed = max([*prefill_tokens, context_tokens + decode_steps + 1]) + 1
    running = max(decode_batches, default=1)
    defaults = {
        "max_model_len": needed,
        # No more than the cases fill, so that the peak memory says what they need.
        "num_pages": max(pages(needed), running * pages(context_tokens + decode_steps + 1)),
        "max_num_seqs": running,
        # A repeated prompt would be found instead of computed.
        "enable_prefix_caching": False,
    }
    llm = engine.LLM(model, **{**defaults, **settings})
    progress(f"loaded {llm.info.model_name} in {time.perf_counter() - started:.1f} s, plan {llm.info.plan}")
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(llm.info.vocab_size) for _ in range(length)]

    llm.generate([prompt(min(256, needed - 2))], _greedy(2))
    rows = [_prefill(llm, prompt, length, repeats) for length in prefill_tokens]
    rows += [_decode(llm, prompt, batch, context_tokens, decode_steps) for batch in decode_batches]
    document: dict[str, Any] = {
        "benchmark": "offline",
        "machine": machine(),
        "model": llm.info.model_name,
        "plan": llm.info.plan,
        "dtype": llm.info.dtype,
        "backend": llm.info.backend,
        "kernels": llm.info.kernels,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rows": rows,
    }
    llm.close()
    progress(f"peak memory {document['peak_memory_bytes'] / 1e9:.2f} GB\n{table(rows)}")
    write(document, out)
    return 0


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def _prefill(llm: Any, prompt: Any, length: int, repeats: int) -> Row:
    seconds = []
    for _ in range(repeats):
        tokens = prompt(length)
        started = time.perf_counter()
        llm.generate([tokens], _greedy(1))
        seconds.append(time.perf_counter() - started)
        progress(f"prefill {length}: {length / seconds[-1]:.0f} tok/s")
    return _row("prefill", 1, length, length / median(seconds), median(seconds) * 1e3, None)


def _decode(llm: Any, prompt: Any, batch: int, context: int, steps: int) -> Row:
    """Steps that hold exactly one token of every request, as the engine itself timed them."""
    llm.stats.drain()
    before = (llm.stats.forward_s, llm.stats.steps_s)
    llm.generate([prompt(context) for _ in range(batch)], _greedy(steps + 1))
    seen = llm.stats.drain()
    seconds = [
        step_s
        for step_s, tokens, size in zip(seen.step_s, seen.step_tokens, seen.batch_size, strict=True)
        if tokens == size == batch
    ]
    forward_s, steps_s = llm.stats.forward_s - before[0], llm.stats.steps_s - before[1]
    progress(f"decode {batch} x {context}: {batch / median(seconds):.1f} tok/s")
    return _row("decode", batch, context, batch / median(seconds), median(seconds) * 1e3, 1 - forward_s / steps_s)


def _row(case: str, batch: int, tokens: int, rate: float, step_ms: float, outside: float | None) -> Row:
    """outside: share of the steps' time that was not spent in the model's forward pass and sampling."""
    return {
        "case": case,
        "batch": batch,
        "context_tokens": tokens,
        "tokens_per_s": rate,
        "median_ms": step_ms,
        "outside_forward": outside,
    }
