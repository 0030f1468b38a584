"""Whether a plan keeps the accuracy and the loss of another one."""

from __future__ import annotations

from service.evaluation.data import Data
from service.evaluation.measure import Measured, accuracies, accuracy_differences, loss_differences, losses

# Fewer questions say nothing about a bucket.
MIN_QUESTIONS = 20


def regressions(data: Data, baseline: Measured, candidate: Measured, tolerance: float) -> list[str]:
    """What the candidate answers worse than the baseline, a line per part (task and distance, or hops); empty: nothing.

    A part counts when its accuracy falls by more than `tolerance` (a share, in [0, 1)) and the interval of the paired
    difference is below 0 throughout, which parts with fewer than MIN_QUESTIONS questions are not asked for.
    ValueError when the two were not measured on `data`, or the tolerance is out of range.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    _check_same_data(data, baseline, candidate)
    found: list[str] = []
    before, after = accuracies(data, baseline), accuracies(data, candidate)
    for row, old, new in zip(accuracy_differences(data, baseline, candidate), before, after, strict=True):
        if row["questions"] < MIN_QUESTIONS or row["difference"] >= -tolerance or row["high"] >= 0:
            continue
        hops = "" if row["hops"] is None else f", {row['hops']} hops"
        found.append(
            f"{row['task']}, distance {row['distance']}{hops}: accuracy {old['accuracy']:.3f} -> {new['accuracy']:.3f} "
            f"({row['difference']:+.3f}, 95 % interval {row['low']:+.3f} to {row['high']:+.3f}, {row['questions']} "
            f"questions), tolerance {tolerance:g}"
        )
    return found


def loss_regressions(data: Data, baseline: Measured, candidate: Measured, tolerance: float) -> list[str]:
    """Where the candidate's loss exceeds the baseline's, a line per part of `measure.losses`; empty: nowhere.

    A part counts when its mean loss rises by more than `tolerance` nats per token. ValueError when the two were not
    measured on `data`, or the tolerance is negative.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    _check_same_data(data, baseline, candidate)
    rows = zip(
        loss_differences(data, baseline, candidate), losses(data, baseline), losses(data, candidate), strict=True
    )
    return [
        f"loss, {row['part']}: {old['nats']:.4f} -> {new['nats']:.4f} nats ({row['difference']:+.4f}), "
        f"tolerance {tolerance:g}"
        for row, old, new in rows
        if row["difference"] > tolerance
    ]


def _check_same_data(data: Data, *found: Measured) -> None:
    for each in found:
        if len(each.correct) != len(data.answers):
            raise ValueError(f"{each.plan} has {len(each.correct)} answers, the data {len(data.answers)} questions")
        if each.nats.shape != data.token_bytes.shape:
            raise ValueError(f"{each.plan} has losses of shape {each.nats.shape}, the data {data.token_bytes.shape}")
