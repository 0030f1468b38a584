"""`m3serve monitor`: a Prometheus that scrapes the service on this machine and evaluates its rules."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.errors import ConfigError
from service.prometheus import LOOPBACK, Prometheus, PrometheusFailed, configuration, find_programs
from service.serve_command import free_port, say

POLL_S = 0.25
# Prometheus finds its targets after 5 s, and first scrapes each within one scrape interval.
FIRST_SCRAPE_S = 30.0
_DURATION = re.compile(r"[1-9][0-9]*(ms|s|m|h|d|w|y)")

_QUERIES = {
    "tokens per second": "sum(rate(m3_delivered_tokens_total[1m]))",
    "95th percentile of the time to the first token, seconds": (
        "histogram_quantile(0.95, sum by (le) (rate(m3_time_to_first_token_seconds_bucket[5m])))"
    ),
    "share of selections that were reused, by layer": (
        'sum by (layer) (rate(m3_index_selections_total{role="reuse"}[5m])) '
        "/ sum by (layer) (rate(m3_index_selections_total[5m]))"
    ),
    "mean indexer time by layer, seconds": (
        "sum by (layer) (rate(m3_indexer_seconds_total[5m])) / sum by (layer) (rate(m3_indexer_samples_total[5m]))"
    ),
}

_EPILOG = """\
Prometheus is taken from PATH, else from .tools/ of the checkout (`make tools` fetches Debian's, which answers queries
but has no web pages). Alerts: http://127.0.0.1:9090/api/v1/alerts

examples:
  m3serve monitor                                  beside `m3serve serve` on this machine
  m3serve monitor --dir DIR --retention 30d        keep the samples
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "monitor",
        help="run Prometheus on the service of this machine",
        description="Run Prometheus in the foreground, on 127.0.0.1, until Ctrl-C: it scrapes the running service and "
        "evaluates its recording rules and alerts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prometheus-port", type=int, default=9090, metavar="N", help="port of Prometheus; 0: any free one (9090)"
    )
    parser.add_argument(
        "--metrics-url",
        default=f"{LOOPBACK}:9400",
        metavar="TEXT",
        help=f"exporter of the service, HOST:PORT or http://HOST:PORT/PATH ({LOOPBACK}:9400)",
    )
    parser.add_argument(
        "--ray-metrics", default=f"{LOOPBACK}:9401", metavar="TEXT", help=f"metrics of the Ray node ({LOOPBACK}:9401)"
    )
    parser.add_argument("--retention", default="1d", metavar="TEXT", help="how long samples are kept, e.g. 12h (1d)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="keep the samples here; default: they go at the end")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run Prometheus until a signal; the exit status."""
    if not _DURATION.fullmatch(args.retention):
        raise ConfigError(f"--retention must be a number and one of ms, s, m, h, d, w, y, got {args.retention!r}")
    if not 0 <= args.prometheus_port <= 65535:
        raise ConfigError(f"--prometheus-port must be in [0, 65535], got {args.prometheus_port}")
    config = configuration({"m3serve": args.metrics_url, "ray": args.ray_metrics})
    find_programs()
    port = free_port("--prometheus-port", LOOPBACK, args.prometheus_port)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    try:
        with (
            _directory(args.dir) as directory,
            Prometheus(config, directory, port=port, retention=args.retention) as it,
        ):
            it.wait_until_ready()
            print(f"m3serve monitor ready: {it.url} scrapes {args.metrics_url} and {args.ray_metrics}", flush=True)
            _show_queries(it)
            _report_targets(it, stop)
            while not stop.wait(POLL_S):
                if it.process.poll() is not None:
                    raise PrometheusFailed(it.last_words())
    except PrometheusFailed as error:
        # Ctrl-C reaches Prometheus too, perhaps first.
        if not stop.is_set():
            say(f"error: {error}")
            return 1
    say("stopped")
    return 0


@contextlib.contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory(prefix="m3serve-monitor-") as made:
            yield Path(made)
        return
    try:
        given.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--dir {given}: {error.strerror}") from None
    yield given


def _show_queries(prometheus: Prometheus) -> None:
    has_pages = prometheus.has_pages()
    for title, expr in _QUERIES.items():
        say(f"{title}:")
        if has_pages:
            say(f"  {prometheus.url}/graph?g0.expr={quote(expr)}&g0.tab=0&g0.range_input=15m")
        else:
            say(f"  curl -s {prometheus.url}/api/v1/query --data-urlencode {shlex.quote(f'query={expr}')}")


def _report_targets(prometheus: Prometheus, stop: threading.Event) -> None:
    """Say which targets answer, once each has been tried."""
    deadline_s = time.monotonic() + FIRST_SCRAPE_S
    # Prometheus knows no targets in its first seconds.
    while not (targets := prometheus.targets()) or any(health == "unknown" for _, _, health, _ in targets):
        if stop.wait(POLL_S):
            return
        if time.monotonic() > deadline_s:
            break
    for job, address, health, error in targets:
        say(f"{job} at {address} is {health}{f': {error}' if error else ''}")
