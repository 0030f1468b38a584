"""The first kernel of a captured decode step against plain indexing."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import triton_prepare
from engine.kernels.batch import Segment, StepBatch
from tests.kernels.devices import DEVICE, TARGET

WIDTH, MAX_PAGES = 4, 2100


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_rows_come_from_their_slots_and_padding_repeats_the_first(num_rows: int) -> None:
    bucket = 4
    generator = torch.Generator().manual_seed(num_rows)
    tables = torch.randint(0, 10**6, (6, MAX_PAGES), generator=generator, dtype=torch.int32)
    last_tokens = torch.randint(0, 10**5, (6,), generator=generator)
    slots = torch.tensor([5, 0, 2, 1])
    positions = torch.tensor([128 * 1500 + 3, 0, 127, 128])
    keys = torch.tensor([-(2**63), 2**63 - 1, 5, 7])
    temperatures = torch.tensor([0.0, 0.7, 1e-30, 2.0], dtype=torch.float64)
    inputs = torch.cat((torch.tensor([num_rows]), slots, positions, keys, temperatures.view(torch.int64)))

    def filled(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, -7, dtype=dtype, device=DEVICE)

    batch = StepBatch(
        positions=filled(bucket),
        slot_mapping=filled(bucket),
        row_ids=torch.arange(bucket, device=DEVICE),
        block_table=filled(bucket, MAX_PAGES, dtype=torch.int32),
        seq_lens=filled(bucket, dtype=torch.int32),
        query_start_loc=torch.arange(bucket + 1, dtype=torch.int32, device=DEVICE),
        query_starts=list(range(bucket + 1)),
        seq_lens_host=[MAX_PAGES * 128] * bucket,
        segments=(Segment("decode", 0, bucket, 0, bucket),),
    )
    token_ids, out_slots, out_keys = filled(bucket), filled(bucket), filled(bucket)
    out_temperatures = filled(bucket, dtype=torch.float32)
    triton_prepare.prepare(
        TARGET, inputs.to(DEVICE), WIDTH, last_tokens.to(DEVICE), tables.to(DEVICE), batch,
        token_ids, out_slots, out_keys, out_temperatures,
    )  # fmt: skip
    for row in range(bucket):
        source = row if row < num_rows else 0
        slot, position = int(slots[source]), int(positions[source])
        assert out_slots[row] == slot and batch.positions[row] == position and batch.seq_lens[row] == position + 1
        assert token_ids[row] == last_tokens[slot] and out_keys[row] == keys[source]
        assert out_temperatures[row].item() == temperatures[source].float().item()
        page = int(tables[slot, position // 128])
        assert batch.slot_mapping[row] == (page * 128 + position % 128 if row < num_rows else -1)
        count = position // 128 + 1
        assert torch.equal(batch.block_table[row, :count].cpu(), tables[slot, :count])
