"""Flags of the calibration that do not come from the settings. Loads no torch, and no library of the service."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.errors import ConfigError
from engine.msa.calibrate import SearchOptions, parse_level
from engine.msa.plan_file import PLAN_FILE_NAME
from service.evaluation.arguments import add_data_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that do not come from the settings."""
    add_data_flags(
        parser.add_argument_group("calibration data"),
        documents="those that come with the package for this, of which neither the demo checkpoint's training nor "
        "`m3serve eval` has any",
        count=12,
        examples="synthetic long-context sequences per task, whose answers count as much as all documents",
        seed=1,
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--blocks", type=int, default=1, metavar="N",
        help="search so many runs of neighbouring layers apart: about N times fewer trials; the first layer of each "
        "run keeps its indexer (1)",
    )  # fmt: skip
    search.add_argument(
        "--levels", metavar="X,X",
        help="end the search at the smallest of these shares of selecting layers, such as 1/2,1/4; default: when no "
        "layer is left",
    )  # fmt: skip
    search.add_argument(
        "--level", metavar="X", help="the plan is the pattern in which this share of the layers selects (1/4)"
    )
    search.add_argument(
        "--tolerance", type=float, metavar="X",
        help="the plan is the sparsest pattern whose loss rises by no more than X nats per token",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path(PLAN_FILE_NAME), metavar="FILE",
        help=f"the plan file, which an interrupted calibration goes on with ({PLAN_FILE_NAME})",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the plot; default: that of --out, as .png")


def search_options(args: argparse.Namespace) -> SearchOptions:
    """What the flags of the search say; ConfigError for what contradicts itself."""
    if args.level is not None and args.tolerance is not None:
        raise ConfigError(f"--level {args.level} and --tolerance {args.tolerance}: give one of them")
    stops = [parse_level(text.strip()) for text in (args.levels or "").split(",") if text.strip()]
    if args.levels is not None and not stops:
        raise ConfigError("--levels names no level")
    level = parse_level(args.level or "1/4")
    if stops and args.level is not None and level < min(stops):
        raise ConfigError(f"--level {args.level}: the search ends at {min(stops)}, see --levels")
    return SearchOptions(blocks=args.blocks, stop=min(stops, default=None), level=level, tolerance=args.tolerance)
