"""The whole engine on the triton backend, in Triton's interpreter where there is no GPU: a tiny model, a few tokens."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.errors import ConfigError
from engine.kernels import launch
from engine.types import GuidedSpec
from tests.checkpoints import make_checkpoint

SIZES = {
    "layers": 4, "hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "rotary_dim": 8, "index_dim": 16,
    "topk_blocks": 2, "experts": 4, "expert_width": 16, "dense_width": 32, "shared_width": 16, "vocab_size": 300,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("triton"), seed=1, **SIZES)


def tokens(model: Path, **settings: object) -> list[list[int]]:
    fixed = {"dtype": "float32", "max_model_len": 512, "num_pages": 12, "max_num_seqs": 2}
    prompts = [[i % 290 + 3 for i in range(265)], [7, 8, 9]]
    with LLM(model, **fixed, **settings) as llm:
        assert llm.info.backend == settings["backend"]
        greedy = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        return [output.token_ids for output in llm.generate(prompts, greedy)]


def test_tokens_equal_those_of_torch(model: Path) -> None:
    settings = {"index_topk_freq": 2, "async_scheduling": True}
    assert tokens(model, backend="triton", **settings) == tokens(model, backend="torch", **settings)


def test_guided_tokens_equal_those_of_torch(model: Path) -> None:
    """Two rows drawn under their masks by the kernel, one sampled as a whole, one free."""
    bound = GuidedSpec("regex", "[a-c]{2}")
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "guided": bound},
        {"temperature": 1.0, "seed": 1, "top_k": 3, "guided": bound},
        {"temperature": 0.0, "ignore_eos": True},
        {"temperature": 1.0, "seed": 2, "guided": bound},
    ]
    found = []
    for backend in ("triton", "torch"):
        fixed = {"dtype": "float32", "max_model_len": 512, "num_pages": 12, "async_scheduling": True}
        with LLM(model, backend=backend, **fixed) as llm:
            outputs = llm.generate([[7, 8, 9]] * 4, [SamplingParams(max_tokens=3, **kind) for kind in kinds])
        texts = [outputs[i].text for i in (0, 1, 3)]
        assert all(re.fullmatch("[a-c]{2}", text) for text in texts), texts
        found.append([output.token_ids for output in outputs])
    assert found[0] == found[1]


def test_reuse_layers_launch_no_indexer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, top-k and block unions run once per step in each F layer, and never in an S layer."""
    # One block of two: few programs for the interpreter.
    model = make_checkpoint(tmp_path, seed=1, **{**SIZES, "topk_blocks": 1})
    launched: Counter[str] = Counter()

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: Any, options: Any) -> None:
        launched[kernel.__name__] += 1
        kernel[grid](*args, **constants, **options)

    found = launch.detect()
    monkeypatch.setattr(launch, "detect", lambda: dataclasses.replace(found, recorder=record))
    fixed = {"dtype": "float32", "max_model_len": 512, "num_pages": 6, "max_num_seqs": 1, "enforce_eager": True}
    greedy = SamplingParams(max_tokens=1, temperature=0)
    per_prefill = {}
    for pattern in ("FF", "FS"):
        with LLM(model, backend="triton", index_topk_pattern=pattern, **fixed) as llm:
            launched.clear()
            llm.generate([[i % 290 + 3 for i in range(132)]], greedy)
            per_prefill[pattern] = dict(launched)
    indexer = ("score_prefill", "select_prefill", "_build_kernel")
    assert [per_prefill["FF"][name] for name in indexer] == [2, 2, 2]
    assert [per_prefill["FS"][name] for name in indexer] == [1, 1, 1]
    assert per_prefill["FF"]["_attend_kernel"] == per_prefill["FS"]["_attend_kernel"] == 2


def test_heads_that_have_no_tiles_are_refused(tmp_path: Path) -> None:
    odd = make_checkpoint(tmp_path, **{**SIZES, "head_dim": 48, "rotary_dim": 16})
    with pytest.raises(ConfigError, match="head_dim=48: backend=triton needs a power of two"):
        LLM(odd, backend="triton")
