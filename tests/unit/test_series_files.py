"""Who lives in the directory of the series, with real processes that die in real ways."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import series_files
from service.exporter import Exporter

_WRITER = """
import sys
from service import series_files
series_files.claim_from_environment()
from prometheus_client import Counter, Gauge, Histogram
Counter("requests", "", ["route"]).labels("a").inc(float(sys.argv[1]))
Histogram("seconds", "", buckets=(1, 10)).observe(float(sys.argv[1]))
Gauge("running", "", ["engine"], multiprocess_mode="mostrecent").labels(sys.argv[2]).set(float(sys.argv[1]))
Gauge("fronts", "", multiprocess_mode="livesum").set(1)
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def writer(directory: Path, amount: int, engine: str) -> Iterator[subprocess.Popen[str]]:
    """A process that wrote and lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(amount), engine],
        env=os.environ | {series_files.VARIABLE: str(directory)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)
        assert process.stdin is not None
        process.stdin.close()
        process.stdout.close()


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=10)


@contextlib.contextmanager
def exporter(directory: Path) -> Iterator[Exporter]:
    started = Exporter(directory, port=0)
    yield started
    started.close()


def scrape(source: Exporter) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{source.port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_counters_of_the_dead_go_on_and_their_gauges_are_gone(tmp_path: Path) -> None:
    with exporter(tmp_path) as source, writer(tmp_path, 3, "0") as first, writer(tmp_path, 4, "1"):
        both = scrape(source)
        assert both['requests_total{route="a"}'] == 7
        assert (both['running{engine="0"}'], both['running{engine="1"}'], both["fronts"]) == (3, 4, 2)
        kill(first)
        for _ in range(2):  # folding a second time changes nothing
            left = scrape(source)
            assert left['requests_total{route="a"}'] == 7
            assert (left['seconds_bucket{le="10.0"}'], left["seconds_sum"], left["seconds_count"]) == (2, 7, 2)
            assert 'running{engine="0"}' not in left
            assert (left['running{engine="1"}'], left["fronts"]) == (4, 1)
        assert not list(tmp_path.glob(f"*{first.pid}*"))
        with writer(tmp_path, 5, "0"):
            again = scrape(source)
            assert again['requests_total{route="a"}'] == 12
            assert (again['running{engine="0"}'], again["fronts"]) == (5, 2)


def test_files_stay_few_however_many_processes_die(tmp_path: Path) -> None:
    with exporter(tmp_path) as source:
        for amount in range(1, 6):
            with writer(tmp_path, amount, "0"):
                pass
            assert scrape(source)['requests_total{route="a"}'] == sum(range(amount + 1))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["counter_archive.db", "histogram_archive.db"]


def test_an_exporter_that_restarts_alone_loses_nothing(tmp_path: Path) -> None:
    with writer(tmp_path, 3, "0") as first, writer(tmp_path, 4, "1"):
        with exporter(tmp_path) as source:
            kill(first)
            assert scrape(source)['requests_total{route="a"}'] == 7
        with exporter(tmp_path) as source:
            assert scrape(source)['requests_total{route="a"}'] == 7
    with exporter(tmp_path) as source:
        assert scrape(source) == {}, "nobody of that life is left"


def test_the_exporter_of_a_draining_pod_ends_with_its_last_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.exporter", "--dir", str(tmp_path), "--port", "0"]
    with writer(tmp_path, 3, "0") as first:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().removeprefix("metrics: ").strip()
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1.0)
            with urllib.request.urlopen(url, timeout=5) as reply:
                assert b"requests_total" in reply.read()
            kill(first)
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()
            process.wait(timeout=10)


def test_scrapes_at_the_same_time_see_whole_sums(tmp_path: Path) -> None:
    seen: list[float] = []
    with exporter(tmp_path) as source, writer(tmp_path, 3, "0") as first, writer(tmp_path, 4, "1") as second:
        kill(first)
        kill(second)
        threads = [
            threading.Thread(target=lambda: seen.append(scrape(source)['requests_total{route="a"}'])) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
    assert seen == [7.0] * 8


def test_a_process_whose_id_was_used_before_starts_anew(tmp_path: Path) -> None:
    """The lock and the files of a dead process with this id lie there, and were not folded yet."""
    own = os.getpid()
    (tmp_path / f"{own}.lock").touch()
    (tmp_path / f"gauge_livesum_{own}.db").write_bytes(b"left by another life")
    series_files.claim(tmp_path)
    try:
        assert not list(tmp_path.glob("gauge_*"))
        series_files.claim(tmp_path)  # again: nothing to do
        series_files.fold(tmp_path)
        assert (tmp_path / f"{own}.lock").exists(), "this process lives"
    finally:
        os.close(series_files._held.pop(tmp_path))


def test_no_directory_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(series_files.VARIABLE, raising=False)
    before = dict(series_files._held)
    series_files.claim_from_environment()
    assert series_files._held == before
