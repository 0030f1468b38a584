"""Tokens from shares of the vocabulary against the sampler on whole rows: the same bits, hence the same tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from engine import vocab_parallel
from engine.sampler import SamplerState
from engine.types import NOT_FINITE, NewRequest, SamplingParams

ROWS, VOCAB, POSITION = 9, 1200, 7


class Ranks:
    """Threads that gather what each of them brings."""

    def __init__(self, size: int) -> None:
        self._parts: list[Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size, timeout=20)

    def gather(self, rank: int) -> Callable[[Tensor], Tensor]:
        def gather(x: Tensor) -> Tensor:
            self._parts[rank] = x
            self._barrier.wait()
            gathered = torch.stack(self._parts)
            self._barrier.wait()
            return gathered

        return gather


def draw(logits: Tensor, size: int, temperatures: list[float], keys: list[int]) -> list[list[int]]:
    """What each rank draws."""
    ranks, share = Ranks(size), logits.shape[1] // size

    def of_rank(rank: int) -> list[int]:
        first = rank * share
        own = logits[:, first : first + share]
        return vocab_parallel.draw(own, first, temperatures, keys, ranks.gather(rank)).tolist()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of_rank, range(size)))


@pytest.fixture
def logits() -> Tensor:
    found = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(3)) * 3
    found[0, [299, 300, 900]] = 50.0  # the best three times, on both sides of a border
    found[1, [100, 1100]] = 60.0
    found[2, 1199], found[3, 0], found[4, 600] = torch.nan, torch.inf, -torch.inf
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("chunk_rows", [2, ROWS])
def test_shares_give_the_tokens_of_whole_rows(
    logits: Tensor, size: int, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocab_parallel, "CHUNK_ELEMENTS", chunk_rows * VOCAB // size)
    state = SamplerState(ROWS, VOCAB)
    for slot in range(ROWS):
        temperature = (0.0, 0.0, 1.0, 0.7, 0.0, 1.0, 0.3, 5.0, 1e-35)[slot]
        params = SamplingParams(max_tokens=9, temperature=temperature, seed=slot, ignore_eos=True)
        state.add(NewRequest(slot, [1, 2], 2, params), ())
    slots, positions = list(range(ROWS)), [POSITION + slot for slot in range(ROWS)]
    temperatures, keys, shaped = state.free_draws(slots, positions)
    expected = state.sample(logits, slots, positions).tolist()
    assert shaped == [] and expected[0] == 299 and expected[2:5] == [NOT_FINITE] * 3
    assert draw(logits, size, temperatures, keys) == [expected] * size


def test_one_batch_of_greedy_rows_makes_no_noise(logits: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(keys: Tensor, token_ids: Tensor) -> Tensor:
        raise AssertionError("noise for greedy rows")

    monkeypatch.setattr(vocab_parallel, "gumbel_noise", refuse)
    found = draw(logits[5:], 2, [0.0] * 4, [0] * 4)
    assert found == [logits[5:].argmax(1).tolist()] * 2
