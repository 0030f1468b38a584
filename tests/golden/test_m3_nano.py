"""The demo checkpoint in transformers: what an evaluation harness reads over HTTP is what it would get from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.demo import CHECKPOINT
from engine import LLM, SamplingParams
from engine.tokenizer import Tokenizer
from tests.golden.oracle import Oracle

# As the client checks of tests/compat ask for them through lm-eval.
CHOICES = Path(__file__).parents[1] / "compat" / "tasks" / "choices.json"


def test_log_likelihoods_are_those_of_transformers() -> None:
    """Short of the positions where the plan's S layers reuse a selection, which transformers does not do."""
    tokenizer = Tokenizer.from_dir(CHECKPOINT)
    rows = json.loads(CHOICES.read_text())
    texts = [tokenizer.encode(f"{row['context']} {choice}") for row in rows for choice in row["choices"]]
    with LLM(CHECKPOINT, dtype="float32") as llm:
        outputs = llm.generate(texts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    oracle = Oracle(CHECKPOINT)
    for token_ids, output in zip(texts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        expected = oracle.run(token_ids).logprobs
        found = [entry[token] for token, entry in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True) if entry]
        assert found == pytest.approx([float(expected[i, token]) for i, token in enumerate(token_ids[1:])], abs=1e-4)
