"""Reads what a model will ask for ahead of it: several readers, bounded memory, progress in the log.

The order comes from a dry pass: the model is built once from a `Recorder`, which reads nothing.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.model.shards import DTYPES, Shards

log = logging.getLogger(__name__)

READERS = 8
# Read and not yet taken; pinned where there is a GPU. Enough for every reader to have two large pieces in flight.
BUDGET_BYTES = 256 << 20
# Larger tensors are read in pieces of whole rows, by several readers at once.
PIECE_BYTES = 16 << 20
REPORT_INTERVAL_S = 5.0
# On CPU, threads that copy what was read to where it belongs, and how much each does at a time.
_COPIERS = 4
_STRIP_BYTES = 2 << 20
# Pieces begin at multiples of this, so that they can be viewed in any dtype.
_ALIGN_BYTES = 512


class Reader(Protocol):
    """Where the bytes of a checkpoint come from: tensors under the names they have on disk, in the dtype they have
    there."""

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """The tensor `name` cut to `rows` and `columns`. out: filled, cast if need be, and returned."""


@dataclass(frozen=True, slots=True)
class Request:
    """One read of the model."""

    name: str
    rows: slice | None
    columns: slice | None


class Recorder:
    """Notes what is read, and answers with tensors on the meta device."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.requests: list[Request] = []

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """See Reader."""
        self.requests.append(Request(name, rows, columns))
        stored = self._shards[name]
        shape = stored.cut(rows, columns)
        return out if out is not None else torch.empty(shape, dtype=DTYPES[stored.dtype], device="meta")


class Progress:
    """A line in the log every few seconds, and one at the end. label: whose load it is."""

    def __init__(self, label: str, num_bytes: int, num_tensors: int) -> None:
        self._label = label
        self._num_bytes = num_bytes
        self._num_tensors = num_tensors
        self._bytes = self._tensors = 0
        self._started = self._reported = time.monotonic()

    def add(self, num_bytes: int, num_tensors: int) -> None:
        """So much more was read."""
        self._bytes += num_bytes
        self._tensors += num_tensors
        now = time.monotonic()
        if now - self._reported < REPORT_INTERVAL_S:
            return
        self._reported = now
        rate = self._bytes / (now - self._started)
        log.info(
            "%s: read %.1f of %.1f GB, %.2f GB/s, %.0f s left, %d of %d tensors",
            self._label, self._bytes / 1e9, self._num_bytes / 1e9, rate / 1e9,
            (self._num_bytes - self._bytes) / rate, self._tensors, self._num_tensors,
        )  # fmt: skip

    def finish(self) -> None:
        """All was read."""
        seconds = time.monotonic() - self._started
        log.info(
            "%s: read %.1f GB, %d tensors, in %.1f s, %.2f GB/s",
            self._label, self._bytes / 1e9, self._tensors, seconds, self._bytes / 1e9 / max(seconds, 1e-9),
        )  # fmt: skip


class Ring:
    """Room for byte ranges that are given back in the order in which they were taken."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: deque[tuple[int, int]] = deque()

    def take(self, num_bytes: int) -> int | None:
        """Where `num_bytes`, more than 0, begin; None while there is no room."""
        need = -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        start = 0
        if self._taken:
            oldest, end = self._taken[0][0], self._taken[-1][1]
            if end > oldest:
                start = end if self._size - end >= need else 0
                limit = self._size if start else oldest
            else:
                start, limit = end, oldest
        else:
            limit = self._size
        if limit - start < need:
            return None
        self._taken.append((start, start + need))
        return start

    def give_back(self) -> None:
        """The oldest range is free again."""
        self._taken.popleft()


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one request. offset: bytes of the cut before it.  rows: of the tensor on disk.  num_bytes: of the cut,
    file_bytes: that are read for it."""

    request: Request
    offset: int
    rows: slice | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    file_bytes: int


