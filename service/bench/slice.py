"""`m3serve bench slice`: the engine on one rank's share of 12 layers of MiniMax-M3, with random weights.

Also `python -m service.bench.slice`. The engine is built as `engine.LLM` builds it, and driven step by step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.errors import CheckpointError, ConfigError
from service.bench.arguments import add_slice
from service.bench.engine_load import ClosedLoop, Load, SteadyDecode, budget_of, closed_loop, steady_decode
from service.bench.floors import H100, M3_RANK, Kind, RankShape, Rates
from service.bench.gpu_timing import Protocol, measure_rates
from service.bench.report import Row, machine, progress, summary, table, write
from service.bench.slice_engine import SliceEngine, expert_coverage
from service.bench.slice_model import TINY_RANK, group_shape, hf_config
from service.evaluation.arguments import setting

# What long prompts' products reach on an H100; prefill floors assume it whatever the device.
PREFILL_FLOPS = 600e12


def run(
    *,
    shape: RankShape,
    kind: Kind,
    freqs: Sequence[int],
    load: Load,
    settings: dict[str, Any],
    bandwidth: float | None,
    out: str | None,
    ranks: int = 1,
) -> int:
    """Measure an engine per frequency. shape: of each of `ranks` ranks.  kind: the format of weights.  bandwidth:
    bytes/s that floors assume; None: measured, or an H100's."""
    rates = _rates(bandwidth)
    document: dict[str, Any] = {
        "benchmark": "slice",
        "machine": machine(),
        "shape": dataclasses.asdict(shape),
        "tensor_parallel_size": ranks,
        "format": kind,
        "floor_bytes_per_s": rates.bytes_per_s,
        "floor_prefill_flops_per_s": rates.flops_per_s,
        "engines": [],
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="m3serve-slice-") as name:
        (Path(name) / "config.json").write_text(
            json.dumps(hf_config(group_shape(shape, ranks), kind)), encoding="utf-8"
        )
        for freq in freqs:
            engine = SliceEngine(Path(name), shape, kind, load, {**settings, "index_topk_freq": freq}, ranks)
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


def _measure(engine: SliceEngine, freq: int, load: Load, rates: Rates) -> tuple[Row, list[Row]]:
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
    return {
        "freq": freq,
        "plan": info.plan,
        "backend": info.backend,
        "dtype": info.dtype,
        "coverage": coverage,
        "kernels": info.kernels,
    }, rows


def _line(row: Row) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in _flat(row).items())


def _flat(row: Row) -> Row:
    """Without what only the JSON has room for."""
    return {key: value for key, value in row.items() if not isinstance(value, dict)}


def _prefill(engine: SliceEngine, freq: int, tokens: int, repeats: int, rates: Rates) -> Row:
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
    engine: SliceEngine,
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
        "collective_ms": None if found.collective_s is None else found.collective_s * 1e3,
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


def from_args(args: argparse.Namespace) -> int:
    """Run with the flags of `arguments.add_slice`."""
    if args.bandwidth is not None and args.bandwidth <= 0:
        raise ConfigError(f"--bandwidth must be positive, got {args.bandwidth}")
    if not torch.cuda.is_available() and not args.tiny:
        raise ConfigError("bench slice needs a GPU with 80 GB, and torch sees none; --tiny runs a toy size on CPU")

    settings = dict(map(setting, args.set))

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
            budget=budget_of(settings),
        ),
        settings={"backend": args.backend, "dtype": args.dtype, **settings},
        bandwidth=None if args.bandwidth is None else args.bandwidth * 1e12,
        out=args.out,
        ranks=args.tensor_parallel_size,
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
