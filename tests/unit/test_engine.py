"""The step loop: what it refuses, what its events say, how it ends, what it counts."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.errors import ConfigError, EngineDead, RequestError
from engine.types import EngineRequest, FinishReason, LayerOverlap, LayerSeconds, StepPlan, StepResult
from tests.unit.worker_model import (
    EOS_TOKEN_IDS,
    POISON_SEED,
    VOCAB_SIZE,
    CheckingExecutor,
    Received,
    expected,
    finish,
    make_core,
    make_request,
    run,
    same,
    step,
)


def test_not_finite_logits_end_that_request_alone_and_its_pages_are_not_found() -> None:
    core, _ = make_core()
    bad = make_request("bad", 300, max_tokens=9, seed=POISON_SEED, min_tokens=9)
    good = make_request("good", [7] * 200, max_tokens=9)
    answers = run(core, bad, good)
    assert answers["bad"].finish_reason is FinishReason.ERROR
    assert answers["bad"].error is not None and "position 301" in answers["bad"].error
    assert len(answers["bad"].token_ids) == 2
    assert same(answers["good"], expected(good))
    again = make_request("again", 300, max_tokens=9)
    assert run(core, again)["again"].num_cached_tokens == 0
    assert core.stats.finished[FinishReason.ERROR] == 1


def test_stop_token_is_delivered_and_named() -> None:
    request = make_request("r", 20, max_tokens=400)
    reference = expected(request)
    assert reference.finish_reason is FinishReason.STOP
    core, _ = make_core()
    answer = run(core, request)["r"]
    assert answer.stop_token_id == answer.token_ids[-1] and answer.stop_token_id in EOS_TOKEN_IDS
    later = run(core, make_request("later", 20, max_tokens=400, min_tokens=len(answer.token_ids) + 20))["later"]
    assert len(later.token_ids) > len(answer.token_ids) + 20


def test_resubmission_of_an_answer_that_was_complete_only_says_so() -> None:
    core, executor = make_core()
    request = make_request("r", 20, max_tokens=7, ignore_eos=True)
    core.add_request(dataclasses.replace(request, output_token_ids=expected(request).token_ids))
    assert core.has_work()
    [event] = core.step()
    assert (event.index, event.token_ids, event.finish_reason) == (7, [], FinishReason.LENGTH)
    assert not executor.plans and not core.has_work()


def test_probe_and_audit_come_at_their_intervals() -> None:
    for reuse, audits in (("audited", [3, 6, 9]), ("lean", [])):
        config = EngineConfig(
            "model", probe_interval=4, audit_interval=3, index_reuse=reuse, enable_prefix_caching=False
        )
        executor = CheckingExecutor(config, 16)
        run(EngineCore(config, executor), make_request("r", 10, max_tokens=10, ignore_eos=True))
        assert [plan.step_id for plan in executor.plans if plan.probe] == [4, 8]
        assert [plan.step_id for plan in executor.plans if plan.audit] == audits


@pytest.mark.parametrize("error", [EngineDead("killed"), RuntimeError("out of memory")])
def test_dead_executor_ends_nothing_and_stays_dead(error: Exception) -> None:
    core, executor = make_core()
    core.add_request(make_request("r", 20, max_tokens=20, ignore_eos=True))
    executor.die_at_step, executor.error = 3, error
    answers: dict[str, Received] = {}
    step(core, answers)
    step(core, answers)
    with pytest.raises(EngineDead, match=str(error)):
        core.step()
    with pytest.raises(EngineDead, match=str(error)):
        core.step()
    with pytest.raises(EngineDead):
        core.add_request(make_request("r2", 20))
    assert len(executor.plans) == 3 and answers["r"].finish_reason is None
    core.close()
    assert executor.closed == 1


@pytest.mark.parametrize(
    "change",
    [
        {"step_id": 99},
        {"sampled": []},
        {"sampled": [VOCAB_SIZE]},
        {"sampled": [-1]},
        {"sampled": [-3]},
    ],
)
def test_result_that_does_not_answer_the_plan_is_the_end(change: dict[str, object]) -> None:
    core, executor = make_core()
    core.add_request(make_request("r", 20))
    collect = executor.collect
    executor.collect = lambda: dataclasses.replace(collect(), **change)  # type: ignore[method-assign,arg-type]
    with pytest.raises(EngineDead, match="step 1"):
        core.step()


@pytest.mark.parametrize(
    ("request_", "param", "code", "words"),
    [
        (make_request("r", []), "prompt", "invalid_value", ["0"]),
        (make_request("r", 512, max_tokens=1), "prompt", "context_length_exceeded", ["512"]),
        (
            make_request("r", 500, max_tokens=13),
            "max_tokens",
            "context_length_exceeded",
            ["500", "13", "512"],
        ),
        (make_request("r", [5, VOCAB_SIZE]), "prompt", "invalid_value", ["50"]),
        (make_request("r", [-1]), "prompt", "invalid_value", ["-1"]),
        (make_request("r", [True]), "prompt", "invalid_value", ["True"]),
        (make_request("r", 5, stop_token_ids=[50]), "stop_token_ids", "invalid_value", ["50"]),
        (make_request("r", 5, logit_bias={60: 1.0}), "logit_bias", "invalid_value", ["60", "50"]),
        (make_request("r", 5, seed=None), "seed", "invalid_value", ["seed"]),
        (make_request("busy", 5), "request_id", "duplicate_request_id", ["busy"]),
        (make_request("gone", 5), "request_id", "duplicate_request_id", ["gone"]),
    ],
)
def test_request_that_can_never_run_is_refused(
    request_: EngineRequest, param: str, code: str, words: list[str]
) -> None:
    core, _ = make_core()
    core.add_request(make_request("busy", 5))
    core.add_request(make_request("gone", 5))
    core.abort("gone")
    with pytest.raises(RequestError) as caught:
        core.add_request(request_)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert all(word in caught.value.message for word in words)
    answers = finish(core, {})
    assert {name: answer.finish_reason is FinishReason.ABORT for name, answer in answers.items()} == {
        "busy": False,
        "gone": True,
    }


def test_longest_request_runs_in_the_smallest_pool() -> None:
    core, _ = make_core(num_pages=4)
    request = make_request("r", 511, max_tokens=1)
    assert same(run(core, request)["r"], expected(request))
    with pytest.raises(RequestError, match="output_token_ids has 2 tokens"):
        core.add_request(dataclasses.replace(make_request("s", 5, max_tokens=1), output_token_ids=[6, 6]))


def test_pool_smaller_than_one_request_is_a_config_error() -> None:
    config = EngineConfig("model")
    executor = CheckingExecutor(config, num_pages=3)
    with pytest.raises(ConfigError, match=r"384 tokens.*max_model_len, 512"):
        EngineCore(config, executor)
    assert executor.closed == 1


def test_stats_count_and_drain_once() -> None:
    core, executor = make_core(enable_prefix_caching=False)
    collect = executor.collect

    def measured() -> StepResult:
        result = collect()
        result.seconds = [
            LayerSeconds("indexer", 1, "decode", 0.5),
            LayerSeconds("sparse_attention", 1, "decode", 2),
        ]
        result.overlaps = [LayerOverlap(2, 1.5, 2)]
        result.computed, result.reused = {1: 1}, {2: 1}
        result.forward_s, result.python_s = 0.25, 0.125
        return result

    executor.collect = measured  # type: ignore[method-assign]
    core.add_request(make_request("a", 300, max_tokens=4, ignore_eos=True))
    core.add_request(make_request("b", 10, max_tokens=2, ignore_eos=True))
    step(core, {})
    assert (core.stats.num_running, core.stats.num_waiting, core.stats.kv_usage) == (2, 0, 4 / 16)
    finish(core, {"a": Received([0]), "b": Received([0])})
    stats = core.stats
    assert (stats.steps, stats.computed_prompt_tokens, stats.generation_tokens) == (4, 310, 6)
    assert (stats.num_running, stats.kv_usage, stats.finished[FinishReason.LENGTH]) == (0, 0.0, 2)
    assert (stats.indexer_s, stats.indexer_samples) == ({(1, "decode"): 2.0}, {(1, "decode"): 4})
    assert (stats.sparse_attention_s, stats.sparse_attention_samples) == (
        {(1, "decode"): 8},
        {(1, "decode"): 4},
    )
    assert (stats.overlap_sum, stats.overlap_count) == ({2: 6.0}, {2: 8})
    assert (stats.selections_computed, stats.selections_reused) == ({1: 4}, {2: 4})
    assert (stats.forward_s, stats.python_s, stats.prefix_queries_tokens) == (1.0, 0.5, 0)
    observations = stats.drain()
    assert list(observations.step_tokens) == [310, 2, 1, 1] and list(observations.batch_size) == [2, 2, 1, 1]
    assert list(observations.prompt_tokens) == [10, 300] and list(observations.generation_tokens) == [2, 4]
    for name in ("queue_s", "prefill_s", "decode_s"):
        assert len(getattr(observations, name)) == 2 and min(getattr(observations, name)) >= 0
    assert len(observations.step_s) == 4 and sum(observations.step_s) == pytest.approx(stats.steps_s)
    assert not stats.drain().step_s


def observed(core: EngineCore, executor: CheckingExecutor) -> list[tuple[str, int]]:
    """What the executor is asked, in order: ("submit" or "collect", step id)."""
    calls: list[tuple[str, int]] = []
    submit, collect = executor.submit, executor.collect

    def observed_submit(plan: StepPlan) -> None:
        calls.append(("submit", plan.step_id))
        submit(plan)

    def observed_collect() -> StepResult:
        result = collect()
        calls.append(("collect", result.step_id))
        return result

    executor.submit, executor.collect = observed_submit, observed_collect  # type: ignore[method-assign]
    return calls


def test_next_step_is_submitted_before_the_last_is_collected() -> None:
    for max_in_flight, order in (
        (1, ["s1", "c1", "s2", "c2", "s3", "c3", "s4", "c4"]),
        (2, ["s1", "s2", "c1", "s3", "c2", "s4", "c3", "c4"]),
        (3, ["s1", "s2", "s3", "c1", "s4", "c2", "c3", "c4"]),
    ):
        core, executor = make_core(max_in_flight=max_in_flight)
        calls = observed(core, executor)
        request = make_request("r", 20, max_tokens=4, ignore_eos=True)
        assert same(run(core, request)["r"], expected(request))
        assert [f"{name[0]}{step_id}" for name, step_id in calls] == order
        assert core.stats.steps == 4 and core.step() == [] and len(calls) == 8


@pytest.mark.parametrize("max_in_flight", [2, 3])
def test_rows_behind_the_stop_token_are_ignored_and_their_steps_collected(max_in_flight: int) -> None:
    core, executor = make_core(max_in_flight=max_in_flight)
    prompt_lens = (n for n in range(1, 128) if n + len(expected(make_request("r", n, max_tokens=200)).token_ids) == 128)
    request = make_request("r", next(prompt_lens), max_tokens=200)
    answer = run(core, request)["r"]
    num_tokens = len(answer.token_ids)
    assert same(answer, expected(request)) and answer.finish_reason is FinishReason.STOP
    assert len(executor.plans) == core.stats.steps == num_tokens + max_in_flight - 1
    assert core.stats.generation_tokens == num_tokens and not executor.num_in_flight
    assert list(core.stats.drain().generation_tokens) == [num_tokens]
    # The stop token fills the page, and only a stale row computed it.
    whole = request.prompt_token_ids + answer.token_ids
    assert run(core, make_request("again", [*whole, 5], max_tokens=1))["again"].num_cached_tokens == 0
    assert executor.plans[num_tokens + max_in_flight - 1].released == [0]


@pytest.mark.parametrize("max_in_flight", [2, 3])
def test_abort_with_rows_in_flight_is_the_last_word(max_in_flight: int) -> None:
    core, executor = make_core(max_in_flight=max_in_flight)
    core.add_request(make_request("r", 300, max_tokens=9, ignore_eos=True))
    assert len(core.step()) == 1 and executor.num_in_flight == max_in_flight - 1
    core.abort("r")
    assert not core.pool.num_held and core.has_work()
    [event] = core.step()
    assert event.finish_reason is FinishReason.ABORT and not event.token_ids
    # The id is free again, while a step of its first owner may still be in flight.
    request = make_request("r", 200, max_tokens=3, ignore_eos=True)
    assert same(run(core, request)["r"], expected(request))
    assert executor.num_in_flight == 0 and core.stats.generation_tokens == 1 + 3


def test_logits_not_finite_with_rows_behind_end_the_request_once() -> None:
    core, executor = make_core(max_in_flight=3)
    request = make_request("r", 20, max_tokens=9, seed=POISON_SEED, min_tokens=9)
    assert same(run(core, request)["r"], expected(request))
    assert core.stats.finished[FinishReason.ERROR] == 1 and len(executor.plans) == 5


def test_executor_that_dies_with_steps_in_flight_ends_nothing() -> None:
    core, executor = make_core(max_in_flight=2)
    core.add_request(make_request("r", 20, max_tokens=20, ignore_eos=True))
    answers: dict[str, Received] = {}
    step(core, answers)

    def collect() -> StepResult:
        raise EngineDead("killed")

    executor.collect = collect  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(EngineDead, match="killed"):
            core.step()
    assert len(answers["r"].token_ids) == 1 and answers["r"].finish_reason is None


def test_close_with_steps_in_flight() -> None:
    core, executor = make_core(max_in_flight=2)
    core.add_request(make_request("r", 20, max_tokens=20, ignore_eos=True))
    core.step()
    core.close()
    assert executor.closed == 1 and executor.num_in_flight == 1
    with pytest.raises(EngineDead, match="closed"):
        core.step()


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_seconds_of_overlapping_steps_add_up_to_the_time_that_passed(
    max_in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr("engine.engine.time", SimpleNamespace(monotonic=lambda: now_s))
    core, executor = make_core(max_in_flight=max_in_flight)
    submit, collect = executor.submit, executor.collect
    executor.submit = lambda plan: (sleep(0.25), submit(plan))  # type: ignore[method-assign,assignment,func-returns-value]
    executor.collect = lambda: (sleep(2.0), collect())[1]  # type: ignore[method-assign,func-returns-value]
    for request_id in ("r", "after a pause"):
        run(core, make_request(request_id, 20, max_tokens=4, ignore_eos=True))
        sleep(50.0)
    seconds = [2.25] * 4 if max_in_flight == 1 else [2.5, 2.25, 2.25, 2.0]
    assert list(core.stats.observations.step_s) == seconds * 2
    assert core.stats.steps_s == 2 * (4 * 0.25 + 4 * 2.0)
