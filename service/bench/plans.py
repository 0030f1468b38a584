"""`m3serve bench plans`: speed of one checkpoint by index plan. Also `python -m service.bench.plans`.

What sharing does to the output is `m3serve eval`'s to say; this says what it saves.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.errors import CheckpointError, ConfigError
from engine.executor import InlineExecutor
from service.bench.arguments import add_plans
from service.bench.engine_load import PROBE_INTERVAL, Load, budget_of, closed_loop, steady_decode
from service.bench.report import Row, machine, progress, table, write
from service.evaluation.arguments import setting
from service.evaluation.plans import plan_specs, resolve, with_plan


def run(model: Path, specs: Sequence[str], load: Load, settings: dict[str, Any], out: str | None) -> int:
    """Measure an engine per plan, the first again at the end: how far the two differ is what the machine's noise
    does.  specs: see `service.evaluation.plans.plan_settings`."""
    settings = load.engine_settings() | settings
    resolve(model, settings, list(specs))
    document: dict[str, Any] = {"benchmark": "plans", "machine": machine(), "settings": settings, "rows": []}
    for spec in [*specs, specs[0]] if len(specs) > 1 else specs:
        config = EngineConfig.from_kwargs(model, **with_plan(settings, spec))
        core = EngineCore(config, InlineExecutor(config))
        try:
            info = core.info
            document |= {"model": info.model_name, "backend": info.backend, "dtype": info.dtype}
            progress(f"{info.plan}: {info.backend}, {info.dtype}")
            document["rows"] += _measure(core, load)
        finally:
            core.close()
            del core
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    add_gains(document["rows"])
    for case in ("prefill", "decode"):
        if shown := [row for row in document["rows"] if row["case"] == case]:
            progress(f"\n{table(shown)}")
    write(document, out)
    return 0


def _measure(core: EngineCore, load: Load) -> list[Row]:
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(core.info.vocab_size) for _ in range(length)]

    # Kernels compile, buffers grow.
    closed_loop(core, [prompt(min(300, core.info.max_model_len - 4))], concurrency=1, output_tokens=4)
    rows = []
    for tokens in load.prefill_tokens:
        closed_loop(core, [prompt(tokens)], concurrency=1, output_tokens=1)
        rows.append(_prefill(core, prompt, tokens, load.repeats))
    for batch, context in itertools.product(load.concurrency, load.context_tokens):
        prompts = [prompt(context) for _ in range(batch)]
        found = steady_decode(core, prompts, load.decode_steps, load.max_tokens(batch, context))
        step_s = median(found.intervals_s)
        # None where no step was probed: too few steps.
        share = sum(found.indexer_s.values()) / step_s if found.indexer_s else None
        rows.append(_row(core, "decode", batch, context, batch / step_s, step_s, share))
    return rows


def _prefill(core: EngineCore, prompt: Any, tokens: int, repeats: int) -> Row:
    """Time to the first token of one prompt on an idle engine, and the indexer's share of probed steps: prompts are
    run until one has been probed."""
    seconds: list[float] = []
    before = _probed_prefill(core)
    while len(seconds) < repeats or (_probed_prefill(core)[1] == before[1] and len(seconds) < 2 * PROBE_INTERVAL):
        ran = closed_loop(core, [prompt(tokens)], concurrency=1, output_tokens=1)
        seconds.append(ran.streams[0].ttft_s)
    indexer_s, forward_s = (late - early for late, early in zip(_probed_prefill(core), before, strict=True))
    prefill_s = median(seconds)
    return _row(core, "prefill", 1, tokens, tokens / prefill_s, prefill_s, indexer_s / forward_s if forward_s else None)


def _probed_prefill(core: EngineCore) -> tuple[float, float]:
    """(the indexers' seconds on prompts, seconds of whole steps), both of probed steps so far."""
    indexer_s = sum(seconds for (_, phase), seconds in core.stats.indexer_s.items() if phase == "prefill")
    rank = core.stats.ranks.get(0)
    return indexer_s, 0.0 if rank is None else rank.forward_s


def _row(core: EngineCore, case: str, batch: int, tokens: int, rate: float, seconds: float, share: float | None) -> Row:
    row = {
        "case": case,
        "plan": core.info.plan,
        "batch": batch,
        "context_tokens": tokens,
        "tokens_per_s": rate,
        "median_ms": seconds * 1e3,
        "indexer_share": share,
    }
    progress("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    return row


def add_gains(rows: Sequence[Row]) -> None:
    """Each row's rate over that of the first plan in the same case."""
    first: dict[tuple[str, int, int], float] = {}
    for row in rows:
        key = (row["case"], row["batch"], row["context_tokens"])
        row["against_first"] = row["tokens_per_s"] / first.setdefault(key, row["tokens_per_s"])


def from_args(args: argparse.Namespace) -> int:
    """Run with the flags of `arguments.add_plans`."""
    settings = dict(map(setting, args.set))
    return run(
        Path(args.model),
        plan_specs(args.compare),
        Load(
            prefill_tokens=args.prefill_tokens,
            concurrency=args.decode_batches,
            context_tokens=[args.context_tokens],
            decode_steps=args.decode_steps,
            repeats=args.repeats,
            budget=budget_of(settings),
        ),
        settings,
        args.out,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m service.bench.plans`."""
    parser = argparse.ArgumentParser(prog="python -m service.bench.plans", allow_abbrev=False)
    add_plans(parser)
    args = parser.parse_args(argv)
    if args.model is None:
        parser.error("--model DIR is needed")
    try:
        return from_args(args)
    except (ConfigError, CheckpointError) as error:
        print(f"m3serve: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
