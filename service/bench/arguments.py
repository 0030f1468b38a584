"""Flags of the benchmarks that also run without the service's libraries. Loads no torch."""

from __future__ import annotations

import argparse

_KERNELS = """\
Every GPU operation of the model at the shapes of one of four tensor-parallel ranks of MiniMax-M3, in bf16: many calls
in one captured graph, on inputs that the caches no longer hold, median of 20 replays, in microseconds.

The floor of a case is what must move or be computed at the least, at the copy bandwidth and the bf16 GEMM rate that
are measured first; a ratio of 1 cannot be beaten. The baseline is vLLM 0.33 on one H100, or torch's F.linear here.
"""
_KERNELS_EPILOG = """\
examples:
  m3serve bench kernels --dry-run                            the cases and their floors on an H100; needs no GPU
  m3serve bench kernels --out kernels.json
  m3serve bench kernels --filter "indexer decode" --filter "sparse prefill 8192" --quick
"""
_SLICE = """\
The engine on one GPU, with one of four tensor-parallel ranks' share of 12 of the 60 layers of MiniMax-M3 (3 dense,
9 sparse; 17 billion random parameters, 35 GB in bf16), which is how fast a rank runs without its collectives. Several
ranks, on as many GPUs, hold a model that many times as wide.

Prefill: the time to the first token of one prompt. Decode: C requests are prefilled, and once all of them decode
together, N steps are timed: TPOT is the median interval between tokens. Every frequency of the index cache needs
an engine of its own. Floors: weights, keys and index keys that a step must read, at the given bandwidth.
"""
_SLICE_EPILOG = """\
examples:
  m3serve bench slice --out slice.json
  m3serve bench slice --freqs 1,4 --concurrency 64 --context-tokens 32768
  m3serve bench slice --tensor-parallel-size 2
  m3serve bench slice --format mxfp4 --freqs 1 --concurrency 1,16
  m3serve bench slice --tiny --backend torch           the same on a model of toy size, on CPU
"""
_PLANS = """\
One checkpoint under several index plans, each by an engine of its own: speed of prompts and of decoding, and which part
of a step the indexers take. What sharing does to the output is for `m3serve eval` to say.

The first plan is what the others are compared with. It is measured once more at the end: how far its two rates differ
is what the machine's noise does. Prompts are random token ids.
"""
_PLANS_EPILOG = """\
examples:
  m3serve bench plans --compare F,2,4,deploy/demo/m3-nano/index_plan.json
  python -m service.bench.plans --model DIR --compare F,FSSFSFFSF --decode-batches 1,16,64
"""
_METRICS = """\
What the metrics cost per decode step: counting in the engine, publishing the replica's series into shared files, and
probed steps, spread over the default interval. Each is timed by itself; steps with and without the series alternate.
"""
_METRICS_EPILOG = """\
examples:
  m3serve bench metrics --model DIR --batches 1,16 --num-threads 1
  python -m service.bench.instrumentation                    12 layers of one M3 rank, on a GPU with 80 GB
"""
_LOAD = """\
How fast one rank reads its share of a checkpoint, beside a plain read of the same bytes by as many threads. The
checkpoint is synthetic: MXFP8, names and widths of MiniMax-M3, 4 layers, as many experts as make the wanted size.

Each read starts with nothing of the shards in the page cache. Without a GPU, weights stay as they are stored.
"""
_LOAD_EPILOG = """\
examples:
  m3serve bench load --gb 8 --directory /mnt/models
  m3serve bench load --tensor-parallel-sizes 1,8 --readers 4,8,16
  python -m service.bench.load --tiny --gb 0.01
"""


def counts(text: str) -> list[int]:
    """A comma-separated list of positive numbers; an empty one switches the case off."""
    try:
        values = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, got {text!r}") from None
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"must be positive numbers, got {text!r}")
    return values


