# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Sampling inside a captured decode step: greedy, or Gumbel-max over the whole vocabulary, in two launches.

The vocabulary is cut into chunks of a fixed size, so that a row's token does not depend on the batch. Each chunk
names its winner; then the winners meet, scored relative to the best token of the row as engine/sampler.py does. Ranks
that hold a share of the vocabulary each bring the winners of its chunks together, not the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine import noise
from engine.kernels import configs
from engine.kernels.exchange import VocabShare
from engine.kernels.launch import SM90, Target
from engine.kernels.triton_reduce import receive, send
from engine.types import NOT_FINITE

# As constants of the kernels: SplitMix64's, unsigned.
_GOLDEN = tl.constexpr(noise.GOLDEN)
_MIX1 = tl.constexpr(noise.MIX1)
_MIX2 = tl.constexpr(noise.MIX2)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_MIN_TEMPERATURE = tl.constexpr(noise.MIN_TEMPERATURE)
_LARGEST_UNIFORM = tl.constexpr(1 - 2.0**-24)


@triton.jit
def gumbel_noise(key, token_id):
    """noise.gumbel_noise: the hash bit for bit, the logarithms to a few ulps.

    key: int64 scalar or tile.  token_id: int32 or int64, of a shape that broadcasts with it.  Returns float32.
    """
    z = key.to(tl.uint64, bitcast=True) + (token_id.to(tl.int64) + 1).to(tl.uint64, bitcast=True) * _GOLDEN
    z = (z ^ (z >> 30)) * _MIX1
    z = (z ^ (z >> 27)) * _MIX2
    z = z ^ (z >> 31)
    u = ((z >> 32).to(tl.uint32).to(tl.float32) + 0.5) * (2.0**-32)
    u = tl.minimum(u, _LARGEST_UNIFORM)
    # log1p(-u) as Kahan computes it: the rounding of w = 1 - u cancels in log(w) / (w - 1).
    w = 1.0 - u
    denominator = tl.where(w == 1.0, -1.0, w - 1.0)
    exponential = tl.where(w == 1.0, u, u * (tl.log(w) / denominator))
    return -tl.log(exponential)


@triton.jit
def _relative(x, best, temperature):
    """(x - best) / temperature, rounded as torch rounds it."""
    difference = x - best
    return tl.div_rn(difference, tl.zeros(difference.shape, tl.float32) + temperature)


@triton.jit(do_not_specialize=["first_id"])
def _chunk_kernel(
    logits_ptr, temperature_ptr, keys_ptr, found_ptr, masks_ptr, logits_stride, masks_stride, vocab, first_id,
    CHUNK: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, rows). found: int32 [3, rows, chunks], the bits of a chunk's largest logit (NaN if one is not
    finite) and of its winner's, and the winner's token id. A chunk of which the mask leaves nothing finds -inf."""
    if PDL:
        gdc_launch_dependents()
    chunk, row = tl.program_id(0), tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = place < vocab
    lowest = float("-inf")
    x = tl.load(logits_ptr + row.to(tl.int64) * logits_stride + place, mask=inside, other=0.0).to(tl.float32)
    broken = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 0) != 0
    if MASKED:
        token = first_id + place
        word = tl.load(masks_ptr + row.to(tl.int64) * masks_stride + (token >> 5), mask=inside, other=0)
        inside = inside & (((word >> (token & 31)) & 1) != 0)
    x = tl.where(inside, x, lowest)
    best = tl.max(x, 0)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        reference = best
        if MASKED:
            reference = tl.where(best == lowest, 0.0, best)
        score = _relative(x, reference, tl.maximum(temperature, _MIN_TEMPERATURE))
        score += gumbel_noise(tl.load(keys_ptr + row), first_id + place)
    else:
        score = x
    winner = chunk * CHUNK + tl.argmax(score, 0, tie_break_left=True)
    cells = tl.num_programs(1) * tl.num_programs(0)
    cell_ptr = found_ptr + row * tl.num_programs(0) + chunk
    tl.store(cell_ptr, tl.where(broken, float("nan"), best).to(tl.int32, bitcast=True))
    tl.store(cell_ptr + cells, tl.max(tl.where(place == winner, x, lowest), 0).to(tl.int32, bitcast=True))
    tl.store(cell_ptr + 2 * cells, first_id + winner)


@triton.jit
def _merge_kernel(
    found_ptr, temperature_ptr, keys_ptr, slots_ptr, out_ptr, last_tokens_ptr, peers_ptr, counters_ptr,
    CHUNKS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, EXCHANGE: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows). found: as _chunk_kernel leaves it, [SIZE, 3, rows, CHUNKS] of all ranks; with EXCHANGE of this one,
    and the others' come by exchange."""
    row = tl.program_id(0)
    index = tl.arange(0, PADDED)
    source, chunk = index // CHUNKS, index % CHUNKS
    inside = source < SIZE
    lowest = float("-inf")
    temperature = tl.load(temperature_ptr + row)
    key = tl.load(keys_ptr + row)
    slot = tl.load(slots_ptr + row)
    if PDL:
        gdc_wait()
    cells = tl.num_programs(0) * CHUNKS
    here = inside & (source == RANK) if EXCHANGE else inside
    cell_ptr = found_ptr + (0 if EXCHANGE else source * 3 * cells) + row * CHUNKS + chunk
    best_bits = tl.load(cell_ptr, mask=here, other=0)
    x_bits = tl.load(cell_ptr + cells, mask=here, other=0)
    token = tl.load(cell_ptr + 2 * cells, mask=here, other=0)
    if EXCHANGE:
        count = tl.load(counters_ptr + row) + 1
        send(best_bits, chunk, here, row, count, peers_ptr, ROWS, WIDTH, RANK, SIZE)
        send(x_bits, CHUNKS + chunk, here, row, count, peers_ptr, ROWS, WIDTH, RANK, SIZE)
        send(token, 2 * CHUNKS + chunk, here, row, count, peers_ptr, ROWS, WIDTH, RANK, SIZE)
        there = inside & (source != RANK)
        best_bits |= receive(source, chunk, there, row, count, peers_ptr, ROWS, WIDTH, RANK, SIZE)
        x_bits |= receive(source, CHUNKS + chunk, there, row, count, peers_ptr, ROWS, WIDTH, RANK, SIZE)
        token |= receive(source, 2 * CHUNKS + chunk, there, row, count, peers_ptr, ROWS, WIDTH, RANK, SIZE)
        tl.store(counters_ptr + row, count)
    largest = tl.where(inside, best_bits.to(tl.float32, bitcast=True), lowest)
    x = tl.where(inside, x_bits.to(tl.float32, bitcast=True), lowest)
    broken = tl.max((largest != largest).to(tl.int32), 0) != 0
    if temperature > 0:
        score = _relative(x, tl.max(largest, 0), tl.maximum(temperature, _MIN_TEMPERATURE))
        score += gumbel_noise(key, token)
    else:
        score = x
    # Chunks ascend by token id: of equal scores the lower id wins.
    winner = tl.argmax(score, 0, tie_break_left=True)
    result = tl.sum(tl.where(index == winner, token, 0), 0).to(tl.int64)
    result = tl.where(broken, _NOT_FINITE, result)
    tl.store(out_ptr + row, result)
    tl.store(last_tokens_ptr + slot, result, mask=result >= 0)


