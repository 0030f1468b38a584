"""The audit's guard on a real model whose random indexers do not agree: what it measures, and what clients get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM, SamplingParams
from engine.kernels.batch import StepBatch
from engine.kernels.params import Selection
from engine.types import Output
from tests.checkpoints import make_checkpoint
from tests.golden.compare import open_llm
from tests.golden.configs import make_prompt

TOPK = 4
VOCAB_SIZE = 320
SPARSE = (0, 1, 1, 1, 1, 1, 1)
PLAN = "DFSSSFS"
SOURCES = {2: 1, 3: 1, 4: 1, 6: 5}
CHUNK = 512
# Random indexers overlap by about 0.6 here.
GUARD = {"audit_interval": 1, "audit_overlap_floor": 0.9, "audit_trip_after": 2, "audit_recover_after": 3}
NEVER = {"audit_interval": 1, "audit_overlap_floor": 0.3, "audit_trip_after": 2, "audit_recover_after": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index_guard")
    sizes: dict[str, Any] = {"layers": len(SPARSE), "sparse": SPARSE, "topk_blocks": TOPK, "vocab_size": VOCAB_SIZE}
    return make_checkpoint(path, seed=22, heads=4, expert_width=16, **sizes)


def guarded(checkpoint: Path, **settings: Any) -> LLM:
    fixed = {"chunk": CHUNK, "index_topk_freq": 4, "index_reuse": "audited", "enable_prefix_caching": True}
    return open_llm(checkpoint, **{**fixed, **GUARD, **settings})


@pytest.fixture(scope="module")
def without_reuse(checkpoint: Path) -> Iterator[LLM]:
    with open_llm(checkpoint, chunk=CHUNK, enable_prefix_caching=True) as llm:
        yield llm


def ask(llm: LLM, length: int, seed: int, max_tokens: int = 8) -> Output:
    prompt = make_prompt(length, vocab_size=VOCAB_SIZE, seed=seed)
    [output] = llm.generate([prompt], SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=0))
    return output


def seen(output: Output) -> tuple[Any, ...]:
    """What a client can see of it, exactly."""
    return output.token_ids, output.logprobs, output.num_cached_tokens


def test_low_overlap_trips_it_and_answers_become_those_without_reuse(checkpoint: Path, without_reuse: LLM) -> None:
    with guarded(checkpoint) as llm:
        assert str(llm.plan) == PLAN and llm.info.fallback_plan == "DFFFFFF"
        first = ask(llm, 1500, 0)
        assert llm.stats.guard_active and llm.stats.guard_trips == 1
        # It began by the plan with reuse and went on, to its end, by the other: its pages are of no use to anyone.
        exact = ask(without_reuse, 1500, 0)
        assert len(first.token_ids) == 8 and first.logprobs != exact.logprobs
        reused = dict(llm.stats.selections_reused)
        assert seen(ask(llm, 1500, 0)) == seen(exact) and exact.num_cached_tokens == 0
        # The pages of those that follow are found, as by the other engine.
        assert seen(ask(llm, 1500, 0)) == seen(ask(without_reuse, 1500, 0))
        assert ask(llm, 1500, 0).num_cached_tokens == 1408
        assert llm.stats.selections_reused == reused and llm.stats.selections_computed[2] > 0
        assert llm.stats.guard_active and llm.stats.guard_trips == 1


def test_it_recovers_with_traffic_whose_selections_hold_every_block(checkpoint: Path) -> None:
    with guarded(checkpoint) as llm, guarded(checkpoint, **NEVER) as reusing:
        ask(llm, 1500, 0)
        assert llm.stats.guard_active
        ask(llm, TOPK * 128 - 2, 0, max_tokens=2)
        assert llm.stats.guard_active, "two audits are not three"
        ask(llm, 100, 1, max_tokens=1)
        assert not llm.stats.guard_active and llm.stats.guard_trips == 1
        # One audit with a choice, in the second chunk: reuse is back, on pages of its own, and nothing trips.
        again, never = ask(llm, 900, 2, max_tokens=1), ask(reusing, 900, 2, max_tokens=1)
        assert seen(again) == seen(never)
        assert not llm.stats.guard_active and not reusing.stats.guard_trips
        ask(llm, 1500, 3)
        assert llm.stats.guard_active and llm.stats.guard_trips == 2


def test_overlap_is_measured_on_while_it_is_active(checkpoint: Path) -> None:
    """Of each S layer's own selection with that of its source, both as the layers made them in the same step."""
    shared, count = dict.fromkeys(SOURCES, 0), dict.fromkeys(SOURCES, 0)
    sources: dict[int, Tensor] = {}

    def keep(layer_id: int, batch: StepBatch, selection: Selection) -> None:
        if layer_id not in SOURCES:
            sources[layer_id] = selection.blocks.clone()
            return
        had_choice = batch.positions // 128 >= TOPK
        both = torch.zeros(selection.blocks.shape[:2], dtype=torch.int64)
        for block in range(16):
            in_both = (selection.blocks == block).any(-1) & (sources[SOURCES[layer_id]] == block).any(-1)
            both += in_both
        shared[layer_id] += int(both[:, had_choice].sum())
        count[layer_id] += int(had_choice.sum()) * both.shape[0]

    with guarded(checkpoint) as llm:
        ask(llm, 1500, 0)
        assert llm.stats.guard_active
        before = dict(llm.stats.overlap_sum), dict(llm.stats.overlap_count)
        llm.index_cache.observer = keep
        ask(llm, 1500, 1)
        for layer_id in SOURCES:
            grown = llm.stats.overlap_sum[layer_id] - before[0][layer_id]
            assert llm.stats.overlap_count[layer_id] - before[1][layer_id] == count[layer_id] > 0
            assert grown == pytest.approx(shared[layer_id] / TOPK)
            assert 1 / TOPK < grown / count[layer_id] < 0.9


def test_a_group_of_requests_goes_on_over_the_change(checkpoint: Path) -> None:
    """Decode rows and prefill chunks in one step, two steps in flight: every request ends with all its tokens."""
    prompts = [make_prompt(length, vocab_size=VOCAB_SIZE, seed=length) for length in (20, 700, 1500, 300, 1200)]
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    with guarded(checkpoint, async_scheduling=True, audit_interval=2) as llm:
        outputs = llm.generate(prompts, sampling)
        assert llm.stats.guard_trips == 1
    assert [len(output.token_ids) for output in outputs] == [12] * len(prompts)
