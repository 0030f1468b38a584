"""The `m3serve` command. Each subcommand is a module with `add_parser(subparsers)`, which sets `run`.

Exit status: 0 done; 1 it failed while running; 2 the command line, a setting or the checkpoint is wrong;
130 Ctrl-C before there was anything to finish.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from engine.errors import CheckpointError, ConfigError
from service import (
    bench_command,
    calibrate_command,
    config_command,
    eval_command,
    monitor_command,
    plan_command,
    serve_command,
)

_COMMANDS = (
    serve_command,
    plan_command,
    calibrate_command,
    eval_command,
    bench_command,
    monitor_command,
    config_command,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="m3serve",
        description="Serve MiniMax-M3 with Ray Serve over an OpenAI-compatible HTTP API.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (ConfigError, CheckpointError) as error:
        print(f"m3serve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
