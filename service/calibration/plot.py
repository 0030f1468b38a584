"""The plot of a calibration: loss against the number of layers that reuse, searched and uniform. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the plot of a plan file's content; the suffix of `path` says in which format."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    levels, uniform, chosen = found["levels"], found["uniform"], found["chosen"]
    axes.plot([row["skipped"] for row in levels], [row["loss"] for row in levels], "o-", label="searched")
    axes.plot([row["skipped"] for row in uniform], [row["loss"] for row in uniform], "s", label="uniform")
    for row in uniform:
        axes.annotate(f"freq {row['freq']}", (row["skipped"], row["loss"]), xytext=(6, 4), textcoords="offset points")
    axes.axhline(levels[0]["loss"], linestyle=":", color="gray", label="every layer selects")
    axes.plot([chosen["skipped"]], [chosen["loss"]], "o", markersize=14, fillstyle="none", label="the plan")
    num_sparse = len(found["sparse_layers"])
    axes.set(
        title=f"{found['checkpoint']}: {chosen['pattern']}",
        xlabel=f"layers that reuse, of {num_sparse}",
        ylabel=f"loss past {found['data']['skip_tokens']} tokens, nats",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