def exchange_width(target: Target, vocab: int) -> int:
    """Words of a row that ranks which hold `vocab` tokens each exchange."""
    return 3 * int(triton.cdiv(vocab, configs.SAMPLE_CHUNK[target.arch]["CHUNK"]))


def sample(
    target: Target,
    logits: Tensor,
    temperature: Tensor,
    keys: Tensor,
    out: Tensor,
    last_tokens: Tensor,
    slots: Tensor,
    share: VocabShare | None = None,
    masks: Tensor | None = None,
) -> None:
    """The next token of each row, as engine/sampler.py draws it where nothing but `masks` edits or truncates the
    logits.

    logits: [num_rows, vocab] of any floating dtype; with `share`, of its part of the vocabulary.
    temperature: float32 [num_rows], 0: greedy.  keys: int64 [num_rows], of noise.noise_key.  out: int64 [num_rows],
    gets the token, or NOT_FINITE.  last_tokens: int64 [max_num_seqs]; a row's token goes to slots [num_rows] of it too,
    unless the row is NOT_FINITE.  share: every rank has to call, and all get the same tokens.
    masks: int32 [num_rows, ceil(whole vocabulary / 32)], bit i of word w says whether token 32 * w + i may come; one at
    least of each row.
    """
    num_rows, vocab = logits.shape
    config, merge_config = configs.SAMPLE_CHUNK[target.arch], configs.SAMPLE_MERGE[target.arch]
    chunks = triton.cdiv(vocab, config["CHUNK"])
    found = torch.empty(3, num_rows, chunks, dtype=torch.int32, device=logits.device)
    exchange = None if share is None else share.exchange
    pdl = bool(merge_config.cuda.get("launch_pdl")) and target.arch == SM90
    size = 1 if share is None else share.size
    target.launch(
        _chunk_kernel,
        (chunks, num_rows),
        logits,
        temperature,
        keys,
        found,
        masks,
        logits.stride(0),
        0 if masks is None else masks.stride(0),
        vocab,
        0 if share is None else share.first_id,
        config=config,
        MASKED=masks is not None,
        PDL=pdl,
    )
    if share is not None and exchange is None:
        found = share.gather(found)
    target.launch(
        _merge_kernel,
        (num_rows,),
        found,
        temperature,
        keys,
        slots,
        out,
        last_tokens,
        None if exchange is None else exchange.peers,
        None if exchange is None else exchange.counters,
        config=merge_config,
        CHUNKS=chunks,
        SIZE=size,
        PADDED=triton.next_power_of_2(size * chunks),
        EXCHANGE=exchange is not None,
        RANK=0 if exchange is None else exchange.rank,
        ROWS=0 if exchange is None else exchange.rows,
        WIDTH=0 if exchange is None else exchange.width,
        PDL=pdl,
    )
