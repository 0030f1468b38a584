"""Drives every operation with tensors without storage, in every class of shapes that the engine launches.

The tensors have the sizes, the strides and the alignment of the engine's own: pools and weights as large as a real
rank's (AMD's loads depend on whether a storage has more than 2 GiB), buffers of a captured step aligned, those of an
eager step cut out of one packed tensor at any offset.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from engine.kernels import triton_pages, triton_set
from engine.kernels.api import KernelSet
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.exchange import Exchange, VocabShare
from engine.kernels.params import (
    BlockUnions,
    KVPages,
    MXWeight,
    QKVLayout,
    RouteParams,
    Selection,
    SelectParams,
    SwigluParams,
    Weight,
)
from tests.kernels.aot.record import Launch, Recorder

META = torch.device("meta")
PAGE = 128
MAX_ROWS, MAX_TOKENS, MAX_PAGES = 64, 8192, 1024
ACT = SwigluParams(1.702, 7.0, 1.0)


@dataclass(frozen=True)
class Rank:
    """One rank's share of a model, and the types it computes in.

    fp8: of the pages.  shared: the shared expert is one more expert of the grouped products.  linear, routed: formats
    of the linear layers and of the experts, "" for weights of `dtype`.  only: the operations to drive; none: all.
    """

    name: str
    heads: int
    kv_heads: int
    index_heads: int
    dim: int
    topk: int
    hidden: int
    width: int
    dense_width: int
    experts: int
    vocab: int
    full_vocab: int = 200064
    experts_per_token: int = 4
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    shared: bool = True
    num_pages: int = 16384
    linear: str = ""
    routed: str = ""
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """rows: (keys before, new tokens), decode rows first.  captured: of fixed addresses, its lengths unknown."""

    name: str
    rows: tuple[tuple[int, int], ...]
    captured: bool = False


M3_TP4 = Rank("tp4-bf16", 16, 1, 1, 128, 16, 6144, 768, 3072, 128, 50016)
_SMALL = Rank("small-fp32", 8, 2, 2, 32, 4, 64, 32, 128, 8, 128, 512, 2, torch.float32, num_pages=512)

DECODE = {n: Step(f"decode{n}", ((0, 1),) * n, captured=True) for n in (1, 2, 4, 8, 16, 24, 32, 64)}
PREFILL = (
    Step("prefill2048", ((6144, 2048),)),
    Step("prefill8192", ((24576, 4096), (24576, 4096))),
)
# Odd sizes on purpose: nothing behind them is aligned.
MIXED = Step("mixed", ((700, 1), (8585, 1), (3, 1), (129, 1000), (8192, 1047)))
ALL_STEPS = (*DECODE.values(), *PREFILL, MIXED)
Classes = tuple[tuple[Rank, tuple[Step, ...]], ...]
# What `make test` compiles comes first: an entry is named after the first class that launches it.
_TESTED_STEPS = (DECODE[1], DECODE[8], DECODE[64], *PREFILL, MIXED)
_M3_TP4_FP8 = replace(M3_TP4, name="tp4-fp8", fp8=True)
_M3_TP8 = Rank("tp8-bf16", 8, 1, 1, 128, 16, 6144, 384, 1536, 128, 25008)
_M3_TP1 = Rank("tp1-bf16", 64, 4, 4, 128, 16, 6144, 3072, 12288, 128, 200064)
_PREFILL200 = Step("prefill200", ((6144, 200),))
_MX_STEPS = (DECODE[1], DECODE[8], _PREFILL200, PREFILL[1])
MXFP8_TP4 = replace(M3_TP4, name="tp4-mxfp8", linear="mxfp8", routed="mxfp8")
MXFP4_TP4 = replace(M3_TP4, name="tp4-mxfp4", routed="mxfp4")
TESTED: Classes = (
    (M3_TP4, _TESTED_STEPS),
    (_M3_TP4_FP8, _TESTED_STEPS),
    (_SMALL, (DECODE[1], MIXED)),
    (replace(MXFP8_TP4, only=("o_proj", "experts")), _MX_STEPS),
    (replace(MXFP4_TP4, only=("experts",)), _MX_STEPS),
)
_ALL_MX_STEPS = (*DECODE.values(), _PREFILL200, *PREFILL, MIXED)
OTHERS: Classes = (
    (M3_TP4, ALL_STEPS),
    (_M3_TP4_FP8, ALL_STEPS),
    (replace(M3_TP4, name="tp4-bf16-4g", num_pages=131072), ALL_STEPS),
    (replace(M3_TP4, name="tp4-bf16-unshared", shared=False), ALL_STEPS),
    (_M3_TP8, ALL_STEPS),
    (MXFP8_TP4, _ALL_MX_STEPS),
    (MXFP4_TP4, _ALL_MX_STEPS),
    (replace(_M3_TP8, name="tp8-mxfp8", linear="mxfp8", routed="mxfp8"), _ALL_MX_STEPS),
    (replace(_M3_TP8, name="tp8-mxfp4", linear="mxfp4", routed="mxfp4"), _ALL_MX_STEPS),
    (replace(_SMALL, name="small-mxfp8", linear="mxfp8", routed="mxfp8"), (DECODE[2], MIXED)),
    (replace(_SMALL, name="small-mxfp4", linear="mxfp4", routed="mxfp4"), (DECODE[2], MIXED)),
    (
        replace(_SMALL, name="small-bf16-mxfp4", dtype=torch.bfloat16, linear="mxfp4", routed="mxfp4"),
        (DECODE[1], DECODE[2], MIXED),
    ),
    (_M3_TP1, ALL_STEPS),
    (replace(_M3_TP1, name="tp1-fp8", fp8=True), ALL_STEPS),
    (replace(_SMALL, name="small64-fp32", dim=64, index_heads=1, shared=False), (DECODE[2], MIXED)),
    (replace(_SMALL, name="small32-bf16", dtype=torch.bfloat16, index_heads=4), (DECODE[2], MIXED)),
)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def make_weight(kind: str, *shape: int, dtype: torch.dtype) -> Weight:
    """kind: the format, or "" for a tensor of `dtype`."""
    if not kind:
        return meta(*shape, dtype=dtype)
    *outer, columns = shape
    values = meta(*outer, columns // 2 if kind == "mxfp4" else columns, dtype=torch.uint8)
    scales = meta(*outer, columns // 32, dtype=torch.uint8)
    return MXWeight("mxfp4" if kind == "mxfp4" else "mxfp8", values, scales)


def make_batch(step: Step) -> StepBatch:
    """As engine/graphs.py (captured) and engine/batches.py (eager) make them."""
    counts = [new for _, new in step.rows]
    starts = [0, *accumulate(counts)]
    num_rows, num_tokens = len(step.rows), starts[-1]
    split = next((i for i, count in enumerate(counts) if count > 1), num_rows)
    segments = (
        Segment("decode", 0, split, 0, starts[split]),
        Segment("prefill", split, num_rows, starts[split], num_tokens),
    )
    lengths = [MAX_PAGES * PAGE] * num_rows if step.captured else [before + new for before, new in step.rows]
    if step.captured:
        positions, slot_mapping, row_ids = (meta(MAX_ROWS, dtype=torch.int64)[:num_rows] for _ in range(3))
        table = meta(MAX_ROWS, MAX_PAGES, dtype=torch.int32)[:num_rows]
    else:
        sizes = (num_tokens, num_tokens, num_tokens, num_rows, num_rows + 1, num_rows)
        _, row_ids, positions, *_ = meta(sum(sizes), dtype=torch.int64).split(sizes)
        slot_mapping = meta(num_tokens, dtype=torch.int64)
        table = meta(num_rows, MAX_PAGES, dtype=torch.int32)
    return StepBatch(
        positions=positions,
        slot_mapping=slot_mapping,
        row_ids=row_ids,
        block_table=table,
        seq_lens=meta(num_rows, dtype=torch.int32),
        query_start_loc=meta(num_rows + 1, dtype=torch.int32),
        query_starts=starts,
        seq_lens_host=lengths,
        segments=tuple(segment for segment in segments if segment.num_rows),
    )


def make_pages(rank: Rank, fp8_dtype: torch.dtype) -> KVPages:
    dtype = fp8_dtype if rank.fp8 else rank.dtype
    kv, index = (rank.num_pages, rank.kv_heads, PAGE), (rank.num_pages, PAGE)

    def scale(*shape: int) -> Tensor | None:
        return meta(*shape, dtype=torch.float32) if rank.fp8 else None

    return KVPages(
        meta(*kv, rank.dim, dtype=dtype),
        meta(*kv, rank.dim, dtype=dtype),
        meta(*index, rank.dim, dtype=dtype),
        scale(*kv),
        scale(*kv),
        scale(*index),
    )


def make_selection(rank: Rank, group_tokens: int) -> Selection:
    """The fixed buffers of engine/msa/cache.py."""
    unions = None
    if group_tokens:
        shape = (rank.index_heads, MAX_TOKENS // group_tokens + MAX_ROWS, group_tokens * rank.topk)
        unions = BlockUnions(group_tokens, meta(*shape, dtype=torch.int32), meta(*shape[:2], dtype=torch.int32))
    blocks = meta(rank.index_heads, MAX_TOKENS, rank.topk, dtype=torch.int32)
    return Selection(blocks, meta(MAX_TOKENS, dtype=torch.int32), unions)


Operation = tuple[str, Callable[[], object]]


def layer_operations(kernels: KernelSet, rank: Rank, batch: StepBatch) -> Iterator[Operation]:
    """Norms, products, experts and router over the tokens of a step."""
    tokens, hidden, dtype = batch.num_tokens, rank.hidden, rank.dtype
    x, gain = meta(tokens, hidden, dtype=dtype), meta(hidden, dtype=torch.float32)
    yield "rms_norm", lambda: kernels.rms_norm(x, gain, 1e-6)
    yield "add_rms_norm", lambda: kernels.add_rms_norm(x, meta(tokens, hidden, dtype=dtype), gain, 1e-6)
    qkv, index = (rank.heads + 2 * rank.kv_heads) * rank.dim, (rank.index_heads + 1) * rank.dim
    products = {
        "qkv": (qkv, hidden),
        "qkv_index": (qkv + index, hidden),
        "o_proj": (hidden, rank.heads * rank.dim),
        "gate_up": (2 * rank.dense_width, hidden),
        "down": (hidden, rank.dense_width),
    }
    for name, (outputs, inputs) in products.items():
        packed = kernels.pack_linear(make_weight(rank.linear, outputs, inputs, dtype=dtype))
        yield name, lambda packed=packed, inputs=inputs: kernels.linear(meta(tokens, inputs, dtype=dtype), packed)
    rows = len(batch.seq_lens_host)
    lm_head = kernels.pack_linear(meta(rank.vocab, hidden, dtype=dtype))
    yield "lm_head", lambda: kernels.linear(meta(rows, hidden, dtype=dtype), lm_head)
    yield "swiglu", lambda: kernels.swiglu(meta(tokens, 2 * rank.dense_width, dtype=dtype), ACT)
    gate = kernels.pack_linear(meta(rank.experts, hidden, dtype=torch.float32))
    bias = meta(rank.experts, dtype=torch.float32)
    routing = RouteParams(rank.experts_per_token, 2.0, rank.shared)
    weight = partial(make_weight, rank.routed, rank.experts + rank.shared, dtype=dtype)
    experts = kernels.pack_experts(weight(2 * rank.width, hidden), weight(hidden, rank.width))
    yield "route", lambda: kernels.route(x, gate, bias, routing)
    yield "experts", lambda: kernels.experts(x, experts, *kernels.route(x, gate, bias, routing), ACT)


def attention_operations(kernels: KernelSet, rank: Rank, batch: StepBatch) -> Iterator[Operation]:
    """From the packed projection to the attended values, segment by segment."""
    tokens, dim = batch.num_tokens, rank.dim
    pages = make_pages(rank, kernels.fp8_dtype)
    table = meta(MAX_PAGES * PAGE, dim // 2, dtype=torch.float32)
    gains = [meta(rank.heads + rank.kv_heads, dim, dtype=torch.float32)]
    for with_index in (False, True):
        layout = QKVLayout(rank.heads, rank.kv_heads, dim, rank.index_heads if with_index else 0, dim, dim // 2, 1e-6)
        qkv = meta(tokens, sum(layout.sizes), dtype=rank.dtype)
        own = pages if with_index else replace(pages, index_k=None, index_k_scale=None)
        all_gains = (*gains, meta(rank.index_heads + 1, dim, dtype=torch.float32)) if with_index else tuple(gains)
        arguments = (qkv, all_gains, table, batch, layout, own)
        name = "qk_norm_index" if with_index else "qk_norm"
        yield name, lambda arguments=arguments: kernels.qk_norm_rope_insert(*arguments)
    q, out = (meta(tokens, rank.heads, dim, dtype=rank.dtype) for _ in range(2))
    index_q = meta(tokens, rank.index_heads, dim, dtype=rank.dtype)
    groups = max(rank.kv_heads, rank.index_heads)
    selection = make_selection(rank, kernels.group_tokens(rank.heads // groups)).first(tokens)
    params = SelectParams(rank.topk, 0, 1)
    for segment in batch.segments:
        phase = segment.phase
        yield (
            f"select_{phase}",
            lambda segment=segment: kernels.select_blocks(index_q, pages, batch, segment, params, selection),
        )
        yield f"dense_{phase}", lambda segment=segment: kernels.attend_dense(q, pages, batch, segment, 0.1, out)
        yield (
            f"sparse_{phase}",
            lambda segment=segment: kernels.attend_sparse(q, pages, selection, batch, segment, 0.1, out),
        )


@dataclass
class Recording:
    """Of one architecture. num_tested: how many of the launches, the first ones, `make test` compiles.  errors: by
    class of shapes, those that raised."""

    launches: list[Launch]
    num_tested: int
    errors: dict[str, str]


def decode_operations(kernels: KernelSet, rank: Rank, batch: StepBatch) -> Iterator[Operation]:
    """What a captured step runs besides the model, on buffers cut from those of the largest batch."""
    if kernels.decode is None or batch.num_tokens != len(batch.seq_lens_host):
        return
    decode, rows = kernels.decode, batch.num_tokens
    token_ids, slots, keys, out = (meta(MAX_ROWS, dtype=torch.int64)[:rows] for _ in range(4))
    temperatures = meta(MAX_ROWS, dtype=torch.float32)[:rows]
    last_tokens, tables = meta(MAX_ROWS, dtype=torch.int64), meta(MAX_ROWS, MAX_PAGES, dtype=torch.int32)
    inputs = meta(1 + 4 * MAX_ROWS, dtype=torch.int64)
    yield (
        "prepare",
        lambda: decode.prepare(inputs, MAX_ROWS, last_tokens, tables, batch, token_ids, slots, keys, temperatures),
    )
    logits = meta(rows, rank.full_vocab, dtype=rank.dtype)
    yield "sample", lambda: decode.sample(logits, temperatures, keys, out, last_tokens, slots)
    masks = meta(rows, -(-rank.full_vocab // 32), dtype=torch.int32)
    yield "sample_masked", lambda: decode.sample(logits, temperatures, keys, out, last_tokens, slots, masks=masks)


def group_operations(kernels: KernelSet, rank: Rank, batch: StepBatch) -> Iterator[Operation]:
    """What one of four ranks runs in a captured step to add up hidden states and to sample from its share."""
    if kernels.decode is None or batch.num_tokens != len(batch.seq_lens_host):
        return
    size, number, rows = 4, 1, batch.num_tokens

    def exchange(width: int) -> Exchange:
        counters = meta(MAX_ROWS, dtype=torch.int32)
        return Exchange(number, size, MAX_ROWS, width, meta(size, dtype=torch.int64), counters)

    of_sample = None
    if kernels.exchange is not None:
        x, gain = meta(rows, rank.hidden, dtype=rank.dtype), meta(rank.hidden, dtype=torch.float32)
        sums, reduce = exchange(rank.hidden * rank.dtype.itemsize // 4), kernels.exchange
        of_sample = exchange(reduce.sample_width(rank.vocab))
        yield "all_reduce", lambda: reduce.all_reduce(x, sums)
        yield "all_reduce_norm", lambda: reduce.all_reduce_add_rms_norm(x, torch.empty_like(x), gain, 1e-6, sums)
    share = VocabShare(number, size, rank.vocab, lambda found: found.new_empty(size, *found.shape), of_sample)
    keys, out, slots = (meta(MAX_ROWS, dtype=torch.int64)[:rows] for _ in range(3))
    temperatures, last_tokens = meta(MAX_ROWS, dtype=torch.float32)[:rows], meta(MAX_ROWS, dtype=torch.int64)
    logits, sample = meta(rows, rank.vocab, dtype=rank.dtype), kernels.decode.sample
    yield "sample_share", lambda: sample(logits, temperatures, keys, out, last_tokens, slots, share)
    masks = meta(rows, -(-rank.full_vocab // 32), dtype=torch.int32)
    yield "sample_share_masked", lambda: sample(logits, temperatures, keys, out, last_tokens, slots, share, masks)


def record(arch: str, everything: bool) -> Recording:
    """Run every operation in every class of shapes."""
    recorder = Recorder(arch)
    kernels = triton_set.bind(recorder.target, META)
    errors = drive(kernels, recorder, TESTED) | make_page_tables(recorder, TESTED)
    num_tested = len(recorder.launches)
    if everything:
        errors |= drive(kernels, recorder, OTHERS) | make_page_tables(recorder, OTHERS)
    return Recording(list(recorder.launches.values()), num_tested, errors)


def drive(kernels: KernelSet, recorder: Recorder, classes: Classes) -> dict[str, str]:
    """Run every operation in these classes of shapes; what raised, by class."""
    errors: dict[str, str] = {}
    for rank, steps in classes:
        for step in steps:
            batch = make_batch(step)
            for make in (layer_operations, attention_operations, decode_operations, group_operations):
                for name, run in make(kernels, rank, batch):
                    if rank.only and name not in rank.only:
                        continue
                    recorder.shape_class = f"{rank.name}/{name}/{step.name}"
                    try:
                        run()
                    except Exception as error:  # one bad operation must not hide the others
                        where = traceback.extract_tb(error.__traceback__)[-1]
                        errors[recorder.shape_class] = (
                            f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                        )
    return errors


def make_page_tables(recorder: Recorder, classes: Classes) -> dict[str, str]:
    """What the aiter backend launches beside the triton backend's operations, by decode rows of each class."""
    errors: dict[str, str] = {}
    for rank, steps in classes:
        for step in steps:
            batch = make_batch(step)
            selection = make_selection(rank, 0).first(batch.num_tokens)
            recorder.shape_class = f"{rank.name}/page_tables/{step.name}"
            for segment in batch.segments:
                if segment.phase == "prefill":
                    continue
                try:
                    triton_pages.selected_pages(
                        recorder.target, selection, batch, segment, num_kv_heads=rank.kv_heads, small_page=16
                    )
                except Exception as error:  # as in drive
                    errors[recorder.shape_class] = f"{type(error).__name__}: {error}"
    return errors


def never_launched(recordings: Iterable[Recording]) -> list[str]:
    """Kernels of the modules in use that nothing launched and that no other kernel calls."""
    kernels: dict[str, JITFunction] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("engine.kernels.triton_"):
            kernels |= {
                f"{name}.{key}": value
                for key, value in vars(module).items()
                if isinstance(value, JITFunction) and value.__module__ == name
            }
    launched = {launch.kernel for found in recordings for launch in found.launches}
    called = {name for kernel in kernels.values() for name in re.findall(r"\w+", kernel.src) if name != kernel.__name__}
    return [name for name, kernel in kernels.items() if kernel not in launched and kernel.__name__ not in called]
