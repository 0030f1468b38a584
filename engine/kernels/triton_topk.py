"""Keeping the best key blocks of scored rows: exact, deterministic, without a sort.

A row's threshold, the topk-th largest score, is found by bisection on the scores' bits while they stay in registers; a
second bisection, on block ids, runs only where several blocks tie at the threshold. What is kept is then a set of bits,
and the output its positions in order. Counting costs a compare and an add per score and step, a sorting network an
order of magnitude more.
"""

# Kernels are typed by Triton, not by Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.triton_common import follow

INIT_SCORE = tl.constexpr(1e30)
LOCAL_SCORE = tl.constexpr(1e29)
NEVER = tl.constexpr(-1e30)
PAGE = tl.constexpr(128)
# Below every score's ordered bits, and above them.
_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)
# A quarter of the distance between a float32 and twice it, in ordered bits.
_FIRST_STRIDE = tl.constexpr(2**21)
# Neighbouring blocks that share a word of flags.
MEMBERS = tl.constexpr(32)


@triton.jit
def _midpoint(low, high):
    """The floor of the mean, without the overflow of low + high."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def _count(flags):
    """How many of [R, N] flags are set, per row."""
    return tl.sum(flags.to(tl.int32), 1)


@triton.jit
def _ordered(score):
    """int32 that compares as `score` does; -0 equals +0, NaN is worst, infinities are the extremes of a score."""
    score = tl.where((score != score) | (score == -float("inf")), NEVER, score)
    score = tl.where(score == float("inf"), -NEVER, score)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _forced(score: tl.constexpr):
    return tl.full([], score, tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _threshold(keys, ids, forced, own, TOPK: tl.constexpr):
    """(low, last), int32 [R]: a row keeps the keys above `low`, and those equal to it whose id is below `last`."""
    NUM_IDS: tl.constexpr = keys.shape[1]
    choosing = own >= TOPK
    # count(keys >= low) >= TOPK > count(keys >= high), and low is the threshold once the two are neighbours.
    low = tl.full(own.shape, _LOWEST, tl.int32)
    high = tl.full(own.shape, _HIGHEST, tl.int32)
    # Forced scores are far from all others: the first step tells whether they alone fill the row. The threshold is
    # mostly within a factor of two of the best score, so the search goes down from that, ever faster.
    middle = tl.max(tl.where(forced, _LOWEST, keys), 1) + 1
    stride = tl.full([], _FIRST_STRIDE, tl.int32)
    reached = tl.full(own.shape, NUM_IDS + 1, tl.int32)
    active = choosing
    while tl.max(active.to(tl.int32), 0) > 0:
        count = _count(keys >= middle[:, None])
        enough = count >= TOPK
        low = tl.where(active & enough, middle, low)
        reached = tl.where(active & enough, count, reached)
        high = tl.where(active & (count < TOPK), middle, high)
        active = active & (reached != TOPK) & (high > low + 1)
        down = (low == _LOWEST) & (high > _LOWEST + stride)
        middle = tl.where(down, high - stride, _midpoint(low, high))
        stride = tl.minimum(stride, 2**29) * 2
    low = tl.where(choosing, low, _LOWEST + 1)
    # More than TOPK reach the threshold: of the equal ones keep the lowest ids.
    first = tl.zeros(own.shape, tl.int32)
    last = tl.full(own.shape, NUM_IDS, tl.int32)
    active = choosing & (reached != TOPK)
    while tl.max(active.to(tl.int32), 0) > 0:
        middle = (first + last) >> 1
        count = _count(_is_kept(keys, ids, low, middle))
        last = tl.where(active & (count >= TOPK), middle, last)
        first = tl.where(active & (count < TOPK), middle, first)
        active = active & (count != TOPK) & (last > first + 1)
    return low, last


@triton.jit
def _is_kept(keys, ids, low, last):
    low = low[:, None]
    return (keys > low) | ((keys == low) & (ids < last[:, None]))


@triton.jit
def _bit_count(x):
    """Of int32, as int32."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _halve(word, n, position, WIDTH: tl.constexpr):
    """Of 2 * WIDTH bits of `word`, the half that has the n-th set one."""
    count = _bit_count((word & ((1 << WIDTH) - 1)).to(tl.int32))
    beyond = n >= count
    n = tl.where(beyond, n - count, n)
    return tl.where(beyond, word >> WIDTH, word), n, tl.where(beyond, position + WIDTH, position)


@triton.jit
def _nth_bit(word, n):
    """The position of the n-th set bit, from 0, of 32."""
    word, n, position = _halve(word.to(tl.uint32, bitcast=True), n, tl.zeros_like(n), 16)
    word, n, position = _halve(word, n, position, 8)
    word, n, position = _halve(word, n, position, 4)
    word, n, position = _halve(word, n, position, 2)
    word, n, position = _halve(word, n, position, 1)
    return position


