"""The Ray cluster of a test session, and waits that have a deadline. Import it only where Ray is needed."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from service.app import build, build_engine
from service.exporter import Exporter
from service.settings import ServiceSettings
from service.stream import EngineClient

LOOPBACK = "127.0.0.1"


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> float:
    """Poll until `condition` holds; the seconds it took. Fails the test after `timeout_s`."""
    started_s = time.monotonic()
    while not condition():
        if time.monotonic() - started_s > timeout_s:
            pytest.fail(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(0.02)
    return time.monotonic() - started_s


async def wait_until_async(condition: Callable[[], Awaitable[bool]], *, timeout_s: float, what: str) -> None:
    """As `wait_until`, for a condition that has to be awaited."""
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"{what} did not happen within {timeout_s:g} s")
        await asyncio.sleep(0.02)


def process_exists(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Cluster:
    """The session's Ray cluster with Serve on `url`, and the series of everything deployed on it."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="m3t-", dir="/tmp"))
        self.exporter = Exporter(self.directory / "metrics", port=0)
        self.ray_metrics = f"{LOOPBACK}:{free_port()}"
        ray.init(
            address="local",
            num_cpus=16,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            _temp_dir=str(self.directory / "ray"),
            _node_ip_address=LOOPBACK,
            _metrics_export_port=int(self.ray_metrics.rpartition(":")[2]),
            # Of Ray's own series; 10000 unless set.
            _system_config={"metrics_report_interval_ms": 1000},
        )
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self.metrics_url = f"http://{LOOPBACK}:{self.exporter.port}/metrics"
        serve.start(http_options={"host": LOOPBACK, "port": self.port}, proxy_location="HeadOnly")

    def settings(self, model: Path, **settings: Any) -> ServiceSettings:
        """Settings for this cluster: loopback, metrics on, quick health checks."""
        defaults: dict[str, Any] = {
            "backend": "torch",
            "dtype": "float32",
            "num_threads": 1,
            "data_host": LOOPBACK,
            "metrics_dir": str(self.exporter.directory),
            "health_check_period_s": 0.5,
            "graceful_shutdown_timeout_s": 5.0,
        }
        return ServiceSettings(model=str(model), **(defaults | settings))

    @contextlib.contextmanager
    def service(self, settings: ServiceSettings) -> Iterator[str]:
        """The whole service, ready for HTTP, at the URL that is yielded. One at a time."""
        with self._deployed("service", build(settings)):
            yield self.url

    @contextlib.contextmanager
    def engine(self, settings: ServiceSettings) -> Iterator[Any]:
        """Engine replicas alone; yields their handle."""
        with self._deployed("engine", build_engine(settings)) as handle:
            yield handle

    @contextlib.contextmanager
    def _deployed(self, name: str, application: serve.Application) -> Iterator[Any]:
        route = "/" if name == "service" else None
        handle = serve.run(application, name=name, route_prefix=route)
        try:
            yield handle
        finally:
            serve.delete(name)

    def close(self) -> None:
        serve.shutdown()
        ray.shutdown()
        self.exporter.close()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.asynccontextmanager
async def engine_client(settings: ServiceSettings, handle: Any) -> AsyncIterator[EngineClient]:
    """An EngineClient in this process."""
    client = EngineClient(settings)
    await client.start(handle)
    try:
        yield client
    finally:
        await client.close()
