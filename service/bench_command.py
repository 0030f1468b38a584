"""`m3serve bench`: speed of single kernels, of loading, of the engine alone, or of an HTTP endpoint."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from service.bench import offline
from service.bench.arguments import add_kernels, add_load, add_metrics, add_plans, add_slice, count, counts
from service.bench.serving.arguments import add_serve
from service.serve_command import demo_checkpoint

_EPILOG = """\
examples:
  m3serve bench kernels --dry-run                what each GPU operation costs at the least, without a GPU
  m3serve bench slice --out slice.json           12 of M3's 60 layers on one GPU
  m3serve bench offline --model DIR --decode-batches 1,8,16
  m3serve bench plans --compare F,2,4            what index plans save, on the demo checkpoint
  m3serve bench serve --max-concurrency 16 --num-prompts 64 --metrics-url http://127.0.0.1:9400/metrics
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure speed: GPU kernels, the engine, or an HTTP endpoint",
        description="Measure speed; the results go to stdout as JSON, progress and a table to stderr.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    alone = kinds.add_parser("offline", help="the engine in this process, without Ray", allow_abbrev=False)
    alone.add_argument("--model", metavar="DIR", help="checkpoint; default: the demo checkpoint")
    alone.add_argument(
        "--prefill-tokens", type=counts, default=[2048, 8192], metavar="N,N", help="prompt lengths (2048,8192)"
    )
    alone.add_argument("--decode-batches", type=counts, default=[1, 8, 16], metavar="N,N", help="batch sizes (1,8,16)")
    alone.add_argument("--context-tokens", type=count, default=2048, metavar="N", help="prompt length of decode (2048)")
    alone.add_argument("--decode-steps", type=count, default=64, metavar="N", help="steps per decode case (64)")
    alone.add_argument("--repeats", type=count, default=3, metavar="N", help="runs per prefill case (3)")
    alone.add_argument("--dtype", default="auto", metavar="TEXT", help="bfloat16, float32 or auto (auto)")
    alone.add_argument("--index-topk-freq", type=count, metavar="N", help="one sparse layer in N selects")
    alone.add_argument("--tensor-parallel-size", type=count, default=1, metavar="N", help="ranks (1)")
    alone.add_argument("--num-threads", type=count, metavar="N", help="CPU threads; default: all cores")
    alone.add_argument("--out", metavar="FILE", help="write the JSON here instead of stdout")
    alone.set_defaults(run=_offline)
    remote = kinds.add_parser("serve", help="load on an OpenAI-compatible endpoint", allow_abbrev=False)
    add_serve(remote)
    remote.set_defaults(run=_serve)
    kernels = kinds.add_parser("kernels", help="every GPU operation beside its floor", allow_abbrev=False)
    add_kernels(kernels)
    kernels.set_defaults(run=_kernels)
    part = kinds.add_parser("slice", help="the engine on 12 layers of one M3 rank, on one GPU", allow_abbrev=False)
    add_slice(part)
    part.set_defaults(run=_slice)
    plans = kinds.add_parser("plans", help="a checkpoint by index plan: speed, the indexers' share", allow_abbrev=False)
    add_plans(plans)
    plans.set_defaults(run=_plans)
    cost = kinds.add_parser("metrics", help="what the metrics cost per decode step", allow_abbrev=False)
    add_metrics(cost)
    cost.set_defaults(run=_metrics)
    load = kinds.add_parser("load", help="how fast a rank reads a checkpoint", allow_abbrev=False)
    add_load(load)
    load.set_defaults(run=_load)


def _offline(args: argparse.Namespace) -> int:
    settings: dict[str, Any] = {"dtype": args.dtype, "tensor_parallel_size": args.tensor_parallel_size}
    if args.index_topk_freq is not None:
        settings["index_topk_freq"] = args.index_topk_freq
    if args.num_threads is not None:
        settings["num_threads"] = args.num_threads
    return offline.run(
        str(Path(args.model) if args.model else demo_checkpoint()),
        prefill_tokens=args.prefill_tokens,
        decode_batches=args.decode_batches,
        context_tokens=args.context_tokens,
        decode_steps=args.decode_steps,
        repeats=args.repeats,
        settings=settings,
        out=args.out,
    )


# By name: the other commands need neither torch nor Triton, nor an HTTP client.
def _serve(args: argparse.Namespace) -> int:
    status: int = importlib.import_module("service.bench.serving.run").from_args(args)
    return status


def _kernels(args: argparse.Namespace) -> int:
    status: int = importlib.import_module("service.bench.kernels").from_args(args)
    return status


def _plans(args: argparse.Namespace) -> int:
    args.model = args.model or str(demo_checkpoint())
    status: int = importlib.import_module("service.bench.plans").from_args(args)
    return status


def _metrics(args: argparse.Namespace) -> int:
    status: int = importlib.import_module("service.bench.instrumentation").from_args(args)
    return status


def _load(args: argparse.Namespace) -> int:
    status: int = importlib.import_module("service.bench.load").from_args(args)
    return status


def _slice(args: argparse.Namespace) -> int:
    status: int = importlib.import_module("service.bench.slice").from_args(args)
    return status
