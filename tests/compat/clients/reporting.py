"""What a client program says: one JSON line per thing that it ran. Standard library alone."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

URL = os.environ.get("M3_URL", "")
MODEL = os.environ.get("M3_MODEL", "")
EXPECTED: dict[str, Any] = (
    json.loads(Path(os.environ["M3_EXPECTED"]).read_text()) if "M3_EXPECTED" in os.environ else {}
)


def run(package: str, checks: list[tuple[str, Callable[[], None]]]) -> None:
    """Run every check; ends the process with status 1 when one raised."""
    failed = False
    for name, check in checks:
        line = {"client": package, "version": version(package), "ran": name, "result": "ok"}
        try:
            check()
        except Exception as error:  # the next check still says something
            failed = True
            traceback.print_exc()
            first = (str(error).strip() or "no message").splitlines()[0]
            line["result"] = f"{type(error).__name__}: {first}"[:100]
        print("RESULT " + json.dumps(line), flush=True)
    sys.exit(1 if failed else 0)


def same(found: Any, expected: Any) -> None:
    """Raise AssertionError with both values unless they are equal."""
    if found != expected:
        raise AssertionError(f"got {found!r}, expected {expected!r}")
