"""Times of short device operations: many calls in one captured graph, replayed; the median of the replays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from service.bench.floors import Rates

_COPY_BYTES = 2**30
_GEMM_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Protocol:
    """How often a series of calls is repeated, not counting and counting."""

    warmups: int = 3
    replays: int = 20


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one call. method: "graph": replayed, free of launches by the host; "calls": launched one by one, because
    the operation cannot be captured."""

    us: float
    method: str


def measure(run: Callable[[int], object], count: int, device: torch.device, protocol: Protocol) -> Measured:
    """The time of one of the calls run(0) .. run(count - 1)."""

    def series() -> None:
        for call in range(count):
            run(call)

    if device.type == "cpu":
        return Measured(median(_host_times(series, protocol)) * 1e6 / count, "calls")
    _warm_up(run, count)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            series()
    except RuntimeError:
        torch.cuda.synchronize()  # raises once more where the device itself has failed
        return Measured(median(_device_times(series, protocol)) * 1e3 / count, "calls")
    return Measured(median(_device_times(graph.replay, protocol)) * 1e3 / count, "graph")


def _warm_up(run: Callable[[int], object], count: int) -> None:
    """Compile, and let libraries allocate, before anything is captured; on a stream of its own, as capture wants."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in range(min(2, count)):
            run(call)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _host_times(series: Callable[[], None], protocol: Protocol) -> list[float]:
    times = []
    for repeat in range(protocol.warmups + protocol.replays):
        started = time.perf_counter()
        series()
        if repeat >= protocol.warmups:
            times.append(time.perf_counter() - started)
    return times


def _device_times(series: Callable[[], Any], protocol: Protocol) -> list[float]:
    """Milliseconds."""
    for _ in range(protocol.warmups):
        series()
    times = []
    for _ in range(protocol.replays):
        started, stopped = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        series()
        stopped.record()
        stopped.synchronize()
        times.append(started.elapsed_time(stopped))
    return times


def measure_rates(protocol: Protocol) -> Rates:
    """What floors are computed with: a copy by a kernel, read plus write, and an 8192^3 bf16 matrix product."""
    device = torch.device("cuda")
    source, target = (torch.ones(_COPY_BYTES // 4, device=device) for _ in range(2))
    # Not copy_: the device's copy engines are slower than its multiprocessors.
    copy = measure(lambda call: torch.mul(source, 2.0, out=target), 4, device, protocol)
    a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    product = measure(lambda call: torch.mm(a, b.t(), out=out), 4, device, protocol)
    return Rates(2 * _COPY_BYTES / (copy.us * 1e-6), 2 * _GEMM_SIZE**3 / (product.us * 1e-6))


def cache_bytes() -> int:
    """Of the largest cache that a kernel's inputs may survive in."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # Behind the L2 of the MI300 family lies a cache of 256 MiB that the driver does not report.
    return 2**28 if torch.version.hip else int(getattr(properties, "L2_cache_size", 50 * 2**20))
