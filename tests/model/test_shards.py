"""Reading shards: the bytes that are on disk, headers that lie, and the read-ahead with its bounds."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.model import read_ahead
from engine.model.read_ahead import ReadAhead, Recorder, Request, Ring
from engine.model.shards import DTYPES, Shards

CPU = torch.device("cpu")
FILE = "model.safetensors"
# name, rows, columns
Read = tuple[str, slice | None, slice | None]
READS: list[Read] = [
    ("wide", None, None),
    ("wide", slice(7, 1900), None),
    ("wide", None, slice(96, 192)),
    ("codes", slice(100, 300), slice(32, 64)),
    ("codes", None, slice(0, 0)),
    ("flat", slice(2, 5), None),
    ("flat", None, None),
    ("scalar", None, None),
    ("empty", None, None),
    ("deep", slice(1, 3), slice(0, 4)),
]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    tensors = {
        "wide": codes(2000, 1152).view(torch.bfloat16),
        "codes": codes(400, 128).view(torch.float8_e4m3fn),
        "flat": codes(36).view(torch.float32),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "deep": codes(4, 4, 8),
    }
    tensors |= {
        name: codes(3, 16).view(dtype) if dtype is not torch.bool else codes(3, 16) > 99
        for name, dtype in DTYPES.items()
    }
    path = tmp_path_factory.mktemp("shards")
    save_file(tensors, path / FILE)
    return path


def cut(tensor: Tensor, rows: slice | None, columns: slice | None) -> Tensor:
    return tensor[(rows or slice(None), columns or slice(None))[: tensor.ndim]] if tensor.ndim else tensor


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (path / FILE).write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: Any = (4,), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_is_read_as_it_is_on_disk(checkpoint: Path) -> None:
    shards, expected = Shards(checkpoint), load_file(checkpoint / FILE)
    assert shards.names() == expected.keys()
    for name, tensor in expected.items():
        found = shards.read(name)
        assert (found.dtype, found.shape, raw(found)) == (tensor.dtype, tensor.shape, raw(tensor)), name
        assert shards.shape(name) == tuple(tensor.shape)
        assert shards.file(name) == FILE
    assert {shards.dtype(name) for name in DTYPES} == DTYPES.keys()
    shards.close()


@pytest.mark.parametrize(("name", "rows", "columns"), READS)
def test_a_cut_equals_the_slice_of_the_whole(
    checkpoint: Path, name: str, rows: slice | None, columns: slice | None
) -> None:
    shards, whole = Shards(checkpoint), load_file(checkpoint / FILE)[name]
    expected = cut(whole, rows, columns)
    assert raw(shards.read(name, rows, columns)) == raw(expected)
    out = torch.full((expected.nbytes,), 7, dtype=torch.uint8).view(expected.dtype).view(expected.shape)
    assert shards.read(name, rows, columns, out=out) is out
    assert raw(out) == raw(expected)


def test_rows_of_a_tensor_are_read_alone(checkpoint: Path) -> None:
    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    shards = Shards(checkpoint)
    before = read_bytes()
    shards.read("wide", slice(500, 510))
    assert read_bytes() - before < 10 * 1152 + 1000  # and what reading the count itself takes


HEADERS: list[tuple[str, dict[str, Any], int, str]] = [
    ("overlap", {"a": entry(0, 4), "b": entry(2, 6)}, 6, "tensor b .*overlaps"),
    ("gap", {"a": entry(0, 4), "b": entry(5, 9)}, 9, "tensor b .*gap"),
    ("starts late", {"a": entry(1, 5)}, 5, "tensor a .*gap"),
    ("shape too large", {"a": entry(0, 4, [5])}, 4, "tensor a .*takes 5 bytes, not 4"),
    ("reversed", {"a": entry(4, 0)}, 4, "tensor a .*takes 4 bytes, not -4"),
    ("negative size", {"a": entry(0, 4, [-2, -2])}, 4, "tensor a has shape"),
    ("negative offset", {"a": entry(-4, 0)}, 4, "tensor a has data_offsets"),
    ("shape is text", {"a": entry(0, 4, "4")}, 4, "tensor a has shape"),
    ("shape of booleans", {"a": entry(0, 4, [True, 4])}, 4, "tensor a has shape"),
    ("three offsets", {"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, 4, "tensor a has data_offsets"),
    ("unknown dtype", {"a": entry(0, 4, dtype="Q4")}, 4, "tensor a has dtype 'Q4', known are BOOL"),
    ("dtype is a list", {"a": entry(0, 4, dtype=["U8"])}, 4, "tensor a has dtype"),
    ("no object", {"a": 3}, 4, "tensor a: expected an object"),
    ("short data", {"a": entry(0, 4)}, 3, "truncated"),
    ("more data", {"a": entry(0, 4)}, 5, "bytes follow the last tensor"),
]


@pytest.mark.parametrize(
    ("header", "size", "message"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS]
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{FILE}.*{message}"):
        Shards(write(tmp_path, header, bytes(size)))


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (b"{}", 1 << 40, "at most 100000000"),
        (b"{}", 100_000_000, "truncated"),
        (b"", None, "not valid JSON"),
        (b"[]", None, "not an object"),
        (b"\xff\xfe", None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b'{"a": 1, "a": 2}', None, "'a' is there twice"),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, header: bytes, length: int | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{FILE}.*{message}"):
        Shards(write(tmp_path, header, length=length))


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    shards = Shards(write(tmp_path, {"a": entry(0, 4)}, bytes(4)))
    os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{FILE} became shorter: it ends inside tensor a"):
        shards.read("a")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for file in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.zeros(3)}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"y\.safetensors: tensor a is there twice, see x\.safetensors"):
        Shards(tmp_path)


def test_files_are_closed_when_one_of_them_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError):
        Shards(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_ring_never_hands_out_bytes_that_are_taken() -> None:
    rng = random.Random(0)
    for _ in range(200):
        size = rng.randrange(1, 20) * 512
        ring, waits = Ring(size), 0
        taken: list[tuple[int, int]] = []
        for _ in range(200):
            num_bytes = rng.randrange(1, size + 1)
            while (start := ring.take(num_bytes)) is None:
                waits += 1
                ring.give_back()
                taken.pop(0)  # fails if there was room for it: nothing was taken
            assert start >= 0
            assert start + num_bytes <= size
            assert all(start + num_bytes <= first or end <= start for first, end in taken)
            taken.append((start, start + num_bytes))
        assert waits


Bounds = Callable[[int], None]


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Bounds:
    """Sets the size of the pieces that large tensors are read in."""
    return lambda size: monkeypatch.setattr(read_ahead, "PIECE_BYTES", size)


@pytest.mark.parametrize("piece_bytes", [1, 5000, 1 << 24])
@pytest.mark.parametrize("budget_bytes", [0, 20_000, 1 << 29])
def test_read_ahead_returns_what_was_planned(
    checkpoint: Path, pieces: Bounds, piece_bytes: int, budget_bytes: int
) -> None:
    """In any order, with room for one piece or for all."""
    pieces(piece_bytes)
    shards, expected = Shards(checkpoint), load_file(checkpoint / FILE)
    reads = READS + [(name, None, None) for name in DTYPES]
    random.Random(1).shuffle(reads)
    recorder = Recorder(shards)
    for name, rows, columns in reads:
        assert recorder.read(name, rows, columns).shape == cut(expected[name], rows, columns).shape
    ahead = ReadAhead(shards, recorder.requests, CPU, readers=3, budget_bytes=budget_bytes)
    for name, rows, columns in reads:
        assert raw(ahead.read(name, rows, columns)) == raw(cut(expected[name], rows, columns)), name
    ahead.finish()
    ahead.close()


def test_read_ahead_fills_and_casts_what_it_is_given(checkpoint: Path, pieces: Bounds) -> None:
    pieces(4000)
    shards, whole = Shards(checkpoint), load_file(checkpoint / FILE)["wide"]
    ahead = ReadAhead(shards, [Request("wide", slice(0, 1000), None)], CPU)
    packed = torch.zeros(2, 1000, 576)
    ahead.read("wide", slice(0, 1000), out=packed[1])
    ahead.close()
    torch.testing.assert_close(packed[1], whole[:1000].float(), rtol=0, atol=0, equal_nan=True)
    assert not packed[0].any()


def test_read_ahead_tells_a_reader_s_error(tmp_path: Path) -> None:
    shards = Shards(write(tmp_path, {"a": entry(0, 4), "b": entry(4, 8)}, bytes(8)))
    os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size - 1)
    ahead = ReadAhead(shards, [Request("a", None, None), Request("b", None, None)], CPU)
    ahead.read("a")
    with pytest.raises(CheckpointError, match="inside tensor b"):
        ahead.read("b")
    ahead.close()


def test_progress_is_logged(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(read_ahead, "REPORT_INTERVAL_S", 0.0)
    shards = Shards(checkpoint)
    ahead = ReadAhead(shards, [Request("wide", None, None), Request("codes", None, slice(0, 32))], CPU, label="rank 3")
    with caplog.at_level(logging.INFO, read_ahead.__name__):
        ahead.read("wide")
        ahead.read("codes", None, slice(0, 32))
        ahead.finish()
    ahead.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "rank 3: read 0.0 of 0.0 GB" in lines[0]
    assert "1 of 2 tensors" in lines[0]
    assert lines[2].startswith("rank 3: read 0.0 GB, 2 tensors, in ")
