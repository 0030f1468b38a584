"""What must not change a result: the batch, the prefix cache, preemption, the chunking."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from engine import LLM, Output, SamplingParams
from tests.checkpoints import make_checkpoint

LENGTHS = [1, 5, 127, 128, 129, 300, 700, 900]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("determinism"), topk_blocks=2)


def load(model: Path, **settings: object) -> LLM:
    defaults = {"dtype": "float32", "max_model_len": 2048, "num_threads": 1, "num_pages": 128}
    return LLM(model, **{**defaults, **settings})


def prompts(vocab_size: int) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in LENGTHS]


def params() -> list[SamplingParams]:
    """Greedy and sampled, with every kind of change to the logits; requests of different lengths."""
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_p": 0.9, "seed": 2},
        {"temperature": 1.3, "top_k": 20, "seed": 3},
        {"temperature": 1.0, "min_p": 0.05, "seed": -4},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5, "seed": 5},
        {"temperature": 1.0, "logit_bias": {3: 5.0, 9: -100.0}, "seed": 6},
    ]
    return [
        SamplingParams(max_tokens=20 + i, ignore_eos=True, logprobs=2, **kind)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds)
    ]


@pytest.fixture(scope="module")
def alone(model: Path) -> list[Output]:
    """Each request by itself, without a prefix cache."""
    with load(model, enable_prefix_caching=False) as llm:
        given = prompts(llm.info.vocab_size)
        return [llm.generate([p], s)[0] for p, s in zip(given, params(), strict=True)]


def same(outputs: list[Output], expected: list[Output], *, exact: bool = False) -> None:
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert [o.text for o in outputs] == [o.text for o in expected]
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.logprobs is not None and wanted.logprobs is not None
        for got, want in zip(output.logprobs, wanted.logprobs, strict=True):
            assert got == want if exact else got == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("order", ["given", "reversed"])
def test_batch_does_not_matter(model: Path, alone: list[Output], order: str) -> None:
    step = 1 if order == "given" else -1
    with load(model, enable_prefix_caching=False) as llm:
        given = prompts(llm.info.vocab_size)
        outputs = llm.generate(given[::step], params()[::step])[::step]
    same(outputs, alone)


def test_decoding_in_a_batch_is_bit_for_bit(model: Path) -> None:
    """Prompts that are not cut into chunks: then not even the last bit may differ."""
    settings = {"enable_prefix_caching": False, "max_num_batched_tokens": 512}
    short = [list(range(10 * i + 1, 10 * i + 60)) for i in range(6)]
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=3)
    with load(model, **settings) as llm:
        expected = [llm.generate([prompt], sampling)[0] for prompt in short]
        outputs = llm.generate(short, sampling)
    assert llm.stats.observations.batch_size.count(6) > 0, "the requests never ran together"
    same(outputs, expected, exact=True)


@pytest.mark.parametrize("chunk", [48, 128, 200])
def test_chunked_prefill_mixed_with_decode(model: Path, alone: list[Output], chunk: int) -> None:
    with load(model, enable_prefix_caching=False, max_num_batched_tokens=chunk, max_num_seqs=3) as llm:
        same(llm.generate(prompts(llm.info.vocab_size), params()), alone)


@pytest.mark.parametrize("num_pages", [128, 20])
def test_overlapping_steps(model: Path, alone: list[Output], num_pages: int) -> None:
    """A step is planned before the tokens of the last one are known; with few pages requests are preempted, too."""
    settings = {"async_scheduling": True, "num_pages": num_pages, "max_num_batched_tokens": 300, "max_num_seqs": 4}
    with load(model, **settings) as llm:
        assert llm.info.max_in_flight == 2
        same(llm.generate(prompts(llm.info.vocab_size), params()), alone)


def test_prefix_cache(model: Path, alone: list[Output]) -> None:
    """The second run finds every whole page of the first, and says so."""
    with load(model) as llm:
        given = prompts(llm.info.vocab_size)
        first = llm.generate(given, params())
        again = llm.generate(given, params())
    same(first, alone)
    same(again, alone)
    assert [o.num_cached_tokens for o in first] == [0] * len(LENGTHS)
    assert [o.num_cached_tokens for o in again] == [(length - 1) // 128 * 128 for length in LENGTHS]


@pytest.mark.parametrize("caching", [True, False])
def test_preemption(model: Path, caching: bool) -> None:
    """All fit at first and outgrow the pages together: some give theirs back and start over, and no one can tell."""
    given = [list(range(i, i + 110 + i)) for i in range(8)]
    longer = [dataclasses.replace(sampling, max_tokens=160) for sampling in params()]
    with load(model, enable_prefix_caching=False) as llm:
        expected = llm.generate(given, longer)
    with load(model, max_model_len=1024, num_pages=16, enable_prefix_caching=caching) as llm:
        outputs = llm.generate(given, longer)
        assert llm.stats.preemptions > 0, "nothing was preempted"
    same(outputs, expected)


def test_reuse_plans_differ_and_keep_these_promises(model: Path) -> None:
    """A plan that reuses changes long contexts only, and is as deterministic as the others."""
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
    with load(model, index_topk_freq=4) as llm:
        given = prompts(llm.info.vocab_size)
        together = llm.generate(given, sampling)
        separate = [llm.generate([prompt], sampling)[0] for prompt in given]
    same(together, separate)
    with load(model) as llm:
        exact = llm.generate(given, sampling)
    for length, reused, full in zip(LENGTHS, together, exact, strict=True):
        if length + 12 <= 256:  # topk_blocks * 128
            assert reused.token_ids == full.token_ids
            assert reused.logprobs == full.logprobs
    assert any(reused.logprobs != full.logprobs for reused, full in zip(together, exact, strict=True))