@triton.jit
def best_blocks(
    score, ids, own, TOPK: tl.constexpr, PADDED: tl.constexpr, INIT_BLOCKS: tl.constexpr, LOCAL_BLOCKS: tl.constexpr
):
    """The blocks that each row keeps: int32 [R, PADDED], ascending, -1 to the right.

    score: float32 [R, GROUPS * MEMBERS].  ids: int32 [1, GROUPS * MEMBERS], from 0.  own: int32 [R], the last block
    that counts; a row of up to TOPK blocks keeps all, and its scores are not looked at.
    """
    R: tl.constexpr = score.shape[0]
    GROUPS: tl.constexpr = score.shape[1] // MEMBERS
    last_id = own[:, None]
    valid = ids <= last_id
    keys = tl.where(valid, _ordered(score), _LOWEST)
    forced = valid & ((ids < INIT_BLOCKS) | (ids > last_id - LOCAL_BLOCKS))
    if INIT_BLOCKS > 0:
        keys = tl.where(valid & (ids < INIT_BLOCKS), _forced(INIT_SCORE), keys)
    if LOCAL_BLOCKS > 0:
        keys = tl.where(valid & (ids > last_id - LOCAL_BLOCKS), _forced(LOCAL_SCORE), keys)
    low, last = _threshold(keys, ids, forced, own, TOPK)
    # The kept blocks as bits, a word for each group of neighbours.
    flags = tl.reshape(_is_kept(keys, ids, low, last).to(tl.int32), [R, GROUPS, MEMBERS])
    words = tl.sum(flags << tl.arange(0, MEMBERS)[None, None, :], 2)
    counts = _bit_count(words)
    ends = tl.cumsum(counts, 1)
    # Slot j of the output is in the group that the j-th kept block, in ascending order, is in.
    slots = tl.arange(0, PADDED)
    passed = ends[:, :, None] <= slots[None, None, :]
    here = ((ends - counts)[:, :, None] <= slots[None, None, :]) & (ends[:, :, None] > slots[None, None, :])
    group = tl.sum(passed.to(tl.int32), 1)
    before = tl.sum(tl.where(passed, counts[:, :, None], 0), 1)
    word = tl.sum(tl.where(here, words[:, :, None], 0), 1)
    kept = group * MEMBERS + _nth_bit(word, slots[None, :] - before)
    return tl.where((slots[None, :] <= own[:, None]) & (group < GROUPS), kept, -1)


@triton.jit
def select_row(
    scores,
    blocks,
    own,
    TOPK: tl.constexpr,
    PADDED: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One row: scores float32 [own + 1] to block ids int32 [TOPK]. GROUPS * MEMBERS > own."""
    ids = tl.arange(0, GROUPS * MEMBERS)[None, :]
    # Not reused from L1: in the fused kernel other programs wrote them.
    scored = tl.where(own >= TOPK, own, -1)
    score = tl.load(scores + ids, mask=ids <= scored, other=0.0, cache_modifier=".cg")
    kept = best_blocks(score, ids, tl.zeros([1], tl.int32) + own, TOPK, PADDED, INIT_BLOCKS, LOCAL_BLOCKS)
    slots = tl.arange(0, PADDED)[None, :]
    tl.store(blocks + slots, kept, mask=slots < TOPK)


@triton.jit
def select_row_by_length(
    scores,
    blocks,
    own,
    TOPK: tl.constexpr,
    PADDED: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    FEW: tl.constexpr,
):
    """select_row, on a tile of FEW groups where those are enough: the bound is often far from the row's length."""
    if FEW < GROUPS and own < FEW * MEMBERS:
        select_row(scores, blocks, own, TOPK, PADDED, INIT_BLOCKS, LOCAL_BLOCKS, FEW)
    else:
        select_row(scores, blocks, own, TOPK, PADDED, INIT_BLOCKS, LOCAL_BLOCKS, GROUPS)


@triton.jit
def select_decode(
    scores,
    seq_lens,
    blocks,
    num_blocks,
    scores_row_stride,
    scores_head_stride,
    blocks_head_stride,
    TOPK: tl.constexpr,
    PADDED: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    FEW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (rows, heads). scores: float32 [rows, heads, blocks], valid where a row has more than TOPK blocks."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    own = (tl.load(seq_lens + row) - 1) // PAGE
    if head == 0:
        tl.store(num_blocks + row, tl.minimum(own + 1, TOPK))
    follow(OVERLAP)
    select_row_by_length(
        scores + row * scores_row_stride + head * scores_head_stride,
        blocks + head * blocks_head_stride + row * TOPK,
        own,
        TOPK,
        PADDED,
        INIT_BLOCKS,
        LOCAL_BLOCKS,
        GROUPS,
        FEW,
    )


@triton.jit(do_not_specialize=["window_start", "window_end"])
def select_prefill(
    scores,
    positions,
    blocks,
    num_blocks,
    window_start,
    window_end,
    scores_head_stride,
    scores_block_stride,
    blocks_head_stride,
    TOPK: tl.constexpr,
    PADDED: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid (window tokens / ROWS, heads). scores: float32 [heads, blocks, window tokens], token-contiguous: a program
    reads whole sectors, of several tokens."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = window_start + rows
    used = tokens < window_end
    own = (tl.load(positions + tokens, mask=used, other=0) // PAGE).to(tl.int32)
    ids = tl.arange(0, GROUPS * MEMBERS)[None, :]
    scored = tl.where(own >= TOPK, own, -1)
    source = scores + head * scores_head_stride + ids * scores_block_stride + rows[:, None]
    score = tl.load(source, mask=ids <= scored[:, None], other=0.0)
    kept = best_blocks(score, ids, own, TOPK, PADDED, INIT_BLOCKS, LOCAL_BLOCKS)
    slots = tl.arange(0, PADDED)[None, :]
    out = blocks + head * blocks_head_stride + tokens[:, None] * TOPK + slots
    tl.store(out, kept, mask=used[:, None] & (slots < TOPK))
    if head == 0:
        tl.store(num_blocks + tokens, tl.minimum(own + 1, TOPK), mask=used)
