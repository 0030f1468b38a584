"""A rank's share of a checkpoint as one file in the order in which the model asks for it, for later starts.

The directory holds `<model>-rank-<r>-of-<n>/<key>/weights.safetensors`. The key stands for the checkpoint's files and
for every cut of every tensor, and so for the number of ranks, the index plan and all else that decides what is read;
a share under another key is stale, and goes once the new one is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model.read_ahead import Piece, Request
from engine.model.shards import DTYPES, Shards
from engine.parallel import TensorParallel

log = logging.getLogger(__name__)

FILE = "weights.safetensors"
# Part of every key: to be raised when the layout of a share changes.
_VERSION = 1
_PARTIAL = "partial-"
# A partial share that nobody wrote to for so long was left behind.
_ABANDONED_S = 3600.0


class WeightCache:
    """The share of one rank, found or to be written."""

    def __init__(self, directory: Path, shards: Shards, requests: Sequence[Request], parallel: TensorParallel) -> None:
        """requests: all reads of the model, in order."""
        self._shards = shards
        self._requests = requests
        name = shards.path.resolve().name
        self._home = directory / f"{name}-rank-{parallel.rank}-of-{parallel.size}"
        self.path = self._home / _key(shards, requests)
        self._partial = self._home / f"{_PARTIAL}{os.uname().nodename}-{os.getpid()}"
        self._descriptor: int | None = None
        self._offsets: dict[str, int] = {}
        self._error: OSError | None = None

    def find(self) -> Shards | None:
        """The complete share of an earlier start; each tensor in it is one request."""
        if not self.path.exists():
            return None
        try:
            found = Shards(self.path)
            if {name: found.shape(name) for name in found.names()} == self._shapes():
                return found
            found.close()
            reason = "it holds other tensors"
        except CheckpointError as error:
            reason = str(error)
        log.warning("weight cache %s is of no use and will be made again: %s", self.path, reason)
        shutil.rmtree(self.path, ignore_errors=True)
        return None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {each.name: self._shards[each.name].cut(each.rows, each.columns) for each in self._requests}

    def begin(self) -> None:
        """Make room for the share. A cache that cannot be written costs a warning, not the start."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begins: dict[str, int] = {}
        end = 0
        for name, shape in self._shapes().items():
            dtype = self._shards.dtype(name)
            begins[name], end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begins[name], end]}
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text
        self._offsets = {name: len(data) + begin for name, begin in begins.items()}
        try:
            self._partial.mkdir(parents=True)
            if shutil.disk_usage(self._partial).free < len(data) + end:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._descriptor = os.open(self._partial / FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._descriptor, len(data) + end)
            os.pwrite(self._descriptor, data, 0)
        except OSError as error:
            self._error = error

    def write(self, piece: Piece, values: Tensor) -> None:
        """Keep a piece, which lies in host memory. Several readers call this at a time."""
        if self._descriptor is None or self._error is not None:
            return
        view = values.view(-1).view(torch.uint8).numpy().data
        offset = self._offsets[piece.request.name] + piece.offset
        try:
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            self._error = error

    def commit(self) -> None:
        """All pieces were written: from now on the share is found, and those under other keys go."""
        try:
            if self._error is None and self._descriptor is not None:
                os.fsync(self._descriptor)
                self._partial.rename(self.path)
                log.info("weight cache %s was written", self.path)
                self._remove_stale()
        except OSError as error:
            self._error = error
        if self._error is not None and not self.path.exists():
            log.warning("weight cache %s was not written: %s", self.path, self._error.strerror)

    def _remove_stale(self) -> None:
        for other in self._home.iterdir():
            if other == self.path:
                continue
            if other.name.startswith(_PARTIAL) and time.time() - other.stat().st_mtime < _ABANDONED_S:
                continue
            log.info(
                "weight cache %s is of another checkpoint or other settings, or was left unfinished: removed", other
            )
            shutil.rmtree(other, ignore_errors=True)

    def close(self) -> None:
        """Nothing more is written; what is not complete goes."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        shutil.rmtree(self._partial, ignore_errors=True)


def _key(shards: Shards, requests: Sequence[Request]) -> str:
    facts = [_VERSION, shards.stamps(), [(each.name, each.rows, each.columns) for each in requests]]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
