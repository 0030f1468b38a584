# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Sums of few rows over the ranks of a group in one launch, alone or with the residual and the norm that follow.

Every rank writes its rows into the memory of all others, and adds up what it got, in the order of the ranks, so that
all have the same bits. A word carries 4 bytes of data and, beside them, the count of the exchange: a store of 8 bytes
arrives whole, so whoever reads the count it waits for has the data too, and no fence, flag or second trip is needed.
(NCCL calls this protocol LL.) Buffers take turns. That is enough: a rank that writes exchange n + 2 of a row has seen
every other rank's words of n + 1, which they sent after their kernel of n, the last reader of that buffer, had ended
(a kernel sends behind `follow`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import configs
from engine.kernels.exchange import Exchange
from engine.kernels.launch import Target
from engine.kernels.triton_common import follow


@triton.jit
def send(
    words, column, mask, row, count, peers_ptr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Hand `words`, int32 [n], to all other ranks, as words `column` [n] of exchange number `count` of `row`."""
    tagged = (count.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    cell = (((count & 1) * SIZE + RANK) * ROWS + row) * WIDTH + column
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            buffer = tl.load(peers_ptr + peer).to(tl.pointer_type(tl.int64))
            tl.store(buffer + cell, tagged, mask=mask)


@triton.jit
def receive(
    source, column, mask, row, count, peers_ptr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Wait for words `column` [n] of `source` (a rank, or one per word); int32 [n], 0 where masked."""
    buffer = tl.load(peers_ptr + RANK).to(tl.pointer_type(tl.int64))
    cell = (((count & 1) * SIZE + source) * ROWS + row) * WIDTH + column
    words = tl.load(buffer + cell, mask=mask, other=0, volatile=True)
    while tl.max(tl.where(mask & ((words >> 32).to(tl.int32) != count), 1, 0), 0) != 0:
        words = tl.load(buffer + cell, mask=mask, other=0, volatile=True)
    return words.to(tl.int32)


@triton.jit
def _numbers(words, PACKED: tl.constexpr):
    """float32 [n], or [2 * n] where a word holds two bf16 numbers."""
    if PACKED:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
        numbers = tl.interleave(low, high)
    else:
        numbers = words.to(tl.float32, bitcast=True)
    return numbers


@triton.jit
def _reduce_kernel(
    words_ptr, residual_ptr, gain_ptr, out_ptr, total_ptr, peers_ptr, counters_ptr, eps,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows). words: int32 [rows, WIDTH]. With NORM out is the norm of total = residual + sum, else the sum."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    LENGTH: tl.constexpr = 2 * WIDTH if PACKED else WIDTH
    number = tl.arange(0, 2 * BLOCK if PACKED else BLOCK)
    mask = number < LENGTH
    if NORM:
        gain = tl.load(gain_ptr + number, mask=mask, other=0.0)
    follow(OVERLAP)
    count = tl.load(counters_ptr + row) + 1
    own = tl.load(words_ptr + row * WIDTH + column, mask=inside, other=0)
    send(own, column, inside, row, count, peers_ptr, ROWS, WIDTH, RANK, SIZE)
    if NORM:  # loaded while the words are on their way
        residual = tl.load(residual_ptr + row * LENGTH + number, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros(number.shape, tl.float32)
    for source in tl.static_range(SIZE):
        if source == RANK:
            total += _numbers(own, PACKED)
        else:
            total += _numbers(receive(source, column, inside, row, count, peers_ptr, ROWS, WIDTH, RANK, SIZE), PACKED)
    if NORM:
        # Rounded as a sum that is handed over is, and again as the residual stream is stored.
        total = total.to(total_ptr.dtype.element_ty).to(tl.float32) + residual
        stored = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * LENGTH + number, stored, mask=mask)
        total = stored.to(tl.float32)
        total *= tl.rsqrt(tl.sum(total * total, 0) / LENGTH + eps) * gain
    tl.store(out_ptr + row * LENGTH + number, total, mask=mask)
    tl.store(counters_ptr + row, count)


def all_reduce(target: Target, x: Tensor, exchange: Exchange) -> None:
    """Sum over the ranks, in place. x: [rows, size], contiguous, of at most exchange.rows rows, which fill a row of
    words: exchange.width float32 or twice as many bf16 numbers."""
    _reduce(target, x, None, None, x, None, 0.0, exchange)


def all_reduce_add_rms_norm(
    target: Target, x: Tensor, residual: Tensor, gain: Tensor, eps: float, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """torch_norm.add_rms_norm of the sum of x, as `all_reduce` takes it, over the ranks."""
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    _reduce(target, x, residual, gain, normed, total, eps, exchange)
    return normed, total


def _reduce(
    target: Target,
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    eps: float,
    exchange: Exchange,
) -> None:
    words = x.view(torch.int32)
    assert x.is_contiguous() and words.shape[1] == exchange.width and len(words) <= exchange.rows
    assert residual is None or residual.is_contiguous()
    target.launch(
        _reduce_kernel,
        (len(words),),
        words,
        residual,
        gain,
        out,
        total,
        exchange.peers,
        exchange.counters,
        eps,
        config=configs.ALL_REDUCE[target.arch],
        WIDTH=exchange.width,
        SIZE=exchange.size,
        RANK=exchange.rank,
        ROWS=exchange.rows,
        BLOCK=triton.next_power_of_2(exchange.width),
        PACKED=x.dtype.itemsize == 2,
        NORM=residual is not None,
        OVERLAP=target.overlaps,
    )
