"""The files of a checkpoint: which tensors they hold and where, from their headers. Loads no torch.

Nothing is trusted in a header: a file that lies about its tensors is refused by name before any of it is used.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from engine.errors import CheckpointError
from engine.model_config import read_json

INDEX = "model.safetensors.index.json"
# Bytes of an element, by dtype as a header spells it.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
# The limit of the format itself. M3's 1,500 tensors a shard take 0.2 MB.
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
# More than any tensor has: products of sizes stay small numbers.
_MAX_DIMENSIONS, _MAX_SIZE = 8, 2**63 - 1


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
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    def cut(self, rows: slice | None, columns: slice | None) -> tuple[int, ...]:
        """The shape of what `rows` and `columns` leave."""
        kept = [
            len(range(size)[part]) if part is not None else size
            for size, part in zip(self.shape, (rows, columns), strict=False)
        ]
        return (*kept, *self.shape[2:])


class TensorFiles:
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
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise CheckpointError(f"{file} cannot be read: {error}") from error
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

    def fill(self, name: str, offset: int, view: memoryview) -> None:
        """Fill `view`, of bytes, with those from `offset` on of the tensor's file."""
        stored = self._tensors[name]
        descriptor = self._files[stored.file]
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
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where} has dtype {dtype!r}, known are {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where} has shape {shape!r}, expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has data_offsets {offsets!r}, expected two positions")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise CheckpointError(f"{where} of dtype {dtype} and shape {shape} takes {expected} bytes, not {end - begin}")
    return begin, end


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value)
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} is there twice")
    return found


def _exactly(file: Path, descriptor: int, count: int, offset: int) -> bytes:
    try:
        content = os.pread(descriptor, count, offset)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if len(content) < count:
        raise CheckpointError(f"{file} is truncated: its header should have {count} bytes from byte {offset} on")
    return content
