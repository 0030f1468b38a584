"""The demo checkpoint's plan must keep what the model can do without sharing, at every distance."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.demo import CHECKPOINT
from engine.config import PAGE_SIZE, EngineConfig, resolve_model
from service.evaluation.data import Data, Sizes, make_data
from service.evaluation.documents import read_documents, shipped_documents
from service.evaluation.gate import loss_regressions, regressions
from service.evaluation.measure import Measured, accuracies
from service.evaluation.offline import evaluate

# Of a task's questions in a bucket of distances, and nats per token in a bucket of positions.
ACCURACY_TOLERANCE = 0.01
LOSS_TOLERANCE = 0.01
# All that the model can see.
LENGTH = 8191
TASKS = ("recall", "copy", "tracking")


@pytest.fixture(scope="module")
def measured() -> tuple[Data, dict[str, Measured]]:
    """The gate's data, and on it: no sharing, the plan that ships, and the uniform one of the same sparsity."""
    model, _ = resolve_model(EngineConfig(str(CHECKPOINT)))
    skip_tokens = model.topk_blocks * PAGE_SIZE
    sizes = Sizes(length=LENGTH, documents=1, examples=1, seed=0, skip_tokens=skip_tokens, tasks=TASKS)
    data = make_data(Path(CHECKPOINT), read_documents(shipped_documents()), sizes)
    found, _ = evaluate(Path(CHECKPOINT), data, {}, ["F", None, "2"])
    return data, dict(zip(("all F", "shipped", "uniform"), found, strict=True))


def test_the_model_can_what_is_asked(measured: tuple[Data, dict[str, Measured]]) -> None:
    """Else nothing could be lost."""
    data, found = measured
    total = {row["task"]: row["accuracy"] for row in accuracies(data, found["all F"]) if row["distance"] == "all"}
    assert min(total.values()) > 0.7, total


def test_the_shipped_plan_passes(measured: tuple[Data, dict[str, Measured]]) -> None:
    data, found = measured
    assert found["shipped"].plan.count("S") >= 4, "nothing is shared"
    assert regressions(data, found["all F"], found["shipped"], ACCURACY_TOLERANCE) == []
    assert loss_regressions(data, found["all F"], found["shipped"], LOSS_TOLERANCE) == []


def test_the_uniform_plan_of_equal_sparsity_does_not(measured: tuple[Data, dict[str, Measured]]) -> None:
    data, found = measured
    assert found["uniform"].plan.count("S") == found["shipped"].plan.count("S")
    assert regressions(data, found["all F"], found["uniform"], ACCURACY_TOLERANCE)
    told = loss_regressions(data, found["all F"], found["uniform"], LOSS_TOLERANCE)
    for bucket in ("2k-4k", "4k-8k"):
        assert any(bucket in line for line in told), told
    assert not any("0-512" in line or "512-1k" in line for line in told), "there every block is selected"
