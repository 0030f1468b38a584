"""Writes every file of the project that is made from code: `make generate`. With --check it only compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy import chart_schema
from deploy.grafana import dashboards
from deploy.prometheus import rules
from service import metrics_table, openai_table

ROOT = Path(__file__).resolve().parent.parent


def generated() -> dict[str, str]:
    """Every generated file: its path in the checkout, and its content."""
    made = metrics_table.generated() | dashboards.generated() | rules.generated() | chart_schema.generated()
    return made | openai_table.generated()


def stale() -> list[str]:
    """Paths whose content on disk is not what the code makes."""
    return [
        path
        for path, content in generated().items()
        if not (ROOT / path).is_file() or (ROOT / path).read_text() != content
    ]


def main() -> int:
    """Exit status: 1 when --check found files that are out of date."""
    parser = argparse.ArgumentParser(prog="python -m deploy.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    args = parser.parse_args()
    paths = stale()
    for path in paths:
        print(f"{'out of date' if args.check else 'written'}: {path}", file=sys.stderr)
        if not args.check:
            target = ROOT / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(generated()[path])
    return 1 if args.check and paths else 0


if __name__ == "__main__":
    sys.exit(main())