def pieces_of(shards: Shards, request: Request) -> list[Piece]:
    """The reads that `request` becomes; none of an empty tensor."""
    stored = shards[request.name]
    shape, dtype = stored.cut(request.rows, request.columns), DTYPES[stored.dtype]
    if 0 in shape:
        return []
    if not shape:
        return [Piece(request, 0, None, shape, dtype, dtype.itemsize, dtype.itemsize)]
    row_bytes = dtype.itemsize
    for size in shape[1:]:
        row_bytes *= size
    first = (request.rows or slice(None)).indices(stored.shape[0])[0]
    step = max(1, PIECE_BYTES // row_bytes)
    pieces = []
    for start in range(0, shape[0], step):
        count = min(step, shape[0] - start)
        rows = slice(first + start, first + start + count)
        part = (count, *shape[1:])
        pieces.append(Piece(request, start * row_bytes, rows, part, dtype, count * row_bytes, count * stored.row_bytes))
    return pieces


class ReadAhead:
    """The tensors of `requests`, in that order, on `device`."""

    def __init__(
        self,
        shards: Shards,
        requests: Sequence[Request],
        device: torch.device,
        *,
        label: str = "weights",
        readers: int = READERS,
        budget_bytes: int = BUDGET_BYTES,
        cut: Shards | None = None,
        sink: Callable[[Piece, Tensor], None] | None = None,
    ) -> None:
        """readers: threads.  budget_bytes: limit of what was read and not yet taken.  cut: holds the cuts themselves
        as tensors, under the same names: they are read instead.  sink: is shown every piece by the reader that has it.
        """
        self._shards = shards
        self._source = shards if cut is None else cut
        self._sink = sink
        self._device = device
        self._requests = iter(requests)
        stored = requests if cut is None else [Request(request.name, None, None) for request in requests]
        plan = [piece for request in stored for piece in pieces_of(self._source, request)]
        total = sum(piece.file_bytes for piece in plan)
        largest = max((piece.num_bytes for piece in plan), default=0)
        size = max(min(budget_bytes, sum(piece.num_bytes + _ALIGN_BYTES for piece in plan)), largest + _ALIGN_BYTES)
        self._plan = iter(plan)
        self._next = next(self._plan, None)
        self._arena = torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")
        self._ring = Ring(size)
        self._flying: deque[tuple[Piece, Future[Tensor]]] = deque()
        # Copies to the device that may still read the arena, oldest first.
        self._copying: deque[torch.cuda.Event] = deque()
        self._progress = Progress(label, total, len(requests))
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="read-ahead")
        self._copiers = ThreadPoolExecutor(_COPIERS, thread_name_prefix="copy")
        self._send()

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """See Reader. It must be what comes next in `requests`. On a GPU the copy is queued on the current stream."""
        request = Request(name, rows, columns)
        expected = next(self._requests, None)
        assert request == expected, f"{request} was read where the dry pass read {expected}"
        stored = self._shards[name]
        shape = stored.cut(rows, columns)
        if out is None:
            out = torch.empty(shape, dtype=DTYPES[stored.dtype], device=self._device)
        assert tuple(out.shape) == shape
        row = file_bytes = 0
        while row < (shape[0] if shape else 1) and out.numel():
            self._send()
            piece, future = self._take()
            values = future.result()
            count = piece.shape[0] if shape else 1
            target = out[row : row + count] if shape else out
            self._copy(target, values)
            self._release()
            row += count
            file_bytes += piece.file_bytes
        self._progress.add(file_bytes, 1)
        return out

    def _send(self) -> None:
        """Hand the readers all that there is room for."""
        while self._copying and self._copying[0].query():
            self._copying.popleft()
            self._ring.give_back()
        while self._next is not None and (start := self._ring.take(self._next.num_bytes)) is not None:
            self._flying.append((self._next, self._pool.submit(self._fill, self._next, start)))
            self._next = next(self._plan, None)

    def _take(self) -> tuple[Piece, Future[Tensor]]:
        while not self._flying:
            # The room that is missing is that of copies under way.
            self._copying[0].synchronize()
            self._send()
        return self._flying.popleft()

    def _fill(self, piece: Piece, start: int) -> Tensor:
        room = self._arena[start : start + piece.num_bytes].view(piece.dtype).view(piece.shape)
        self._source.read(piece.request.name, piece.rows, piece.request.columns, out=room)
        if self._sink is not None:
            self._sink(piece, room)
        return room

    def _copy(self, target: Tensor, values: Tensor) -> None:
        if target.device.type != "cpu" or target.dtype != values.dtype:
            target.copy_(values, non_blocking=True)
            return
        # To touch new memory takes longer than to read. Not by torch's threads, which wait for each other in a spin
        # on the cores that the readers need.
        to, source = (each.view(-1).view(torch.uint8).numpy() for each in (target, values))
        strips = -(-len(to) // _STRIP_BYTES)
        if strips == 1:
            np.copyto(to, source)
        else:
            # The list waits for all of them.
            list(self._copiers.map(np.copyto, np.array_split(to, strips), np.array_split(source, strips)))

    def _release(self) -> None:
        """The oldest piece was taken: its room is free, on a GPU once the copy is through."""
        if self._device.type == "cpu":
            self._ring.give_back()
            return
        event = torch.cuda.Event()
        event.record()
        self._copying.append(event)

    def finish(self) -> None:
        """All was read."""
        assert next(self._requests, None) is None, "less was read than in the dry pass"
        self._progress.finish()

    def close(self) -> None:
        """Stop the readers, whatever is still under way."""
        self._pool.shutdown(cancel_futures=True)
        self._copiers.shutdown()
        for event in self._copying:
            event.synchronize()
        self._copying.clear()
