"""Scores from an engine in this process, one after the other for every plan."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine
from engine import scoring
from engine.config import PAGE_SIZE
from service.evaluation.data import Data
from service.evaluation.measure import Measured, measured
from service.evaluation.plans import with_plan
from service.evaluation.progress import Progress, say

# Sequences whose prompts may be computed in one step.
_RUNNING = 4


def evaluate(
    model: Path, data: Data, settings: dict[str, Any], specs: Sequence[str | None]
) -> tuple[list[Measured], dict[str, Any]]:
    """One `Measured` per plan, each from an engine of its own, and what start-up resolved.

    settings: fields of EngineConfig; what is not given suits the data.  specs: see `plans.plan_settings`; None: the
    plan that the settings give. With index_reuse=audited every step is audited, unless the settings say otherwise.
    """
    results = []
    about: dict[str, Any] = {}
    for number, spec in enumerate(specs, start=1):
        started_s = time.monotonic()
        with engine.LLM(model, **(_defaults(data) | with_plan(settings, spec))) as llm:
            info = llm.info
            say(f"plan {number} of {len(specs)}: {info.plan}, loaded in {time.monotonic() - started_s:.1f} s")
            about = {
                "checkpoint": info.model_name,
                "backend": info.backend,
                "dtype": info.dtype,
                "tensor_parallel_size": info.tensor_parallel_size,
            }
            progress = Progress(info.plan, data.num_tokens)
            started_s = time.monotonic()
            try:
                nats = scoring.score(llm, data.documents, progress.add)
                tasks = scoring.judge(llm, data.sequences, progress.add)
            finally:
                progress.close()
            stats = llm.stats
            overlap = {layer: stats.overlap_sum[layer] / count for layer, count in stats.overlap_count.items()}
        seconds = time.monotonic() - started_s
        results.append(measured(data, info.plan, nats, tasks, overlap=overlap, seconds=seconds))
    return results, about


def _defaults(data: Data) -> dict[str, Any]:
    """Room for the sequences and one more token, in which nothing is found that was computed before."""
    length = data.sizes.length + 1
    return {
        "max_model_len": length,
        "max_num_seqs": _RUNNING,
        "num_pages": _RUNNING * -(-length // PAGE_SIZE),
        "enable_prefix_caching": False,
        "audit_interval": 1,
        "probe_interval": 0,
    }
