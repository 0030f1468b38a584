# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Sampling inside a captured decode step: greedy, or Gumbel-max over the whole vocabulary, in two launches.

The vocabulary is cut into chunks of a fixed size, so that a row's token does not depend on the batch. Each chunk
names its winner; then the winners meet, scored relative to the best token of the row as engine/sampler.py does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine import noise
from engine.kernels import configs
from engine.kernels.launch import SM90, Target
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


@triton.jit
def _chunk_kernel(
    logits_ptr, temperature_ptr, keys_ptr, values_ptr, ids_ptr, logits_stride, vocab,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, rows). values: float32 [2, rows, chunks], a chunk's largest logit (NaN if one is not finite) and
    its winner's logit; ids: int32 [rows, chunks], its winner."""
    if PDL:
        gdc_launch_dependents()
    chunk, row = tl.program_id(0), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    lowest = float("-inf")
    x = tl.load(logits_ptr + row.to(tl.int64) * logits_stride + token, mask=inside, other=0.0).to(tl.float32)
    broken = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 0) != 0
    x = tl.where(inside, x, lowest)
    best = tl.max(x, 0)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        score = _relative(x, best, tl.maximum(temperature, _MIN_TEMPERATURE))
        score += gumbel_noise(tl.load(keys_ptr + row), token)
    else:
        score = x
    winner = tl.argmax(score, 0, tie_break_left=True)
    cell = row * tl.num_programs(0) + chunk
    tl.store(values_ptr + cell, tl.where(broken, float("nan"), best))
    tl.store(
        values_ptr + tl.num_programs(1) * tl.num_programs(0) + cell,
        tl.max(tl.where(token == chunk * CHUNK + winner, x, lowest), 0),
    )
    tl.store(ids_ptr + cell, chunk * CHUNK + winner)


@triton.jit
def _merge_kernel(
    values_ptr, ids_ptr, temperature_ptr, keys_ptr, slots_ptr, out_ptr, last_tokens_ptr,
    CHUNKS: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0)
    chunk = tl.arange(0, PADDED)
    inside = chunk < CHUNKS
    lowest = float("-inf")
    cell = row * CHUNKS + chunk
    temperature = tl.load(temperature_ptr + row)
    key = tl.load(keys_ptr + row)
    slot = tl.load(slots_ptr + row)
    if PDL:
        gdc_wait()
    largest = tl.load(values_ptr + cell, mask=inside, other=lowest)
    x = tl.load(values_ptr + tl.num_programs(0) * CHUNKS + cell, mask=inside, other=lowest)
    token = tl.load(ids_ptr + cell, mask=inside, other=0)
    broken = tl.max((largest != largest).to(tl.int32), 0) != 0
    if temperature > 0:
        score = _relative(x, tl.max(largest, 0), tl.maximum(temperature, _MIN_TEMPERATURE))
        score += gumbel_noise(key, token)
    else:
        score = x
    # Chunks ascend by token id: of equal scores the lower id wins.
    winner = tl.argmax(score, 0, tie_break_left=True)
    result = tl.sum(tl.where(chunk == winner, token, 0), 0).to(tl.int64)
    result = tl.where(broken, _NOT_FINITE, result)
    tl.store(out_ptr + row, result)
    tl.store(last_tokens_ptr + slot, result, mask=result >= 0)


def sample(
    target: Target, logits: Tensor, temperature: Tensor, keys: Tensor, out: Tensor, last_tokens: Tensor, slots: Tensor
) -> None:
    """The next token of each row, as engine/sampler.py draws it where nothing edits or truncates the logits.

    logits: [num_rows, vocab] of any floating dtype.  temperature: float32 [num_rows], 0: greedy.  keys: int64
    [num_rows], of noise.noise_key.  out: int64 [num_rows], gets the token, or NOT_FINITE.  last_tokens: int64
    [max_num_seqs]; a row's token goes to slots [num_rows] of it too, unless the row is NOT_FINITE.
    """
    num_rows, vocab = logits.shape
    config, merge_config = configs.SAMPLE_CHUNK[target.arch], configs.SAMPLE_MERGE[target.arch]
    chunks = triton.cdiv(vocab, config["CHUNK"])
    values = torch.empty(2, num_rows, chunks, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, chunks, dtype=torch.int32, device=logits.device)
    pdl = bool(merge_config.cuda.get("launch_pdl")) and target.arch == SM90
    target.launch(
        _chunk_kernel,
        (chunks, num_rows),
        logits,
        temperature,
        keys,
        values,
        ids,
        logits.stride(0),
        vocab,
        config=config,
        PDL=pdl,
    )
    target.launch(
        _merge_kernel,
        (num_rows,),
        values,
        ids,
        temperature,
        keys,
        slots,
        out,
        last_tokens,
        config=merge_config,
        CHUNKS=chunks,
        PADDED=triton.next_power_of_2(chunks),
        PDL=pdl,
    )
