"""The audit's guard in a service: the ranks of a group change over at the same step, and the series tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.executor import Executor, InlineExecutor
from engine.ray_executor import RayExecutor
from engine.types import EngineRequest, Logprobs, SamplingParams, StepPlan
from tests.checkpoints import small_engine
from tests.cluster import Cluster, wait_until

PROMPT = [(7 * i * i + i) % 300 + 3 for i in range(900)]
GUARD: dict[str, Any] = {
    "index_topk_freq": 2,
    "index_reuse": "audited",
    "audit_interval": 2,
    "audit_overlap_floor": 0.95,
}


def answers(settings: EngineConfig, executor: Executor) -> tuple[list[Logprobs], list[int]]:
    """(log-probabilities of all generated tokens of two equal requests, one behind the other; the steps that ran by the
    fallback)."""
    core = EngineCore(settings, executor)
    fallback: list[int] = []
    submit = executor.submit

    def noted_submit(plan: StepPlan) -> None:
        submit(plan)
        if plan.fallback:
            fallback.append(plan.step_id)

    executor.submit = noted_submit  # type: ignore[method-assign]
    found: list[Logprobs] = []
    try:
        for name in ("first", "second"):
            sampling = SamplingParams(max_tokens=6, temperature=0.0, seed=0, ignore_eos=True, logprobs=0)
            core.add_request(EngineRequest(name, PROMPT, sampling))
            while core.has_work():
                for event in core.step():
                    found += event.logprobs or []
        return found, fallback
    finally:
        core.close()


def same(one: list[Logprobs], other: list[Logprobs]) -> bool:
    return all(a == pytest.approx(b, abs=1e-4) for a, b in zip(one, other, strict=True))


def test_ranks_change_over_at_the_same_step(cluster: Cluster, checkpoint: Path) -> None:
    """Ranks that ran a step by different plans would add up hidden states of two models."""
    one_rank = small_engine(checkpoint, enable_prefix_caching=False, audit_trip_after=2, **GUARD)
    expected, steps = answers(one_rank, InlineExecutor(one_rank))
    # Audits with a choice are those of step 4, the prompt's last chunk, and of step 6, which decodes.
    assert steps[0] == 7 and len(expected) == 12
    group = replace(one_rank, tensor_parallel_size=2, async_scheduling=False)
    found, group_steps = answers(group, RayExecutor(group))
    assert group_steps == steps
    assert same(found, expected)

    # The change can be seen: what came before it, in it and behind it is of different plans.
    plain = small_engine(checkpoint, enable_prefix_caching=False)
    exact, _ = answers(plain, InlineExecutor(plain))
    assert not same(found[:6], exact[:6]) and same(found[6:], exact[6:])


def test_the_series_say_so(cluster: Cluster, checkpoint: Path) -> None:
    name = "guarded"
    settings = cluster.settings(
        checkpoint, served_model_name=name, max_model_len=2048, num_pages=64, audit_trip_after=1, **GUARD
    )

    def series(client: httpx.Client) -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(client.get(cluster.metrics_url).text)
        samples = [each for family in families for each in family.samples if each.labels.get("model_name") == name]
        return {
            (
                each.name,
                *(each.labels[label] for label in ("layer", "role", "plan") if label in each.labels),
            ): each.value
            for each in samples
        }

    active, trips = ("m3_index_guard_active",), ("m3_index_guard_trips_total",)
    reusing, exact = ("m3_index_plan_active", "DDFSF"), ("m3_index_plan_active", "DDFFF")
    selected = ("m3_index_selections_total", "3", "compute")
    with cluster.service(settings) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        wait_until(lambda: client.get("/ready").status_code == 200, timeout_s=20, what="ready")
        before = series(client)
        assert [before[key] for key in (active, trips, reusing, exact, selected)] == [0, 0, 1, 0, 0]
        body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
        assert client.post("/v1/completions", json=body).status_code == 200
        wait_until(lambda: series(client)[active] == 1, timeout_s=10, what="an active guard")
        after = series(client)
        assert [after[key] for key in (trips, reusing, exact)] == [1, 0, 1] and after[selected] > 0
