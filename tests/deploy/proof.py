"""The run that tests/deploy/test_prometheus.py judges: load on a whole service, one engine replica killed, Prometheus
watching. Import it only where Ray is needed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from deploy.grafana import dashboards
from deploy.prometheus import rules
from service.prometheus import Prometheus, PrometheusFailed
from tests.load import TEXT, Load

NUM_CLIENTS = 2
SCRAPE_S = 1.0
# Of load before the kill, and after the replacement is there.
LOAD_S = 2.0
# Steps enough to find a stream running on each replica and to kill one of them.
STREAM_TOKENS = 200
MAX_STREAMS = 8
MAX_BURSTS = 5
# Beyond max_num_seqs + max_queued_requests of all replicas.
BURST = 24

# The largest values that this run can have. Nothing in it takes longer; percent may be of one processor.
_MOST = {
    "percentunit": 1.0 + 1e-9,
    "ratio": 1.0 + 1e-9,
    "percent": 100.0 * (os.cpu_count() or 1),
    "s": 600.0,
    "seconds": 600.0,
}

Vector = list[tuple[dict[str, str], float]]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One expression with what it returned. where: dashboard or rule group.  result: of `expr`.

    value: of an alert, what it compares: that has data also while nothing fires. Else the same as result.
    error: Prometheus' words when it refused the expression.
    """

    where: str
    name: str
    expr: str
    unit: str
    optional: bool
    result: Vector
    value: Vector
    error: str = ""

    def line(self) -> str:
        """One line for people: where / name / expression / value / unit."""
        compared = f", fires: {'yes' if self.result else 'no'}" if self.value is not self.result else ""
        seen = self.error or f"{_summary(self.value)}{compared}"
        return " / ".join((self.where, self.name, " ".join(self.expr.split()), seen, self.unit))


def _drawn(vector: Vector) -> Vector:
    """What Grafana draws: it leaves a gap for the quantile or the ratio of a series that saw nothing (NaN)."""
    return [(labels, value) for labels, value in vector if not math.isnan(value)]


def _summary(vector: Vector) -> str:
    if not vector:
        return "no data"
    values = sorted(value for _, value in vector)
    if len(values) == 1:
        return f"{values[0]:.6g}"
    return f"{len(values)} series, {values[0]:.6g} to {values[-1]:.6g}"


@dataclass(slots=True)
class Proof:
    """What was seen. begin_s, end_s: when an idle service was scraped, before and after the load.

    killed_s: when a replica was killed.  All Unix time.  metrics_url: of the exporter.
    """

    prometheus: Prometheus
    load: Load
    metrics_url: str
    begin_s: float = 0.0
    end_s: float = 0.0
    killed_s: float = 0.0
    evaluated: list[Evaluated] = field(default_factory=list)

    @property
    def window(self) -> str:
        """From the last scrape back to just before the first one, so that `rate` has nothing to extrapolate."""
        return f"{round((self.end_s - self.begin_s) * 1000) + 1}ms"

    @property
    def window_s(self) -> float:
        return self.end_s - self.begin_s

    def query(self, expr: str) -> Vector:
        """The value at the end."""
        return self.prometheus.query(expr, at_s=self.end_s)

    def grown(self, series: str, label: str) -> dict[str, float]:
        """How much a counter has grown by `label`, as a rate panel over the whole load shows it; zeros left out."""
        found = self.query(f"sum by ({label}) (rate({series}[{self.window}]))")
        return {labels.get(label, ""): value * self.window_s for labels, value in found if value}

    def panel(self, dashboard: str, title: str) -> Vector:
        """What the first query of a panel returned."""
        return next(e.result for e in self.evaluated if (e.where, e.name) == (dashboard, title))

    def panel_counts(self, dashboard: str, title: str, label: str) -> dict[str, float]:
        """The rates of a panel over the whole load, as counts by `label`; zeros left out."""
        return {labels.get(label, ""): v * self.window_s for labels, v in self.panel(dashboard, title) if v}

    def matrix(self, selector: str) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Every scraped sample within the window: labels, then time and value."""
        data = self.prometheus.api("query", query=f"{selector}[{self.window}]", time=self.end_s)["result"]
        return [(s["metric"], [(stamp, float(value)) for stamp, value in s["values"]]) for s in data]

    def evaluate_everything(self) -> None:
        """Every panel and every rule, over the whole load."""
        for panel in dashboards.expressions():
            expr = dashboards.substitute(
                panel.expr,
                rate_interval=self.window,
                time_range=self.window,
                variables={"model_name": self.load.model},
            )
            self._evaluate(panel.dashboard, panel.panel, expr, expr, panel.unit, panel.optional)
        for rule in rules.expressions():
            self._evaluate(rule.group, rule.name, rule.expr, rule.value, rule.unit, False)

    def _evaluate(self, where: str, name: str, expr: str, value: str, unit: str, optional: bool) -> None:
        try:
            result = _drawn(self.query(expr))
            compared = result if value == expr else _drawn(self.query(value))
        except PrometheusFailed as error:
            self.evaluated.append(Evaluated(where, name, expr, unit, optional, [], [], str(error)))
        else:
            self.evaluated.append(Evaluated(where, name, expr, unit, optional, result, compared))


async def run(proof: Proof) -> None:
    """One of each kind of request; then closed loops, every kind again, a kill, and on until the replica is back."""
    load = proof.load
    async with load.client() as client:
        await _one_of_each(load, client)
        proof.begin_s = await _scrape_at_rest(proof)
        load.forget()
        async with _busy(load, client):
            await _one_of_each(load, client)
            await asyncio.sleep(LOAD_S)
        [victim, *_] = await serve.get_deployment_handle("Engine", "service").pids.remote()
        streams = await _streams_on_every_replica(proof, client)
        proof.killed_s = time.time()
        os.kill(victim, signal.SIGKILL)
        async with _busy(load, client):
            newest = f'max(m3_engine_start_time_seconds{{model_name="{load.model}"}})'
            await _until(lambda: proof.prometheus.query(newest)[0][1] > proof.killed_s, 120, "a new replica")
            await asyncio.sleep(LOAD_S)
        await asyncio.gather(*streams)
        proof.end_s = await _scrape_at_rest(proof)


@contextlib.asynccontextmanager
async def _busy(load: Load, client: httpx.AsyncClient) -> AsyncIterator[None]:
    """Closed loops of clients meanwhile."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_CLIENTS):
            group.create_task(load.keep_busy(client, stop))
        try:
            yield
        finally:
            stop.set()


