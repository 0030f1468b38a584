"""Parity with transformers: log-probabilities within 1e-4, equal selections, however a prompt is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import LLM
from tests.checkpoints import make_checkpoint
from tests.golden.compare import Observed, Reference, observe, observe_batch, open_llm
from tests.golden.configs import CONFIGS, PROMPT_LENGTHS, make_prompt
from tests.golden.oracle import Oracle

WHOLE = 4096
NEW_TOKENS = 4  # 127 + 4 crosses into the second block


class Case:
    """One checkpoint: its oracle, and engines by the size of their chunks, each loaded once."""

    def __init__(self, path: Path, sizes: dict[str, Any]) -> None:
        make_checkpoint(path, **sizes)
        self.path = path
        self.reference = Reference(Oracle(path))
        self._vocab_size: int = sizes.get("vocab_size", 512)
        self._engines: dict[int, LLM] = {}

    def engine(self, chunk: int) -> LLM:
        if chunk not in self._engines:
            self._engines[chunk] = open_llm(self.path, chunk=chunk)
        return self._engines[chunk]

    def prompt(self, length: int) -> list[int]:
        return make_prompt(length, vocab_size=self._vocab_size)

    def observe(self, length: int, chunk: int, max_tokens: int = NEW_TOKENS) -> Observed:
        return observe(self.engine(chunk), self.prompt(length), max_tokens)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    opened = Case(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])
    yield opened
    opened.close()


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_whole_prefill(case: Case, length: int) -> None:
    case.reference.check(case.observe(length, WHOLE))


@pytest.mark.parametrize("chunk", [100, 128, 257])
@pytest.mark.parametrize("length", [129, 300, 1500, 3000])
def test_chunked_prefill(case: Case, length: int, chunk: int) -> None:
    case.reference.check(case.observe(length, chunk))


@pytest.mark.parametrize("length", [1, 129])
def test_prefill_token_by_token(case: Case, length: int) -> None:
    case.reference.check(case.observe(length, 1))


@pytest.mark.parametrize("length", [380, 700])
def test_decode_across_blocks(case: Case, length: int) -> None:
    """80 tokens of decode pass the border at 384 or 768, where the token's own block starts anew."""
    case.reference.check(case.observe(length, WHOLE, max_tokens=80))


def test_all_prompts_in_one_batch(case: Case) -> None:
    """Prefill chunks of some prompts share their steps with decode tokens of others."""
    prompts = [case.prompt(length) for length in PROMPT_LENGTHS]
    for observed in observe_batch(case.engine(257), prompts, NEW_TOKENS):
        case.reference.check(observed)
