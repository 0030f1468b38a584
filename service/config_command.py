"""`m3serve check-config`: whether a Serve config file says what its author meant, before anyone deploys it."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

_EPILOG = """\
examples:
  m3serve check-config serve.yaml && serve deploy serve.yaml
  helm template r helm/ -s templates/rayservice.yaml | yq .spec.serveConfigV2 | m3serve check-config /dev/stdin
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check-config",
        help="check a Serve config file: unknown keys, values, settings",
        description="Check Serve config files (`serve deploy`, serveConfigV2 of a RayService). Ray ignores keys that "
        "it does not know; this names them, with the nearest known one. Settings in args are checked too.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a YAML file")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    # By name: it loads Ray, which the other commands start without.
    serve_config = importlib.import_module("service.serve_config")
    for file in args.files:
        serve_config.check_file(file)
        print(f"{file}: ok")
    return 0
