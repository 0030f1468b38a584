"""In-graph sampling against engine/sampler.py's rule, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import triton_sample
from engine.noise import gumbel_noise, noise_key
from engine.types import NOT_FINITE
from tests.kernels.devices import DEVICE, ON_GPU, TARGET


def draw(
    logits: Tensor, temperature: list[float], keys: list[int], slots: list[int], allow: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(tokens, last tokens of 8 slots, -7 where none was put), on the CPU."""
    out = torch.full((len(logits),), -9, dtype=torch.int64, device=DEVICE)
    last = torch.full((8,), -7, dtype=torch.int64, device=DEVICE)
    triton_sample.sample(
        TARGET,
        logits.to(DEVICE),
        torch.tensor(temperature, device=DEVICE),
        torch.tensor(keys, device=DEVICE),
        out,
        last,
        torch.tensor(slots, device=DEVICE),
        masks=None if allow is None else pack_bits(allow).to(DEVICE),
    )
    return out.cpu(), last.cpu()


def pack_bits(allow: Tensor) -> Tensor:
    """bool [n, vocab] to int32 [n, words], a word more than needed."""
    words = allow.shape[1] // 32 + 2
    padded = torch.zeros(len(allow), 32 * words, dtype=torch.bool)
    padded[:, : allow.shape[1]] = allow
    weights = torch.tensor([1 << i for i in range(31)] + [-(1 << 31)])
    return (padded.view(len(allow), words, 32) * weights).sum(2).to(torch.int32)


def scores(logits: Tensor, temperature: float, key: int) -> Tensor:
    """What the token is the argmax of."""
    x = logits.float()
    if temperature == 0:
        return x
    noise = gumbel_noise(torch.tensor([[key]]), torch.arange(len(logits)))[0]
    return (x - x.max()) / max(temperature, 1e-30) + noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 1000])
def test_tokens(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)).mul(3).to(dtype)
    temperature = [0.0, 1.0, 0.7, 5.0, 1e-35]
    keys = [noise_key(seed, 10 + seed) for seed in range(5)]
    slots = [4, 0, 2, 7, 1]
    tokens, last = draw(logits, temperature, keys, slots)
    for row in range(5):
        expected = scores(logits[row], temperature[row], keys[row])
        # The logarithms differ in their last bits: only a near-tie may go the other way.
        assert expected[tokens[row]] >= expected.max() - 1e-5 * expected.max().abs()
        assert last[slots[row]] == tokens[row]
    assert tokens[0] == logits[0].float().argmax()
    assert (last[[3, 5, 6]] == -7).all()


def test_ties_go_to_the_lower_token() -> None:
    logits = torch.zeros(2, 300)
    logits[0, 100] = logits[0, 101] = logits[0, 250] = 1.0
    assert draw(logits, [0.0, 0.0], [0, 0], [0, 1])[0].tolist() == [100, 0]


def test_rows_that_are_not_finite() -> None:
    logits = torch.zeros(4, 200)
    logits[0, 150], logits[1, 3], logits[2, 199] = torch.nan, torch.inf, -torch.inf
    tokens, last = draw(logits, [0.0, 1.0, 1.0, 0.0], [1, 2, 3, 4], [0, 1, 2, 3])
    assert tokens.tolist() == [NOT_FINITE] * 3 + [0]
    assert last.tolist() == [-7, -7, -7, 0, -7, -7, -7, -7]


def test_large_logits_keep_their_order() -> None:
    """float32 cannot hold 3e38 / 1e-30; relative to the best token nothing overflows."""
    logits = torch.full((2, 100), -3e38)
    logits[:, 70] = 3e37
    assert draw(logits, [1e-30, 0.0], [5, 5], [0, 1])[0].tolist() == [70, 70]


def test_rows_do_not_depend_on_the_batch() -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(1))
    keys = [noise_key(3, position) for position in range(6)]
    together = draw(logits, [1.0] * 6, keys, [0, 1, 2, 3, 4, 5])[0]
    for row in range(6):
        assert draw(logits[row : row + 1], [1.0], keys[row : row + 1], [row])[0] == together[row]


def test_logits_may_be_a_view() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    tokens = draw(logits[:, :200], [0.0] * 3, [0] * 3, [0, 1, 2])[0]
    assert torch.equal(tokens, logits[:, :200].argmax(1))


@pytest.mark.parametrize("share", [0.9, 0.1, 0.004])
def test_masks(share: float) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 1000, generator=generator)
    allow = torch.rand(4, 1000, generator=generator) < share
    allow[:, 777] = True
    temperature, slots = [0.0, 1.0, 0.3, 1e-35], [3, 1, 0, 2]
    keys = [noise_key(seed, 3) for seed in range(4)]
    tokens, last = draw(logits, temperature, keys, slots, allow)
    for row, token in enumerate(tokens.tolist()):
        x = logits[row].clone()
        noise = gumbel_noise(torch.tensor([[keys[row]]]), torch.arange(1000))[0]
        best = x[allow[row]].max()
        expected = x if temperature[row] == 0 else (x - best) / max(temperature[row], 1e-30) + noise
        expected = torch.where(allow[row], expected, -torch.inf)
        assert allow[row, token] and last[slots[row]] == token
        assert expected[token] >= expected.max() - 1e-5 * expected.max().abs()
    assert torch.equal(
        draw(logits, temperature, keys, slots, torch.ones(4, 1000) > 0)[0], draw(logits, temperature, keys, slots)[0]
    )
    # Most chunks have nothing that may come; one that may not is broken, and so is its row.
    logits[1, 5] = torch.nan
    allow[:] = False
    allow[:, 999] = True
    assert draw(logits, temperature, keys, slots, allow)[0].tolist() == [999, NOT_FINITE, 999, 999]


@pytest.mark.skipif(not ON_GPU, reason="slow in the interpreter")
@pytest.mark.parametrize("vocab", [50016, 200064])
def test_model_vocabulary(vocab: int) -> None:
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)).bfloat16()
    keys = [noise_key(seed, 7) for seed in range(4)]
    tokens, _ = draw(logits, [0.0, 1.0, 0.8, 1.3], keys, [0, 1, 2, 3])
    for row, temperature in enumerate([0.0, 1.0, 0.8, 1.3]):
        expected = scores(logits[row], temperature, keys[row])
        assert expected[tokens[row]] >= expected.max() - 1e-5 * expected.max().abs()
