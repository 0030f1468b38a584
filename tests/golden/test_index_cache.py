"""The index cache against the oracle: what is shared, what sharing changes, and what it must not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import LLM
from engine.msa.plan import IndexPlan
from tests.checkpoints import make_checkpoint
from tests.golden.compare import Observed, Reference, observe, open_llm
from tests.golden.configs import make_prompt
from tests.golden.oracle import BLOCK, Oracle

TOPK = 4
VOCAB_SIZE = 320
SPARSE = (0, 1, 1, 1, 1, 1, 1, 1)
LENGTH = 1500
# The knobs, and the letter of every layer that they must give.
PLANS: list[tuple[dict[str, Any], str]] = [
    ({"index_topk_freq": 2}, "DFSFSFSF"),
    ({"index_topk_freq": 4}, "DFSSSFSS"),
    ({"index_topk_freq": 4, "index_skip_topk_offset": 2}, "DFFFSSSF"),
    ({"index_topk_pattern": "FSFFSSS"}, "DFSFFSSS"),
    ({"index_topk_pattern": "FSSSSSS", "index_topk_freq": 2}, "DFSSSSSS"),
]
FREQ_4 = PLANS[1][0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index_cache")
    sizes: dict[str, Any] = {"layers": len(SPARSE), "sparse": SPARSE, "topk_blocks": TOPK, "vocab_size": VOCAB_SIZE}
    return make_checkpoint(path, seed=22, heads=4, expert_width=16, **sizes)


@pytest.fixture(scope="module")
def off(checkpoint: Path) -> Iterator[LLM]:
    """The engine without the index cache."""
    with open_llm(checkpoint) as llm:
        yield llm


@pytest.fixture(scope="module")
def off_long(off: LLM) -> Observed:
    return observe(off, prompt(LENGTH), 4)


def prompt(length: int, seed: int = 0) -> list[int]:
    return make_prompt(length, vocab_size=VOCAB_SIZE, seed=seed)


def results(observed: Observed) -> tuple[Any, ...]:
    """Everything that a client can see, exactly."""
    output = observed.output
    return output.token_ids, output.logprobs, output.prompt_logprobs


def oracle(checkpoint: Path, letters: str) -> Reference:
    is_sparse = [letter != "D" for letter in letters]
    return Reference(Oracle(checkpoint, IndexPlan.build(is_sparse, pattern=letters.replace("D", ""))))


def largest_difference(one: Observed, other: Observed) -> float:
    assert one.output.prompt_logprobs is not None and other.output.prompt_logprobs is not None
    pairs = zip(one.output.prompt_logprobs[1:], other.output.prompt_logprobs[1:], strict=True)
    return max(abs(next(iter(a.values())) - next(iter(b.values()))) for a, b in pairs if a and b)


@pytest.mark.parametrize(("knobs", "letters"), PLANS, ids=[letters for _, letters in PLANS])
def test_sharing_equals_the_oracle(checkpoint: Path, off_long: Observed, knobs: dict[str, Any], letters: str) -> None:
    with open_llm(checkpoint, chunk=257, **knobs) as llm:
        assert str(llm.plan) == letters
        shared = observe(llm, prompt(LENGTH), 4)
    oracle(checkpoint, letters).check(shared)
    # The comparison would see a plan that is ignored: sharing does change the results.
    assert largest_difference(shared, off_long) > 0.1


def test_the_knobs_in_config_json_are_the_same(checkpoint: Path) -> None:
    with open_llm(checkpoint, hf_overrides={"text_config": FREQ_4}) as inner:
        assert str(inner.plan) == "DFSSSFSS"
    with open_llm(checkpoint, hf_overrides={"use_index_cache": True, **FREQ_4}) as outer:
        assert str(outer.plan) == "DFSSSFSS"


def test_frequency_1_is_off(checkpoint: Path, off_long: Observed) -> None:
    with open_llm(checkpoint, use_index_cache=True, index_topk_freq=1) as llm:
        assert results(observe(llm, prompt(LENGTH), 4)) == results(off_long)


@pytest.mark.parametrize("length", [1, 128, TOPK * BLOCK - 8])
def test_sharing_is_exact_while_every_block_is_taken(checkpoint: Path, off: LLM, length: int) -> None:
    """Up to topk blocks of context a selection holds them all, whoever made it."""
    with open_llm(checkpoint, **FREQ_4) as llm:
        assert results(observe(llm, prompt(length), 8)) == results(observe(off, prompt(length), 8))


def test_only_compute_layers_select(checkpoint: Path) -> None:
    with open_llm(checkpoint, chunk=500, **FREQ_4) as llm:
        observe(llm, prompt(LENGTH), 4)
        computed, reused = llm.stats.selections_computed, llm.stats.selections_reused
    steps = 3 + 3
    assert {layer_id: count for layer_id, count in computed.items() if count} == {1: steps, 5: steps}
    assert {layer_id: count for layer_id, count in reused.items() if count} == dict.fromkeys((2, 3, 4, 6, 7), steps)


def test_audited_is_lean_and_its_overlaps_are_the_oracles(checkpoint: Path) -> None:
    with open_llm(checkpoint, **FREQ_4) as llm:
        lean = observe(llm, prompt(LENGTH), 4)
    with open_llm(checkpoint, index_reuse="audited", audit_interval=1, **FREQ_4) as llm:
        audited = observe(llm, prompt(LENGTH), 4)
        overlap_sum, overlap_count = llm.stats.overlap_sum, llm.stats.overlap_count
    assert results(audited) == results(lean)

    run = oracle(checkpoint, "DFSSSFSS").check(audited)
    chosen = slice(TOPK * BLOCK, None)  # before, there is nothing to choose from
    for layer_id in (2, 3, 4, 6, 7):
        fresh, reused = run.fresh[layer_id][:, chosen], run.attended[layer_id][:, chosen]
        shared = (fresh.unsqueeze(-1) == reused.unsqueeze(-2)).any(-1).sum(-1) / TOPK
        assert overlap_count[layer_id] == shared.numel()
        # One block of one (token, head) may be a tie in the shadow selection, which parity does not look at.
        assert overlap_sum[layer_id] == pytest.approx(float(shared.sum()), abs=1 / TOPK)
        # Better than the local block alone, worse than the same: the measure can tell layers apart.
        assert 1 / TOPK < overlap_sum[layer_id] / overlap_count[layer_id] < 0.99
    assert overlap_sum.keys() == {2, 3, 4, 6, 7}


def test_an_audit_runs_every_interval(checkpoint: Path) -> None:
    """6 steps of at most 300 tokens, an audit every 2nd: fewer tokens are audited than run."""
    counts = []
    for interval in (1, 2):
        with open_llm(checkpoint, chunk=300, index_reuse="audited", audit_interval=interval, **FREQ_4) as llm:
            observe(llm, prompt(LENGTH), 2)
            counts.append(llm.stats.overlap_count[2])
    every, second = counts
    assert every == 2 * (LENGTH + 1 - TOPK * BLOCK)
    assert 0 < second < every
