"""Every operation of the model at the shapes of one rank: what to call, on which inputs, and its floor.

Keys, values, index keys and weights come from memory in a real step, whose other layers have evicted them: successive
calls read different ones. Activations were just written by the operation before: they stay where they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import launch
from engine.kernels.api import QKVLayout, RouteParams, Selection, SelectParams, SwigluParams
from service.bench import floors, selections
from service.bench.floors import BF16, FP8, Floor, Kind, RankShape
from service.bench.kernel_inputs import (
    Bench,
    decode_steps,
    empty_selection,
    fill_selection,
    index_pages,
    kv_pages,
    prefill_steps,
    quantised,
    weight,
)

K = 1024
ACT = SwigluParams(alpha=1.702, limit=7.0, beta=1.0)
# Of each token's 16 blocks, 14 are its predecessor's: four neighbours then select about as many distinct ones as in
# the released model (22 of 64).
KEPT = 14

Call = Callable[[int], object]
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Which sizes each operation is tried at: (batch, context) of decode, (queries, context) of prefill, tokens."""

    decode: Pairs = (
        (1, 8 * K), (16, 8 * K), (64, 8 * K), (1, 32 * K), (16, 32 * K), (64, 32 * K), (1, 128 * K), (16, 128 * K)
    )  # fmt: skip
    prefill: Pairs = ((2048, 8 * K), (8192, 8 * K), (8192, 32 * K), (8192, 128 * K))
    dense_decode: Pairs = ((1, 8 * K), (64, 32 * K), (1, 128 * K))
    dense_prefill: Pairs = ((8192, 8 * K), (8192, 32 * K))
    layer_tokens: tuple[int, ...] = (1, 64, 8192)
    weight_tokens: tuple[int, ...] = (1, 16, 64, 8192)
    sampled: tuple[int, ...] = (1, 64)


