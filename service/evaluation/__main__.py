"""The evaluation with the engine's libraries alone: `python -m service.evaluation --model DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import CheckpointError, ConfigError
from service.evaluation.arguments import add_eval_flags, choice, setting
from service.evaluation.run import offline


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a wrong flag, setting or checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m service.evaluation",
        description="Held-out loss and accuracy of a checkpoint, as `m3serve eval`, without the service's libraries.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint")
    parser.add_argument("--compare", metavar="PLAN,PLAN", help="index plans, as of `m3serve eval`")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the engine; VALUE is JSON or text",
    )
    add_eval_flags(parser)
    args = parser.parse_args(argv)
    try:
        settings = dict(setting(text) for text in args.set)
        return offline(args.model, settings, choice(args), compare=args.compare, out=args.out)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
