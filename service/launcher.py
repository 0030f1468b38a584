"""Runs the whole service in the foreground: Ray, Serve, the application, the metrics exporter."""

from __future__ import annotations

import io
import logging
import os
import queue
import shutil
import signal
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import httpx
import ray
from ray import serve
from ray.serve.api import RunTarget
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from engine.errors import CheckpointError, ConfigError, M3Error
from engine.ray_executor import rank_resources
from service.app import build
from service.drain import Drain, until_cut
from service.exporter import Exporter
from service.settings import ServiceSettings
from service.tls import client_context

APP_NAME = "m3serve"
PROGRESS_PERIOD_S = 10.0
POLL_S = 0.25
WATCH_PERIOD_S = 10.0
SERVE_CALL_TIMEOUT_S = 30.0
# Serve looks whether a replica has drained once in this time.
DRAIN_SPARE_S = 5.0
# Serve's own controller, proxy and the replicas' bookkeeping, on top of what the deployments ask for.
SPARE_CPUS = 4
OBJECT_STORE_BYTES = 200 * 2**20

T = TypeVar("T")


class ServiceFailed(M3Error):
    """The service did not come up, or was lost, for a reason that is no setting's fault."""


def launch(settings: ServiceSettings, plan: str, *, ray_address: str | None) -> int:
    """Start everything, wait for a signal, stop everything; returns the exit status.

    settings: checked, with ports that are free.  plan: one letter per layer.  ray_address: None starts a
    private Ray.
    """
    signals = _Signals()
    # Serve reports its own progress on this logger; ours says the same in fewer words.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        with ExitStack() as stack:
            settings = stack.enter_context(_metrics(settings))
            settings = stack.enter_context(_ray(settings, ray_address, signals))
            # After Ray, which installs a handler of its own that would end this process at once.
            signals.install()
            stack.enter_context(_application(settings, signals, is_ours=ray_address is None))
            if _wait_until_ready(settings, signals):
                base = f"{_base_url(settings)}/v1"
                metrics = f"http://{_reachable(settings.host)}:{settings.metrics_port}/metrics"
                name = settings.model_name
                print(f"m3serve ready: {base} model={name} plan={plan} metrics={metrics}", flush=True)
                if settings.enable_playground:
                    _say(f"playground: {_base_url(settings)}/")
                while not signals.stop.wait(timeout=WATCH_PERIOD_S):
                    _application_status()
            _say("stopping: finishing what runs (Ctrl-C again to cut it off)")
    except ServiceFailed as error:
        _say(f"error: {error}")
        return 1
    _say("stopped")
    return 0


def _say(text: str) -> None:
    """Progress, for the person at the terminal; stdout carries the ready line alone."""
    print(f"m3serve: {text}", file=sys.stderr, flush=True)


def _base_url(settings: ServiceSettings) -> str:
    scheme = "http" if settings.tls_cert_file is None else "https"
    return f"{scheme}://{_reachable(settings.host)}:{settings.port}"


def _reachable(host: str) -> str:
    """The address to show for a server that may listen on all interfaces."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{shown}]" if ":" in shown else shown


@contextmanager
def _metrics(settings: ServiceSettings) -> Iterator[ServiceSettings]:
    """The exporter and the directory it reads. Yields the settings with what was chosen."""
    own_dir = None if settings.metrics_dir else tempfile.mkdtemp(prefix="m3serve-metrics-")
    directory = settings.metrics_dir or own_dir
    assert directory is not None
    exporter = Exporter(Path(directory), host=settings.host, port=settings.metrics_port)
    try:
        yield settings.model_copy(update={"metrics_dir": directory, "metrics_port": exporter.port})
    finally:
        exporter.close()
        if own_dir is not None:
            shutil.rmtree(own_dir, ignore_errors=True)


@contextmanager
def _ray(settings: ServiceSettings, address: str | None, signals: _Signals) -> Iterator[ServiceSettings]:
    """A private Ray on loopback, or a connection to the one at `address`."""
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--ray-address {address}: {error}") from error
        try:
            yield settings
        finally:
            ray.shutdown()
        return
    _say("starting Ray")
    # Nothing about a private cluster is reported to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    wanted_cpus = settings.most_replicas * (1 + settings.tensor_parallel_size) + settings.ingress_replicas
    # Unix socket paths are limited to 107 characters: the directory's name must be short.
    directory = tempfile.mkdtemp(prefix="m3-", dir="/tmp")
    try:
        ray.init(
            address="local",
            # Logical ones: they place processes, they do not limit them.
            num_cpus=max(os.cpu_count() or 1, wanted_cpus + SPARE_CPUS),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            # What the processes log is for the person at the terminal: it goes nowhere else.
            log_to_driver=True,
            logging_level=logging.ERROR,
            _temp_dir=directory,
            _node_ip_address="127.0.0.1",
            _metrics_export_port=settings.ray_metrics_port,
        )
        _say(f"Ray's own metrics: http://127.0.0.1:{settings.ray_metrics_port}/metrics")
        _check_gpus(settings)
        yield settings.model_copy(update={"data_host": settings.data_host or "127.0.0.1"})
    finally:
        # Ray tells on stdout that calls to its own controller failed, once that has ended.
        with redirect_stdout(io.StringIO()):
            # Its proxies end first: from then on connections are refused.
            until_cut(serve.shutdown, SERVE_CALL_TIMEOUT_S, signals.cut)
            ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def _check_gpus(settings: ServiceSettings) -> None:
    """ConfigError when this machine lacks the GPUs of a private cluster's ranks: nobody else will bring them."""
    cluster = ray.cluster_resources()
    ranks = settings.most_replicas * settings.tensor_parallel_size
    needed = ranks * rank_resources(settings.backend, cluster).get("GPU", 0.0)
    if needed > (there := cluster.get("GPU", 0.0)):
        raise ConfigError(
            f"backend={settings.backend} needs a GPU for each of {settings.most_replicas} replicas x "
            f"{settings.tensor_parallel_size} ranks, and this machine has {there:.0f}; backend=torch runs on CPU"
        )