async def _streams_on_every_replica(proof: Proof, client: httpx.AsyncClient) -> list[asyncio.Task[None]]:
    """Streams long enough to outlive this call, one after the other until each replica has some."""
    streams: list[asyncio.Task[None]] = []
    while len(_open_requests(proof)) < 2:
        assert len(streams) < MAX_STREAMS, f"{MAX_STREAMS} streams, and all of them on one replica"
        streams.append(await _start_stream(proof, client))
    return streams


async def _start_stream(proof: Proof, client: httpx.AsyncClient) -> asyncio.Task[None]:
    before = sum(_open_requests(proof).values())
    stream = asyncio.create_task(proof.load.stream(client, prompt=[11, 12, 13], max_tokens=STREAM_TOKENS))
    await _until(lambda: sum(_open_requests(proof).values()) > before, 20, "a stream's start")
    return stream


def _open_requests(proof: Proof) -> dict[str, float]:
    """By slot, fresh from the exporter: Prometheus' own are a second old."""
    text = httpx.get(proof.metrics_url, trust_env=False).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["m3_engine_open_requests"].samples
    mine = (sample for sample in samples if sample.labels["model_name"] == proof.load.model)
    return {sample.labels["engine"]: sample.value for sample in mine if sample.value}


async def _one_of_each(load: Load, client: httpx.AsyncClient) -> None:
    """Requests of every kind and outcome: each series is there then, and has something to grow from."""
    assert await load.post(client, prompt=TEXT, max_tokens=8) == 200
    assert await load.post(client, prompt=[[11, 12, 13], [14, 15, 16]], max_tokens=8) == 200
    # Another grammar each time: one that is known is not compiled.
    grammar = f"[a-z]{{50,{100 + load.num_started}}}"
    assert await load.post(client, prompt=TEXT, max_tokens=8, guided_regex=grammar, ignore_eos=False) == 200
    assert await load.post(client, prompt=TEXT, max_tokens=4000) == 400
    assert await load.post(client, model="another") == 404
    await load.stream(client, max_tokens=800, leave_after=3)
    for _ in range(MAX_BURSTS):
        many = [load.post(client, prompt=[[11, 12, 13]], max_tokens=32) for _ in range(BURST)]
        if 429 in await asyncio.gather(*many):
            return
    raise AssertionError(f"{MAX_BURSTS} times {BURST} requests at once, and none was refused")


async def _scrape_at_rest(proof: Proof) -> float:
    """Wait until a scrape has seen the service at rest; when that was."""
    idle = f'sum({{__name__=~"m3_num_requests_running|m3_engine_open_requests", model_name="{proof.load.model}"}})'
    await _until(lambda: proof.prometheus.query(idle)[0][1] == 0, 20, "an idle service")
    # The streams' last words are published within moments of their end.
    after_s = time.time() + SCRAPE_S / 2
    await _until(lambda: _last_scrape_s(proof) > after_s, 20, "a scrape")
    return _last_scrape_s(proof)


def _last_scrape_s(proof: Proof) -> float:
    [(_, stamp)] = proof.prometheus.query('timestamp(up{job="m3serve"})')
    return stamp


async def _until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline_s, f"{what} did not come within {timeout_s:g} s"
        await asyncio.sleep(0.1)


def is_plausible(unit: str, labels: dict[str, str], value: float) -> bool:
    """Whether a value can have the unit: a ratio that is a percentage, or seconds that are milliseconds, cannot.

    Where each bucket of a histogram is shown, the unit is that of the buckets' bounds, and the value a count.
    """
    most = math.inf if "le" in labels else _MOST.get(unit, math.inf)
    return math.isfinite(value) and 0 <= value <= most
