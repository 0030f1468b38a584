"""Random inputs of single kernels: pages, steps and selections, as they look to one rank of a serving engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.kernels import torch_mx
from engine.kernels.api import KernelSet, KVPages, Selection
from engine.kernels.batch import Phase, Segment, StepBatch
from engine.kernels.params import BlockUnions, MXWeight, Weight
from engine.kernels.torch_pages import quantise
from service.bench.floors import PAGE, Floor, Kind, RankShape

# Of one page pool: large enough to outgrow every cache many times.
_POOL_BYTES = 2 * 2**30
_MAX_CALLS = 120


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cases share.

    cold_bytes: touching so many other bytes evicts an input from the caches.  max_len: what decode kernels are told
    of the longest row, as in a captured graph, which serves any length; they read the real lengths on the device.
    min_calls: calls in a row that are timed as one, at least.
    """

    kernels: KernelSet
    shape: RankShape
    dtype: torch.dtype
    cold_bytes: float
    max_len: int = 131072
    min_calls: int = 20
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def device(self) -> torch.device:
        return self.kernels.device

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values, made on the device; they differ from call to call."""
        seed = int(torch.randint(2**31, (1,), generator=self.generator))
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=dtype or self.dtype)

    def calls_for(self, floor: Floor, flops_per_s: float = 1e15) -> int:
        """How many calls in a row, each with other cold inputs: the first one's have left the caches when the
        measurement starts over. Long calls need fewer."""
        cold = math.ceil(self.cold_bytes / floor.num_bytes) + 1
        is_long = floor.flops / flops_per_s > 100e-6 or floor.num_bytes > 2**30
        least = max(1, self.min_calls // 4) if is_long else self.min_calls
        return max(least, min(cold, _MAX_CALLS))


@dataclass(frozen=True, slots=True)
class Steps:
    """The same step over disjoint sets of pages, and how many pages they take together."""

    batches: list[StepBatch]
    num_pages: int

    def __getitem__(self, call: int) -> StepBatch:
        return self.batches[call % len(self.batches)]


def decode_steps(bench: Bench, batch: int, context: int, calls: int) -> Steps:
    """`batch` rows whose newest token is the last of `context`."""
    return _steps(bench, [(context - 1, 1)] * batch, "decode", calls)


def prefill_steps(bench: Bench, queries: int, context: int, calls: int) -> Steps:
    """One row: the last `queries` of `context` tokens."""
    return _steps(bench, [(context - queries, queries)], "prefill", calls)


def _steps(bench: Bench, rows: list[tuple[int, int]], phase: Phase, calls: int) -> Steps:
    """rows: (tokens before the step, tokens of the step).  Pages are handed out in random order."""
    seq_lens = [before + new for before, new in rows]
    pages_of = [-(-length // PAGE) for length in seq_lens]
    set_pages = sum(pages_of)
    page_bytes = PAGE * bench.shape.kv_heads * bench.shape.dim * bench.dtype.itemsize
    sets = max(1, min(calls, _POOL_BYTES // (set_pages * page_bytes)))
    order = torch.randperm(sets * set_pages, generator=bench.generator).int().view(sets, set_pages)
    is_decode = phase == "decode"
    bound = max(*seq_lens, bench.max_len) if is_decode else max(seq_lens)
    starts = [0]
    for _, new in rows:
        starts.append(starts[-1] + new)
    positions = torch.cat([torch.arange(before, before + new) for before, new in rows])
    row_ids = torch.cat([torch.full((new,), i) for i, (_, new) in enumerate(rows)])
    device = bench.device
    batches = []
    for page_ids in order:
        table = torch.zeros(len(rows), -(-bound // PAGE), dtype=torch.int32)
        for row, part in enumerate(page_ids.split(pages_of)):
            table[row, : len(part)] = part
        batches.append(
            StepBatch(
                positions=positions.to(device),
                slot_mapping=(table[row_ids, positions // PAGE].long() * PAGE + positions % PAGE).to(device),
                row_ids=row_ids.to(device),
                block_table=table.to(device),
                seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
                query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
                query_starts=starts,
                seq_lens_host=[bound] * len(rows) if is_decode and device.type != "cpu" else seq_lens,
                segments=(Segment(phase, 0, len(rows), 0, starts[-1]),),
            )
        )
    return Steps(batches, sets * set_pages)


def quantised(bench: Bench, plain: Tensor, kind: Kind) -> Weight:
    """`plain` in that format; as the model does it, converted back for backends that multiply with plain ones alone."""
    if kind == "bf16":
        return plain
    packed = torch_mx.quantise(plain, kind)
    return packed if kind in bench.kernels.mx_formats else torch_mx.dequantise(packed, plain.dtype)


def weight(bench: Bench, kind: Kind, *shape: int) -> Weight:
    """A random weight [..., rows, columns] whose products are about 1."""
    if kind == "bf16":
        return bench.randn(*shape).div_(shape[-1] ** 0.5)
    # One matrix at a time: what quantising needs besides stays small.
    matrices = (bench.randn(*shape[-2:]).div_(shape[-1] ** 0.5) for _ in range(math.prod(shape[:-2])))
    parts = [quantised(bench, matrix, kind) for matrix in matrices]
    if plain := [part for part in parts if isinstance(part, Tensor)]:
        return torch.stack(plain).view(shape)
    packed = MXWeight.cat([part for part in parts if isinstance(part, MXWeight)])
    return MXWeight(kind, packed.values.view(*shape[:-1], -1), packed.scales.view(*shape[:-1], -1))


def kv_pages(bench: Bench, num_pages: int, *, fp8: bool = False) -> KVPages:
    """Pages of keys and values, full of random ones."""
    shape = (num_pages, bench.shape.kv_heads, PAGE, bench.shape.dim)
    (k, k_scale), (v, v_scale) = _pool(bench, shape, fp8), _pool(bench, shape, fp8)
    return KVPages(k, v, None, k_scale, v_scale)


def index_pages(bench: Bench, num_pages: int, *, fp8: bool = False) -> KVPages:
    """Pages of index keys; those of keys and values are there in name only, for kernels that do not read them."""
    index_k, scale = _pool(bench, (num_pages, PAGE, bench.shape.dim), fp8)
    nothing = torch.empty(1, bench.shape.kv_heads, PAGE, bench.shape.dim, dtype=bench.dtype, device=bench.device)
    return KVPages(nothing, nothing, index_k, index_k_scale=scale)


def _pool(bench: Bench, shape: tuple[int, ...], fp8: bool) -> tuple[Tensor, Tensor | None]:
    if not fp8:
        return bench.randn(*shape), None
    pool = torch.empty(shape, dtype=bench.kernels.fp8_dtype, device=bench.device)
    scale = torch.empty(shape[:-1], dtype=torch.float32, device=bench.device)
    for start in range(0, shape[0], 4096):  # what quantising needs besides stays small
        part = bench.randn(*pool[start : start + 4096].shape)
        stored, scales = quantise(part, pool.dtype)
        pool[start : start + 4096].view(torch.uint8).copy_(stored.view(torch.uint8))
        scale[start : start + 4096] = scales
    return pool, scale


def empty_selection(bench: Bench, num_tokens: int, num_rows: int, *, prefill: bool) -> Selection:
    """Buffers for what an indexer selects, as the index cache makes them."""
    shape, device = bench.shape, bench.device
    blocks = torch.full((shape.index_heads, num_tokens, shape.topk_blocks), -1, dtype=torch.int32, device=device)
    num_blocks = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    group = bench.kernels.group_tokens(shape.heads // max(shape.kv_heads, shape.index_heads)) if prefill else 0
    if not group:
        return Selection(blocks, num_blocks)
    size = (shape.index_heads, num_tokens // group + num_rows, group * shape.topk_blocks)
    entries = torch.zeros(size, dtype=torch.int32, device=device)
    return Selection(
        blocks, num_blocks, BlockUnions(group, entries, torch.zeros(size[:2], dtype=torch.int32, device=device))
    )


def fill_selection(selection: Selection, blocks: Tensor) -> Selection:
    """Put chosen blocks, int32 [1, num_tokens, topk], in place of an indexer's, the same ones for every index head."""
    selection.blocks.copy_(blocks.expand_as(selection.blocks))
    selection.num_blocks.copy_((blocks[0] >= 0).sum(-1))
    return selection
