"""The start-up self-test: stored logits that do not drift, and faults of every kind of kernel that it catches."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM
from engine.errors import EngineDead
from engine.kernels.api import KernelSet, resolve
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import KVPages, RouteParams, Selection, SelectParams, SwigluParams
from engine.quant_config import Format
from engine.self_test import SEEDS, Limits, check, compute, row_errors, stored
from tests.checkpoints import make_checkpoint

TORCH = resolve("torch")


@pytest.mark.parametrize("mx", SEEDS)
def test_stored_logits_are_those_of_the_torch_backend(mx: Format | None) -> None:
    errors = row_errors(compute(TORCH, torch.float32, mx=mx), stored(mx))
    assert errors.shape == (9,)
    # Beyond this `python -m engine.self_test --write` was forgotten. Processors differ by some 1e-6.
    assert errors.max() < 2e-5
    assert stored(mx).isfinite().all() and stored(mx).std() > 1


def test_rounding_passes() -> None:
    """bf16 with fp8 pages rounds more than anything else that serves."""
    lines = check(TORCH, torch.bfloat16, where="cpu", kv_dtype=TORCH.fp8_dtype, formats={"mxfp4"})
    runs = [line.split(":")[0] for line in lines]
    assert runs == [
        "backend torch, float32",
        "backend torch, bfloat16, float8_e4m3fn",
        "backend torch, bfloat16, float8_e4m3fn, mxfp4",
    ]


def test_one_row_may_be_a_near_tie() -> None:
    limits = Limits.of(torch.bfloat16, None)
    assert limits.passed(torch.tensor([0.01, 0.3, 0.02]))
    assert not limits.passed(torch.tensor([0.3, 0.3, 0.02]))
    assert not limits.passed(torch.tensor([0.01, 0.9, 0.02]))
    assert not limits.passed(torch.tensor([0.01, math.nan, 0.02]))
    assert not Limits.of(torch.float32, None, None).passed(torch.tensor([0.01, 0.0, 0.0]))
    assert Limits.of(torch.bfloat16, None, torch.float8_e4m3fnuz).many > limits.many


# --- faults: each is one operation that is wrong in one respect ---


def ignores_scores(
    index_q: Tensor, pages: KVPages, batch: StepBatch, segment: Segment, params: SelectParams, out: Selection
) -> None:
    """Takes the first blocks in place of the best ones."""
    first = dataclasses.replace(params, init_blocks=params.topk_blocks - params.local_blocks)
    TORCH.select_blocks(index_q, pages, batch, segment, first, out)


def misses_a_key(
    q: Tensor, pages: KVPages, selection: Selection, batch: StepBatch, segment: Segment, scale: float, out: Tensor
) -> None:
    """Decode does not see the newest key."""
    if segment.phase == "decode":
        batch = dataclasses.replace(batch, seq_lens=batch.seq_lens - 1, positions=batch.positions - 1)
    TORCH.attend_sparse(q, pages, selection, batch, segment, scale, out)


def loses_an_expert(x: Tensor, packed: Any, weights: Tensor, ids: Tensor, act: SwigluParams) -> Tensor:
    """The shared expert, which is the last rank of the router's answer."""
    return TORCH.experts(x, packed, weights * (torch.arange(weights.shape[1]) < weights.shape[1] - 1), ids, act)


def ignores_the_bias(x: Tensor, gate: Any, bias: Tensor, params: RouteParams) -> tuple[Tensor, Tensor]:
    return TORCH.route(x, gate, torch.zeros_like(bias), params)


def is_no_number(x: Tensor, packed: Any) -> Tensor:
    """One NaN in each product of many rows."""
    out = TORCH.linear(x, packed)
    if len(out) > 8:
        out[-1, 0] = math.nan
    return out


@pytest.mark.parametrize(
    "fault",
    [
        {"select_blocks": ignores_scores},
        {"attend_sparse": misses_a_key},
        {"experts": loses_an_expert},
        {"route": ignores_the_bias},
        {"linear": is_no_number},
    ],
    ids=lambda fault: next(iter(fault.values())).__name__,
)
def test_a_wrong_kernel_is_caught(fault: dict[str, Any]) -> None:
    broken: KernelSet = dataclasses.replace(TORCH, **fault)
    with pytest.raises(EngineDead, match="self-test failed on some GPU: backend torch, float32: relative errors of"):
        check(broken, torch.bfloat16, where="some GPU")


def test_a_fault_of_the_served_dtype_alone_is_caught() -> None:
    """bf16 products that lose a tenth: as a kernel that was compiled wrongly for one dtype."""

    def linear(x: Tensor, packed: Any) -> Tensor:
        out = TORCH.linear(x, packed)
        return out * 0.9 if out.dtype == torch.bfloat16 else out

    with pytest.raises(EngineDead, match="backend torch, bfloat16: relative errors"):
        check(dataclasses.replace(TORCH, linear=linear), torch.bfloat16, where="some GPU")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tells_what_it_is_and_passes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_checkpoint(tmp_path, head_dim=64, rotary_dim=32, index_dim=64)
    with caplog.at_level(logging.INFO, "engine.self_test"):
        LLM(str(path), max_model_len=512, num_pages=8, enforce_eager=True).close()
        LLM(str(path), max_model_len=512, num_pages=8, enforce_eager=True, self_test=False).close()
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split()[2] for message in messages] == ["computes", "passed", "computes"]
    assert torch.cuda.get_device_properties(0).name in messages[0]
