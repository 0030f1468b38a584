"""The oracle itself: what the golden tests take for granted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deploy.demo.writer import write_shards
from engine.msa.plan import IndexPlan
from tests.checkpoints import make_checkpoint
from tests.golden.configs import make_prompt
from tests.golden.oracle import Oracle

LENGTH = 900
TOPK, LOCAL = 4, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("oracle")
    return make_checkpoint(path, shards=1, seed=41, layers=4, heads=4, topk_blocks=TOPK, local_blocks=LOCAL)


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    return make_prompt(LENGTH, vocab_size=500)


@pytest.mark.parametrize("part", ["experts.3.w2", "index_k_proj", "e_score_correction_bias", "lm_head"])
def test_it_refuses_what_transformers_would_fill_with_random_weights(tmp_path: Path, part: str) -> None:
    path = make_checkpoint(tmp_path, shards=1)
    tensors = load_file(path / "model-00001-of-00001.safetensors")
    write_shards(path, {name: tensor for name, tensor in tensors.items() if part not in name}, 1)
    # transformers itself refuses an incomplete stack of experts, and only that.
    with pytest.raises(RuntimeError if "experts" in part else AssertionError):
        Oracle(path)


def test_block_scores_explain_the_selection(checkpoint: Path, token_ids: list[int]) -> None:
    oracle = Oracle(checkpoint)
    run = oracle.run(token_ids)
    for layer_id, head, token in ((2, 0, LENGTH - 1), (3, 1, LENGTH - 1), (2, 1, 700), (3, 0, 640)):
        scores = oracle.block_scores(run, layer_id, head, token)
        own = token // 128
        local = {own - back for back in range(LOCAL)}
        rest = sorted((block for block in range(own + 1) if block not in local), key=lambda b: -scores[b])
        assert run.attended[layer_id][head, token].tolist() == sorted(local | set(rest[: TOPK - LOCAL]))


def test_a_forced_selection_is_attended_with(checkpoint: Path, token_ids: list[int]) -> None:
    oracle = Oracle(checkpoint)
    free = oracle.run(token_ids)
    where = (3, 0, LENGTH - 1)
    unpicked = [block for block in range(6) if block not in free.attended[3][0, -1]]
    blocks = [*unpicked[:2], 6, 7]
    forced = oracle.run(token_ids, {where: blocks})
    assert forced.attended[3][0, -1].tolist() == blocks
    assert not torch.allclose(forced.logprobs[-1], free.logprobs[-1], atol=1e-3)
    assert torch.equal(forced.logprobs[:-1], free.logprobs[:-1])


def test_a_reuse_layer_attends_with_its_source(checkpoint: Path, token_ids: list[int]) -> None:
    run = Oracle(checkpoint, IndexPlan.build([False, False, True, True], freq=2)).run(token_ids)
    assert torch.equal(run.attended[3], run.attended[2])
    assert not torch.equal(run.fresh[3], run.attended[3])
