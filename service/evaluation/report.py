"""What an evaluation found: one JSON document with everything, and tables for people."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from service.bench.report import Row, machine, table
from service.evaluation.data import Data
from service.evaluation.measure import (
    Measured,
    accuracies,
    accuracy_differences,
    loss_differences,
    losses,
)

_PACKAGES = ("m3serve", "torch", "numpy", "tokenizers")


def document(data: Data, results: Sequence[Measured], about: dict[str, Any]) -> dict[str, Any]:
    """Everything, ready for JSON. The first plan is what the others are compared with.

    about: of the engine or the endpoint.
    """
    base = results[0]
    plans = []
    for found in results:
        entry: dict[str, Any] = {
            "plan": found.plan,
            "seconds": found.seconds,
            "tokens_per_s": data.num_tokens / found.seconds if found.seconds else None,
            "loss": losses(data, found),
            "accuracy": accuracies(data, found),
            "overlap": {str(layer): share for layer, share in sorted(found.overlap.items())},
            "mean_overlap": _mean(list(found.overlap.values())),
            # One digit per question, in their order: what another run on the same data can be paired with.
            "correct": "".join("01"[int(flag)] for flag in found.correct),
        }
        if found is not base:
            entry["loss_difference"] = loss_differences(data, base, found)
            entry["accuracy_difference"] = accuracy_differences(data, base, found)
        plans.append(entry)
    sizes = data.sizes
    return {
        "format": "m3serve-evaluation",
        "version": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": machine(),
        **about,
        "data": {
            "sha256": data.sha256,
            "length": sizes.length,
            "documents": data.names,
            "examples_per_task": sizes.examples,
            "tasks": list(sizes.tasks),
            "seed": sizes.seed,
            "skip_tokens": sizes.skip_tokens,
            "tokens": data.num_tokens,
            "questions": len(data.answers),
        },
        "plans": plans,
    }


def page(found: dict[str, Any]) -> str:
    """The same as tables. found: of `document`."""
    data, plans = found["data"], found["plans"]
    blocks = []
    if plans[0]["loss"]:
        blocks.append(
            f"loss in nats per token, {len(data['documents'])} documents of {data['length']} tokens\n"
            + table([_loss_row(plans, i) for i in range(len(plans[0]["loss"]))])
        )
    if plans[0]["accuracy"]:
        blocks.append(
            f"accuracy, {data['questions']} questions in sequences of {data['length']} tokens\n"
            + table([_accuracy_row(plans, i) for i in range(len(plans[0]["accuracy"]))])
        )
    overlaps = [
        f"{plan['plan']}: mean overlap {plan['mean_overlap']:.3f}" for plan in plans if plan["mean_overlap"] is not None
    ]
    if overlaps:
        blocks.append("\n".join(overlaps))
    if len(plans) > 1:
        blocks.append(
            f"Differences are from {plans[0]['plan']} on the same data, with 95 % bootstrap intervals; positions below "
            f"{data['skip_tokens']} are the same under every plan."
        )
    return "\n\n".join(blocks)


def _loss_row(plans: Sequence[dict[str, Any]], i: int) -> Row:
    first = plans[0]["loss"][i]
    row: Row = {
        "position": first["part"],
        "tokens": first["tokens"],
        "bits/byte": f"{first['bits_per_byte']:.4f}",
        plans[0]["plan"]: f"{first['nats']:.4f}",
    }
    for plan in plans[1:]:
        row[plan["plan"]] = f"{plan['loss'][i]['nats']:.4f} {_shown(plan['loss_difference'][i], 4)}"
    return row


def _accuracy_row(plans: Sequence[dict[str, Any]], i: int) -> Row:
    first = plans[0]["accuracy"][i]
    row: Row = {
        "task": first["task"],
        "distance": first["distance"],
        "hops": first["hops"] or "",
        "questions": first["questions"],
        plans[0]["plan"]: f"{first['accuracy']:.3f}",
    }
    for plan in plans[1:]:
        row[plan["plan"]] = f"{plan['accuracy'][i]['accuracy']:.3f} {_shown(plan['accuracy_difference'][i], 3)}"
    return row


def _shown(difference: dict[str, Any], digits: int) -> str:
    value, low, high = (f"{difference[key]:+.{digits}f}" for key in ("difference", "low", "high"))
    return f"({value}, {low} to {high})"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "source" if package == "m3serve" else "none"
    return found
