"""The calibration with the engine's libraries alone: `python -m service.calibration --model DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import CheckpointError, ConfigError
from service.calibration.flags import add_flags
from service.calibration.run import run
from service.evaluation.arguments import setting


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a wrong flag, setting or checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m service.calibration",
        description="Find which sparse layers can share a selection, as `m3serve calibrate`, without the service's "
        "libraries.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of the engine; VALUE is JSON or text",
    )  # fmt: skip
    add_flags(parser)
    args = parser.parse_args(argv)
    try:
        return run(args.model, dict(setting(text) for text in args.set), args)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
