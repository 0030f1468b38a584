# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The first kernel of a captured decode step: from slots and positions to everything the layers read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import configs
from engine.kernels.batch import StepBatch
from engine.kernels.launch import Target

PAGE = tl.constexpr(128)


@triton.jit
def _prepare_kernel(
    inputs,
    last_tokens,
    slot_tables,
    block_table,
    positions,
    slot_mapping,
    seq_lens,
    token_ids,
    slots,
    keys,
    temperatures,
    width,
    slot_table_stride,
    block_table_stride,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    num_rows = tl.load(inputs)
    source = tl.where(row < num_rows, row, 0)
    slot = tl.load(inputs + 1 + source)
    position = tl.load(inputs + 1 + width + source)
    tl.store(slots + row, slot)
    tl.store(positions + row, position)
    tl.store(keys + row, tl.load(inputs + 1 + 2 * width + source))
    bits = tl.load(inputs + 1 + 3 * width + source)
    tl.store(temperatures + row, bits.to(tl.float64, bitcast=True).to(tl.float32))
    tl.store(seq_lens + row, (position + 1).to(tl.int32))
    tl.store(token_ids + row, tl.load(last_tokens + slot))
    from_table = slot_tables + slot * slot_table_stride
    page = tl.load(from_table + position // PAGE).to(tl.int64)
    tl.store(slot_mapping + row, tl.where(row < num_rows, page * PAGE + position % PAGE, -1))
    to_table = block_table + row.to(tl.int64) * block_table_stride
    num_pages = (position // PAGE + 1).to(tl.int32)
    for start in range(0, num_pages, CHUNK):
        index = start + tl.arange(0, CHUNK)
        inside = index < num_pages
        tl.store(to_table + index, tl.load(from_table + index, mask=inside), mask=inside)


def prepare(
    target: Target,
    inputs: Tensor,
    width: int,
    last_tokens: Tensor,
    slot_tables: Tensor,
    batch: StepBatch,
    token_ids: Tensor,
    slots: Tensor,
    keys: Tensor,
    temperatures: Tensor,
) -> None:
    """Fill a decode batch of fixed addresses.

    inputs: int64 [1 + 4 * width]: the number of rows, then per row its slot, the position of its newest token, its
    noise key and its temperature (the bits of a float64).  last_tokens: int64 [max_num_seqs].  slot_tables: int32
    [max_num_seqs, max_pages].  Written: positions, slot_mapping, seq_lens and block_table of `batch`, and token_ids,
    slots, keys (int64) and temperatures (float32), all [bucket]. Rows past the number of rows repeat row 0, with
    slot_mapping -1.
    """
    target.launch(
        _prepare_kernel,
        (batch.num_tokens,),
        inputs,
        last_tokens,
        slot_tables,
        batch.block_table,
        batch.positions,
        batch.slot_mapping,
        batch.seq_lens,
        token_ids,
        slots,
        keys,
        temperatures,
        width,
        slot_tables.stride(0),
        batch.block_table.stride(0),
        config=configs.PREPARE[target.arch],
    )
