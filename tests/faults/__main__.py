"""`python -m tests.faults`: every fault, in rounds, then a table of faults and guarantees."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from tests.faults.ledger import Ledger


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault strikes (default 1)")
    parser.add_argument("--report", type=Path, default=Path("faults.json"), help="where the table goes as JSON")
    parser.add_argument("--only", default="", help="a pytest -k expression")
    arguments = parser.parse_args()
    ledger = Ledger(full=True, rounds=arguments.rounds, report=arguments.report)
    selected = ["-k", arguments.only] if arguments.only else []
    return int(pytest.main([str(Path(__file__).parent), "--durations=0", *selected], plugins=[ledger]))


if __name__ == "__main__":
    sys.exit(main())
