"""python -m tests.kernels.aiter [--source DIR]: what the aiter backend takes from which state of AITER, and why not.

DIR: a checkout of AITER, or a wheel that was unpacked; its signatures are read, nothing of it is imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from engine.kernels import aiter, launch, triton_set
from tests.kernels.aiter.reference import Aiter
from tests.kernels.aiter.signatures import Source, load, read_source

# What the operations that are left to Triton could be made of.
CANDIDATES = {
    "route": ("aiter.topk_gating", "aiter.biased_grouped_topk"),
    "experts": ("aiter.fused_moe.fused_moe",),
    "norms": ("aiter.ops.fused_qk_rmsnorm_group_quant.fused_qk_rmsnorm_group_quant",),
    "all_reduce": ("aiter.dist.communication_op.tensor_model_parallel_fused_allreduce_rmsnorm",),
}


def report(source: Source) -> dict[str, str]:
    """The start-up report of the aiter backend on MI300X, with AITER as `source` has it."""
    target = launch.offline_target(launch.GFX942, lambda *launched: None)
    kernels = aiter.bind(Aiter(source).lookup, triton_set.bind(target, torch.device("meta")), target)
    return dict(kernels.report)


def table(sources: dict[str, Source]) -> list[str]:
    """One line per operation and source."""
    lines = []
    for name, source in sources.items():
        lines.append(f"{name}: {source.origin}")
        for operation, how in report(source).items():
            there = [path for path in CANDIDATES.get(operation, ()) if path in source.functions]
            lines.append(f"  {operation:<22} {how}{'; it has ' + ', '.join(there) if there else ''}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.aiter", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, metavar="DIR", help="also this checkout or unpacked wheel")
    options = parser.parse_args(arguments)
    sources = load()
    if options.source is not None:
        if not (options.source / "aiter").is_dir():
            parser.error(f"{options.source} has no package aiter in it")
        sources[str(options.source)] = read_source(options.source)
    print("\n".join(table(sources)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
