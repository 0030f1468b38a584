"""`m3serve bench load`: how fast a rank reads its share of a checkpoint. Also `python -m service.bench.load`.

A synthetic MXFP8 checkpoint with the names and the widths of MiniMax-M3, fewer layers and experts, is read twice, each
time with nothing of it in the page cache: the bytes alone, in the order of the files, and by the engine, which builds
its model of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.capacity import weight_parts
from engine.config import EngineConfig, ModelConfig, resolve_model
from engine.kernels.api import KernelSet, resolve
from engine.memory import free_bytes
from engine.model.loading import dry_pass, load_model
from engine.model.minimax_m3 import MiniMaxM3
from engine.model.read_ahead import PIECE_BYTES, pieces_of
from engine.model.shards import Shards
from engine.model.weights import WeightSource
from engine.parallel import TensorParallel
from engine.quant_config import FORMATS
from engine.tensor_files import INDEX
from service.bench.arguments import add_load
from service.bench.floors import RankShape
from service.bench.report import Row, machine, progress, table, write
from service.bench.slice_model import TINY_RANK, hf_config

_M3 = RankShape(heads=64, kv_heads=4, index_heads=4, dense_width=12288, expert_width=3072, vocab=8192)
_TINY = dataclasses.replace(TINY_RANK, dense_width=128, expert_width=128)
_DENSE_LAYERS, _MOE_LAYERS = 1, 3
_SHARDS = 4
_BLOCK_BYTES = 1 << 24
# What released MXFP8 checkpoints leave unquantised.
_IGNORED = ["lm_head", "model.embed_tokens", "vision_tower", "block_sparse_moe.gate"]
_SPELLED = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}


def checkpoint_config(shape: RankShape) -> dict[str, Any]:
    """config.json of the synthetic checkpoint."""
    config = hf_config(shape)
    sparse = [0] * _DENSE_LAYERS + [1] * _MOE_LAYERS
    text = config["text_config"]
    text |= {"num_hidden_layers": len(sparse), "moe_layer_freq": sparse}
    text["sparse_attention_config"] |= {"sparse_attention_freq": sparse, "sparse_disable_index_value": sparse}
    config["quantization_config"] = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "ignored_layers": _IGNORED,
    }
    return config


def tensors_of(model: ModelConfig) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of all that the checkpoint holds, in the order of the layers."""
    for part in weight_parts(model, index_layers=model.is_sparse):
        for copy in range(part.copies):
            name = "language_model." + part.name.replace(".experts.0.", f".experts.{copy}.")
            if part.kind == "linear":
                yield name, torch.float8_e4m3fn, part.shape
                yield f"{name}_scale_inv", torch.uint8, (*part.shape[:-1], part.shape[-1] // 32)
            else:
                yield name, torch.float32 if part.kind == "router" else torch.bfloat16, part.shape


def shape_of(gb: float, *, tiny: bool) -> RankShape:
    """Sizes of a checkpoint of about `gb` GB: as many experts as it takes."""
    base = _TINY if tiny else _M3
    sizes = []
    for experts in (base.experts_per_token, base.experts_per_token + 1):
        model = ModelConfig.from_hf(checkpoint_config(dataclasses.replace(base, experts=experts)))
        sizes.append(sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors_of(model)))
    more = max(0, round((gb * 1e9 - sizes[0]) / (sizes[1] - sizes[0])))
    return dataclasses.replace(base, experts=base.experts_per_token + more)


