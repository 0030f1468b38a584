"""From scores to figures: loss by position, accuracy by task and distance, and how two plans differ on the same data.

Intervals are percentile bootstraps, 95 %: of documents for losses, of questions for accuracies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.scoring import Score
from service.evaluation.data import DISTANCES, POSITIONS, Data

_RESAMPLES, _AT_ONCE = 2000, 50
_INTERVAL = (2.5, 97.5)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """One plan on the data.

    plan: its letters, or a name.  nats: float32 [documents, length], NaN at position 0.  correct: bool [questions],
    whether all tokens of the answer were the likeliest ones.  overlap: layer -> mean overlap of reused selections,
    where they were audited.  seconds: that it took.
    """

    plan: str
    nats: NDArray[np.float32]
    correct: NDArray[np.bool_]
    overlap: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


def measured(
    data: Data,
    plan: str,
    nats: Sequence[NDArray[np.float32]],
    tasks: Sequence[Score],
    *,
    overlap: dict[int, float] | None = None,
    seconds: float = 0.0,
) -> Measured:
    """nats: float32 [length] of each document.  tasks: of each synthetic sequence."""
    answers = data.answers
    spans = zip(answers.sequence.tolist(), answers.start.tolist(), answers.end.tolist(), strict=True)
    correct = [bool(tasks[sequence].best[start:end].all()) for sequence, start, end in spans]
    losses_of_all = np.array(nats, dtype=np.float32).reshape(len(nats), data.sizes.length)
    return Measured(plan, losses_of_all, np.array(correct, dtype=bool), overlap or {}, seconds)


def losses(data: Data, found: Measured) -> list[Row]:
    """Mean nats per token and bits per byte by position, then past the positions that see every block, then of far
    copies. The same documents are in all buckets."""
    rows = []
    for name, mask in _loss_parts(data):
        values = found.nats[mask].astype(np.float64)
        if values.size:
            size = int(data.token_bytes[mask].sum())
            bits = float(values.sum() / np.log(2) / size) if size else float("nan")
            rows.append({"part": name, "tokens": int(values.size), "nats": float(values.mean()), "bits_per_byte": bits})
    return rows


def accuracies(data: Data, found: Measured) -> list[Row]:
    """Share of questions answered right, by task and distance, and by hops where there are several."""
    return [
        {**key, "questions": int(mask.sum()), "accuracy": float(found.correct[mask].mean())}
        for key, mask in _answer_parts(data)
    ]


def loss_differences(data: Data, base: Measured, other: Measured) -> list[Row]:
    """Nats per token of `other` minus those of `base`, per document, with intervals; parts as in `losses`."""
    rows = []
    for name, mask in _loss_parts(data):
        counts = mask.sum(axis=1)
        inside = counts > 0
        if inside.any():
            difference = np.where(mask, other.nats.astype(np.float64) - base.nats, 0.0).sum(axis=1)
            rows.append({"part": name, "documents": int(inside.sum()), **_mean(difference[inside], counts[inside])})
    return rows


def accuracy_differences(data: Data, base: Measured, other: Measured) -> list[Row]:
    """Accuracy of `other` minus that of `base`, question by question, with intervals; parts as in `accuracies`."""
    rows = []
    for key, mask in _answer_parts(data):
        difference = other.correct[mask].astype(np.float64) - base.correct[mask]
        rows.append({**key, "questions": int(mask.sum()), **_mean(difference, np.ones(len(difference)))})
    return rows


def _mean(sums: NDArray[np.float64], counts: NDArray[Any]) -> Row:
    """Sum over sum, and the interval when whole units (documents, questions) are drawn anew; float64 [units], not
    empty. The same for the same values."""
    rng = np.random.default_rng(0)
    means = []
    # In parts: thousands of questions times thousands of resamples take memory.
    for _ in range(_RESAMPLES // _AT_ONCE):
        drawn = rng.integers(len(sums), size=(_AT_ONCE, len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), _INTERVAL)
    return {"difference": float(sums.sum() / counts.sum()), "low": float(low), "high": float(high)}


def _loss_parts(data: Data) -> list[tuple[str, NDArray[np.bool_]]]:
    """Names and masks, bool [documents, length]. Position 0 has no prediction."""
    shape = (len(data.documents), data.sizes.length)
    if not shape[0]:
        return []
    position = np.broadcast_to(np.arange(data.sizes.length), shape)
    parts = [
        (span(low, high), (position >= max(1, low)) & (position < high))
        for low, high in itertools.pairwise(_bounds(POSITIONS, data.sizes.length))
    ]
    past = position >= max(1, data.sizes.skip_tokens)
    if past.any():
        parts.append((f"from {data.sizes.skip_tokens} on", past))
    if data.far_copy.any():
        parts.append(("far copies", data.far_copy & (position > 0)))
    return parts


def _answer_parts(data: Data) -> list[tuple[Row, NDArray[np.bool_]]]:
    """What identifies a part, and its mask, bool [questions]; only parts that have questions."""
    answers = data.answers
    parts: list[tuple[Row, NDArray[np.bool_]]] = []
    for task_id, task in enumerate(data.sizes.tasks):
        of_task = answers.task == task_id
        for low, high in itertools.pairwise(_bounds(DISTANCES, data.sizes.length)):
            inside = of_task & (answers.distance >= low) & (answers.distance < high)
            parts.append(({"task": task, "distance": span(low, high), "hops": None}, inside))
        parts.append(({"task": task, "distance": "all", "hops": None}, of_task))
        hops = np.unique(answers.hops[of_task])
        if len(hops) > 1:
            for count in hops.tolist():
                inside = of_task & (answers.hops == count)
                parts.append(({"task": task, "distance": "all", "hops": count}, inside))
    return [(key, mask) for key, mask in parts if mask.any()]


def span(low: int, high: int) -> str:
    """The name of the bucket [low, high)."""
    return f"{_short(low)}-{_short(high)}"


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)


def _bounds(bounds: Sequence[int], length: int) -> list[int]:
    """Those up to the first that no position reaches."""
    count = next((i for i, bound in enumerate(bounds) if bound >= length), len(bounds) - 1)
    return list(bounds[: count + 1])
