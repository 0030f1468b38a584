"""Groups of worker processes sample what one process does, whatever shapes the choice of a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.executor import Executor, InlineExecutor
from engine.ray_executor import RayExecutor
from engine.types import EngineRequest, GuidedSpec, Logprobs, SamplingParams
from tests.checkpoints import small_engine
from tests.cluster import Cluster

# Of each way in which ranks sample: from shares of the logits, or from whole rows.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2},
    {"temperature": 1.3, "top_k": 20, "seed": 3},
    {"temperature": 1.0, "seed": 4, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 5, "min_tokens": 3},
    {"temperature": 0.0, "logit_bias": {3: 5.0}, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 6, "guided": GuidedSpec("json_object"), "ignore_eos": False, "logprobs": 1},
    {"temperature": 0.0, "guided": GuidedSpec("regex", r"[a-z]+ \d+"), "ignore_eos": False},
]
SIZES = {"max_model_len": 1024, "max_num_seqs": 10, "index_topk_freq": 2}
Answer = tuple[list[int], list[Logprobs]]


def generate(settings: EngineConfig, executor: Executor) -> dict[str, Answer]:
    core = EngineCore(settings, executor)
    try:
        found: dict[str, Answer] = {}
        for i, kind in enumerate(KINDS):
            sampling = SamplingParams(**{"max_tokens": 8 + i, "ignore_eos": True, "seed": 0, **kind})
            core.add_request(EngineRequest(str(i), list(range(3 + i, 90 + 20 * i)), sampling))
        while core.has_work():
            for event in core.step():
                assert event.error is None
                tokens, logprobs = found.setdefault(event.request_id, ([], []))
                tokens.extend(event.token_ids)
                logprobs.extend(event.logprobs or [])
        return found
    finally:
        core.close()


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, Answer]:
    settings = small_engine(checkpoint, **SIZES)
    return generate(settings, InlineExecutor(settings))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_groups_sample_what_one_process_does(
    cluster: Cluster, checkpoint: Path, expected: dict[str, Answer], num_ranks: int
) -> None:
    settings = small_engine(checkpoint, tensor_parallel_size=num_ranks, **SIZES)
    executor = RayExecutor(settings)
    assert executor.info.kernels["all_reduce"] == "gloo"
    found = generate(settings, executor)
    assert {name: tokens for name, (tokens, _) in found.items()} == {name: each[0] for name, each in expected.items()}
    for name, (_, logprobs) in found.items():
        assert len(logprobs) == len(expected[name][1])
        for got, want in zip(logprobs, expected[name][1], strict=True):
            assert got == pytest.approx(want, abs=1e-4)
