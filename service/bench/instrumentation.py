"""`m3serve bench metrics`: what the metrics cost per decode step. Also `python -m service.bench.instrumentation`.

An engine decodes a batch; blocks of steps in which the replica's series are updated alternate with blocks in which
they are not. Every part is also timed by itself, since a difference of two medians can drown in a machine's noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from engine.config import PAGE_SIZE, EngineConfig
from engine.engine import CPU_PROBE_INTERVAL, GPU_PROBE_INTERVAL, EngineCore
from engine.executor import InlineExecutor
from engine.metrics import EngineStats
from engine.types import EngineRequest, SamplingParams, StepResult
from service import series_files
from service.bench.arguments import add_metrics
from service.bench.floors import M3_RANK
from service.bench.report import Row, machine, progress, table, write
from service.bench.slice_model import hf_config
from service.series import EngineSeries

BLOCK_STEPS = 16
# Here every so many steps are probed, to see what one costs more; what it costs per step follows from the default.
PROBE_INTERVAL = 32
COUNT_REPEATS = 2000


class _Watched(InlineExecutor):
    """Keeps the last result, to count it once more and take the time."""

    last: StepResult | None = None
    probed: bool = False

    def collect(self) -> StepResult:
        self.last = super().collect()
        self.probed = bool(self.last.rank_times)
        return self.last


def measure(config: EngineConfig, *, batch: int, context_tokens: int, steps: int) -> Row:
    """Medians over `steps` decode steps of either sort, in milliseconds and microseconds."""
    executor = _Watched(config)
    core = EngineCore(config, executor)
    try:
        series = EngineSeries(core.info.model_name, "0", core.info, load_s=0.0)
        _start(core, batch, context_tokens, steps)
        seconds: dict[str, list[float]] = {"off": [], "on": [], "probed": []}
        update_s: list[float] = []
        for index in range(2 * steps):
            is_on = index // BLOCK_STEPS % 2 == 1
            started_s = time.perf_counter()
            core.step()
            if is_on:
                before_s = time.perf_counter()
                series.update(core.stats)
                update_s.append(time.perf_counter() - before_s)
            seconds["probed" if executor.probed else "on" if is_on else "off"].append(time.perf_counter() - started_s)
        assert executor.last is not None
        row = _row(core, seconds, update_s, _count_s(executor.last))
    finally:
        core.close()
    return {"batch": batch, "context_tokens": context_tokens, **row}


def _start(core: EngineCore, batch: int, context_tokens: int, steps: int) -> None:
    """Requests that all decode, and go on for longer than is measured."""
    rng = random.Random(0)
    # Until the last prompt is through, the first one decodes.
    head_start = 4 * batch + batch * context_tokens // 256
    sampling = SamplingParams(max_tokens=2 * steps + head_start, temperature=0.0, ignore_eos=True, seed=0)
    for i in range(batch):
        prompt = [rng.randrange(core.info.vocab_size) for _ in range(context_tokens)]
        core.add_request(EngineRequest(f"r{i}", prompt, sampling))
    while sum(bool(event.token_ids) for event in core.step()) < batch:
        pass


def _count_s(result: StepResult) -> float:
    """Counting one step in EngineStats."""
    stats = EngineStats()
    started_s = time.perf_counter()
    for _ in range(COUNT_REPEATS):
        stats.add_result(result)
    return (time.perf_counter() - started_s) / COUNT_REPEATS


def _row(core: EngineCore, seconds: dict[str, list[float]], update_s: list[float], count_s: float) -> Row:
    off, on = median(seconds["off"]), median(seconds["on"])
    interval = CPU_PROBE_INTERVAL if core.info.backend == "torch" else GPU_PROBE_INTERVAL
    probe_s = max(0.0, median(seconds["probed"]) - off) / interval
    cost_s = mean(update_s) + count_s + probe_s
    return {
        "step ms": off * 1e3,
        "with series ms": on * 1e3,
        "counting us": count_s * 1e6,
        "series us": mean(update_s) * 1e6,
        "series max us": max(update_s) * 1e6,
        "probe us": probe_s * 1e6,
        "probed step ms": median(seconds["probed"]) * 1e3,
        "cost %": 100 * cost_s / off,
    }


@contextlib.contextmanager
def _checkpoint(model: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The directory to load, and the settings that it asks for: without a model, 12 layers of one M3 rank."""
    if model is not None:
        yield model, {}
        return
    with tempfile.TemporaryDirectory(prefix="m3serve-slice-") as name:
        (Path(name) / "config.json").write_text(json.dumps(hf_config(M3_RANK)), encoding="utf-8")
        yield name, {"load_format": "dummy"}


def from_args(args: argparse.Namespace) -> int:
    """Run in a process of its own, whose series go into files like a replica's."""
    with tempfile.TemporaryDirectory(prefix="m3serve-metrics-") as directory:
        environment = os.environ | {series_files.VARIABLE: directory}
        command = [sys.executable, "-m", "service.bench.instrumentation", *_flags(args)]
        return subprocess.run(command, env=environment, check=False).returncode


def _flags(args: argparse.Namespace) -> list[str]:
    flags = ["--batches", ",".join(map(str, args.batches)), "--context-tokens", str(args.context_tokens)]
    flags += ["--steps", str(args.steps), "--index-topk-freq", str(args.index_topk_freq)]
    flags += ["--model", args.model] if args.model else []
    flags += ["--num-threads", str(args.num_threads)] if args.num_threads else []
    return flags + (["--out", args.out] if args.out else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m service.bench.instrumentation`."""
    parser = argparse.ArgumentParser(prog="python -m service.bench.instrumentation", allow_abbrev=False)
    add_metrics(parser)
    args = parser.parse_args(argv)
    if series_files.VARIABLE not in os.environ:
        return from_args(args)
    rows = []
    with _checkpoint(args.model) as (model, settings):
        for batch in args.batches:
            length = args.context_tokens + 2 * args.steps + 8 * batch + batch * args.context_tokens // 256
            config = EngineConfig.from_kwargs(
                model,
                max_model_len=length,
                max_num_seqs=batch,
                num_pages=batch * -(-length // PAGE_SIZE) + 1,
                enable_prefix_caching=False,
                probe_interval=PROBE_INTERVAL,
                index_topk_freq=args.index_topk_freq,
                num_threads=args.num_threads,
                **settings,
            )
            rows.append(measure(config, batch=batch, context_tokens=args.context_tokens, steps=args.steps))
            progress(f"batch {batch}: {rows[-1]['cost %']:.2f} % of a step of {rows[-1]['step ms']:.2f} ms")
    progress(f"\n{table(rows)}")
    write({"benchmark": "metrics", "machine": machine(), "rows": rows}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
