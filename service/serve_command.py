"""`m3serve serve`: flags, and what can be checked before anything is started.

Ray, Serve and the application are imported after that (service/launcher.py): a wrong flag is told at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
from typing import Any

from deploy.demo import CHECKPOINT
from engine.config import PAGE_SIZE, resolve_model
from engine.errors import ConfigError
from engine.msa.plan import IndexPlan
from engine.tokenizer import Tokenizer
from service import tls, tracing
from service.auth import ApiKeys
from service.flags import add_settings, given_settings, make_settings
from service.settings import ServiceSettings

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

_EPILOG = """\
Every flag can also be set by an environment variable: --max-num-seqs is M3SERVE_MAX_NUM_SEQS. M3SERVE_API_KEYS, which
has no flag, holds API keys separated by commas.

examples:
  m3serve serve                                    the demo checkpoint m3-nano, on CPU
  m3serve serve --model /models/MiniMax-M3 --tensor-parallel-size 8
  m3serve serve --model DIR --index-topk-freq 4    one sparse layer in four selects, the others reuse
  m3serve serve --model DIR --min-replicas 1 --max-replicas 4
                                                   engine replicas are added when those that run are full
                                                   (--target-tokens-per-replica), and removed again
  m3serve serve --model DIR --ray-address auto     join the Ray cluster that runs on this machine
  RAY_SERVE_ENABLE_HA_PROXY=1 m3serve serve        HAProxy in front, not Serve's Python proxy: less CPU
                                                   per token; it also listens on ports 8404 and 9101
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        usage="m3serve serve [--model DIR] [--port N] [flags]",
        help="serve a checkpoint until Ctrl-C",
        description="Serve a checkpoint over HTTP until Ctrl-C or SIGTERM; then finish what runs, and stop.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS"),
        metavar="TEXT",
        help="Ray cluster to join (RAY_ADDRESS); default: start a private one on this machine",
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check everything, then hand over to the launcher."""
    values = given_settings(args)
    if "model" not in values and "M3SERVE_MODEL" not in os.environ:
        values["model"] = demo_checkpoint()
    settings = make_settings(**values)
    # They are in the settings now: what is started from here inherits the environment.
    os.environ.pop("M3SERVE_API_KEYS", None)
    tls.check(settings, ray_address=args.ray_address)
    plan = check(settings)
    settings = settings.model_copy(
        update={
            "port": free_port("--port", settings.host, settings.port),
            "metrics_port": free_port("--metrics-port", settings.host, settings.metrics_port),
            "ray_metrics_port": _ray_metrics_port(settings, args.ray_address),
            "enable_playground": _has_playground(settings),
        }
    )
    launcher = importlib.import_module("service.launcher")
    status: int = launcher.launch(settings, str(plan), ray_address=args.ray_address)
    return status


def say(text: str) -> None:
    """Progress, for the person at the terminal; stdout carries the ready line alone."""
    print(f"m3serve: {text}", file=sys.stderr, flush=True)


def demo_checkpoint() -> str:
    """The directory of m3-nano, the small trained checkpoint of the package."""
    say(f"no --model given: serving the demo checkpoint {CHECKPOINT}")
    return str(CHECKPOINT)


def check(settings: ServiceSettings) -> IndexPlan:
    """What can be wrong with settings and checkpoint, found before any process starts; the resolved plan."""
    tracing.check(settings)
    if ApiKeys.of(settings) is None and settings.host not in LOOPBACK:
        say(f"no API key is needed: whoever reaches {settings.host} may use this service (--api-key-file)")
    config = settings.engine_config()
    model, knobs = resolve_model(config)
    Tokenizer.from_dir(config.model, vocab_size=model.vocab_size)
    max_tokens = config.max_model_len or model.max_positions
    note = knobs.note(config.model, exact_tokens=model.topk_blocks * PAGE_SIZE, max_tokens=max_tokens)
    if note is not None:
        say(note[1])
    return knobs.build_plan(model.is_sparse)


def _has_playground(settings: ServiceSettings) -> bool:
    """Unless it is said: where only this machine's own people come."""
    given = settings.enable_playground
    return settings.host in LOOPBACK if given is None else given


def _ray_metrics_port(settings: ServiceSettings, ray_address: str | None) -> int:
    """Only a private Ray listens where it is told to."""
    if ray_address is not None:
        return settings.ray_metrics_port
    return free_port("--ray-metrics-port", "127.0.0.1", settings.ray_metrics_port)


def free_port(flag: str, host: str, port: int) -> int:
    """`port` if it can be listened on, any free one for 0; ConfigError when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # A socket that is only bound, by another server with SO_REUSEADDR, shows here at the latest.
            probe.listen(1)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"{flag} {port}: cannot listen on {host}:{port}: {reason}; 0 takes any free port"
            ) from None
        taken: int = probe.getsockname()[1]
    return taken