@dataclass(frozen=True, slots=True)
class Calls:
    """A prepared case. run: call number i of a series of `count`.  baseline: another way to the same result, timed
    alongside.  floor: replaces the case's where it depends on the inputs."""

    run: Call
    count: int
    baseline: Call | None = None
    floor: Floor | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one size. prepare: makes the inputs; what they take is freed with the Calls."""

    name: str
    floor: Floor
    prepare: Callable[[Bench], Calls]


def all_cases(shape: RankShape, sizes: Sizes | None = None) -> list[Case]:
    """The whole list."""
    sizes = sizes or Sizes()
    return [*_attention_cases(shape, sizes), *_layer_cases(shape, sizes), *_feed_forward_cases(shape, sizes)]


def _length(tokens: int) -> str:
    return f"{tokens // K}k" if tokens >= K else str(tokens)


def _attention_cases(shape: RankShape, sizes: Sizes) -> Iterator[Case]:
    for fp8 in (False, True):
        element, suffix = (FP8, " fp8") if fp8 else (BF16, "")
        for batch, context in sizes.decode:
            floor = floors.indexer_decode(shape, batch, context, element)
            prepare = partial(_indexer_decode, batch=batch, context=context, fp8=fp8, floor=floor)
            yield Case(f"indexer decode {batch} x {_length(context)}{suffix}", floor, prepare)
        for batch, context in sizes.decode:
            floor = floors.sparse_decode(shape, batch, context, element)
            prepare = partial(_sparse_decode, batch=batch, context=context, fp8=fp8, floor=floor)
            yield Case(f"sparse decode {batch} x {_length(context)}{suffix}", floor, prepare)
    for queries, context in sizes.prefill:
        floor = floors.indexer_prefill(shape, queries, context)
        prepare = partial(_indexer_prefill, queries=queries, context=context, floor=floor)
        yield Case(f"indexer prefill {queries} @ {_length(context)}", floor, prepare)
    for queries, context in sizes.prefill:
        for kind in ("random", "correlated"):
            where = f"{queries} @ {_length(context)} {kind}"
            floor = floors.sparse_prefill(shape, queries, context)
            prepare = partial(_sparse_prefill, queries=queries, context=context, kind=kind, floor=floor)
            yield Case(f"sparse prefill {where}", floor, prepare)
            floor = floors.block_unions(shape, queries)
            prepare = partial(_unions, queries=queries, context=context, kind=kind)
            yield Case(f"block unions {where}", floor, prepare)
    for batch, context in sizes.dense_decode:
        floor = floors.dense_decode(shape, batch, context)
        prepare = partial(_dense, queries=0, batch=batch, context=context, floor=floor)
        yield Case(f"dense decode {batch} x {_length(context)}", floor, prepare)
    for queries, context in sizes.dense_prefill:
        floor = floors.dense_prefill(shape, queries, context)
        prepare = partial(_dense, queries=queries, batch=1, context=context, floor=floor)
        yield Case(f"dense prefill {queries} @ {_length(context)}", floor, prepare)


def _layer_cases(shape: RankShape, sizes: Sizes) -> Iterator[Case]:
    for tokens in sizes.layer_tokens:
        for index in (True, False):
            floor = floors.qk_norm_rope_insert(shape, tokens, index=index)
            name = f"qk_norm_rope_insert {tokens}{' with index' if index else ''}"
            yield Case(name, floor, partial(_qk_norm_rope_insert, tokens=tokens, index=index))
    for tokens in sizes.layer_tokens:
        yield Case(f"add_rms_norm {tokens}", floors.add_rms_norm(shape, tokens), partial(_add_rms_norm, tokens=tokens))
    for tokens in sizes.layer_tokens:
        floor = floors.swiglu(shape.dense_width, tokens)
        yield Case(f"swiglu {tokens}", floor, partial(_swiglu, tokens=tokens))
    for batch in sizes.sampled:
        yield Case(f"sample {batch}", floors.sample(shape, batch), partial(_sample, batch=batch))


def _feed_forward_cases(shape: RankShape, sizes: Sizes) -> Iterator[Case]:
    for tokens in sizes.weight_tokens:
        yield Case(f"route {tokens}", floors.route(shape, tokens), partial(_route, tokens=tokens))
    for name, rows, columns in linear_shapes(shape):
        for tokens in sizes.weight_tokens:
            floor = floors.linear(rows, columns, tokens)
            prepare = partial(_linear, rows=rows, columns=columns, tokens=tokens, floor=floor)
            yield Case(f"linear {name} {tokens}", floor, prepare)
            if name != "lm_head":  # released checkpoints do not quantise it
                floor = floors.linear(rows, columns, tokens, "mxfp8")
                prepare = partial(_linear, rows=rows, columns=columns, tokens=tokens, floor=floor, kind="mxfp8")
                yield Case(f"linear {name} {tokens} mxfp8", floor, prepare)
    for kind in floors.WEIGHT_BYTES:
        for tokens in sizes.weight_tokens:
            floor = floors.experts(shape, tokens, kind=kind)
            suffix = "" if kind == "bf16" else f" {kind}"
            yield Case(f"experts {tokens}{suffix}", floor, partial(_experts, tokens=tokens, kind=kind))


def linear_shapes(shape: RankShape) -> list[tuple[str, int, int]]:
    """(name, output rows, input columns) of every weight that `linear` multiplies with."""
    return [
        ("qkv", shape.qkv_width, shape.hidden),
        ("o", shape.hidden, shape.heads * shape.dim),
        ("gate_up", 2 * shape.dense_width, shape.hidden),
        ("down", shape.hidden, shape.dense_width),
        ("lm_head", shape.vocab, shape.hidden),
    ]


def _select_params(bench: Bench) -> SelectParams:
    return SelectParams(bench.shape.topk_blocks, init_blocks=0, local_blocks=1)


def _indexer_decode(bench: Bench, *, batch: int, context: int, fp8: bool, floor: Floor) -> Calls:
    count = bench.calls_for(floor)
    steps = decode_steps(bench, batch, context, count)
    pages = index_pages(bench, steps.num_pages, fp8=fp8)
    index_q = bench.randn(batch, bench.shape.index_heads, bench.shape.dim)
    out = empty_selection(bench, batch, batch, prefill=False)
    params = _select_params(bench)

    def run(call: int) -> None:
        step = steps[call]
        bench.kernels.select_blocks(index_q, pages, step, step.segments[0], params, out)

    return Calls(run, count)


def _indexer_prefill(bench: Bench, *, queries: int, context: int, floor: Floor) -> Calls:
    """With the block unions, where the backend attends by groups: they are made in the same call."""
    count = bench.calls_for(floor)
    steps = prefill_steps(bench, queries, context, count)
    pages = index_pages(bench, steps.num_pages)
    index_q = bench.randn(queries, bench.shape.index_heads, bench.shape.dim)
    out = empty_selection(bench, queries, 1, prefill=True)
    params = _select_params(bench)

    def run(call: int) -> None:
        step = steps[call]
        bench.kernels.select_blocks(index_q, pages, step, step.segments[0], params, out)

    return Calls(run, count)


def _sparse_decode(bench: Bench, *, batch: int, context: int, fp8: bool, floor: Floor) -> Calls:
    shape, count = bench.shape, bench.calls_for(floor)
    steps = decode_steps(bench, batch, context, count)
    pages = kv_pages(bench, steps.num_pages, fp8=fp8)
    q = bench.randn(batch, shape.heads, shape.dim)
    out = torch.empty_like(q)
    chosen: list[Selection] = []
    for _ in range(count):
        rows = [selections.uniform(1, context - 1, shape.topk_blocks, bench.generator) for _ in range(batch)]
        blocks = torch.cat(rows, dim=1).to(bench.device)
        chosen.append(fill_selection(empty_selection(bench, batch, batch, prefill=False), blocks))

    def run(call: int) -> None:
        step = steps[call]
        bench.kernels.attend_sparse(q, pages, chosen[call], step, step.segments[0], shape.dim**-0.5, out)

    return Calls(run, count)


def _choose(bench: Bench, queries: int, context: int, kind: str) -> Tensor:
    first, topk = context - queries, bench.shape.topk_blocks
    if kind == "random":
        return selections.uniform(queries, first, topk, bench.generator)
    return selections.correlated(queries, first, topk, min(KEPT, topk), bench.generator)


def _build_unions(selection: Selection) -> Callable[..., None] | None:
    """Only the Triton backend attends by groups: it is looked up by name where it is in use."""
    if selection.unions is None:
        return None
    build: Callable[..., None] = importlib.import_module("engine.kernels.triton_unions").build_unions
    return partial(build, launch.detect(), selection)


def _sparse_prefill(bench: Bench, *, queries: int, context: int, kind: str, floor: Floor) -> Calls:
    """Without the block unions, which are made once for the layers that share a selection."""
    shape, count = bench.shape, bench.calls_for(floor)
    steps = prefill_steps(bench, queries, context, count)
    pages = kv_pages(bench, steps.num_pages)
    q = bench.randn(queries, shape.heads, shape.dim)
    out = torch.empty_like(q)
    blocks = _choose(bench, queries, context, kind)
    selection = fill_selection(empty_selection(bench, queries, 1, prefill=True), blocks.to(bench.device))
    build = _build_unions(selection)
    if build is not None:
        build(steps[0], steps[0].segments[0])

    def run(call: int) -> None:
        step = steps[call]
        bench.kernels.attend_sparse(q, pages, selection, step, step.segments[0], shape.dim**-0.5, out)

    distinct = selections.distinct_blocks(blocks, min(4, queries))
    return Calls(run, count, note=f"4 neighbours select {distinct:.1f} distinct blocks")


def _unions(bench: Bench, *, queries: int, context: int, kind: str) -> Calls:
    step = prefill_steps(bench, queries, context, 1)[0]
    selection = empty_selection(bench, queries, 1, prefill=True)
    fill_selection(selection, _choose(bench, queries, context, kind).to(bench.device))
    build = _build_unions(selection)
    if build is None:
        return Calls(lambda call: None, 0, note="this backend makes none")
    return Calls(lambda call: build(step, step.segments[0]), bench.min_calls)


def _dense(bench: Bench, *, queries: int, batch: int, context: int, floor: Floor) -> Calls:
    """queries: of a prefill row; 0: a decode step of `batch` rows."""
    shape, count = bench.shape, bench.calls_for(floor)
    steps = prefill_steps(bench, queries, context, count) if queries else decode_steps(bench, batch, context, count)
    pages = kv_pages(bench, steps.num_pages)
    q = bench.randn(queries or batch, shape.heads, shape.dim)
    out = torch.empty_like(q)

    def run(call: int) -> None:
        step = steps[call]
        bench.kernels.attend_dense(q, pages, step, step.segments[0], shape.dim**-0.5, out)

    return Calls(run, count)


def _qk_norm_rope_insert(bench: Bench, *, tokens: int, index: bool) -> Calls:
    shape = bench.shape
    index_heads = shape.index_heads if index else 0
    layout = QKVLayout(shape.heads, shape.kv_heads, shape.dim, index_heads, shape.dim, shape.rotary_dim, 1e-6)
    context = 8 * K
    if tokens >= K:
        steps = prefill_steps(bench, tokens, max(context, tokens), 1)
    else:
        steps = decode_steps(bench, tokens, context, 1)
    pages = kv_pages(bench, steps.num_pages)
    if index:
        with_index = index_pages(bench, steps.num_pages)
        pages = type(pages)(pages.k, pages.v, with_index.index_k)
    qkv = bench.randn(tokens, sum(layout.sizes))
    gains = [bench.randn(shape.heads + shape.kv_heads, shape.dim, dtype=torch.float32)]
    if index:
        gains.append(bench.randn(shape.index_heads + 1, shape.dim, dtype=torch.float32))
    angles = bench.randn(max(context, tokens), shape.rotary_dim // 2, dtype=torch.float32)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)

    def run(call: int) -> None:
        bench.kernels.qk_norm_rope_insert(qkv, tuple(gains), cos_sin, steps[0], layout, pages)

    return Calls(run, bench.min_calls)


def _add_rms_norm(bench: Bench, *, tokens: int) -> Calls:
    x, residual = (bench.randn(tokens, bench.shape.hidden) for _ in range(2))
    gain = bench.randn(bench.shape.hidden, dtype=torch.float32)
    return Calls(lambda call: bench.kernels.add_rms_norm(x, residual, gain, 1e-6), bench.min_calls)


def _swiglu(bench: Bench, *, tokens: int) -> Calls:
    gate_up = bench.randn(tokens, 2 * bench.shape.dense_width)
    return Calls(lambda call: bench.kernels.swiglu(gate_up, ACT), bench.min_calls)


def _sample(bench: Bench, *, batch: int) -> Calls:
    """Over the whole vocabulary, as after the gather; every row draws at temperature 1."""
    if bench.kernels.decode is None:
        return Calls(lambda call: None, 0, note="this backend samples in the host's loop")
    sample = bench.kernels.decode.sample
    logits = bench.randn(batch, bench.shape.full_vocab)
    temperatures = torch.ones(batch, dtype=torch.float32, device=bench.device)
    keys = torch.arange(batch, device=bench.device) * 7919
    tokens, last = (torch.zeros(batch, dtype=torch.int64, device=bench.device) for _ in range(2))
    slots = torch.arange(batch, device=bench.device)
    return Calls(lambda call: sample(logits, temperatures, keys, tokens, last, slots), bench.min_calls)


def _route(bench: Bench, *, tokens: int) -> Calls:
    shape = bench.shape
    count = bench.calls_for(Floor(4 * shape.experts * shape.hidden))
    x = bench.randn(tokens, shape.hidden)
    gates = [
        bench.kernels.pack_linear(bench.randn(shape.experts, shape.hidden, dtype=torch.float32) / shape.hidden**0.5)
        for _ in range(count)
    ]
    bias = bench.randn(shape.experts, dtype=torch.float32) * 0.1
    params = RouteParams(shape.experts_per_token, 2.0, True)
    return Calls(lambda call: bench.kernels.route(x, gates[call], bias, params), count)


def _linear(bench: Bench, *, rows: int, columns: int, tokens: int, floor: Floor, kind: Kind = "bf16") -> Calls:
    """The baseline is torch's F.linear, i.e. the vendor's library, on a bf16 weight."""
    count = bench.calls_for(floor)
    copies = max(1, min(count, int(bench.cold_bytes // (floors.WEIGHT_BYTES[kind] * rows * columns)) + 1))
    weights = [bench.randn(rows, columns) / columns**0.5 for _ in range(copies)]
    packed = [bench.kernels.pack_linear(quantised(bench, each, kind)) for each in weights]
    x = bench.randn(tokens, columns)
    return Calls(
        lambda call: bench.kernels.linear(x, packed[call % copies]),
        count,
        baseline=lambda call: F.linear(x, weights[call % copies]),
    )


def _experts(bench: Bench, *, tokens: int, kind: Kind) -> Calls:
    """Uniformly random routing, another one in every call; two sets of weights, so that the shared expert is cold."""
    shape, count = bench.shape, bench.min_calls if tokens < K else max(1, bench.min_calls // 4)
    num_experts, width, hidden = shape.experts + 1, shape.expert_width, shape.hidden
    packed = []
    for _ in range(2):
        w13, w2 = weight(bench, kind, num_experts, 2 * width, hidden), weight(bench, kind, num_experts, hidden, width)
        packed.append(bench.kernels.pack_experts(w13, w2))
        del w13, w2
    x = bench.randn(tokens, hidden)
    gate = bench.kernels.pack_linear(bench.randn(shape.experts, hidden, dtype=torch.float32))
    bias = torch.zeros(shape.experts, dtype=torch.float32, device=bench.device)
    # Weights and ids as the router hands them over; then other ids.
    weights, routed = bench.kernels.route(x, gate, bias, RouteParams(shape.experts_per_token, 2.0, True))
    chosen, distinct = [], 0.0
    for _ in range(count):
        keys = torch.rand(tokens, shape.experts, generator=bench.generator)
        ids = keys.topk(shape.experts_per_token, dim=1).indices
        distinct += len(ids.unique()) / count
        chosen.append(F.pad(ids, (0, 1), value=shape.experts).to(bench.device, routed.dtype))
    return Calls(
        lambda call: bench.kernels.experts(x, packed[call % 2], weights, chosen[call], ACT),
        count,
        floor=floors.experts(shape, tokens, distinct, kind),
        note=f"{distinct:.1f} routed experts hit",
    )
