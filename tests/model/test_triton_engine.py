"""The whole engine on the triton backend, in Triton's interpreter where there is no GPU: a tiny model, a few tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import LLM, SamplingParams
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
