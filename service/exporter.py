"""Serves the series of all processes of one node to Prometheus: `python -m service.exporter --dir D --port 9400`.

One exporter per pod: a counter asked for through a load balancer would jump between processes.
"""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from service import series_files

POLL_S = 0.25


class _LivingCollector:
    """The series of the directory, after those of dead processes were taken care of."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._collector = MultiProcessCollector(None, path=str(directory))
        # Scrapes come in threads of their own; a file must not go while another scrape reads it.
        self._lock = threading.Lock()

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            series_files.fold(self._directory)
            return list(self._collector.collect())


class Exporter:
    """An HTTP server with /metrics over the series files in `directory`.

    Counters and histograms of processes that died go on, their gauges are gone. Starting it removes what an earlier
    life of the service left, but nothing while some process of it still lives: the exporter may be restarted alone.
    port: 0 takes a free one; `self.port` is the one taken.
    """

    def __init__(self, directory: Path, *, host: str = "127.0.0.1", port: int = 9400) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        series_files.clear_if_dead(directory)
        registry = CollectorRegistry()
        registry.register(_LivingCollector(directory))
        self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C, or from SIGTERM on until the last process that writes has ended, or a second SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m service.exporter", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="directory that the deployments write to")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=9400, help="port to listen on; 0: any free one")
    args = parser.parse_args(argv)
    stop, drain = threading.Event(), threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    signal.signal(signal.SIGTERM, lambda *_: (stop if drain.is_set() else drain).set())
    exporter = Exporter(args.dir, host=args.host, port=args.port)
    print(f"metrics: http://{args.host}:{exporter.port}/metrics", flush=True)
    # A pod that drains may go on for minutes, and must not do so unseen.
    while not stop.wait(POLL_S) and not (drain.is_set() and not series_files.is_alive(args.dir)):
        pass
    exporter.close()


if __name__ == "__main__":
    main()