def count(text: str) -> int:
    """One positive number."""
    values = counts(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return values[0]


def _describe(parser: argparse.ArgumentParser, description: str, epilog: str) -> None:
    parser.description, parser.epilog = description, epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", metavar="FILE", help="write the JSON here instead of stdout")


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench kernels`."""
    _describe(parser, _KERNELS, _KERNELS_EPILOG)
    parser.add_argument(
        "--filter", action="append", default=[], metavar="WORDS",
        help="only cases whose name has all these words; may be repeated",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="5 replays instead of 20")
    parser.add_argument("--dry-run", action="store_true", help="only list the cases and their floors on an H100")
    parser.add_argument(
        "--max-len", type=count, default=131072, metavar="N",
        help="longest row that decode kernels must be ready for, as in a captured graph (131072)",
    )  # fmt: skip


def add_slice(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench slice`."""
    _describe(parser, _SLICE, _SLICE_EPILOG)
    parser.add_argument("--freqs", type=counts, default=[1, 4], metavar="N,N", help="index_topk_freq (1,4)")
    parser.add_argument(
        "--format", choices=("bf16", "mxfp8", "mxfp4"), default="bf16",
        help="of the weights: mxfp8 as released, all but embeddings, router and LM head; mxfp4: the experts (bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--prefill-tokens", type=counts, metavar="N,N", help="prompt lengths of prefill (8192; 512 with --tiny)"
    )
    parser.add_argument(
        "--concurrency", type=counts, metavar="N,N", help="requests at the same time (1,16,64; 1,4 with --tiny)"
    )
    parser.add_argument(
        "--context-tokens", type=counts, metavar="N,N",
        help="prompt lengths of decode (8192,32768; 300,600 with --tiny)",
    )  # fmt: skip
    parser.add_argument(
        "--decode-steps", type=count, metavar="N", help="timed steps per decode case (128; 8 with --tiny)"
    )
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="runs per prefill case (3)")
    parser.add_argument(
        "--requests-per-stream", type=count, metavar="N",
        help="also run N times as many requests per decode case to their end, in a closed loop: prompts then run "
        "among the decode steps of others",
    )  # fmt: skip
    parser.add_argument(
        "--tensor-parallel-size", type=count, default=1, metavar="N",
        help="N ranks of this size, each on its own GPU: a model N times as wide, and what its collectives cost (1)",
    )  # fmt: skip
    parser.add_argument("--backend", default="auto", metavar="TEXT", help="triton, aiter, torch or auto (auto)")
    parser.add_argument("--dtype", default="auto", metavar="TEXT", help="bfloat16, float32 or auto (auto)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="any other setting of the engine, as JSON, e.g. enforce_eager=true; may be repeated",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="the same layers at toy sizes")
    parser.add_argument(
        "--bandwidth", type=float, default=None, metavar="TB/s",
        help="what floors assume; default: measured on a GPU, else 3.02, an H100's",
    )  # fmt: skip


def add_plans(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench plans`."""
    _describe(parser, _PLANS, _PLANS_EPILOG)
    parser.add_argument("--model", metavar="DIR", help="checkpoint; default of m3serve: the demo checkpoint")
    parser.add_argument(
        "--compare", required=True, metavar="PLAN,PLAN",
        help="index plans: a number (one sparse layer in so many selects; 1: all), letters (one F or S per sparse "
        "layer; F alone: all) or the path of a plan file",
    )  # fmt: skip
    parser.add_argument(
        "--prefill-tokens", type=counts, default=[8000], metavar="N,N", help="prompt lengths of prefill (8000)"
    )
    parser.add_argument("--decode-batches", type=counts, default=[1, 16], metavar="N,N", help="batch sizes (1,16)")
    parser.add_argument(
        "--context-tokens", type=count, default=7000, metavar="N", help="prompt length of decode (7000)"
    )
    parser.add_argument(
        "--decode-steps", type=count, default=128, metavar="N", help="timed steps per decode case (128)"
    )
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="prompts per prefill case (3)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of the engine; VALUE is JSON or text; may be repeated",
    )  # fmt: skip


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench metrics`."""
    _describe(parser, _METRICS, _METRICS_EPILOG)
    parser.add_argument("--model", metavar="DIR", help="checkpoint; default: 12 layers of one M3 rank, on a GPU")
    parser.add_argument("--batches", type=counts, default=[1, 16], metavar="N,N", help="requests in a step (1,16)")
    parser.add_argument("--context-tokens", type=count, default=2048, metavar="N", help="prompt length (2048)")
    parser.add_argument("--steps", type=count, default=256, metavar="N", help="decode steps of either sort (256)")
    parser.add_argument(
        "--index-topk-freq", type=count, default=4, metavar="N", help="one sparse layer in N selects (4)"
    )
    parser.add_argument("--num-threads", type=count, metavar="N", help="CPU threads; default: all cores")


def add_load(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench load`."""
    _describe(parser, _LOAD, _LOAD_EPILOG)
    parser.add_argument("--gb", type=float, default=4.0, metavar="X", help="size of the checkpoint in GB (4)")
    parser.add_argument(
        "--directory", metavar="DIR", help="where to write it: on the disk to measure; default: that of temporary files"
    )
    parser.add_argument(
        "--tensor-parallel-sizes", type=counts, default=[1], metavar="N,N",
        help="measure the last rank of groups of these sizes, each alone (1)",
    )  # fmt: skip
    parser.add_argument("--readers", type=counts, default=[8], metavar="N,N", help="threads that read (8)")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="reads of either sort per case (3)")
    parser.add_argument("--tiny", action="store_true", help="toy widths, for a test of the benchmark itself")
