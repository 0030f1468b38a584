"""The tensor-parallel executor on real Ray actors: same tokens as one process, and a quick end when a rank is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import zmq

from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.errors import CheckpointError, ConfigError, EngineDead
from engine.executor import Executor, InlineExecutor
from engine.ray_executor import RayExecutor, rank_resources
from engine.transport import Gate, Header, Kind, connect_push, encode, new_token, pack
from engine.types import EngineRequest, NewRequest, SamplingParams, StepPlan, StepResult, StepRow
from tests.checkpoints import small_engine
from tests.cluster import Cluster, process_exists, wait_until

PROMPTS = [list(range(3, 9)), [7] * 130, list(range(10, 400)) + list(range(10, 400))]


def generate(settings: EngineConfig, executor: Executor) -> list[list[int]]:
    """Greedy tokens of PROMPTS, run together."""
    core = EngineCore(settings, executor)
    try:
        tokens: dict[str, list[int]] = {}
        sampling = SamplingParams(max_tokens=8, temperature=0.0, seed=0, ignore_eos=True)
        for i, prompt in enumerate(PROMPTS):
            core.add_request(EngineRequest(str(i), prompt, sampling))
        while core.has_work():
            for event in core.step():
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
        return [tokens[str(i)] for i in range(len(PROMPTS))]
    finally:
        core.close()


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    settings = small_engine(checkpoint, index_topk_freq=2)
    return generate(settings, InlineExecutor(settings))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_give_the_tokens_of_one_process(
    cluster: Cluster, checkpoint: Path, expected: list[list[int]], num_ranks: int
) -> None:
    """The checkpoint has 2 KV heads: with 4 ranks they are replicated, and must select alike."""
    settings = small_engine(checkpoint, tensor_parallel_size=num_ranks, index_topk_freq=2)
    executor = RayExecutor(settings)
    assert executor.info.tensor_parallel_size == num_ranks
    assert executor.info.plan == "DDFSF"
    assert generate(settings, executor) == expected
    wait_until(lambda: not any(map(process_exists, executor.worker_pids)), timeout_s=5, what="the end of closed ranks")
    assert not executor.directory.exists()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_rank_tells_its_times_of_probed_steps(cluster: Cluster, checkpoint: Path, num_ranks: int) -> None:
    settings = small_engine(checkpoint, tensor_parallel_size=num_ranks, probe_interval=2)
    core = EngineCore(settings, RayExecutor(settings))
    try:
        core.add_request(EngineRequest("r", [5] * 20, SamplingParams(max_tokens=40, seed=0, ignore_eos=True)))
        while core.has_work():
            core.step()
    finally:
        core.close()
    assert core.stats.steps == 40
    assert core.stats.ranks.keys() == set(range(num_ranks))
    assert core.stats.ranks[0].samples == 20
    for rank, sums in core.stats.ranks.items():
        # What other ranks send comes beside the answers: of the last steps it may come too late.
        assert sums.samples <= 20 and (rank == 0 or sums.samples > 10)
        assert sums.forward_s > sums.collective_s
        assert (sums.collective_s > 0) == (num_ranks > 1)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_launch_a_step_before_the_last_one_is_answered(
    cluster: Cluster, checkpoint: Path, expected: list[list[int]], num_ranks: int
) -> None:
    """Two steps are with the ranks at a time; the answers stay in order and the tokens the same."""
    settings = small_engine(checkpoint, tensor_parallel_size=num_ranks, index_topk_freq=2, async_scheduling=True)
    executor = RayExecutor(settings)
    in_flight: list[int] = []
    most = 0
    submit, collect = executor.submit, executor.collect

    def counted_submit(plan: StepPlan) -> None:
        nonlocal most
        submit(plan)
        in_flight.append(plan.step_id)
        most = max(most, len(in_flight))

    def counted_collect() -> StepResult:
        result = collect()
        assert result.step_id == in_flight.pop(0)
        return result

    executor.submit, executor.collect = counted_submit, counted_collect  # type: ignore[method-assign]
    assert executor.info.max_in_flight == 2
    assert generate(settings, executor) == expected
    assert most == 2 and not in_flight


@pytest.fixture
def group(cluster: Cluster, checkpoint: Path) -> Any:
    executor = RayExecutor(small_engine(checkpoint, tensor_parallel_size=2), step_timeout_s=3.0)
    yield executor
    executor.close()
    executor.close()


def empty_step(step_id: int) -> StepPlan:
    """A plan with one new request of two tokens, in the place of the one before."""
    return StepPlan(
        step_id,
        [StepRow(0, 0, 2, [step_id % 8], sample=True)],
        0,
        new=[NewRequest(0, [5, 6], 2, SamplingParams(temperature=0.0, seed=0))],
        released=[0] if step_id else [],
    )


def run_until_dead(executor: RayExecutor, *, limit_s: float) -> str:
    """Run steps until EngineDead: its message."""
    deadline_s = time.monotonic() + limit_s
    step_id = 0
    while time.monotonic() < deadline_s:
        try:
            executor.submit(empty_step(step_id))
            executor.collect()
        except EngineDead as error:
            return str(error)
        step_id += 1
    pytest.fail(f"the group still runs steps after {limit_s:g} s")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_group_at_once(group: RayExecutor, rank: int) -> None:
    """Noticed by its death, or by its neighbour whose collective broke: not by the step deadline."""
    threading.Timer(0.3, os.kill, (group.worker_pids[rank], signal.SIGKILL)).start()
    message = run_until_dead(group, limit_s=10.0)
    assert f"rank {rank}" in message or "gloo" in message
    assert "longer than" not in message
    wait_until(lambda: not any(map(process_exists, group.worker_pids)), timeout_s=5, what="the end of the other rank")
    with pytest.raises(EngineDead) as error:
        group.submit(empty_step(0))
    assert str(error.value) == message


def test_a_rank_that_dies_while_idle_is_noticed(group: RayExecutor) -> None:
    os.kill(group.worker_pids[1], signal.SIGKILL)

    def dead() -> bool:
        try:
            group.check_alive()
        except EngineDead:
            return True
        return False

    wait_until(dead, timeout_s=5, what="EngineDead")


def test_a_hung_rank_ends_the_group_at_the_step_deadline(group: RayExecutor) -> None:
    group.submit(empty_step(0))
    group.collect()
    os.kill(group.worker_pids[1], signal.SIGSTOP)
    started_s = time.monotonic()
    with pytest.raises(EngineDead, match="longer than 3 s"):
        group.submit(empty_step(1))
        group.collect()
    assert time.monotonic() - started_s > 2.9, "the rank had its time"
    wait_until(lambda: not any(map(process_exists, group.worker_pids)), timeout_s=5, what="the end of both ranks")


def test_start_up_errors_reach_the_caller_as_they_are(cluster: Cluster, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the first sparse layer"):
        RayExecutor(small_engine(checkpoint, index_topk_pattern="SFF"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        RayExecutor(small_engine(tmp_path / "nothing"))
    held = [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
    assert held == []


def test_foreign_messages_are_dropped_and_counted() -> None:
    """Wrong token, broken header, unknown kind, garbage, and values that a type refuses."""
    token = new_token()
    gate = Gate("test", token, {Kind.STEP: StepPlan, Kind.EVENTS: list[SamplingParams]})
    header = Header(Kind.STEP, 1, 2)
    good = pack(token, header, encode(empty_step(4)))
    assert gate.admit(good) == (header, empty_step(4))
    hot = encode([{"temperature": -3.0}])
    bad = [
        pack(new_token(), header, good[2]),
        pack(b"", header, good[2]),
        [token, b"short", good[2]],
        [token, good[1]],
        [*good, b"more"],
        pack(token, Header(99, 1, 2), good[2]),
        pack(token, header, b"\xc1 no msgpack"),
        pack(token, header, encode({"step_id": "one"})),
        pack(token, header, encode(StepResult(0, []))),
        pack(token, Header(Kind.EVENTS, 1, 2), hot),
    ]
    for number, frames in enumerate(bad, start=1):
        assert gate.admit(frames) is None
        assert gate.dropped == number


def test_strangers_change_nothing_and_a_failing_step_names_its_rank(cluster: Cluster, checkpoint: Path) -> None:
    """A group over tcp, as when the ranks run on another node, with garbage on every socket; then a broken plan."""
    executor = RayExecutor(small_engine(checkpoint, tensor_parallel_size=2), step_timeout_s=10.0, use_tcp=True)
    context: zmq.Context[Any] = zmq.Context()
    strangers = [connect_push(context, e) for e in (*executor.plan_endpoints, executor.reply_endpoint)]
    try:
        garbage = pack(new_token(), Header(Kind.STEP, 0, 0), encode(empty_step(0)))
        for stranger in strangers:
            for frames in (garbage, [b"x"], [b"", b"", b""]):
                stranger.send_multipart(frames)
        for step_id in range(20):
            executor.submit(empty_step(step_id))
            assert executor.collect().step_id == step_id
        assert executor.num_dropped == 3
        # Slot 3 holds no request: every rank fails in the same way.
        executor.submit(StepPlan(20, [StepRow(3, 0, 1, [0], sample=True)], 0))
        with pytest.raises(EngineDead, match=r"rank [01].*slot 3"):
            executor.collect()
    finally:
        for stranger in strangers:
            stranger.close()
        context.term()
        executor.close()


def test_a_rank_asks_for_a_gpu_where_it_runs_on_one() -> None:
    assert rank_resources("torch", {"CPU": 8, "GPU": 4}) == {"CPU": 1}
    assert rank_resources("auto", {"CPU": 8}) == {"CPU": 1}
    assert rank_resources("auto", {"CPU": 8, "GPU": 4}) == rank_resources("triton", {"CPU": 8}) == {"CPU": 1, "GPU": 1}
    assert rank_resources("aiter", {"CPU": 8}) == {"CPU": 1, "GPU": 1}
