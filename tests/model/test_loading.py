"""From a directory to a model: what is wrong is found before anything is read, and what is read is what is there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import LLM
from engine.config import EngineConfig, resolve_model
from engine.errors import CheckpointError, ConfigError
from engine.kernels.api import KernelSet, resolve
from engine.kernels.params import MXWeight, Weight
from engine.model import read_ahead
from engine.model.loading import Build, dry_pass, load_model
from engine.model.minimax_m3 import MiniMaxM3
from engine.model.shards import Shards
from engine.model.weights import CheckpointWeights, WeightSource
from engine.parallel import TensorParallel
from engine.quant_config import FORMATS
from service.bench import load as bench_load
from tests.mx_checkpoints import make_mx_checkpoint, rewrite

CPU = torch.device("cpu")
DTYPE = torch.bfloat16
LAST = "language_model.model.layers.3.block_sparse_moe.shared_experts.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mx_checkpoint(tmp_path_factory.mktemp("mx") / "model", "mxfp8")


def builder(path: Path, parallel: TensorParallel) -> Build:
    config, knobs = resolve_model(EngineConfig(model=str(path)))

    def build(weights: WeightSource, kernels: KernelSet) -> MiniMaxM3:
        return MiniMaxM3(
            config, knobs, weights, kernels, parallel, dtype=DTYPE, max_model_len=256, max_num_tokens=128,
            max_num_rows=4, audited=False,
        )  # fmt: skip

    return build


def kernels_of(formats: frozenset[str]) -> KernelSet:
    """Packing leaves weights as they are."""

    def keep(*weights: Weight) -> Any:
        return weights if len(weights) > 1 else weights[0]

    return replace(resolve("torch"), pack_linear=keep, pack_experts=keep, mx_formats=formats)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Of a layer and all that it is made of."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, MXWeight):
        yield from (value.values, value.scales)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
    elif type(value).__name__ in ("MiniMaxM3", "DecoderLayer", "Attention", "MLP", "MoE"):
        for name, each in sorted(vars(value).items()):
            if name not in ("cos_sin", "index_cache", "pages"):
                yield from tensors_in(each)


def read_bytes() -> int:
    """By this process so far, from files of any kind."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("formats", [FORMATS, frozenset()], ids=["kept", "converted"])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_what_readers_bring_is_what_shards_hold(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, formats: frozenset[str], rank: int, size: int
) -> None:
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 3000)
    parallel, kernels = TensorParallel(rank, size), kernels_of(formats)
    build, quant = builder(checkpoint, parallel), resolve_model(EngineConfig(model=str(checkpoint)))[0].quantization
    shards = Shards(checkpoint)
    expected = build(CheckpointWeights(shards, quant, CPU, shards), kernels)
    requests, num_bytes = dry_pass(shards, quant, kernels, DTYPE, build)
    assert len(requests) == expected.ledger["used"]
    assert num_bytes == sum(tensor.nbytes for tensor in tensors_in(expected)) - repeated_bytes(expected)
    shards.close()
    model = load_model(checkpoint, quant, kernels, DTYPE, parallel, build, free_bytes=num_bytes)
    assert model.ledger == expected.ledger
    assert model.weight_bytes == expected.weight_bytes
    pairs = list(zip(tensors_in(model), tensors_in(expected), strict=True))
    assert len(pairs) > 30
    assert all(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) for ours, theirs in pairs)


def repeated_bytes(model: MiniMaxM3) -> int:
    """Gains of heads are kept once per head and stored once; the norms of four kinds of heads."""
    return sum(4 * gain.shape[1] * (len(gain) - 2) for layer in model.layers for gain in layer.attention.gains)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_nothing_is_read_of_a_checkpoint_that_cannot_be_served(tmp_path: Path, change: str) -> None:
    """The tensor at fault is the last that the model asks for, or never asked for."""
    path = make_mx_checkpoint(tmp_path / "model", "mxfp8", hidden_size=512)

    def damage(tensors: dict[str, Tensor]) -> None:
        if change == "missing":
            del tensors[LAST]
        elif change == "extra":
            tensors["language_model.model.norm.bias"] = torch.zeros(3)
        else:
            tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"][:-1]

    rewrite(path, damage)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    before = read_bytes()
    with pytest.raises(CheckpointError):
        LLM(str(path), backend="torch", dtype="bfloat16", max_model_len=512, num_pages=8)
    assert read_bytes() - before < size / 4


def test_weights_that_do_not_fit_are_refused_with_the_sum(checkpoint: Path) -> None:
    parallel, kernels = TensorParallel(1, 2), kernels_of(FORMATS)
    build, quant = builder(checkpoint, parallel), resolve_model(EngineConfig(model=str(checkpoint)))[0].quantization
    shards = Shards(checkpoint)
    _, num_bytes = dry_pass(shards, quant, kernels, DTYPE, build)
    shards.close()
    before = read_bytes()
    with pytest.raises(ConfigError, match=r"rank 1 keeps .* GiB of weights, .* GiB are free .*parallel_size=2"):
        load_model(checkpoint, quant, kernels, DTYPE, parallel, build, free_bytes=num_bytes - 1)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert read_bytes() - before < size / 2


