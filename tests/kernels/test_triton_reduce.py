"""Exchanges between ranks by kernels: sums with and without the norm behind them, and tokens of a split vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import capacity
from engine.kernels import torch_norm, triton_sample
from engine.kernels.exchange import Exchange
from engine.kernels.launch import SM90, offline_target
from engine.noise import noise_key
from engine.types import NOT_FINITE
from tests.kernels.devices import ON_GPU, TARGET
from tests.kernels.exchange_ranks import EPS, Answer, Call, Draw, Sum, run

pytestmark = pytest.mark.skipif(ON_GPU, reason="the ranks share the memory of the host")

SIZE, ROWS, HIDDEN = 3, 5, 96
VOCAB = 3 * 150  # shares that chunks do not divide


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws(rows: int) -> Draw:
    logits = numbers(7, rows, VOCAB) * 3
    logits[1, 449] = logits[1, 449].abs() + 20
    logits[2, [149, 150, 300]] = 50.0  # of equal ones the lowest, whoever holds it
    logits[3, 10] = torch.nan
    keys = torch.tensor([noise_key(seed, 3) for seed in range(rows)])
    return Draw(logits, torch.tensor([1.0, 0.7, 0.0, 1.0, 0.0]), keys)


def calls() -> list[Call]:
    """Exchanges of as many rows as it comes, so that rows have been exchanged more and less often than others."""
    found: list[Call] = [Sum(numbers(n, SIZE, rows, HIDDEN)) for n, rows in enumerate((1, 5, 2, 5, 1, 5))]
    residual, gain = numbers(20, ROWS, HIDDEN), numbers(21, HIDDEN)
    found.append(Sum(numbers(22, SIZE, ROWS, HIDDEN), residual, gain))
    found.append(draws(ROWS))
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Call], list[list[Answer]]]:
    made = calls()
    return made, run(SIZE, made, rows=ROWS, width=HIDDEN, directory=tmp_path_factory.mktemp("ranks"))


def test_sums_are_those_in_the_order_of_the_ranks(plain: tuple[list[Call], list[list[Answer]]]) -> None:
    made, answers = plain
    for i, call in enumerate(made[:6]):
        assert isinstance(call, Sum)
        expected = (call.x[0] + call.x[1]) + call.x[2]
        for rank in range(SIZE):
            assert torch.equal(answers[rank][i][0], expected), f"rank {rank}, call {i}"


def test_the_norm_behind_the_sum(plain: tuple[list[Call], list[list[Answer]]]) -> None:
    made, answers = plain
    call = made[6]
    assert isinstance(call, Sum) and call.residual is not None and call.gain is not None
    normed, total = torch_norm.add_rms_norm((call.x[0] + call.x[1]) + call.x[2], call.residual, call.gain, EPS)
    for rank in range(SIZE):
        torch.testing.assert_close(answers[rank][6][0], normed, rtol=1e-5, atol=1e-6)
        assert torch.equal(answers[rank][6][1], total)
        assert torch.equal(answers[rank][6][0], answers[0][6][0])


def test_tokens_of_shares_are_those_of_the_whole_vocabulary(plain: tuple[list[Call], list[list[Answer]]]) -> None:
    made, answers = plain
    call = made[7]
    assert isinstance(call, Draw)
    whole, last = torch.full((ROWS,), -9), torch.full((8,), -7)
    slots = torch.arange(ROWS)
    triton_sample.sample(TARGET, call.logits, call.temperatures, call.keys, whole, last, slots)
    assert whole[1] == 449 and whole[2] == 149 and whole[3] == NOT_FINITE
    for rank in range(SIZE):
        assert torch.equal(answers[rank][7][0], whole)
        assert torch.equal(answers[rank][7][1], last)


def test_bf16(tmp_path: Path) -> None:
    """Two numbers a word. The interpreter cuts bf16 off where a GPU rounds."""
    x, residual = numbers(1, 2, 3, HIDDEN).bfloat16(), numbers(2, 3, HIDDEN).bfloat16()
    gain = numbers(3, HIDDEN)
    answers = run(2, [Sum(x), Sum(x, residual, gain)], rows=4, width=HIDDEN // 2, directory=tmp_path)
    total = x[0].float() + x[1].float()
    normed, stream = torch_norm.add_rms_norm(total, residual.float(), gain, EPS)
    for rank in range(2):
        (summed,), behind = answers[rank]
        for found, expected in ((summed, total), (behind[0], normed), (behind[1], stream)):
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
        assert all(torch.equal(a, b) for a, b in zip((summed, *behind), (*answers[0][0], *answers[0][1]), strict=True))


@pytest.mark.parametrize(("ranks", "rows"), [(2, 64), (8, 64), (4, 1)])
def test_the_plan_counts_the_buffers(ranks: int, rows: int) -> None:
    """What capacity.py says of MiniMax-M3 in bf16 is what a rank maps."""
    hidden, share = 6144, 200064 // ranks
    width = triton_sample.exchange_width(offline_target(SM90, lambda *launched: None), share)
    summed = capacity.exchange_rows(ranks, hidden, 2, rows)
    words = Exchange.num_words(ranks, summed, hidden // 2) + Exchange.num_words(ranks, rows, width)
    assert capacity.exchange_bytes(ranks, hidden, 2, rows, share) == 8 * words
    assert summed * hidden * 2 * (ranks - 1) <= capacity.ONE_SHOT_BYTES
