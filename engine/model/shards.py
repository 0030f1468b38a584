"""The tensors of a directory of safetensors files, read by ranges, under the names they have on disk.

Only headers are read at first; nothing is trusted in them: a file that lies about its tensors is refused by name
before any of it is used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import read_json
from engine.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
# The limit of the format itself. M3's 1,500 tensors a shard take 0.2 MB.
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
# Rows that are cut into columns go through a buffer of about this size, which a core's cache holds.
_SCRATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies. dtype: as the header spells it.  offset: of its first byte in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Of one step along the first dimension; of all of a scalar."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    def cut(self, rows: slice | None, columns: slice | None) -> tuple[int, ...]:
        """The shape of what `rows` and `columns` leave."""
        kept = [
            len(range(size)[part]) if part is not None else size
            for size, part in zip(self.shape, (rows, columns), strict=False)
        ]
        return (*kept, *self.shape[2:])


class Shards:
    """An open checkpoint directory. Reads are thread-safe: nothing is shared but file descriptors."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError: no or broken files, an index that does not tell the truth."""
        self._files: dict[str, int] = {}
        self._tensors: dict[str, Stored] = {}
        self.path = path
        index = path / INDEX
        weight_map: dict[str, Any] | None = None
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} misses weight_map")
            files = sorted({str(file) for file in weight_map.values()})
        else:
            files = sorted(file.name for file in path.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{path} holds no *.safetensors file")
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{index}: {file!r} is not a plain file name")
        try:
            for file in files:
                self._open(path / file, weight_map)
            if weight_map is not None and (missing := sorted(weight_map.keys() - self._tensors.keys())):
                raise CheckpointError(f"{index} lists {missing[0]} in {weight_map[missing[0]]}, which lacks it")
        except CheckpointError:
            self.close()
            raise

    def _open(self, file: Path, weight_map: dict[str, Any] | None) -> None:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
        self._files[file.name] = descriptor
        for name, stored in _header(file, descriptor):
            if weight_map is not None and weight_map.get(name) != file.name:
                raise CheckpointError(f"{file} holds tensor {name}, which the index does not place there")
            if name in self._tensors:
                raise CheckpointError(f"{file}: tensor {name} is there twice, see {self._tensors[name].file}")
            self._tensors[name] = stored

    def names(self) -> set[str]:
        return set(self._tensors)

    def __getitem__(self, name: str) -> Stored:
        return self._tensors[name]

    def dtype(self, name: str) -> str:
        """As the file spells it: BF16, F8_E4M3, U8, F32, ..."""
        return self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def file(self, name: str) -> str:
        return self._tensors[name].file

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change, in nanoseconds, of every file."""
        found = {file: os.fstat(descriptor) for file, descriptor in self._files.items()}
        return [(file, status.st_size, status.st_mtime_ns) for file, status in sorted(found.items())]

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """The tensor `name` cut to `rows` and `columns` (of steps of 1), on CPU, in the dtype it has on disk.

        out: contiguous CPU tensor of the cut's shape, of as many bytes; it is filled and returned.

        Rows are read alone. A cut of columns reads its rows whole: those of M3 are shorter than what a file system
        fetches at once.
        """
        stored = self._tensors[name]
        shape = stored.cut(rows, columns)
        if out is None:
            out = torch.empty(shape, dtype=DTYPES[stored.dtype])
        assert out.is_contiguous() and tuple(out.shape) == shape and out.dtype.itemsize == DTYPES[stored.dtype].itemsize
        if out.numel() == 0:
            return out
        target: NDArray[np.uint8] = out.view(-1).view(torch.uint8).numpy()
        first, last, _ = (rows or slice(None)).indices(stored.shape[0] if stored.shape else 1)
        start = stored.offset + first * stored.row_bytes
        if columns is None:
            self._fill(name, start, target)
            return out
        left, right, _ = columns.indices(stored.shape[1])
        width = stored.row_bytes // stored.shape[1]
        step = max(1, _SCRATCH_BYTES // stored.row_bytes)
        pieces = target.reshape(last - first, -1)
        scratch: NDArray[np.uint8] = np.empty((min(step, last - first), stored.row_bytes), np.uint8)
        for row in range(0, last - first, step):
            part = scratch[: min(step, last - first - row)]
            self._fill(name, start + row * stored.row_bytes, part.reshape(-1))
            np.copyto(pieces[row : row + len(part)], part[:, left * width : right * width])
        return out

    def _fill(self, name: str, offset: int, target: NDArray[np.uint8]) -> None:
        """Fill `target` with the bytes from `offset` on of the tensor's file."""
        stored = self._tensors[name]
        descriptor, view = self._files[stored.file], target.data
        while view:
            try:
                count = os.preadv(descriptor, [view], offset)
            except OSError as error:
                raise CheckpointError(f"{self.path / stored.file}: reading {name} failed: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path / stored.file} became shorter: it ends inside tensor {name}")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Nothing can be read after this."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def _header(file: Path, descriptor: int) -> Iterator[tuple[str, Stored]]:
    """The tensors of one file, in the order of their bytes."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(_exactly(file, descriptor, _LENGTH_BYTES, 0), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: a header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    try:
        header = json.loads(_exactly(file, descriptor, length, _LENGTH_BYTES), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not an object")
    header.pop("__metadata__", None)
    data = _LENGTH_BYTES + length
    spans = sorted((_span(file, name, entry), name) for name, entry in header.items())
    end = 0
    for (begin, stop), name in spans:
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise CheckpointError(f"{file}: tensor {name} begins at byte {begin}, which {what} (its end: {end})")
        end = stop
        entry = header[name]
        yield name, Stored(file.name, entry["dtype"], tuple(entry["shape"]), data + begin)
    if data + end != size:
        what = "it may be truncated" if data + end > size else "bytes follow the last tensor"
        raise CheckpointError(f"{file} has {size} bytes, its header describes {data + end}: {what}")


def _span(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """First byte and end of a tensor in the data part, consistent with its dtype and shape."""
    where = f"{file}: tensor {name}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: expected an object, got {entry!r}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype!r}, known are {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where} has shape {shape!r}, expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has data_offsets {offsets!r}, expected two positions")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(f"{where} of dtype {dtype} and shape {shape} takes {expected} bytes, not {end - begin}")
    return begin, end


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _exactly(file: Path, descriptor: int, count: int, offset: int) -> bytes:
    try:
        content = os.pread(descriptor, count, offset)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if len(content) < count:
        raise CheckpointError(f"{file} is truncated: its header should have {count} bytes from byte {offset} on")
    return content
