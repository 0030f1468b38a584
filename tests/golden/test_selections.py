"""What holds for every selection, whatever the checkpoint, the prompt and the chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine import LLM
from engine.msa.plan import Role
from tests.checkpoints import make_checkpoint
from tests.golden.compare import observe, open_llm
from tests.golden.configs import make_prompt
from tests.golden.oracle import BLOCK

# (topk, init, local): one free slot; all forced; none forced; more slots than blocks.
SHAPES = [(3, 1, 1), (3, 1, 2), (2, 0, 0), (32, 2, 3)]
CHUNKS = (100, 257, 4096)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "top{}-init{}-local{}".format(*shape))
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[tuple[int, int, int], list[LLM]]]:
    topk, init, local = request.param
    sizes: dict[str, Any] = {"topk_blocks": topk, "init_blocks": init, "local_blocks": local}
    path = make_checkpoint(tmp_path_factory.mktemp("selections"), seed=31, layers=5, heads=4, **sizes)
    opened = [open_llm(path, chunk=chunk, index_topk_freq=2) for chunk in CHUNKS]
    yield request.param, opened
    for llm in opened:
        llm.close()


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(length=st.integers(1, 1200), seed=st.integers(0, 2**32), which=st.integers(0, len(CHUNKS) - 1))
@example(length=1, seed=0, which=0)
@example(length=3 * BLOCK, seed=0, which=2)
@example(length=3 * BLOCK + 1, seed=0, which=1)
def test_every_selection_is_legal(
    engines: tuple[tuple[int, int, int], list[LLM]], length: int, seed: int, which: int
) -> None:
    (topk, init, local), opened = engines
    llm = opened[which]
    observed = observe(llm, make_prompt(length, vocab_size=500, seed=seed), 3)
    own = torch.arange(length + 2) // BLOCK  # the block of each token
    sparse = {layer_id for layer_id, role in enumerate(llm.plan.roles) if role is not Role.DENSE}
    assert observed.selections.keys() == sparse
    for layer_id, blocks in observed.selections.items():
        assert blocks.shape[1:] == (length + 2, topk)
        valid = blocks >= 0
        assert torch.equal(valid.sum(-1), (own + 1).clamp(max=topk).expand(valid.shape[:2])), "as many as there are"
        assert not (valid[..., 1:] & ~valid[..., :-1]).any(), "-1 only at the right"
        assert (blocks[~valid] == -1).all()
        assert (blocks <= own[:, None]).all(), "causal"
        ascending = blocks[..., 1:] > blocks[..., :-1]
        assert (ascending | ~valid[..., 1:]).all(), "ascending, so unique"
        forced = [own - back for back in range(local)] + [torch.full_like(own, first) for first in range(init)]
        for block in forced:
            exists = (block >= 0) & (block <= own)
            assert ((blocks == block[:, None]).any(-1) | ~exists).all(), "local and init blocks"
        source = llm.plan.source(layer_id)
        assert torch.equal(blocks, observed.selections[source]), "an S layer reads what its source wrote"
