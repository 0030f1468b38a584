"""From what the clients saw to latencies, throughput and goodput."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from service.bench.report import Row
from service.bench.serving.client import Outcome, failures_by_kind


def percentiles(values: Sequence[float], shares: Sequence[float]) -> dict[str, float | None]:
    """mean, and p50 for 50 of `shares`: interpolated between the two values around it; None of no values."""
    ordered = sorted(values)
    found: dict[str, float | None] = {"mean": fmean(ordered) if ordered else None}
    for share in shares:
        found[f"p{share:g}"] = _interpolate(ordered, share) if ordered else None
    return found


def _interpolate(ordered: Sequence[float], share: float) -> float:
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def meets(outcome: Outcome, goals_ms: dict[str, float]) -> bool:
    """Whether a request that succeeded was as fast as asked for. A single token has no time per token to miss."""
    tpot_s = outcome.tpot_s
    seen_s = {"ttft": outcome.ttft_s, "tpot": 0.0 if tpot_s is None else tpot_s, "e2el": outcome.e2e_s}
    return all(seen_s[name] * 1e3 <= limit_ms for name, limit_ms in goals_ms.items())


def summarise(
    outcomes: Sequence[Outcome], wall_s: float, *, shares: Sequence[float], goals_ms: dict[str, float]
) -> dict[str, Any]:
    """Latencies in ms of the requests that succeeded; rates per second of the whole run."""
    good = [outcome for outcome in outcomes if outcome.failure is None]
    tokens, prompt_tokens = sum(o.output_tokens for o in good), sum(o.prompt_tokens for o in good)
    values_s = {
        "ttft_ms": [o.ttft_s for o in good],
        "tpot_ms": [tpot_s for o in good if (tpot_s := o.tpot_s) is not None],
        "itl_ms": [gap_s for o in good for gap_s in o.gaps_s],
        "e2e_ms": [o.e2e_s for o in good],
    }
    late_s = [o.started_s - o.due_s for o in outcomes if o.due_s is not None]
    document: dict[str, Any] = {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": failures_by_kind(outcomes),
        "wall_s": wall_s,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(o.cached_tokens for o in good),
        "output_tokens": tokens,
        "output_tokens_are_pieces": not all(o.is_counted for o in good),
        "requests_per_s": len(good) / wall_s,
        "output_tokens_per_s": tokens / wall_s,
        "total_tokens_per_s": (tokens + prompt_tokens) / wall_s,
    }
    for name, seconds in values_s.items():
        document[name] = percentiles([value * 1e3 for value in seconds], shares)
    document["late_ms"] = percentiles([value * 1e3 for value in late_s], shares) if late_s else None
    if goals_ms:
        num_met = sum(meets(outcome, goals_ms) for outcome in good)
        document["goodput"] = {
            "goals_ms": goals_ms,
            "requests_per_s": num_met / wall_s,
            "share": num_met / len(outcomes) if outcomes else 0.0,
        }
    return document


def latency_rows(document: dict[str, Any]) -> list[Row]:
    """The table of latencies, in ms."""
    names = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "ITL": "itl_ms", "E2E": "e2e_ms", "late": "late_ms"}
    found = {name: document[key] for name, key in names.items() if document[key] is not None}
    return [
        {"ms": name} | {column: "-" if value is None else value for column, value in values.items()}
        for name, values in found.items()
    ]


def details(outcomes: Sequence[Outcome], started_s: float) -> list[dict[str, Any]]:
    """Each request by itself, times in seconds from the start of the run; in the order in which they ended."""
    return [
        {
            "started_s": outcome.started_s - started_s,
            "ended_s": outcome.ended_s - started_s,
            "arrivals_s": [time_s - started_s for time_s in outcome.arrivals_s],
            "prompt_tokens": outcome.prompt_tokens,
            "cached_tokens": outcome.cached_tokens,
            "output_tokens": outcome.output_tokens,
            "error": None if outcome.failure is None else f"{outcome.failure}: {outcome.message}",
        }
        for outcome in outcomes
    ]
