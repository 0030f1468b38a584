"""What the fault tests did and found, as one row per test: a table at the end of the run, and a JSON file.

A pytest plugin: `python -m tests.faults` registers one that asks for every fault in several rounds; in a plain run of
all tests the conftest registers one that asks for the short subset.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.load_row import LoadRow

PLUGIN = "fault-ledger"


@dataclass(slots=True)
class Row:
    """One fault against one service, over all its rounds.

    hits: how often the fault was inflicted.  streams: that ran while it was.  whole: streams that came to their
    finish_reason.  refused: streams that ended with an error object, as the fault demands.  cut: connections that
    broke, as the fault demands.  tokens: compared with an undisturbed run, position by position.  wrong: of those,
    tokens that were different, missing or there twice.  usage_wrong: streams whose usage was not what they had been
    sent.  moved: resubmissions that the service counted.  pause_s: the longest wait for a token of any stream.
    recovery_s: the longest time until every replica was back.  pages: held by the engines at the end.  orphans:
    processes of lost replicas that were still there at the end.
    """

    fault: str
    service: str
    hits: int = 0
    streams: int = 0
    whole: int = 0
    refused: int = 0
    cut: int = 0
    tokens: int = 0
    wrong: int = 0
    usage_wrong: int = 0
    moved: int = 0
    pause_s: float = 0.0
    recovery_s: float = 0.0
    pages: int = 0
    orphans: int = 0
    outcome: str = "unfinished"


class Ledger:
    """Rows in the order of their tests.

    full: every fault, not the short subset.  rounds: how often each strikes.  report: where the JSON goes.
    max_tokens: of each stream.
    """

    __name__ = PLUGIN  # under this name pytest registers it

    def __init__(self, *, full: bool, rounds: int, report: Path | None) -> None:
        self.full = full
        self.rounds = rounds
        self.max_tokens = 160 if full else 64
        self.rows: list[Row] = []
        self.loads: list[LoadRow] = []
        self._report = report
        self._started_s = time.monotonic()

    def open(self, fault: str, service: str) -> Row:
        """A row for the test that runs; it counts as unfinished until the test says otherwise."""
        row = Row(fault, service)
        self.rows.append(row)
        return row

    def open_load(self, load: str, service: str) -> LoadRow:
        """The same for a load."""
        row = LoadRow(load, service)
        self.loads.append(row)
        return row

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.rows:
            terminalreporter.section("faults")
            terminalreporter.write_line(table(self.rows))
        if self.loads:
            terminalreporter.section("loads")
            terminalreporter.write_line(columns(self.loads))
        if self._report is not None:
            self._report.write_text(json.dumps(self._json(), indent=1) + "\n", encoding="utf-8")
            terminalreporter.write_line(f"written: {self._report}")

    def _json(self) -> dict[str, Any]:
        return {
            "seconds": round(time.monotonic() - self._started_s, 1),
            "rounds": self.rounds,
            "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "loads": [dataclasses.asdict(row) for row in self.loads],
        }


def table(rows: list[Row]) -> str:
    """Rows under their field names, and a last row of sums."""
    names = [each.name for each in dataclasses.fields(Row)]
    total = Row("all", "", outcome="ok" if all(row.outcome == "ok" for row in rows) else "FAILED")
    for name in names[2:-1]:
        values = [getattr(row, name) for row in rows]
        setattr(total, name, max(values) if name.endswith("_s") else sum(values))
    return _aligned([names] + [[_shown(getattr(row, name)) for name in names] for row in [*rows, total]])


def columns(loads: list[LoadRow]) -> str:
    """Loads have more figures than a line has room for: a line for each, under the names of the loads."""
    names = [each.name for each in dataclasses.fields(LoadRow)]
    return _aligned([[name, "", *(_shown(getattr(row, name)) for row in loads)] for name in names])


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _shown(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
