"""What a benchmark found: one JSON document with everything, and a table for people."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """The processor and how much of it there is."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed; of an empty list, NaN."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, p95 and p99."""
    return {
        "median": median(values) if values else float("nan"),
        "p95": percentile(values, 0.95),
        "p99": percentile(values, 0.99),
    }


def progress(text: str) -> None:
    """A line for the person who waits; stdout carries the results alone."""
    print(f"m3serve bench: {text}", file=sys.stderr, flush=True)


def table(rows: Sequence[Row]) -> str:
    """The rows as an aligned table; the first row's keys are the columns."""
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(document: dict[str, Any], out: str | None) -> None:
    """The JSON document to `out`, or to stdout."""
    text = json.dumps(document, indent=1)
    if out is None:
        print(text)
    else:
        Path(out).write_text(text + "\n", encoding="utf-8")
        progress(f"wrote {out}")
