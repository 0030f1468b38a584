"""`m3serve bench kernels`: every GPU operation at the shapes of one rank of MiniMax-M3, beside its floor.

Also `python -m service.bench.kernels`, which needs torch, Triton and NumPy alone.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from engine.errors import ConfigError
from engine.kernels.api import resolve
from service.bench.arguments import add_kernels
from service.bench.floors import H100, M3_RANK, Floor, Rates
from service.bench.gpu_timing import Measured, Protocol, cache_bytes, measure, measure_rates
from service.bench.kernel_cases import Calls, Case, all_cases
from service.bench.kernel_inputs import Bench
from service.bench.report import Row, machine, progress, table, write

_QUICK = Protocol(warmups=1, replays=5)
# vLLM 0.33 kernels, measured on one H100 SXM, CUDA-graph replay medians, microseconds: bf16, block tables randomly
# permuted, random q and k. Its indexer is score + top-k.
VLLM_US = {
    "indexer decode 1 x 8k": 8.1,
    "indexer decode 16 x 8k": 15.4,
    "indexer decode 64 x 8k": 52.3,
    "indexer decode 1 x 32k": 9.3,
    "indexer decode 16 x 32k": 52.6,
    "indexer decode 64 x 32k": 184.0,
    "indexer decode 1 x 128k": 13.6,
    "indexer decode 16 x 128k": 183.0,
    "sparse decode 1 x 8k": 5.4,
    "sparse decode 16 x 8k": 9.0,
    "sparse decode 64 x 8k": 31.9,
    "sparse decode 1 x 32k": 5.5,
    "sparse decode 16 x 32k": 8.9,
    "sparse decode 64 x 32k": 31.4,
    "sparse decode 1 x 128k": 5.4,
    "sparse decode 16 x 128k": 8.9,
    "indexer prefill 2048 @ 8k": 88.0 + 8.0,
    "indexer prefill 8192 @ 8k": 91.0 + 17.0,
    "indexer prefill 8192 @ 32k": 345.0 + 56.0,
    "indexer prefill 8192 @ 128k": 1367.0 + 213.0,
    "sparse prefill 2048 @ 8k random": 301.0,
    "sparse prefill 8192 @ 8k random": 1039.0,
    "sparse prefill 8192 @ 32k random": 1238.0,
    "sparse prefill 8192 @ 128k random": 1326.0,
    "sparse prefill 2048 @ 8k correlated": 295.0,
    "sparse prefill 8192 @ 8k correlated": 1018.0,
    "sparse prefill 8192 @ 32k correlated": 1173.0,
    "sparse prefill 8192 @ 128k correlated": 1189.0,
}


def run(*, filters: Sequence[str], out: str | None, quick: bool, dry_run: bool, max_len: int) -> int:
    """Measure, or with `dry_run` only list, the cases whose name has all words of one of `filters`; no filter: all."""
    cases = select(all_cases(M3_RANK), filters)
    if dry_run:
        rows = [_row(case.name, None, case.floor, H100) for case in cases]
        _report(rows, {"benchmark": "kernels", "rates": _rates(H100, "assumed: one H100")}, out)
        return 0
    if not torch.cuda.is_available():
        raise ConfigError("bench kernels needs a CUDA or ROCm device, and torch sees none; --dry-run lists the floors")
    kernels = resolve("triton")
    protocol = _QUICK if quick else Protocol()
    rates = measure_rates(protocol)
    progress(f"{rates.bytes_per_s / 1e12:.2f} TB/s copied, {rates.flops_per_s / 1e12:.0f} TFLOP/s in bf16 GEMM")
    bench = Bench(kernels, M3_RANK, torch.bfloat16, cold_bytes=2.0 * cache_bytes(), max_len=max_len)
    rows = measure_cases(cases, bench, rates, protocol)
    head: dict[str, Any] = {"benchmark": "kernels", "machine": machine() | device(), "max_len": max_len}
    _report(rows, head | {"rates": _rates(rates, "measured")}, out)
    return 1 if any("error" in row for row in rows) else 0


def select(cases: Sequence[Case], filters: Sequence[str]) -> list[Case]:
    """Cases whose name has all words of one of `filters`. ConfigError when a filter matches none."""
    if not filters:
        return list(cases)

    for text in filters:
        if not any(_matches(case, text) for case in cases):
            raise ConfigError(f"--filter {text!r} matches no case; there are: {', '.join(operations(cases))}")
    return [case for case in cases if any(_matches(case, text) for text in filters)]


def _matches(case: Case, text: str) -> bool:
    """Numbers must be whole words: 8k is not 128k."""
    words = case.name.split()
    return all(word in words if any(map(str.isdigit, word)) else word in case.name for word in text.lower().split())


def operations(cases: Sequence[Case]) -> list[str]:
    """The names of the operations: what stands before the first number."""
    names = (" ".join(takewhile(lambda word: not word[0].isdigit(), case.name.split())) for case in cases)
    return list(dict.fromkeys(names))


def measure_cases(cases: Sequence[Case], bench: Bench, rates: Rates, protocol: Protocol) -> list[Row]:
    """One row per case. A case that fails says so in its row and the others go on, unless the device is lost."""
    rows: list[Row] = []
    with torch.inference_mode():
        for case in cases:
            try:
                row = _measure(case, bench, rates, protocol)
            except Exception as error:
                row = _row(case.name, None, case.floor, rates)
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            rows.append(row)
            progress("  ".join(f"{key} {_short(value)}" for key, value in row.items() if value is not None))
            gc.collect()
            if bench.device.type != "cpu" and not _device_lives():
                progress("the device is lost: no further case can run")
                break
    return rows


def _measure(case: Case, bench: Bench, rates: Rates, protocol: Protocol) -> Row:
    calls = case.prepare(bench)
    if not calls.count:
        return _row(case.name, None, case.floor, rates) | {"note": calls.note}
    measured = measure(calls.run, calls.count, bench.device, protocol)
    row = _row(case.name, measured, calls.floor or case.floor, rates)
    row |= _baseline(case, calls, bench, protocol)
    if measured.method == "graph" and calls.count >= bench.min_calls:
        # The same inputs in every call: what the caches hold of them is not read again.
        row["hot_us"] = measure(lambda call: calls.run(0), bench.min_calls, bench.device, protocol).us
    row |= {"calls": calls.count, "method": measured.method}
    return row | ({"note": calls.note} if calls.note else {})


def _baseline(case: Case, calls: Calls, bench: Bench, protocol: Protocol) -> Row:
    if calls.baseline is None:
        return {}
    return {
        "baseline_us": measure(calls.baseline, calls.count, bench.device, protocol).us,
        "baseline": "F.linear",
    }


def _row(name: str, measured: Measured | None, floor: Floor, rates: Rates) -> Row:
    floor_us = floor.us(rates)
    known = VLLM_US.get(name)
    return {
        "case": name,
        "time_us": measured.us if measured else None,
        "floor_us": floor_us,
        "floor": floor.kind(rates),
        "ratio": measured.us / floor_us if measured else None,
        "baseline_us": known,
        "baseline": "vLLM 0.33" if known else None,
    }


def _device_lives() -> bool:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def device() -> dict[str, Any]:
    """The GPU and the libraries that decide its speed."""
    triton = sys.modules.get("triton")
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
    }


def _rates(rates: Rates, source: str) -> dict[str, Any]:
    return {"bytes_per_s": rates.bytes_per_s, "flops_per_s": rates.flops_per_s, "source": source}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _report(rows: list[Row], head: dict[str, Any], out: str | None) -> None:
    columns = ("case", "time_us", "hot_us", "floor_us", "floor", "ratio", "baseline_us", "baseline")
    shown = [{key: "-" if row.get(key) is None else row[key] for key in columns} for row in rows]
    progress(f"\n{table(shown)}")
    write(head | {"rows": rows}, out)


def from_args(args: argparse.Namespace) -> int:
    """Run with the flags of `arguments.add_kernels`."""
    return run(filters=args.filter, out=args.out, quick=args.quick, dry_run=args.dry_run, max_len=args.max_len)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m service.bench.kernels`."""
    parser = argparse.ArgumentParser(prog="python -m service.bench.kernels", allow_abbrev=False)
    add_kernels(parser)
    try:
        return from_args(parser.parse_args(argv))
    except ConfigError as error:
        print(f"m3serve: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