@contextmanager
def _application(settings: ServiceSettings, signals: _Signals, *, is_ours: bool) -> Iterator[None]:
    """Serve and the application on it; at the end, what runs may finish. is_ours: the Ray below is private."""
    logging_config = LoggingConfig(log_level="WARNING", enable_access_log=False)
    http_options: dict[str, Any] = {"host": settings.host, "port": settings.port}
    if settings.tls_cert_file is not None and settings.tls_key_file is not None:
        # The proxy is a process with a working directory of its own.
        files = {"ssl_certfile": settings.tls_cert_file, "ssl_keyfile": settings.tls_key_file}
        http_options |= {name: os.path.abspath(path) for name, path in files.items()}
    serve.start(
        http_options=http_options,
        proxy_location="HeadOnly",
        logging_config=logging_config,
    )
    try:
        target = RunTarget(build(settings), name=APP_NAME, route_prefix="/", logging_config=logging_config)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        yield
    finally:
        _drain(settings, signals, is_ours=is_ours)


def _drain(settings: ServiceSettings, signals: _Signals, *, is_ours: bool) -> None:
    """Wait for running requests, up to the limit or a second signal; then take the application off."""
    drain, limit_s = Drain(APP_NAME, signals.cut), settings.graceful_shutdown_timeout_s
    status = _application_status()
    fronts = None if status is None else status.deployments.get("Ingress")
    if fronts is not None and fronts.replica_states.get("RUNNING"):
        is_done = drain.wait_for_requests(limit_s)
        if not is_done and not signals.cut.is_set():
            _say(f"not done within graceful_shutdown_timeout_s={limit_s:g}: {drain.num_running} requests are cut off")
    if not is_ours:
        _bounded(lambda: serve.delete(APP_NAME, _blocking=False))
        deadline_s = time.monotonic() + limit_s + DRAIN_SPARE_S
        while _application_status() is not None and time.monotonic() < deadline_s:
            if signals.cut.wait(timeout=POLL_S):
                break
        # Serve goes if nobody else uses it.
        if not signals.cut.is_set() and not _bounded(serve.status).applications:
            _bounded(serve.shutdown)
    if signals.cut.is_set():
        _say(f"cut off: {drain.num_running} requests had not finished")


def _application_status() -> ApplicationStatusOverview | None:
    """Serve's view of our application; None when it knows none. ServiceFailed when Serve does not answer."""
    return _bounded(serve.status).applications.get(APP_NAME)


def _bounded(call: Callable[[], T]) -> T:
    """Make a call to Serve, which has no deadline of its own: it would hang for ever when Ray has died."""
    result: queue.Queue[T | Exception] = queue.Queue()

    def work() -> None:
        try:
            result.put(call())
        except Exception as error:  # raised again below, in the thread that asked
            result.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        outcome = result.get(timeout=SERVE_CALL_TIMEOUT_S)
    except queue.Empty:
        raise ServiceFailed(f"Ray Serve did not answer within {SERVE_CALL_TIMEOUT_S:g} s") from None
    if isinstance(outcome, Exception):
        raise ServiceFailed(f"Ray Serve failed: {outcome}") from outcome
    return outcome


class _Signals:
    """Ctrl-C and SIGTERM: the first sets `stop`, the next sets `cut`."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.cut = threading.Event()

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        (self.cut if self.stop.is_set() else self.stop).set()


def _wait_until_ready(settings: ServiceSettings, signals: _Signals) -> bool:
    """True once a request would be answered; False when a signal came first. Says what it waits for."""
    started_s = time.monotonic()
    shown, shown_s = "", started_s
    url = f"{_base_url(settings)}/ready"
    verify = True if settings.tls_cert_file is None else client_context(settings.tls_cert_file)
    while time.monotonic() < started_s + settings.start_timeout_s:
        status = _application_status()
        state = _describe(status)
        if state != shown or time.monotonic() > shown_s + PROGRESS_PERIOD_S:
            shown, shown_s = state, time.monotonic()
            _say(f"{state}, {shown_s - started_s:.0f} s")
        if status is not None:
            _raise_failure(status)
            if status.status == ApplicationStatus.RUNNING and _answers(url, verify):
                return True
        if signals.stop.wait(timeout=POLL_S):
            return False
    raise ServiceFailed(f"not ready after --start-timeout-s {settings.start_timeout_s:g}: {shown}")


def _describe(status: ApplicationStatusOverview | None) -> str:
    if status is None or not status.deployments:
        return "starting Serve"
    parts = [f"{name} {deployment.status.value.lower()}" for name, deployment in status.deployments.items()]
    return f"starting: {', '.join(parts)}"


def _raise_failure(status: ApplicationStatusOverview) -> None:
    """What a replica's constructor raised, under its own class where it is one of ours."""
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines()]
    for line in lines:
        for kind in (ConfigError, CheckpointError):
            _, found, text = line.partition(f"{kind.__name__}: ")
            if found:
                raise kind(text)
    if status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
        raise ServiceFailed("\n".join(messages))


def _answers(url: str, verify: ssl.SSLContext | bool) -> bool:
    try:
        return httpx.get(url, timeout=5.0, trust_env=False, verify=verify).status_code == 200
    except httpx.HTTPError:
        return False
