"""The engine on a GPU: the same tokens as on CPU, and captured, overlapped steps the same as plain ones."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, Output, SamplingParams
from engine.types import GuidedSpec
from tests.checkpoints import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

LENGTHS = [1, 5, 127, 128, 129, 300, 700, 1500]
PLANS = [{}, {"index_topk_freq": 2}]
ONE_HEAD = {"heads": 8, "kv_heads": 1, "head_dim": 128, "rotary_dim": 64, "index_dim": 128, "topk_blocks": 3}


@pytest.fixture(scope="module", params=[{}, ONE_HEAD], ids=["small", "one_kv_head"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gpu"), seed=3, **request.param)


def generate(model: Path, *, max_tokens: int | None = None, **settings: object) -> tuple[list[Output], LLM]:
    """max_tokens: of every request; None: they differ."""
    defaults = {"dtype": "float32", "max_model_len": 2048, "num_pages": 128, "max_num_batched_tokens": 512}
    with LLM(model, **{**defaults, **settings}) as llm:
        rng = random.Random(5)
        prompts = [[rng.randrange(llm.info.vocab_size) for _ in range(length)] for length in LENGTHS]
        lengths = [max_tokens or 24 + i for i in range(len(LENGTHS))]
        greedy = [SamplingParams(max_tokens=length, temperature=0, ignore_eos=True) for length in lengths]
        return llm.generate(prompts, greedy), llm


def tokens(outputs: list[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_greedy_tokens_equal_those_of_the_cpu(model: Path, plan: dict[str, object]) -> None:
    expected, _ = generate(model, backend="torch", **plan)
    found, llm = generate(model, backend="triton", **plan)
    assert llm.info.backend == "triton" and llm.info.max_in_flight == 2
    assert tokens(found) == tokens(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_steps_give_the_tokens_of_eager_ones(model: Path, dtype: str) -> None:
    """The same steps, so that even in bf16 nothing may differ: 8 rows, a bucket of their own."""
    eager, _ = generate(model, dtype=dtype, enforce_eager=True, max_tokens=24)
    captured, llm = generate(model, dtype=dtype, max_tokens=24)
    assert tokens(captured) == tokens(eager)
    assert sum(llm.stats.selections_computed.values()) > 0


def test_overlapped_and_padded_steps_change_nothing(model: Path) -> None:
    """Requests end one by one: batches of 7, 6 and 5 rows run in a graph of 8."""
    plain, _ = generate(model, enforce_eager=True, async_scheduling=False)
    assert tokens(generate(model)[0]) == tokens(plain)


def test_a_guard_that_trips_changes_to_other_graphs(model: Path) -> None:
    """Random indexers do not agree: it trips at the second audit, with steps of the other plan in flight."""
    guard: dict[str, object] = {"index_topk_freq": 2, "index_reuse": "audited", "audit_interval": 4}
    guard |= {"audit_overlap_floor": 0.95, "audit_trip_after": 1, "max_tokens": 24}
    eager, _ = generate(model, enforce_eager=True, **guard)
    captured, llm = generate(model, **guard)
    assert llm.stats.guard_active and llm.stats.guard_trips == 1
    assert tokens(captured) == tokens(eager)
    computed, reused = llm.stats.selections_computed, llm.stats.selections_reused
    for layer, letter in enumerate(str(llm.plan)):
        assert (layer in computed, layer in reused) == (letter in "FS", letter == "S")


def test_a_probed_step_measures_every_sparse_layer(model: Path) -> None:
    _, llm = generate(model, probe_interval=4, index_topk_freq=3)
    sparse = [i for i, letter in enumerate(str(llm.plan)) if letter in "FS"]
    computing = [i for i, letter in enumerate(str(llm.plan)) if letter == "F"]
    assert sorted({layer for layer, _ in llm.stats.indexer_s}) == computing
    assert sorted({layer for layer, _ in llm.stats.sparse_attention_s}) == sparse
    assert all(seconds > 0 for seconds in llm.stats.sparse_attention_s.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, and Ray")
@pytest.mark.parametrize("eager", [False, True])
def test_two_ranks_give_the_tokens_of_one(model: Path, eager: bool) -> None:
    """Greedy and free draws, from shares of the vocabulary, and draws that need whole rows."""
    kinds = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 1}, {"temperature": 0.8, "seed": 2, "top_p": 0.9}]
    params = [SamplingParams(max_tokens=24, ignore_eos=True, **kind) for kind in kinds]  # type: ignore[arg-type]
    prompts = [list(range(1 + i, 300 + i)) for i in range(len(kinds))]
    found = {}
    for size in (1, 2):
        settings = {"dtype": "float32", "max_model_len": 1024, "num_pages": 64, "enforce_eager": eager}
        with LLM(model, tensor_parallel_size=size, index_topk_freq=2, **settings) as llm:
            found[size] = tokens(llm.generate(prompts, params))
            assert ("all_reduce" in llm.info.kernels) == (size > 1)
    assert found[2] == found[1]


def test_sampling_does_not_depend_on_the_path(model: Path) -> None:
    """Free draws happen inside the graph, the others outside: seeds decide in both."""
    kinds = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_p": 0.9},
        {"temperature": 1.2, "seed": 3, "top_k": 20},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 4, "min_tokens": 5},
    ]
    params = [SamplingParams(max_tokens=20, logprobs=2, **kind) for kind in kinds]  # type: ignore[arg-type]
    prompt = list(range(1, 200))
    with LLM(model, dtype="float32", max_model_len=1024, num_pages=64) as llm:
        together = llm.generate([prompt] * len(params), params)
        alone = [llm.generate([prompt], one)[0] for one in params]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert all(o.logprobs is not None and len(o.logprobs) == len(o.token_ids) for o in together)


def test_guided_rows_beside_free_ones_equal_those_of_the_cpu(model: Path) -> None:
    """Free rows are drawn inside the graph, guided ones under their masks."""
    pytest.importorskip("llguidance")
    bound = GuidedSpec("regex", "[a-c]{6}x*")
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "guided": bound},
        {"temperature": 1.0, "seed": 1, "guided": bound},
        {"temperature": 1.0, "seed": 2, "top_k": 3, "guided": bound},
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3},
    ]
    params = [SamplingParams(max_tokens=16, ignore_eos="guided" not in kind, **kind) for kind in kinds]
    found = []
    for backend in ("torch", "triton"):
        with LLM(model, dtype="float32", max_model_len=1024, num_pages=64, backend=backend) as llm:
            outputs = llm.generate([list(range(1, 300))] * len(params), params)
        assert all(re.match("[a-c]{6}", output.text) for output in outputs[:3])
        found.append(tokens(outputs))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "fp8", [{"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8", "index_cache_dtype": "fp8"}], ids=str
)
def test_fp8_pages_equal_those_of_the_cpu(model: Path, fp8: dict[str, object]) -> None:
    """Rounding at the edge of two codes may differ: most first tokens are the same, and the bytes are fewer."""
    expected, cpu = generate(model, backend="torch", **fp8)
    found, gpu = generate(model, backend="triton", **fp8)
    assert gpu.info.page_bytes == cpu.info.page_bytes
    same = [a.token_ids[0] == b.token_ids[0] for a, b in zip(expected, found, strict=True)]
    assert sum(same) >= len(same) - 1
