"""The sampler against slow float64 references, its noise against the distribution, rows against batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import sampler as sampler_module
from engine.noise import gumbel_noise, noise_key
from engine.sampler import SamplerState, _rank, pending_logprobs
from engine.types import NOT_FINITE, Logprobs, NewRequest, SamplingParams

EOS = (5,)


def request(slot: int, *, prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), **params) -> NewRequest:
    params.setdefault("seed", slot)
    return NewRequest(slot, [*prompt, *output], len(prompt), SamplingParams(max_tokens=1000, **params))


def state_of(vocab: int, *requests: NewRequest) -> SamplerState:
    state = SamplerState(len(requests), vocab)
    for new in requests:
        state.add(new, EOS)
    return state


def logits_of(seed: int, rows: int, vocab: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# --- an independent reference: plain Python integers and float64 ---


def logprobs_of(logits: torch.Tensor, token_ids: list[int], num_top: int | list[int]) -> list[Logprobs]:
    counts = [num_top] * len(logits) if isinstance(num_top, int) else num_top
    return pending_logprobs(logits, torch.tensor(token_ids), counts).read(token_ids)


def reference_noise(seed: int, position: int, token: int) -> float:
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z &= mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    k = mix(mix(mix(seed) + (position + 1) * golden) + (token + 1) * golden) >> 32
    return -math.log(-math.log1p(-(k + 0.5) / 2**32))


def reference_scores(logits: np.ndarray, new: NewRequest, outputs: list[int]) -> np.ndarray:
    """Bias, mask and penalties, one token at a time."""
    params = new.sampling
    scores = logits.astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += bias
    if len(outputs) < params.min_tokens:
        for token in (params.stop_token_ids or []) + ([] if params.ignore_eos else list(EOS)):
            scores[token] = -np.inf
    for token in range(len(scores)):
        if token in new.token_ids[: new.prompt_len] or token in outputs:
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        count = outputs.count(token)
        scores[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return scores


def reference_keep(scores: np.ndarray, params: SamplingParams) -> list[int]:
    """The token ids left by min_p, then top_k, then top_p, best first, lower id first among equals."""
    x = (scores - scores.max()) / params.temperature
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    order = [token for token in order if np.exp(x[token]) >= params.min_p and x[token] > -np.inf]
    if params.top_k > 0:
        order = order[: params.top_k]
    total = sum(np.exp(x[token]) for token in order)
    kept, mass = [], 0.0
    for token in order:
        if kept and mass >= params.top_p * total and params.top_p < 1:
            break
        kept.append(token)
        mass += np.exp(x[token])
    return kept


def reference_token(logits: np.ndarray, new: NewRequest, position: int) -> int:
    scores = reference_scores(logits, new, new.token_ids[new.prompt_len :])
    params = new.sampling
    if params.temperature == 0:
        return int(scores.argmax())
    kept = reference_keep(scores, params)
    x = (scores - scores.max()) / params.temperature
    return max(kept, key=lambda token: x[token] + reference_noise(params.seed or 0, position, token))


CASES = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 50.0},
    {"top_k": 1},
    {"top_k": 7, "temperature": 2.0},
    {"top_k": 1100, "temperature": 5.0},
    {"top_k": 10**9, "temperature": 5.0},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 5.0},
    {"top_p": 1e-9, "temperature": 5.0},
    {"min_p": 0.2, "temperature": 3.0},
    {"min_p": 1.0},
    {"min_p": 0.05, "top_k": 9, "top_p": 0.7, "temperature": 2.0},
    {"logit_bias": {3: 100.0, 9: -100.0}, "temperature": 0.0},
    {"logit_bias": {3: 7.5, 0: -3.0}, "temperature": 1.5},
    {"repetition_penalty": 1.8, "temperature": 0.0},
    {"repetition_penalty": 0.5, "presence_penalty": -1.5, "frequency_penalty": 2.0},
    {"presence_penalty": 2.0, "frequency_penalty": -0.5, "top_k": 20},
    {"min_tokens": 5, "stop_token_ids": [7, 8], "temperature": 0.0, "logit_bias": {5: 100.0, 7: 90.0, 8: 95.0}},
    {"min_tokens": 5, "ignore_eos": True, "temperature": 0.0, "logit_bias": {5: 100.0}},
]
OUTPUT = (4, 4, 4, 9)


@pytest.mark.parametrize("params", CASES, ids=str)
@pytest.mark.parametrize("vocab", [33, 2048])
def test_matches_the_slow_reference(params: dict, vocab: int) -> None:
    for seed in range(8):
        new = request(0, prompt=(1, 2, 3, 3), output=OUTPUT, **(params | {"seed": seed - 4}))
        logits = logits_of(seed, 1, vocab)
        token = state_of(vocab, new).sample(logits, [0], [8]).tolist()
        assert token == [reference_token(logits[0].numpy(), new, 8)]


def test_a_row_does_not_depend_on_its_batch() -> None:
    for vocab in (33, 2048, 4099):
        requests = [request(i, output=OUTPUT, **params) for i, params in enumerate(CASES)]
        state = state_of(vocab, *requests)
        logits = logits_of(1, len(requests), vocab)
        slots, positions = list(range(len(requests))), [7 + i for i in range(len(requests))]
        together = state.sample(logits, slots, positions).tolist()
        alone = [state.sample(logits[i : i + 1], [i], [positions[i]]).item() for i in slots]
        order = slots[::-2]
        some = state.sample(logits[order], order, [positions[i] for i in order]).tolist()
        assert together == alone
        assert some == [together[i] for i in order]


def test_a_row_does_not_depend_on_the_row_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(i, **params) for i, params in enumerate(CASES * 3)]
    state = state_of(512, *requests)
    logits = logits_of(2, len(requests), 512)
    slots, positions = list(range(len(requests))), [7] * len(requests)
    whole = state.sample(logits, slots, positions)
    top = logprobs_of(logits, whole.tolist(), 5)
    monkeypatch.setattr(sampler_module, "CHUNK_ELEMENTS", 2 * 512)
    assert torch.equal(state.sample(logits, slots, positions), whole)
    assert logprobs_of(logits, whole.tolist(), 5) == top


def test_sampling_leaves_the_logits_alone() -> None:
    requests = [request(i, output=OUTPUT, **params) for i, params in enumerate(CASES)]
    logits = logits_of(3, len(requests), 64)
    before = logits.clone()
    state_of(64, *requests).sample(logits, list(range(len(requests))), [7] * len(requests))
    assert torch.equal(logits, before)


# --- noise ---


def noise(seed: int, position: int, tokens: torch.Tensor) -> torch.Tensor:
    return gumbel_noise(torch.tensor([[noise_key(seed, position)]]), tokens)[0]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31), st.integers(0, 2**20))
def test_noise_is_the_exact_hash(seed: int, position: int, token: int) -> None:
    expected = reference_noise(seed, position, token)
    # noise = -log(x), x = -log(1 - u), and u is rounded to float32: near 1, where no token wins, that shows.
    x = math.exp(-expected)
    slope = math.exp(x) / x
    found = noise(seed, position, torch.tensor([token])).item()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5 + 2.0**-24 * slope)


def test_noise_does_not_depend_on_which_tokens_are_asked_for() -> None:
    whole = noise(3, 5, torch.arange(1003))
    shard = torch.arange(400, 411)
    assert torch.equal(noise(3, 5, shard), whole[shard])
    assert torch.equal(noise(3, 5, shard.flip(0)), whole[shard].flip(0))


def test_noise_is_always_finite() -> None:
    values = noise(0, 0, torch.arange(2**22))
    assert values.isfinite().all()
    assert values.mean().item() == pytest.approx(0.57722, abs=0.005)  # Euler's constant, the Gumbel mean
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.01)


@pytest.mark.parametrize(("k", "expected"), [(0, 22.8739), (2**32 - 1, -2.8115)])
def test_noise_at_the_ends_of_the_hash(k: int, expected: float) -> None:
    """The key whose hash for token 0 is k in the upper half: the finaliser, run backwards."""
    mask = 2**64 - 1

    def unshift(z: int, bits: int) -> int:
        found = z
        for _ in range(64 // bits):
            found = z ^ (found >> bits)
        return found

    z = unshift((k << 32) | (k & mask), 31)
    z = unshift(z * pow(0x94D049BB133111EB, -1, 2**64) & mask, 27)
    z = unshift(z * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask, 30)
    key = (z - 0x9E3779B97F4A7C15) & mask
    signed = key - 2**64 if key >= 2**63 else key
    value = gumbel_noise(torch.tensor([[signed]]), torch.tensor([0])).item()
    assert value == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("axis", ["seed", "position", "seed far apart"])
def test_tokens_follow_the_softmax(axis: str) -> None:
    """Chi-square over fixed (seed, position) pairs: deterministic, so it cannot flake."""
    vocab, draws = 8, 16000
    logits = logits_of(4, 1, vocab, scale=1.0)
    probabilities = torch.softmax(logits[0].double(), 0)
    rows = []
    for i in range(draws):
        seed, position = {"seed": (i, 7), "position": (7, i), "seed far apart": (i << 40, 7)}[axis]
        rows.append(noise_key(seed, position))
    tokens = (logits + gumbel_noise(torch.tensor(rows).unsqueeze(1), torch.arange(vocab))).argmax(1)
    counts = torch.bincount(tokens, minlength=vocab).double()
    chi_square = ((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum().item()
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001
    # Neighbours are independent: 63 degrees of freedom, p = 0.001.
    pairs = torch.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab**2).double()
    expected = (draws - 1) * torch.outer(probabilities, probabilities).flatten()
    assert ((pairs - expected) ** 2 / expected).sum().item() < 103.4


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 1, 2**63 - 1])
def test_extreme_seeds_are_distinct_streams(seed: int) -> None:
    logits = torch.zeros(1, 4096)
    state = state_of(4096, request(0, seed=seed))
    tokens = [state.sample(logits, [0], [position]).item() for position in (3, 4, 2**31)]
    assert len(set(tokens)) == 3
    other = state_of(4096, request(0, seed=seed ^ 1)).sample(logits, [0], [3]).item()
    assert other != tokens[0]


# --- rows, slots and state ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 5}, {}], ids=str)
def test_a_row_that_is_not_finite_gives_minus_two_for_itself_only(bad: float, params: dict) -> None:
    requests = [request(i, **params) for i in range(3)]
    state = state_of(64, *requests)
    logits = logits_of(5, 3, 64)
    clean = state.sample(logits, [0, 1, 2], [3, 3, 3]).tolist()
    logits[1, 40] = bad
    assert state.sample(logits, [0, 1, 2], [3, 3, 3]).tolist() == [clean[0], NOT_FINITE, clean[2]]


def test_huge_finite_logits_are_sampled() -> None:
    logits = torch.full((1, 64), -3e38)
    logits[0, 9] = 3e38
    for params in ({"temperature": 0.0}, {}, {"top_p": 0.5}, {"temperature": 1e-300}, {"temperature": 100.0}):
        assert state_of(64, request(0, **params)).sample(logits, [0], [3]).item() == 9


def test_a_tiny_temperature_is_greedy() -> None:
    logits = logits_of(6, 1, 64)
    best = logits.argmax().item()
    for temperature in (1e-3, 1e-30, 5e-324):
        assert state_of(64, request(0, temperature=temperature)).sample(logits, [0], [3]).item() == best


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, 40)
    logits[0, [11, 23, 37]] = 2.0
    for params in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.0, "presence_penalty": 1.0}):
        assert state_of(40, request(0, **params)).sample(logits, [0], [3]).item() == 11
    two_best = {state_of(40, request(0, top_k=2, seed=seed)).sample(logits, [0], [3]).item() for seed in range(40)}
    assert two_best == {11, 23}


def test_top_p_of_a_flat_row_needs_more_than_the_first_candidates() -> None:
    """Equal logits over 4096 tokens: top_p 0.5 keeps exactly the lower half, far more than 1024 candidates."""
    logits = torch.zeros(1, 4096)
    tokens = {state_of(4096, request(0, top_p=0.5, seed=seed)).sample(logits, [0], [3]).item() for seed in range(300)}
    assert max(tokens) < 2048
    assert max(tokens) > 1900


def test_min_tokens_ends_when_enough_tokens_are_out() -> None:
    new = request(0, min_tokens=2, stop_token_ids=[7, 10**6], temperature=0.0)
    state = state_of(64, new)
    logits = torch.zeros(1, 64)
    logits[0, 7], logits[0, 5], logits[0, 20] = 3.0, 2.0, 1.0
    assert [state.sample(logits, [0], [position]).item() for position in (3, 4, 5)] == [20, 20, 7]


def test_masking_every_token_still_picks_one() -> None:
    for temperature in (0.0, 1.0):
        new = request(0, min_tokens=2, stop_token_ids=list(range(8)), temperature=temperature, top_p=0.9)
        assert 0 <= state_of(8, new).sample(torch.ones(1, 8), [0], [3]).item() < 8


def test_counts_are_the_same_after_preemption() -> None:
    params = {"temperature": 0.0, "frequency_penalty": 0.7, "repetition_penalty": 1.3}
    state = SamplerState(2, 64)
    state.add(request(0, **params), EOS)
    logits = logits_of(7, 12, 64, scale=0.5)
    outputs: list[int] = []
    for i in range(12):
        token = state.sample(logits[i : i + 1], [0], [3 + i])
        state.append([0], token)
        outputs.append(token.item())
    assert len(set(outputs)) > 1
    state.add(request(1, output=tuple(outputs), **params), EOS)
    for i in range(12):
        pair = state.sample(logits[[i, i]], [0, 1], [15, 15]).tolist()
        assert pair[0] == pair[1]


def test_append_counts_only_slots_with_penalties_and_real_tokens() -> None:
    penalty = {"temperature": 0.0, "frequency_penalty": 2.0}
    state = state_of(16, request(0, temperature=0.0), request(1, **penalty), request(2, **penalty))
    logits = torch.zeros(3, 16)
    logits[:, 9] = 1.0
    assert state.sample(logits, [0, 1, 2], [3, 3, 3]).tolist() == [9, 9, 9]
    state.append([0, 1, 2], torch.tensor([9, 9, NOT_FINITE]))
    assert state.sample(logits, [0, 1, 2], [4, 4, 4]).tolist() == [9, 0, 9]


def test_a_reused_slot_starts_clean() -> None:
    state = SamplerState(2, 16)
    logits = torch.zeros(1, 16)
    logits[0, 9] = 1.0
    for _ in range(3):
        state.add(request(1, prompt=(9, 9), temperature=0.0, presence_penalty=2.0), EOS)
        assert state.sample(logits, [1], [2]).item() == 9
        state.append([1], torch.tensor([9]))
        assert state.sample(logits, [1], [3]).item() == 0
        state.remove(1)
    state.add(request(1, temperature=0.0), EOS)
    assert state.sample(logits, [1], [2]).item() == 9
    state.remove(1)
    logits[0, 4] = 0.9
    state.add(request(1, prompt=(2,), temperature=0.0, repetition_penalty=2.0), EOS)
    assert state.sample(logits, [1], [1]).item() == 9


# --- ranks and log-probabilities ---


def test_both_zeros_are_equal() -> None:
    assert _rank(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 3)[1].tolist() == [[0, 1, 2]]


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from([-math.inf, -3e38, -1.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, 2.5, 3e38]), min_size=1, max_size=40
    ),
    st.integers(1, 40),
)
def test_rank_orders_by_value_then_id(values: list[float], width: int) -> None:
    width = min(width, len(values))
    best, ids = _rank(torch.tensor([values]), width)
    row = torch.tensor(values).tolist()
    expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:width]
    assert ids[0].tolist() == expected
    assert best[0].tolist() == [row[i] for i in expected]


def test_logprobs_are_natural_with_the_actual_token_first() -> None:
    logits = logits_of(8, 5, 300)
    tokens = [299, 0, int(logits[2].argmax()), NOT_FINITE, 4]
    wanted = [3, 0, 20, 5, 300]
    found = logprobs_of(logits, tokens, wanted)
    exact = logits.double().log_softmax(1).numpy()
    for row, (token, count, logprobs) in enumerate(zip(tokens, wanted, found, strict=True)):
        if token == NOT_FINITE:
            assert logprobs == {}
            continue
        ranked = sorted(range(300), key=lambda i: (-logits[row, i].item(), i))[:count]
        assert list(logprobs) == [token, *(i for i in ranked if i != token)]
        for i, value in logprobs.items():
            assert type(value) is float and type(i) is int
            assert value == pytest.approx(exact[row, i], abs=2e-6)


def test_logprob_ties_rank_by_lower_id() -> None:
    assert list(logprobs_of(torch.zeros(1, 9), [6], 3)[0]) == [6, 0, 1, 2]


def test_logprobs_of_a_row_do_not_depend_on_the_batch() -> None:
    logits = logits_of(9, 6, 50001)
    together = logprobs_of(logits, [1] * 6, 4)
    assert together == [logprobs_of(logits[i : i + 1], [1], 4)[0] for i in range(6)]


def test_free_draws_are_those_that_a_captured_step_can_make() -> None:
    """Temperature and noise key per row; rows that are shaped by more are named, with numbers that draw nothing."""
    requests = [
        request(0, temperature=0.0, top_p=0.5),
        request(1, temperature=0.7, seed=9),
        *(
            request(2 + i, **shaped)
            for i, shaped in enumerate(
                [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 0.5}, {"logit_bias": {3: 1.0}}]
            )
        ),
    ]
    state = state_of(50, *requests)
    assert state.free_draws([1, 0], [7, 8]) == ([0.7, 0.0], [noise_key(9, 7), 0], [])
    assert state.free_draws([2, 1, 3, 4, 0, 5, 6], [7] * 7) == (
        [0.0, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0, noise_key(9, 7), 0, 0, 0, 0, 0],
        [0, 2, 3, 5, 6],
    )
    waiting = state_of(50, request(0, min_tokens=2))
    assert waiting.free_draws([0], [4])[2] == [0]  # the second output token: a stop token is masked
    assert waiting.free_draws([0], [5])[2] == []
