"""A request whose numbers are not finite, in the whole engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import SamplingParams
from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.executor import InlineExecutor
from engine.types import EngineRequest, FinishReason, RequestEvent
from tests.checkpoints import make_checkpoint, poison

ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA or ROCm device: the interpreter takes minutes"
)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=[pytest.mark.gpu, ON_GPU])])
def test_pages_of_a_request_with_nan_go_clean_to_the_next(tmp_path: Path, backend: str) -> None:
    """Every page has held NaN when the good requests get them, and 0 * NaN would be NaN."""
    bad_id = 511
    model = poison(make_checkpoint(tmp_path, seed=1), bad_id)
    sampling = SamplingParams(max_tokens=2, temperature=0, seed=0, ignore_eos=True, logit_bias={bad_id: -100})
    good = [[i % 290 + 3 for i in range(265)], [7, 8, 9]]
    fixed: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "num_pages": 4, "max_num_seqs": 2}
    config = EngineConfig.from_kwargs(model, backend=backend, async_scheduling=True, **fixed)
    core = EngineCore(config, InlineExecutor(config))

    def run(name: str, prompts: list[list[int]]) -> list[list[RequestEvent]]:
        found: dict[str, list[RequestEvent]] = {}
        for i, prompt in enumerate(prompts):
            found[f"{name}{i}"] = []
            core.add_request(EngineRequest(f"{name}{i}", prompt, sampling))
        while core.has_work():
            for event in core.step():
                found[event.request_id].append(event)
        return list(found.values())

    try:
        clean = run("clean", good)
        for events in run("bad", [[bad_id] * 300, [5] * 100 + [bad_id]]):
            assert events[-1].finish_reason == FinishReason.ERROR and events[-1].error
        assert core.stats.not_finite == 2
        after = run("after", good)
    finally:
        core.close()
    assert [[event.token_ids for event in events] for events in after] == [
        [event.token_ids for event in events] for events in clean
    ]
    assert all(events[-1].finish_reason == FinishReason.LENGTH for events in after)
