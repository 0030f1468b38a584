"""`m3serve bench slice`: the engine on one rank's share of 12 layers of MiniMax-M3, with random weights.

Also `python -m service.bench.slice`. The engine is built as `engine.LLM` builds it, and driven step by step.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from engine.config import PAGE_SIZE, EngineConfig
from engine.engine import EngineCore
from engine.errors import CheckpointError, ConfigError
from engine.executor import InlineExecutor
from engine.model.minimax_m3 import MiniMaxM3
from engine.model.moe import MoE
from service.bench import floors
from service.bench.arguments import add_slice
from service.bench.engine_load import ClosedLoop, SteadyDecode, closed_loop, steady_decode, steps_of_prefill
from service.bench.floors import H100, M3_RANK, Kind, RankShape, Rates
from service.bench.gpu_timing import Protocol, measure_rates
from service.bench.report import Row, machine, progress, summary, table, write
from service.bench.slice_model import TINY_RANK, SliceFloors, hf_config

BUDGET = 8192
# What long prompts' products reach on an H100; prefill floors assume it whatever the device.
PREFILL_FLOPS = 600e12
_COVERAGE_DRAWS = 16
PROBE_INTERVAL = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What is tried on each engine. requests_per_stream: of a closed loop per decode
    case; 0: none."""

    prefill_tokens: list[int]
    concurrency: list[int]
    context_tokens: list[int]
    decode_steps: int
    repeats: int
    requests_per_stream: int

    def max_tokens(self, rows: int, context: int) -> int:
        """Enough for the first request to live until all `rows` have decoded together."""
        return steps_of_prefill([context] * rows, BUDGET) + self.decode_steps + 1

    def engine_settings(self) -> dict[str, Any]:
        """The sizes that every case fits in."""
        cases = [(rows, context) for rows in self.concurrency for context in self.context_tokens]
        lengths = [(rows, context + self.max_tokens(rows, context)) for rows, context in cases]
        lengths += [(1, tokens + 1) for tokens in self.prefill_tokens]
        return {
            "max_model_len": max(length for _, length in lengths),
            "max_num_seqs": max(rows for rows, _ in lengths),
            "max_num_batched_tokens": BUDGET,
            "num_pages": max(rows * -(-length // PAGE_SIZE) for rows, length in lengths) + 1,
            # A repeated prompt would be found instead of computed.
            "enable_prefix_caching": False,
            # Often enough for every case to be probed, too rarely to move a median.
            "probe_interval": PROBE_INTERVAL,
        }


class _Executor(InlineExecutor):
    """Lets the benchmark look at the model that it measures."""

    @property
    def model(self) -> MiniMaxM3:
        assert self._runner is not None, "the executor is closed"
        return self._runner.model


class _Engine:
    """One engine on the slice, and prompts for it."""

    def __init__(self, directory: Path, shape: RankShape, kind: Kind, load: Load, settings: dict[str, Any]) -> None:
        merged = {"load_format": "dummy", **load.engine_settings(), **settings}
        self.config = EngineConfig.from_kwargs(directory, **merged)
        self.executor = _Executor(self.config)
        self.core = EngineCore(self.config, self.executor)
        info = self.core.info
        element = getattr(torch, info.dtype).itemsize
        kv, index = (
            floors.FP8 if merged.get(name) == "fp8" else element for name in ("kv_cache_dtype", "index_cache_dtype")
        )
        self.floors = SliceFloors(shape, info.plan, element, kv, index, kind)
        self.shape = shape
        self._rng = random.Random(0)

    def prompt(self, length: int) -> list[int]:
        return [self._rng.randrange(self.shape.vocab) for _ in range(length)]

    def close(self) -> None:
        self.core.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run(
    *,
    shape: RankShape,
    kind: Kind,
    freqs: Sequence[int],
    load: Load,
    settings: dict[str, Any],
    bandwidth: float | None,
    out: str | None,
) -> int:
    """Measure an engine per frequency. kind: the format of weights.  bandwidth: bytes/s that floors assume; None:
    measured, or an H100's."""
    rates = _rates(bandwidth)
    document: dict[str, Any] = {
        "benchmark": "slice",
        "machine": machine(),
        "shape": dataclasses.asdict(shape),
        "format": kind,
        "floor_bytes_per_s": rates.bytes_per_s,
        "floor_prefill_flops_per_s": rates.flops_per_s,
        "engines": [],
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="m3serve-slice-") as name:
        (Path(name) / "config.json").write_text(json.dumps(hf_config(shape, kind)), encoding="utf-8")
        for freq in freqs:
            engine = _Engine(Path(name), shape, kind, load, {**settings, "index_topk_freq": freq})
            try:
                info, rows = _measure(engine, freq, load, rates)
            finally:
                engine.close()
            document["engines"].append(info)
            document["rows"] += rows
    document["gains"] = gains(document["rows"])
    for case in ("prefill", "decode", "closed loop"):
        if shown := [row for row in document["rows"] if row["case"] == case]:
            progress(f"\n{table([_flat(row) for row in shown])}")
    if document["gains"]:
        progress(f"\n{table(document['gains'])}")
    write(document, out)
    return 0


def _rates(bandwidth: float | None) -> Rates:
    if bandwidth is not None:
        return Rates(bandwidth, PREFILL_FLOPS)
    measured = measure_rates(Protocol()) if torch.cuda.is_available() else H100
    return Rates(measured.bytes_per_s, PREFILL_FLOPS)


def _measure(engine: _Engine, freq: int, load: Load, rates: Rates) -> tuple[Row, list[Row]]:
    info = engine.core.info
    weights = f"{info.dtype}, {engine.floors.kind} weights, {info.weight_bytes / 1e9:.1f} GB"
    progress(f"freq {freq}: {info.backend}, {weights}, plan {info.plan}, {info.num_pages} pages")
    if load.concurrency and load.context_tokens:  # kernels compile, buffers grow
        warm, length = min(2, max(load.concurrency)), min(300, min(load.context_tokens))
        prompts = [engine.prompt(length) for _ in range(warm)]
        steady_decode(engine.core, prompts, min(3, load.decode_steps), load.max_tokens(warm, length))
    coverage = expert_coverage(engine, load.concurrency)
    rows = [_prefill(engine, freq, tokens, load.repeats, rates) for tokens in load.prefill_tokens]
    for context in load.context_tokens:
        for concurrency in load.concurrency:
            prompts = [engine.prompt(context) for _ in range(concurrency)]
            max_tokens = load.max_tokens(concurrency, context)
            found = steady_decode(engine.core, prompts, load.decode_steps, max_tokens)
            rows.append(_decode_row(engine, freq, concurrency, context, found, coverage, rates))
            progress(_line(rows[-1]))
            if load.requests_per_stream:
                prompts = [engine.prompt(context) for _ in range(load.requests_per_stream * concurrency)]
                ran = closed_loop(engine.core, prompts, concurrency=concurrency, output_tokens=load.decode_steps)
                rows.append(_loop_row(freq, concurrency, context, ran))
                progress(_line(rows[-1]))
    return {"freq": freq, "plan": info.plan, "backend": info.backend, "dtype": info.dtype, "coverage": coverage}, rows


def _line(row: Row) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in _flat(row).items())


def _flat(row: Row) -> Row:
    """Without what only the JSON has room for."""
    return {key: value for key, value in row.items() if not isinstance(value, dict)}


def _prefill(engine: _Engine, freq: int, tokens: int, repeats: int, rates: Rates) -> Row:
    """Time to the first token of one prompt on an idle engine; the first run does not count."""
    seconds = []
    for _ in range(repeats + 1):
        found = closed_loop(engine.core, [engine.prompt(tokens)], concurrency=1, output_tokens=1)
        seconds.append(found.streams[0].ttft_s)
    prefill_s = median(seconds[1:])
    floor_ms = engine.floors.prefill(tokens).us(rates) * 1e-3
    row = {
        "case": "prefill",
        "freq": freq,
        "tokens": tokens,
        "ttft_ms": prefill_s * 1e3,
        "floor_ms": floor_ms,
        "ratio": prefill_s * 1e3 / floor_ms,
        "tok_per_s": tokens / prefill_s,
    }
    progress(_line(row))
    return row


def _decode_row(
    engine: _Engine,
    freq: int,
    concurrency: int,
    context: int,
    found: SteadyDecode,
    coverage: dict[int, float],
    rates: Rates,
) -> Row:
    """TPOT of the steady state; the indexer's share of it, all selecting layers together."""
    tpot_s = median(found.intervals_s)
    floor_ms = engine.floors.decode(concurrency, context, coverage[concurrency]).us(rates) * 1e-3
    # None where no step was probed: too few steps.
    indexer_s = sum(found.indexer_s.values()) if found.indexer_s else None
    attention_s = sum(found.attention_s.values()) if found.attention_s else None
    return {
        "case": "decode",
        "freq": freq,
        "concurrency": concurrency,
        "context": context,
        "tpot_ms": tpot_s * 1e3,
        "tpot_p95_ms": summary(found.intervals_s)["p95"] * 1e3,
        "floor_ms": floor_ms,
        "ratio": tpot_s * 1e3 / floor_ms,
        "tok_per_s": concurrency / tpot_s,
        "ttft_ms": median(stream.ttft_s for stream in found.streams) * 1e3,
        "indexer_ms": None if indexer_s is None else indexer_s * 1e3,
        "sparse_attention_ms": None if attention_s is None else attention_s * 1e3,
        "indexer_share": None if indexer_s is None else indexer_s / tpot_s,
        "experts_hit": coverage[concurrency],
        "steps": found.steps,
        "preemptions": found.preemptions,
        "indexer_ms_per_layer": {str(layer): seconds * 1e3 for layer, seconds in found.indexer_s.items()},
    }


def _loop_row(freq: int, concurrency: int, context: int, found: ClosedLoop) -> Row:
    """Prompts of new requests run among the decode steps of the others."""
    tokens = sum(len(stream.times_s) for stream in found.streams)
    return {
        "case": "closed loop",
        "freq": freq,
        "concurrency": concurrency,
        "context": context,
        "requests": len(found.streams),
        "tpot_ms": median(stream.tpot_s for stream in found.streams) * 1e3,
        "ttft_ms": median(stream.ttft_s for stream in found.streams) * 1e3,
        "output_tok_per_s": tokens / found.wall_s,
        "steps": found.steps,
        "preemptions": found.preemptions,
    }


def gains(rows: Sequence[Row]) -> list[Row]:
    """What sharing selections saves: the share of the step that freq 1 spends in the indexers which another frequency
    leaves out, beside the difference of the two measured TPOTs."""
    decode = {(row["freq"], row["concurrency"], row["context"]): row for row in rows if row["case"] == "decode"}
    found = []
    for (freq, concurrency, context), row in decode.items():
        base = decode.get((1, concurrency, context))
        if freq == 1 or base is None:
            continue
        share, layers, left = base["indexer_share"], len(base["indexer_ms_per_layer"]), len(row["indexer_ms_per_layer"])
        found.append(
            {
                "freq": freq,
                "concurrency": concurrency,
                "context": context,
                "indexer_share": share,
                "predicted_gain": None if share is None or not left else share * (1 - left / layers),
                "measured_gain": 1 - row["tpot_ms"] / base["tpot_ms"],
            }
        )
    return found


@contextmanager
def _watch_routes(model: MiniMaxM3, seen: dict[int, Tensor]) -> Iterator[None]:
    """`seen` gets, by layer, the expert ids of the step that runs last; steps in captured graphs are not seen."""
    experts = {i: layer.feed_forward for i, layer in enumerate(model.layers) if isinstance(layer.feed_forward, MoE)}
    kernels = {i: moe.kernels for i, moe in experts.items()}

    def watched(layer_id: int) -> Any:
        def route(*args: Any) -> tuple[Tensor, Tensor]:
            weights, ids = kernels[layer_id].route(*args)
            seen[layer_id] = ids.clone()
            return weights, ids

        return route

    for layer_id, moe in experts.items():
        moe.kernels = dataclasses.replace(kernels[layer_id], route=watched(layer_id))
    try:
        yield
    finally:
        for layer_id, moe in experts.items():
            moe.kernels = kernels[layer_id]


def expert_coverage(engine: _Engine, concurrency: Sequence[int]) -> dict[int, float]:
    """Distinct routed experts that so many tokens hit in a layer, on average: random weights must not route alike, or
    a step would read too few of them. Taken from tokens of one prompt, as a stand-in for a decode step's rows."""
    if not concurrency:
        return {}
    seen: dict[int, Tensor] = {}
    length = min(engine.core.info.max_model_len - 1, max(256, 4 * max(concurrency)), BUDGET)
    with _watch_routes(engine.executor.model, seen):
        closed_loop(engine.core, [engine.prompt(length)], concurrency=1, output_tokens=1)
    num_experts = engine.shape.experts
    generator = torch.Generator().manual_seed(0)
    found = {}
    for rows in concurrency:
        distinct = []
        for ids in (ids.cpu() for ids in seen.values()):
            for _ in range(_COVERAGE_DRAWS):
                picked = ids[torch.randperm(len(ids), generator=generator)[:rows]]
                distinct.append(len(picked[picked < num_experts].unique()))
        found[rows] = mean(distinct)
        uniform = floors.expected_experts(num_experts, engine.shape.experts_per_token, rows)
        progress(f"{rows} tokens hit {found[rows]:.1f} of {num_experts} experts in a layer; uniform: {uniform:.1f}")
    return found


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE settings of the engine; values are JSON, or text where they are not."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {pair!r} must be NAME=VALUE")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def from_args(args: argparse.Namespace) -> int:
    """Run with the flags of `arguments.add_slice`."""
    if args.bandwidth is not None and args.bandwidth <= 0:
        raise ConfigError(f"--bandwidth must be positive, got {args.bandwidth}")
    if not torch.cuda.is_available() and not args.tiny:
        raise ConfigError("bench slice needs a GPU with 80 GB, and torch sees none; --tiny runs a toy size on CPU")

    def given(value: Any, full: Any, tiny: Any) -> Any:
        return value if value is not None else tiny if args.tiny else full

    return run(
        shape=TINY_RANK if args.tiny else M3_RANK,
        kind=args.format,
        freqs=args.freqs,
        load=Load(
            prefill_tokens=given(args.prefill_tokens, [8192], [512]),
            concurrency=given(args.concurrency, [1, 16, 64], [1, 4]),
            context_tokens=given(args.context_tokens, [8192, 32768], [300, 600]),
            decode_steps=given(args.decode_steps, 128, 8),
            repeats=args.repeats,
            requests_per_stream=args.requests_per_stream or 0,
        ),
        settings={"backend": args.backend, "dtype": args.dtype, **settings_of(args.set)},
        bandwidth=None if args.bandwidth is None else args.bandwidth * 1e12,
        out=args.out,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m service.bench.slice`."""
    parser = argparse.ArgumentParser(prog="python -m service.bench.slice", allow_abbrev=False)
    add_slice(parser)
    try:
        return from_args(parser.parse_args(argv))
    except (ConfigError, CheckpointError) as error:
        print(f"m3serve: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
