"""Draws training_curve.png from the log of a training: loss, accuracy by distance, what the indexers capture.

    python -m deploy.demo.plot_training LOG.jsonl OUT.png

Needs matplotlib, which nothing else does.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m deploy.demo.plot_training LOG.jsonl OUT.png")
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise SystemExit("plot_training needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    points = [row for row in rows if "at" in row]
    phases = [(row["name"], row["progress"]) for row in rows if row.get("event") == "phase"]
    figure, (loss, recall, index) = pyplot.subplots(3, 1, figsize=(9, 10), sharex=True, layout="constrained")
    steps = [row["at"] for row in points]
    loss.plot(steps, [row["text"] for row in points], label="text")
    loss.plot(steps, [row["answer"] for row in points], label="answers of tasks")
    loss.set(ylabel="loss, nats per token", yscale="log")
    for bucket in ("<128", "<512", "<1024", "<2048", "<4096", "<8192"):
        known = [(row["at"], _percent(row["accuracy"][bucket])) for row in points if bucket in row["accuracy"]]
        if known:
            recall.plot(*zip(*known, strict=True), label=f"distance {bucket}")
    recall.set(ylabel="answers right, %", ylim=(0, 101))
    trained = [row for row in points if row["captured"]]
    for layer in range(len(trained[0]["captured"]) if trained else 0):
        captured = [100 * row["captured"][layer] for row in trained]
        index.plot([row["at"] for row in trained], captured, label=f"layer {layer + 1}")
    index.set(ylabel="attention captured by the\nchosen blocks, % of the best", xlabel="step")
    for axes in (loss, recall, index):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2)
        _mark(axes, phases, points)
    figure.savefig(sys.argv[2], dpi=110)


def _percent(text: str) -> float:
    return float(text.split("%")[0])


def _mark(axes: Any, phases: list[tuple[str, float]], points: list[dict[str, Any]]) -> None:
    """A line where each phase began."""
    for name, progress in phases:
        later = [row["at"] for row in points if row["progress"] >= progress]
        if later:
            axes.axvline(later[0], color="grey", linewidth=0.6)
            axes.text(later[0], axes.get_ylim()[1], name, rotation=90, va="top", fontsize=6)


if __name__ == "__main__":
    main()