def test_bench_load_reports_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tiny", "--gb", "0.003", "--tensor-parallel-sizes", "1,2", "--readers", "2", "--repeats", "1"]
    assert bench_load.main([*flags, "--directory", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["ranks"], row["rank"]) for row in rows] == [(1, 0), (2, 1)]
    whole, half = rows
    assert whole["read GB"] == pytest.approx(0.003, rel=0.1)
    assert half["read GB"] < 0.9 * whole["read GB"]
    assert half["kept GB"] == pytest.approx(whole["kept GB"] / 2, rel=0.1)
    assert all(row["raw GB/s"] > 0 and row["load GB/s"] > 0 for row in rows)
    assert not list(tmp_path.iterdir())


class Cached:
    """Loads of one rank of two with a cache directory, and what the log says of the cache."""

    def __init__(self, checkpoint: Path, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.path = checkpoint
        self.directory = directory
        self._caplog = caplog

    def load(self, rank: int = 1, size: int = 2) -> tuple[MiniMaxM3, list[str]]:
        """The model and the lines of the log."""
        parallel = TensorParallel(rank, size)
        quant = resolve_model(EngineConfig(model=str(self.path)))[0].quantization
        self._caplog.clear()
        with self._caplog.at_level("INFO", "engine.model"):
            model = load_model(
                self.path, quant, kernels_of(FORMATS), DTYPE, parallel, builder(self.path, parallel),
                free_bytes=1 << 40, cache_dir=self.directory,
            )  # fmt: skip
        return model, [record.getMessage() for record in self._caplog.records]

    def shares(self) -> list[Path]:
        """Complete ones; nothing unfinished may be left."""
        found = sorted(self.directory.glob("*/*"))
        assert not [path for path in found if path.name.startswith("partial-")]
        return found


@pytest.fixture
def cached(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Cached:
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 3000)
    return Cached(make_mx_checkpoint(tmp_path / "model", "mxfp8"), tmp_path / "cache", caplog)


def same(ours: MiniMaxM3, theirs: MiniMaxM3) -> bool:
    pairs = zip(tensors_in(ours), tensors_in(theirs), strict=True)
    return ours.ledger == theirs.ledger and all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def test_a_later_start_reads_its_share_from_the_cache(cached: Cached) -> None:
    first, lines = cached.load()
    [share] = cached.shares()
    assert any(f"weight cache {share} was written" in line for line in lines)
    # What is in the checkpoint no longer counts, only that it looks untouched.
    for file in cached.path.glob("*.safetensors"):
        status, header = file.stat(), 8 + int.from_bytes(file.read_bytes()[:8], "little")
        file.write_bytes(file.read_bytes()[:header] + bytes(status.st_size - header))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    second, lines = cached.load()
    assert same(second, first)
    assert ["from the weight cache" in line for line in lines] == [True]
    assert (share / "weights.safetensors").stat().st_size == pytest.approx(first.weight_bytes, rel=0.1)


def test_every_rank_and_every_size_of_the_group_has_its_own_share(cached: Cached) -> None:
    models = [cached.load(rank, size)[0] for rank, size in ((0, 1), (0, 2), (1, 2))]
    assert len(cached.shares()) == 3
    for (rank, size), model in zip(((0, 1), (0, 2), (1, 2)), models, strict=True):
        again, lines = cached.load(rank, size)
        assert "from the weight cache" in lines[-1]
        assert same(again, model)


def test_a_changed_checkpoint_makes_the_share_stale(cached: Cached) -> None:
    cached.load()
    [stale] = cached.shares()
    rewrite(cached.path, lambda tensors: tensors["language_model.model.norm.weight"].add_(1.0))
    model, lines = cached.load()
    [fresh] = cached.shares()
    assert fresh != stale
    assert sum(str(stale) in line for line in lines) == 1
    expected = load_file(next(file for file in cached.path.glob("*.safetensors") if holds(file, "model.norm.weight")))
    assert torch.equal(model.final_gain, expected["language_model.model.norm.weight"].float() + 1.0)


def holds(file: Path, name: str) -> bool:
    return name.encode() in file.read_bytes()


@pytest.mark.parametrize("damage", ["shorter", "empty", "other tensors"])
def test_a_torn_share_is_made_again(cached: Cached, damage: str) -> None:
    first, _ = cached.load()
    [share] = cached.shares()
    file = share / "weights.safetensors"
    if damage == "other tensors":
        save_file({"x": torch.zeros(3)}, file)
    else:
        os.truncate(file, 0 if damage == "empty" else file.stat().st_size - 1)
    second, lines = cached.load()
    assert same(second, first)
    assert sum("is of no use and will be made again" in line for line in lines) == 1
    assert "from the weight cache" in cached.load()[1][-1]


def test_a_cache_that_cannot_be_written_costs_a_line_in_the_log(cached: Cached) -> None:
    cached.directory.write_text("not a directory")
    model, lines = cached.load()
    assert model.weight_bytes
    assert sum("was not written: Not a directory" in line for line in lines) == 1


def test_what_an_interrupted_start_left_is_removed(cached: Cached) -> None:
    cached.load()
    [share] = cached.shares()
    left = share.parent / "partial-elsewhere-1"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"")
    young = share.parent / "partial-elsewhere-2"
    young.mkdir()
    for path in (left, left / "weights.safetensors"):
        os.utime(path, (0, 0))
    shutil.rmtree(share)
    cached.load()
    assert sorted(share.parent.iterdir()) == sorted([share, young])


def test_a_failed_start_leaves_no_share(cached: Cached) -> None:
    scales = "language_model.model.layers.3.block_sparse_moe.shared_experts.down_proj.weight_scale_inv"
    rewrite(cached.path, lambda tensors: tensors[scales].fill_(255))
    with pytest.raises(CheckpointError, match="NaN"):
        cached.load()
    assert cached.shares() == []
