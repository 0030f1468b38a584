"""`m3serve plan`: what a model takes and how many tokens fit, from its config.json alone."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.capacity import (
    DEVICES,
    GIB,
    GPU_MEMORY_FRACTION,
    RELEASED,
    Footprint,
    FormatOf,
    fit,
    stored_formats,
    weight_parts,
)
from engine.config import EngineConfig, read_json, resolve_model
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from service import plan_report
from service.flags import add_settings, given_settings, make_settings

_SETTINGS = (
    "model", "dtype", "tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "memory_fraction", "kv_cache_dtype", "index_cache_dtype", "hf_overrides", "use_index_cache", "index_topk_freq",
    "index_topk_pattern", "index_skip_topk_offset", "index_plan_file", "index_reuse", "audit_overlap_floor",
    "enforce_eager",
)  # fmt: skip
# Ranks of a replica, where the command line does not say: powers of two up to the GPUs of a node.
_GPUS_PER_NODE = 8

_EPILOG = """\
Weights, bytes per token and pages are what the engine allocates. Activations, captured graphs and what the device's
runtime keeps are estimates. Block-scaled weights stay packed, as on a GPU; on CPU they become plain numbers.

Without --tensor-parallel-size, 1, 2, 4, ... ranks up to --gpus-per-node are tried: those of a replica share one node.
The settings are those of `m3serve serve`, M3SERVE_* variables included.

Exit status: 0 if a layout fits, 1 if none does, 2 if a flag or the configuration is wrong.

examples:
  m3serve plan --model /models/MiniMax-M3-MXFP8             all devices, 1 to 8 ranks
  m3serve plan --config config.json --format mxfp4          before the weights are downloaded
  m3serve plan --config config.json --format mxfp8 --device mi300x --kv-cache-dtype fp8 \\
      --max-model-len 131072 --max-num-seqs 64
  m3serve plan --config config.json --index-topk-freq 4     what it saves that three in four layers reuse
  m3serve plan --config config.json --memory-gib 96 --tensor-parallel-size 8 --json
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        usage="m3serve plan (--model DIR | --config FILE) [--format NAME] [--device NAME] [flags]",
        help="compute memory and KV tokens per device, without weights",
        description="Compute from config.json what weights, KV pages and a step take on each rank, how many tokens\n"
        "and requests fit on each device, and which layout takes the fewest GPUs; where none fits, why.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.json without its checkpoint")
    parser.add_argument(
        "--format",
        choices=sorted(RELEASED),
        help="weights as in the released checkpoint of that format; default: what config.json says",
    )
    parser.add_argument(
        "--device", action="append", choices=sorted(DEVICES), metavar="NAME",
        help=f"one of {', '.join(DEVICES)}; may be repeated; default: all",
    )  # fmt: skip
    parser.add_argument("--memory-gib", type=float, metavar="X", help="another device, of so many GiB")
    parser.add_argument(
        "--gpus-per-node", type=int, default=_GPUS_PER_NODE, metavar="N",
        help=f"a replica takes no more; several may share a node ({_GPUS_PER_NODE})",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, with bytes instead of GiB")
    add_settings(parser, only=_SETTINGS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; the exit status."""
    devices = _devices(args)
    config, given_ranks = _engine_config(args)
    model, format_name, format_of, plan = _read(config, args)
    base = Footprint(
        model=model,
        plan=plan,
        ranks=config.tensor_parallel_size,
        max_model_len=config.max_model_len or model.max_positions,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        audited=config.index_reuse == "audited",
        format_of=format_of,
        captured=not config.enforce_eager,
        guarded=config.audit_overlap_floor is not None,
        **_elements(config, model),
    )
    footprints = _footprints(base, args.gpus_per_node, given_ranks)
    fraction = config.memory_fraction or GPU_MEMORY_FRACTION
    weights = [footprint.weights() for footprint in footprints]
    fits = {
        name: [
            fit(each, sum(parts.values()), memory, fraction) for each, parts in zip(footprints, weights, strict=True)
        ]
        for name, memory in devices.items()
    }
    document = plan_report.document(
        base, format_name, weights, fits, fraction=fraction, gpus_per_node=args.gpus_per_node
    )
    print(json.dumps(document, indent=1) if args.json else plan_report.page(document))
    return 0 if any(device["best"] for device in document["devices"]) else 1


def _devices(args: argparse.Namespace) -> dict[str, int]:
    if args.memory_gib is not None:
        if not math.isfinite(args.memory_gib) or args.memory_gib <= 0:
            raise ConfigError(f"--memory-gib must be positive, got {args.memory_gib}")
        chosen = {name: DEVICES[name] for name in args.device or ()}
        return chosen | {f"{args.memory_gib:g} GiB": int(args.memory_gib * GIB)}
    return {name: memory for name, memory in DEVICES.items() if not args.device or name in args.device}


def _engine_config(args: argparse.Namespace) -> tuple[EngineConfig, bool]:
    """The settings, and whether they say how many ranks there are."""
    if args.gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node must be at least 1, got {args.gpus_per_node}")
    values = given_settings(args)
    if args.config is not None:
        if "model" in values:
            raise ConfigError(f"--model {values['model']} and --config {args.config}: give one of them")
        values["model"] = str(args.config.parent)
    try:
        settings = make_settings(**values)
    except ConfigError:
        if "model" not in values:
            raise ConfigError("give --model DIR, a checkpoint's directory, or --config FILE, its config.json") from None
        raise
    return settings.engine_config(), "tensor_parallel_size" in settings.model_fields_set


def _read(config: EngineConfig, args: argparse.Namespace) -> tuple[ModelConfig, str, FormatOf, str]:
    """The model, how its weights are stored (a name for it, and by name), and the plan's letters."""
    raw = read_json(args.config or Path(config.model) / "config.json")
    if args.format is not None:
        raw = _without_quantisation(raw)
    model, knobs = resolve_model(config, raw)
    plan = str(knobs.build_plan(model.is_sparse))
    if args.format is not None:
        return model, args.format, RELEASED[args.format], plan
    format_of = stored_formats(model)
    parts = weight_parts(model, index_layers=model.is_sparse)
    formats = {format_of(part.name) for part in parts if part.kind == "linear"} - {None}
    plain = "bf16" if model.torch_dtype == "bfloat16" else model.torch_dtype
    return model, " and ".join(sorted(map(str, formats))) or plain, format_of, plan


def _without_quantisation(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json as of plain weights: how its own checkpoint is stored does not matter, nor whether we know it."""
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return plain


def _elements(config: EngineConfig, model: ModelConfig) -> dict[str, int]:
    """Bytes of a number, as the runner resolves the dtypes on a GPU."""
    element = 2 if (model.torch_dtype if config.dtype == "auto" else config.dtype) == "bfloat16" else 4
    return {
        "element": element,
        "kv_element": 1 if config.kv_cache_dtype == "fp8" else element,
        "index_element": 1 if config.index_cache_dtype == "fp8" else element,
    }


def _footprints(base: Footprint, gpus_per_node: int, given_ranks: bool) -> list[Footprint]:
    """One for each number of ranks that is tried."""
    if given_ranks:
        if base.ranks > gpus_per_node:
            raise ConfigError(
                f"--tensor-parallel-size {base.ranks}: the ranks of a replica share one node, and --gpus-per-node is "
                f"{gpus_per_node}"
            )
        if error := base.split_error():
            raise ConfigError(error)
        return [base]
    tried = [replace(base, ranks=2**i) for i in range(gpus_per_node.bit_length())]
    return [footprint for footprint in tried if footprint.split_error() is None]
