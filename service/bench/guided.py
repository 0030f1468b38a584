"""What guided rows cost: time of decode steps in which no row, or every row, is under the mask of a grammar.

Rounds of three kinds take turns in one engine, so that all see the same machine: free rows; rows under a grammar that
any text matches, which sample nearly what the free ones do; and rows under a JSON schema, whose text keeps fewer
experts busy, so that only their masks are compared. One thread runs a rank on CPU, and its CPU time is told beside the
clock's, which depends more on who else uses the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.demo import CHECKPOINT
from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.executor import InlineExecutor
from engine.types import EngineRequest, GuidedSpec, SamplingParams

# An array that no round comes to the end of.
SCHEMA = {
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}
PROMPT_TOKENS = 64


def measure(core: EngineCore, rows: int, tokens: int, rounds: int, temperature: float) -> dict[str, Any]:
    """Percentiles over all decode steps of all rows, by the clock and as CPU time of this thread; masks_ms: the mean
    time of their making, of a step."""
    specs = {
        "free": None,
        "any": GuidedSpec("regex", r"(?s:.){1000,2000}"),
        "json": GuidedSpec("json_schema", json.dumps(SCHEMA)),
    }
    masks: dict[str, float] = dict.fromkeys(specs, 0.0)
    clock: dict[str, list[float]] = {name: [] for name in specs}
    cpu: dict[str, list[float]] = {name: [] for name in specs}
    for number in range(rounds + 1):
        for name, spec in specs.items():
            sampling = SamplingParams(
                max_tokens=tokens,
                temperature=temperature,
                seed=number,
                ignore_eos=spec is None,
                guided=spec,
            )
            for row in range(rows):
                prompt = [(row + i) % 256 + 1 for i in range(PROMPT_TOKENS)]
                core.add_request(EngineRequest(f"{name}-{number}-{row}", prompt, sampling))
            while core.has_work():
                before, started_s, started_cpu_s = core.stats.decode_tokens, time.perf_counter(), time.thread_time()
                mask_s = core.stats.mask_s
                core.step()
                # The first round compiles the grammar and warms the machine up.
                if number and core.stats.decode_tokens - before == rows:
                    clock[name].append(time.perf_counter() - started_s)
                    cpu[name].append(time.thread_time() - started_cpu_s)
                    masks[name] += core.stats.mask_s - mask_s
    answer: dict[str, Any] = {"temperature": temperature, "rows": rows, "steps": len(clock["free"])}
    for what, times in (("step", clock), ("cpu", cpu)):
        for share in (10, 50):
            found = {name: statistics.quantiles(each, n=100)[share - 1] for name, each in times.items()}
            answer[f"{what}_ms_p{share}"] = {name: round(seconds * 1e3, 2) for name, seconds in found.items()}
            answer[f"{what}_overhead_p{share}"] = round(found["any"] / found["free"] - 1, 3)
    answer["masks_ms"] = {name: round(masks[name] / len(clock[name]) * 1e3, 3) for name in ("any", "json")}
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.bench.guided", description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint directory")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rows", type=int, default=16, help="requests that decode together")
    parser.add_argument("--tokens", type=int, default=32, help="of each request and round")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind, after one that is not counted")
    args = parser.parse_args(argv)
    config = EngineConfig.from_kwargs(
        args.model, backend=args.backend, max_num_seqs=args.rows, max_model_len=1024, probe_interval=0, num_threads=1
    )
    core = EngineCore(config, InlineExecutor(config))
    try:
        for temperature in (0.0, 1.0):
            print(json.dumps(measure(core, args.rows, args.tokens, args.rounds, temperature)), flush=True)
    finally:
        core.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
