"""Losses and ranks of given tokens, and what they say about two index plans, on a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.errors import RequestError
from engine.scoring import judge, score
from service.evaluation.data import Answers, Data, Sizes
from service.evaluation.gate import regressions
from service.evaluation.measure import Measured, accuracies, measured

SETTINGS: dict[str, Any] = {
    "backend": "torch",
    "dtype": "float32",
    "num_threads": 1,
    "max_model_len": 2048,
    "num_pages": 64,
}


def test_scores_are_those_of_the_engine(checkpoint: Path) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(500, size=length).tolist() for length in (3, 300, 700)]
    done: list[int] = []
    with LLM(checkpoint, **SETTINGS) as llm:
        nats, judged = score(llm, sequences, done.append), judge(llm, sequences)
        outputs = llm.generate(sequences, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=3))
        # A likeliest token is what greedy decoding gives.
        greedy = llm.generate(sequences, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
        [continued] = judge(llm, [[*sequences[1], *greedy[1].token_ids]])
        with pytest.raises(RequestError, match="prompt has 2048 tokens"):
            score(llm, [[1] * 2048])
        assert score(llm, []) == []
    assert sum(done) == 1003
    for ids, values, each, output in zip(sequences, nats, judged, outputs, strict=True):
        assert output.prompt_logprobs is not None
        assert values.dtype == np.float32 and len(values) == len(ids) and np.isnan(values[0]) and not each.best[0]
        np.testing.assert_array_equal(values, each.nats)
        for i, entries in enumerate(output.prompt_logprobs[1:], start=1):
            assert entries is not None
            assert values[i] == pytest.approx(-entries[ids[i]], abs=1e-6)
            assert each.best[i] == (entries[ids[i]] == max(entries.values()))
    assert continued.best[300:].all() and not continued.best[1:300].all()


@pytest.fixture(scope="module")
def plans(checkpoint: Path) -> tuple[Data, Measured, Measured]:
    """What the engine says after long prompts when every layer selects, asked of it again, and of an engine in which
    one layer selects for all."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(500, size=length).tolist() for length in (200, 1100, 1500, 1900)]
    with LLM(checkpoint, **SETTINGS) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
        sequences = [[*prompt, *output.token_ids] for prompt, output in zip(prompts, outputs, strict=True)]
        data = _questions(prompts, sequences)
        base = measured(data, str(llm.plan), [], judge(llm, sequences))
    with LLM(checkpoint, index_topk_pattern="FSS", **SETTINGS) as llm:
        other = measured(data, str(llm.plan), [], judge(llm, sequences))
    return data, base, other


def _questions(prompts: list[list[int]], sequences: list[list[int]]) -> Data:
    """Every token that was generated is a question, at the distance of its prompt's beginning."""
    rows = [
        (which, 0, i, i + 1, i, 1)
        for which, prompt in enumerate(prompts)
        for i in range(len(prompt), len(sequences[which]))
    ]
    sizes = Sizes(length=2048, documents=0, examples=4, seed=0, skip_tokens=512, tasks=("recall",))
    nothing = np.zeros((0, 2048), dtype=np.int64)
    return Data(
        sizes=sizes,
        names=[],
        documents=[],
        token_bytes=nothing,
        far_copy=nothing.astype(bool),
        sequences=sequences,
        answers=Answers(*np.array(rows, dtype=np.int64).T),
    )


def test_a_plan_that_answers_worse_is_told(plans: tuple[Data, Measured, Measured]) -> None:
    data, base, other = plans
    assert (base.plan, other.plan) == ("DDFFF", "DDFSS")
    assert base.correct.all(), "greedy tokens are the likeliest ones"
    found = {row["distance"]: row["accuracy"] for row in accuracies(data, other)}
    # Where every block is selected anyway both plans are the same.
    assert found.pop("128-512") == 1.0
    assert found["1k-2k"] < 0.9
    told = regressions(data, base, other, tolerance=0.05)
    assert len(told) == 2 and told[0].startswith("recall, distance 1k-2k: accuracy 1.000 -> ")
    assert "120 questions), tolerance 0.05" in told[0] and told[1].startswith("recall, distance all: ")
    assert regressions(data, base, base, tolerance=0.0) == []
    assert regressions(data, other, base, tolerance=0.0) == [], "better is not worse"
    assert regressions(data, base, other, tolerance=0.99) == []


def test_a_gate_on_other_data_is_refused(plans: tuple[Data, Measured, Measured]) -> None:
    data, base, _ = plans
    short = Measured("DDFFF", base.nats, base.correct[1:])
    with pytest.raises(ValueError, match="DDFFF has 159 answers, the data 160 questions"):
        regressions(data, base, short, tolerance=0.1)
    with pytest.raises(ValueError, match=r"tolerance must be in \[0, 1\), got 1"):
        regressions(data, base, base, tolerance=1)