def write_checkpoint(path: Path, shape: RankShape, *, seed: int = 0) -> int:
    """Write config.json and shards of random bytes; how many bytes the shards have."""
    config = checkpoint_config(shape)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = list(tensors_of(ModelConfig.from_hf(config)))
    total = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors)
    # Code 255 is NaN as a scale, and refused.
    noise = random.Random(seed).randbytes(_BLOCK_BYTES).replace(b"\xff", b"\x7f")
    weight_map: dict[str, str] = {}
    done = written = 0
    parts: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[] for _ in range(_SHARDS)]
    for tensor in tensors:
        parts[min(done * _SHARDS // total, _SHARDS - 1)].append(tensor)
        done += math.prod(tensor[2]) * tensor[1].itemsize
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{_SHARDS:05d}.safetensors"
        # In a file, safetensors puts wide dtypes first, and then goes by name.
        part.sort(key=lambda tensor: (-tensor[1].itemsize, _SPELLED[tensor[1]], tensor[0]))
        weight_map |= {name: file for name, _, _ in part}
        written += _write_shard(path / file, part, noise)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return written


def _write_shard(file: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], noise: bytes) -> int:
    header, end = {}, 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SPELLED[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, _BLOCK_BYTES):
            out.write(noise[: min(_BLOCK_BYTES, end - start)])
        out.flush()
        # Pages that are not on disk yet cannot be dropped from the cache.
        os.fsync(out.fileno())
        return out.tell()


@dataclass(frozen=True, slots=True)
class Loader:
    """The engine's load of one rank, alone. keeps: what the weights take where the model is."""

    config: EngineConfig
    parallel: TensorParallel
    readers: int

    def kernels(self) -> KernelSet:
        """Those of a GPU; without one, weights stay as they are read: the torch backend would convert them."""
        kernels = resolve(self.config.backend)
        if kernels.device.type == "cpu":
            return dataclasses.replace(
                kernels, mx_formats=FORMATS, pack_linear=lambda weight: weight, pack_experts=lambda *pair: pair
            )
        return kernels

    def build(self) -> Callable[[WeightSource, KernelSet], MiniMaxM3]:
        model_config, knobs = resolve_model(self.config)

        def build(weights: WeightSource, kernels: KernelSet) -> MiniMaxM3:
            return MiniMaxM3(
                model_config, knobs, weights, kernels, self.parallel, dtype=torch.bfloat16, max_model_len=128,
                max_num_tokens=128, max_num_rows=1, audited=False,
            )  # fmt: skip

        return build

    def ranges(self) -> list[tuple[Path, int, int]]:
        """(file, first byte, end) of all that this rank reads, neighbours joined, in the order of the files."""
        shards = Shards(Path(self.config.model))
        quant = resolve_model(self.config)[0].quantization
        requests, _ = dry_pass(shards, quant, self.kernels(), torch.bfloat16, self.build())
        spans = []
        for piece in (piece for request in requests for piece in pieces_of(shards, request)):
            stored = shards[piece.request.name]
            first = stored.offset + (piece.rows.start if piece.rows else 0) * stored.row_bytes
            spans.append((shards.path / stored.file, first, first + piece.file_bytes))
        shards.close()
        joined: list[tuple[Path, int, int]] = []
        for file, first, end in sorted(spans):
            if joined and joined[-1][0] == file and joined[-1][2] == first:
                joined[-1] = (file, joined[-1][1], end)
            else:
                joined.append((file, first, end))
        return joined

    def load(self) -> MiniMaxM3:
        kernels = self.kernels()
        with torch.inference_mode():
            return load_model(
                Path(self.config.model), resolve_model(self.config)[0].quantization, kernels, torch.bfloat16,
                self.parallel, self.build(), free_bytes=free_bytes(kernels.device), readers=self.readers,
            )  # fmt: skip


def read_raw(ranges: Sequence[tuple[Path, int, int]], readers: int, *, keep: bool) -> None:
    """Read the ranges in large blocks, in their order. keep: each into memory of its own, as weights on CPU are: to
    touch memory for the first time can take as long as to read. Else every reader fills one block again and again."""
    files = {file: os.open(file, os.O_RDONLY) for file, _, _ in ranges}
    kept = torch.empty(sum(end - first for _, first, end in ranges) if keep else 0, dtype=torch.uint8)
    room, done = memoryview(kept.numpy().data), 0
    blocks: list[tuple[int, int, int, int]] = []  # descriptor, first byte, number of bytes, where in `room`
    for file, first, end in ranges:
        for start in range(first, end, PIECE_BYTES):
            blocks.append((files[file], start, min(PIECE_BYTES, end - start), done))
            done += blocks[-1][2]
    queue, lock = iter(blocks), threading.Lock()

    def work() -> None:
        own = memoryview(bytearray(PIECE_BYTES))
        while True:
            with lock:
                block = next(queue, None)
            if block is None:
                return
            descriptor, start, count, place = block
            view = room[place : place + count] if keep else own[:count]
            while view:
                read = os.preadv(descriptor, [view], start)
                start, view = start + read, view[read:]

    threads = [threading.Thread(target=work) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for descriptor in files.values():
        os.close(descriptor)


def drop_cache(path: Path) -> None:
    """Nothing of the shards is in the page cache after this."""
    for file in path.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident_bytes() -> tuple[int, int]:
    """Of this process: now, and the most since `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines() if line.startswith("Vm"))
    now, peak = (int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> None:
    """Where the kernel does not allow it, the peak stays that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        progress("the peak of memory cannot be reset here: it includes what came before")


def measure(loader: Loader, repeats: int) -> Row:
    """Medians over `repeats` reads of either sort, which alternate."""
    path, ranges = Path(loader.config.model), loader.ranges()
    on_cpu = loader.kernels().device.type == "cpu"
    num_bytes = sum(end - first for _, first, end in ranges)
    raw_s, load_s, above = [], [], []
    weight_bytes = 0
    for _ in range(repeats):
        drop_cache(path)
        started_s = time.perf_counter()
        read_raw(ranges, loader.readers, keep=on_cpu)
        raw_s.append(time.perf_counter() - started_s)
        drop_cache(path)
        before, _ = resident_bytes()
        forget_peak()
        started_s = time.perf_counter()
        model = loader.load()
        if not on_cpu:
            torch.cuda.synchronize()
        load_s.append(time.perf_counter() - started_s)
        weight_bytes = model.weight_bytes
        above.append(resident_bytes()[1] - before - (weight_bytes if on_cpu else 0))
        progress(f"raw {num_bytes / raw_s[-1] / 1e9:.2f} GB/s, load {num_bytes / load_s[-1] / 1e9:.2f} GB/s")
        del model
    raw, load = num_bytes / median(raw_s) / 1e9, num_bytes / median(load_s) / 1e9
    return {
        "ranks": loader.parallel.size,
        "rank": loader.parallel.rank,
        "readers": loader.readers,
        "read GB": num_bytes / 1e9,
        "kept GB": weight_bytes / 1e9,
        "raw GB/s": raw,
        "load GB/s": load,
        "ratio %": 100 * median(r / s for r, s in zip(raw_s, load_s, strict=True)),
        "above share MB": max(above) / 1e6,
    }


def run(
    directory: Path, *, gb: float, ranks: Sequence[int], readers: Sequence[int], repeats: int, tiny: bool
) -> list[Row]:
    """Write the checkpoint into `directory`, and measure every combination."""
    shape = shape_of(gb, tiny=tiny)
    started_s = time.perf_counter()
    size = write_checkpoint(directory, shape)
    progress(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - started_s:.0f} s: {shape.experts} experts a layer")
    rows = []
    for num_ranks, num_readers in itertools.product(ranks, readers):
        config = EngineConfig(str(directory), tensor_parallel_size=num_ranks)
        loader = Loader(config, TensorParallel(num_ranks - 1, num_ranks), num_readers)
        rows.append(measure(loader, repeats))
    return rows


def from_args(args: argparse.Namespace) -> int:
    """Run `bench load` as its flags say."""
    with tempfile.TemporaryDirectory(prefix="m3serve-load-", dir=args.directory) as name:
        rows = run(
            Path(name), gb=args.gb, ranks=args.tensor_parallel_sizes, readers=args.readers, repeats=args.repeats,
            tiny=args.tiny,
        )  # fmt: skip
    progress(f"\n{table(rows)}")
    write({"benchmark": "load", "machine": machine(), "rows": rows}, args.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m service.bench.load`."""
    parser = argparse.ArgumentParser(prog="python -m service.bench.load", allow_abbrev=False)
    add_load(parser)
    return from_args(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
