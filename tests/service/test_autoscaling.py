"""How many replicas a load asks for, and what Serve is told."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingContext

from service.autoscaling import LOAD_METRIC, autoscaling_config, idle_load, replicas_for_load
from service.settings import ServiceSettings


def context(shares: list[float]) -> AutoscalingContext:
    """As Serve's controller makes it, with the loads of so many running replicas."""
    deployment = DeploymentID("Engine", "app")
    replicas = [ReplicaID(str(i), deployment) for i in range(len(shares))]
    loads = {LOAD_METRIC: dict(zip(replicas, shares, strict=True))} if shares else {}
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name="Engine",
        app_name="app",
        current_num_replicas=len(shares),
        target_num_replicas=len(shares),
        running_replicas=replicas,
        total_num_requests=99.0,
        total_queued_requests=99.0,
        aggregated_metrics=loads,
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=None,
    )


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [([], 1), ([0.0], 1), ([0.2, 0.0], 1), ([1.0], 1), ([1.01], 2), ([2.5], 3), ([0.9, 0.9, 0.9], 3), ([0.4] * 5, 2)],
)
def test_as_many_replicas_as_the_load_fills(shares: list[float], wanted: int) -> None:
    """Whatever the number of open calls, which Serve counts by itself."""
    assert replicas_for_load(context(shares))[0] == wanted


def test_a_replica_is_full_by_tokens_or_by_requests() -> None:
    idle = idle_load(ServiceSettings(model="/m", max_num_seqs=8, max_queued_requests=4), "a", kv_tokens=10_000)
    assert (idle.full_tokens, idle.full_requests, idle.max_requests) == (7000, 8, 12)
    assert idle.plus(3500, 1).share == 0.5
    assert idle.plus(3500, 12).share == 1.5
    given = ServiceSettings(model="/m", target_tokens_per_replica=500)
    assert idle_load(given, "a", kv_tokens=10_000).full_tokens == 500


@pytest.mark.parametrize(
    ("settings", "limits", "push_s", "window_s"),
    [
        ({"max_replicas": 4}, (1, 4), 10.0, 30.0),
        ({"replicas": 2, "max_replicas": 4, "upscale_delay_s": 6}, (2, 4), 2.0, 6.0),
        ({"min_replicas": 3, "max_replicas": 3, "upscale_delay_s": 0}, (3, 3), 0.5, 1.5),
    ],
)
def test_what_serve_is_told(settings: dict[str, Any], limits: tuple[int, int], push_s: float, window_s: float) -> None:
    config = autoscaling_config(ServiceSettings(model="/m", downscale_delay_s=7, **settings))
    assert config is not None
    assert (config.min_replicas, config.max_replicas) == limits
    assert (config.metrics_interval_s, config.look_back_period_s) == (push_s, window_s)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (settings.get("upscale_delay_s", 30), 7)
    assert config.policy.get_policy()(context([1.5]))[0] == 2, "the policy that its controller unpickles"


def test_without_max_replicas_their_number_is_fixed() -> None:
    assert autoscaling_config(ServiceSettings(model="/m", replicas=3)) is None
