"""`m3serve eval`: held-out loss and long-context accuracy of a checkpoint, by index plan, or of an HTTP endpoint."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, resolve_model
from engine.errors import ConfigError
from service.evaluation import remote, run
from service.evaluation.arguments import add_eval_flags, choice, data_for
from service.evaluation.progress import say
from service.flags import add_settings, given_settings, make_settings
from service.serve_command import demo_checkpoint

_SETTINGS = (
    "model", "backend", "dtype", "tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "num_pages", "memory_fraction", "kv_cache_dtype", "index_cache_dtype", "load_format", "weight_cache_dir",
    "hf_overrides", "use_index_cache", "index_topk_freq", "index_topk_pattern", "index_skip_topk_offset",
    "index_plan_file", "index_reuse", "audit_interval", "enforce_eager", "async_scheduling", "self_test",
    "numa_pinning", "seed", "num_threads",
)  # fmt: skip

_EPILOG = """\
Loss: documents that the model was not trained on, the same ones in every range of positions; "far copies" are tokens
that repeat a text last seen before the blocks that every plan selects. Accuracy: recall, needle, copy, tracking and
last_write, synthetic tasks whose answers stand in the context; an answer counts when each of its tokens is the
likeliest one, given those before it. Positions below topk_blocks * 128 see every block under any plan.

PLAN is a number (one sparse layer in so many selects; 1: all), letters (one F or S per sparse layer; F alone: all) or
the path of a plan file. All plans see the same data; the first is what the others are compared with. With
--index-reuse audited each plan's mean overlap of reused selections is shown too. Every plan loads an engine of its own;
max_model_len, max_num_seqs, num_pages, prefix caching, probes and the audit's interval suit the data unless given.

With --url the endpoint must echo the log-probabilities of a prompt (`echo`, `logprobs`), as m3serve and vLLM do;
--model is then a directory with the tokenizer.json and config.json of what it serves.

examples:
  m3serve eval                                          the demo checkpoint
  m3serve eval --model DIR --compare F,2,4,plan.json    four index plans side by side
  m3serve eval --model DIR --documents src/ --length 4096 --examples 0 --out loss.json
  m3serve eval --model DIR --url http://127.0.0.1:8000/v1
  python -m service.evaluation --model DIR --compare F,4 --set backend=triton    without Ray and the HTTP libraries
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "eval",
        usage="m3serve eval [--model DIR] [--compare PLAN,PLAN] [--url URL] [flags]",
        help="measure loss and long-context accuracy, by index plan",
        description="Measure held-out loss by position and the accuracy of synthetic long-context tasks by distance.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--compare", metavar="PLAN,PLAN", help="index plans to evaluate on the same data")
    add_eval_flags(parser)
    endpoint = parser.add_argument_group("endpoint")
    endpoint.add_argument("--url", help="base URL of an OpenAI-compatible endpoint; default: an engine in this process")
    endpoint.add_argument("--served-model", metavar="NAME", help="its model; default: the first that is served")
    endpoint.add_argument("--streams", type=int, default=4, metavar="N", help="requests at the same time (4)")
    endpoint.add_argument("--timeout-s", type=float, default=600.0, metavar="X", help="limit for one request (600)")
    endpoint.add_argument("--api-key", help="sent as a bearer token")
    add_settings(parser, only=_SETTINGS)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Evaluate, print, write; the exit status."""
    values = given_settings(args)
    if "model" not in values and "M3SERVE_MODEL" not in os.environ:
        values["model"] = demo_checkpoint()
    settings = make_settings(**values)
    config = settings.engine_config()
    if args.url is not None:
        return _remote(args, config)
    # Only what was set: for the rest the evaluation has defaults of its own.
    given = {name: getattr(config, name) for name in settings.model_fields_set & set(_SETTINGS) - {"model"}}
    return run.offline(Path(config.model), given, choice(args), compare=args.compare, out=args.out)


def _remote(args: argparse.Namespace, config: EngineConfig) -> int:
    if args.compare is not None:
        raise ConfigError("--compare and --url: an endpoint has one plan; give one of them")
    if args.streams < 1:
        raise ConfigError(f"--streams must be at least 1, got {args.streams}")
    model, _ = resolve_model(config)
    options = {"api_key": args.api_key, "timeout_s": args.timeout_s}
    try:
        card = remote.model_card(args.url, args.served_model, **options)
        limit = card.get("max_model_len", config.max_model_len)
        data = data_for(Path(config.model), model, choice(args), max_model_len=limit)
        found = remote.evaluate(args.url, card, data, streams=args.streams, **options)
    except remote.EndpointError as error:
        say(f"error: {error}")
        return 1
    run.tell(data, [found], {"source": args.url, "checkpoint": card["id"]}, args.out)
    return 0
