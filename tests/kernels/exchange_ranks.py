"""Ranks as processes that exchange rows through shared memory, each by interpreted kernels: the real protocol, with
the memory of one machine in the place of that of several GPUs."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch import multiprocessing as mp

from engine.kernels import triton_reduce, triton_sample
from engine.kernels.exchange import Exchange, VocabShare
from engine.kernels.launch import detect

EPS = 1e-6
TIMEOUT_S = 120


@dataclass(frozen=True)
class Sum:
    """x: [size, rows, hidden], a part for each rank.  residual: [rows, hidden] and gain: [hidden], or None."""

    x: Tensor
    residual: Tensor | None = None
    gain: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """logits: [rows, vocab], of which each rank gets its share."""

    logits: Tensor
    temperatures: Tensor
    keys: Tensor


Call = Sum | Draw


Answer = tuple[Tensor, ...]


def run(size: int, calls: list[Call], *, rows: int, width: int, directory: Path) -> list[list[Answer]]:
    """What every rank has of every call: (sum,), (norm, sum with residual) or (tokens, last tokens).

    rows, width: of the exchange, one for all calls.
    """
    words = Exchange.num_words(size, rows, width)
    buffers = [torch.zeros(words, dtype=torch.int64).share_memory_() for _ in range(size)]
    arguments = (size, calls, rows, width, buffers, directory)
    context = mp.start_processes(_run_rank, args=arguments, nprocs=size, join=False, start_method="spawn")
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < deadline, "ranks wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(directory / f"{rank}.pt") for rank in range(size)]


def _run_rank(
    rank: int, size: int, calls: list[Call], rows: int, width: int, buffers: list[Tensor], directory: Path
) -> None:
    peers = torch.tensor([buffer.data_ptr() for buffer in buffers])
    exchange = Exchange(rank, size, rows, width, peers, torch.zeros(rows, dtype=torch.int32))
    torch.save([_call(each, exchange) for each in calls], directory / f"{rank}.pt")


def _call(call: Call, exchange: Exchange) -> Answer:
    target, rank, size = detect(), exchange.rank, exchange.size
    if isinstance(call, Sum):
        x = call.x[rank].clone()
        if call.residual is None or call.gain is None:
            triton_reduce.all_reduce(target, x, exchange)
            return (x,)
        return triton_reduce.all_reduce_add_rms_norm(target, x, call.residual, call.gain, EPS, exchange)
    rows, vocab = call.logits.shape
    share = vocab // size
    # The exchange is as wide as the sums need; these need less of it.
    narrow = replace(exchange, width=triton_sample.exchange_width(target, share))
    assert narrow.width <= exchange.width
    out, last = torch.full((rows,), -9), torch.full((8,), -7)
    triton_sample.sample(
        target, call.logits[:, rank * share : (rank + 1) * share], call.temperatures, call.keys, out, last,
        torch.arange(rows), VocabShare(rank, size, rank * share, _refuse, narrow),
    )  # fmt: skip
    return out, last


def _refuse(x: Tensor) -> Tensor:
    raise AssertionError("kernels exchange it")
