"""`m3serve calibrate`: which sparse layers of a checkpoint can reuse a selection, found by its own loss."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

from service.calibration.flags import add_flags
from service.flags import add_settings, given_settings, make_settings
from service.serve_command import demo_checkpoint

_SETTINGS = (
    "model", "backend", "dtype", "tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "num_pages",
    "memory_fraction", "kv_cache_dtype", "index_cache_dtype", "weight_cache_dir", "hf_overrides", "async_scheduling",
    "self_test", "numa_pinning", "num_threads",
)  # fmt: skip

_EPILOG = """\
Starts from every sparse layer selecting for itself. Each step tries for every one of them that it reuses the selection
above it, one run of the data through the loaded engine per trial, and keeps the choice with the lowest loss. N layers
take about N * N / 2 trials; --blocks P about P times fewer. Only tokens past the first topk_blocks * 128 count: before,
all plans are the same.

The plan file has the chosen pattern, that of every number of layers, all losses, hashes of checkpoint and data, and
versions. m3serve refuses it for other weights. As index_plan.json beside config.json it is the checkpoint's default.

examples:
  m3serve calibrate --model DIR --out DIR/index_plan.json
  m3serve calibrate --model DIR --tensor-parallel-size 8 --documents texts/ --length 32768 --blocks 4 --levels 1/4
  m3serve calibrate --model DIR --tolerance 0.01
  m3serve eval --model DIR --compare F,4,index_plan.json     what the plan costs on other data
  python -m service.calibration --model DIR --set backend=triton    without Ray and the HTTP libraries
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "calibrate",
        usage="m3serve calibrate [--model DIR] [--out FILE] [flags]",
        help="find which layers can share a selection, and write a plan file",
        description="Find which sparse layers can reuse the selection of one above, by the loss of the checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser)
    add_settings(parser, only=_SETTINGS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Calibrate; the exit status."""
    values = given_settings(args)
    if "model" not in values and "M3SERVE_MODEL" not in os.environ:
        values["model"] = demo_checkpoint()
    settings = make_settings(**values)
    config = settings.engine_config()
    # Only what was set: for the rest the calibration has defaults of its own.
    given = {name: getattr(config, name) for name in settings.model_fields_set & set(_SETTINGS) - {"model"}}
    # By name: the other commands have no use for torch.
    status: int = importlib.import_module("service.calibration.run").run(Path(config.model), given, args)
    return status
