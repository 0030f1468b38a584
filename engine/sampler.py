"""Picks the next token of each row of logits.

Order: logit_bias, min_tokens mask, penalties, the grammar's mask, temperature, min_p, top_k, top_p, Gumbel-max. So
top_k and top_p choose among what the grammar allows. Nothing in a row's result depends on the other rows: noise is a
function of (seed, position, token id), ranks have no ties, and the mass of top_p is summed in integers, whose sum does
not depend on the order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.noise import MIN_TEMPERATURE, gumbel_noise, noise_key
from engine.transfer import to_device, to_host
from engine.types import NOT_FINITE, Logprobs, NewRequest, SamplingParams

SMALL_TOP_K = 1024  # up to here, the best tokens are found without sorting the vocabulary
CHUNK_ELEMENTS = 2**24  # of [rows, vocab] at a time, to bound the memory of the 64-bit temporaries
WEIGHT_BITS = 44  # fixed point of a weight in [0, 1]: 2^18 tokens of weight 1 still fit in 63 bits
TOP_P_OFF = 2.0  # no prefix of the ranking reaches twice the total


def _rank(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of each row, descending, equal values by lower index: (values, int64 indices)."""
    vocab = x.shape[1]
    # Order-preserving integers: flip the magnitude bits of negatives. Adding 0.0 makes -0.0 and 0.0 equal.
    bits = (x + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    keys = (ordered << 32) + (vocab - 1 - torch.arange(vocab, device=x.device))
    best = keys.topk(width, dim=1).values if width < vocab else keys.sort(dim=1, descending=True).values
    indices = vocab - 1 - (best & (2**32 - 1))
    return x.gather(1, indices), indices


@dataclass(slots=True)
class _Slot:
    """One request. stop_ids: what min_tokens masks.  pool_row: of its token counts."""

    sampling: SamplingParams
    prompt_len: int
    stop_ids: list[int]
    pool_row: int | None


@dataclass(slots=True)
class _Draw:
    """Rows sampled in the same way; a parameter is [n, 1], or None when it is off for all of them.

    rows: int64 [n] into the edited rows.  members: the same rows in the batch.
    width: how many of the best tokens can be kept; 0: nothing truncates, None: top_p alone decides.
    """

    rows: Tensor
    members: list[int]
    temperature: Tensor
    log_min_p: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    width: int | None


@dataclass(slots=True)
class _Batch:
    """How one composition of the batch is sampled; kept while it stays the same.

    plain: rows whose token is the argmax of the untouched logits.  edited: all other rows.  The rest counts
    rows within `edited`: cells are (rows, token ids) of single logits.
    """

    plain: Tensor | None
    edited: Tensor | None
    bias_cells: tuple[Tensor, Tensor]
    bias: Tensor | None
    masked_cells: tuple[Tensor, Tensor]
    penalised: Tensor | None
    pool_rows: Tensor
    penalties: Tensor  # float32 [3, n, 1]: repetition, presence, frequency
    guided: Tensor | None
    greedy: Tensor | None
    draws: list[_Draw]


class SamplerState:
    """The sampling parameters and token counts of a worker's slots.

    Token counts exist only for slots with penalties: int32 [rows, vocab] of the output and bool [rows, vocab]
    of the prompt, in a pool that grows as needed.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._slots: list[_Slot | None] = [None] * max_num_seqs
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=self.device)
        self._in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=self.device)
        self._free_rows: list[int] = []
        self._all_ids = torch.arange(vocab_size, device=self.device)
        self._batch_key: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._batch: _Batch | None = None

    def add(self, new: NewRequest, eos_token_ids: Sequence[int]) -> None:
        """Put a request into its slot; after preemption its outputs come along and are counted again."""
        assert self._slots[new.slot] is None, f"slot {new.slot} is taken"
        sampling = new.sampling
        assert sampling.is_greedy or sampling.seed is not None, "a sampled request needs its seed"
        stop_ids = set(sampling.stop_token_ids or ())
        if not sampling.ignore_eos:
            stop_ids.update(eos_token_ids)
        pool_row = self._count(new) if sampling.has_penalties else None
        # A stop id past the vocabulary can never be sampled.
        known = sorted(token for token in stop_ids if token < self.vocab_size)
        self._slots[new.slot] = _Slot(sampling, new.prompt_len, known, pool_row)
        self._batch_key = None

    def remove(self, slot: int) -> None:
        """Free a slot."""
        if (pool_row := self._at(slot).pool_row) is not None:
            self._free_rows.append(pool_row)
        self._slots[slot] = None

    def append(self, slots: Sequence[int], tokens: Tensor) -> None:
        """Count what `sample` returned, int64 [len(slots)]; negative tokens are not counted."""
        counted = [(i, row) for i, slot in enumerate(slots) if (row := self._at(slot).pool_row) is not None]
        if not counted:
            return
        picked = tokens.to(self.device).index_select(0, self._index([i for i, _ in counted]))
        cells = (self._index([row for _, row in counted]), picked.clamp(min=0))
        self._counts.index_put_(cells, (picked >= 0).to(torch.int32), accumulate=True)

    def sample(
        self, logits: Tensor, slots: Sequence[int], positions: Sequence[int], masks: Tensor | None = None
    ) -> Tensor:
        """The next token of each row, int64 [num_rows]; NOT_FINITE where the row's logits are not.

        logits: float32 [num_rows, vocab], left as they are.  slots: of each row.
        positions: absolute index of the token being sampled.
        masks: int32 [num_guided, ceil(vocab / 32)] of the guided rows in order, bit i of word w says whether token
        32 * w + i may come; None when no row is guided.
        """
        low, high = torch.aminmax(logits, dim=1)
        finite = low.isfinite() & high.isfinite()
        batch = self._prepare(slots, positions)
        if batch.edited is None:
            tokens = logits.argmax(1)
        else:
            tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
            if batch.plain is not None:
                tokens.index_copy_(0, batch.plain, logits.index_select(0, batch.plain).argmax(1))
            tokens.index_copy_(0, batch.edited, self._sample_edited(logits, slots, positions, batch, masks))
        return torch.where(finite, tokens, NOT_FINITE)

    def free_draws(self, slots: Sequence[int], positions: Sequence[int]) -> tuple[list[float], list[int], list[int]]:
        """(temperature, noise key) of each row, and which rows more than that shapes: their numbers are greedy's.
        Temperature 0 is greedy."""
        temperatures, keys, shaped = [], [], []
        for i, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            draw = None if self._at(slot).sampling.guided is not None else self.free_draw(slot, position)
            if draw is None:
                shaped.append(i)
                draw = 0.0, 0
            temperatures.append(draw[0])
            keys.append(draw[1])
        return temperatures, keys, shaped

    def free_draw(self, slot: int, position: int) -> tuple[float, int] | None:
        """(temperature, noise key) of a row, its mask aside; None when more than that shapes it."""
        state = self._at(slot)
        params = state.sampling
        masked = bool(state.stop_ids) and position - state.prompt_len < params.min_tokens
        truncated = params.top_p < 1.0 or 0 < params.top_k < self.vocab_size or params.min_p > 0.0
        if masked or params.has_penalties or params.logit_bias or (truncated and not params.is_greedy):
            return None
        if params.is_greedy:
            return 0.0, 0
        return max(params.temperature, MIN_TEMPERATURE), noise_key(params.seed or 0, position)

    def _sample_edited(
        self,
        logits: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        batch: _Batch,
        masks: Tensor | None,
    ) -> Tensor:
        assert batch.edited is not None
        work = logits.index_select(0, batch.edited)
        if batch.bias is not None:
            work.index_put_(batch.bias_cells, batch.bias, accumulate=True)
        work[batch.masked_cells] = -math.inf
        if batch.penalised is not None:
            work.index_copy_(0, batch.penalised, self._penalise(work.index_select(0, batch.penalised), batch))
        if batch.guided is not None:
            assert masks is not None, "a guided row needs its mask"
            bound = work.index_select(0, batch.guided)
            work.index_copy_(0, batch.guided, bound.masked_fill_(~unpack_bits(masks, self.vocab_size), -math.inf))
        tokens = torch.empty(work.shape[0], dtype=torch.int64, device=self.device)
        if batch.greedy is not None:
            tokens.index_copy_(0, batch.greedy, work.index_select(0, batch.greedy).argmax(1))
        for draw in batch.draws:
            keys = [noise_key(self._at(slots[i]).sampling.seed or 0, positions[i]) for i in draw.members]
            picked = self._draw(work, draw, self._index(keys).unsqueeze(1))
            tokens.index_copy_(0, draw.rows, picked)
        return tokens

    def _penalise(self, x: Tensor, batch: _Batch) -> Tensor:
        counts = self._counts.index_select(0, batch.pool_rows)
        in_output = counts > 0
        seen = self._in_prompt.index_select(0, batch.pool_rows) | in_output
        repetition, presence, frequency = batch.penalties.unbind()
        repeated = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        return repeated - frequency * counts - presence * in_output

    def _draw(self, work: Tensor, draw: _Draw, keys: Tensor) -> Tensor:
        step = max(1, CHUNK_ELEMENTS // self.vocab_size)
        return torch.cat([self._draw_chunk(work, draw, keys, i, i + step) for i in range(0, len(keys), step)])

    def _draw_chunk(self, work: Tensor, draw: _Draw, keys: Tensor, start: int, end: int) -> Tensor:
        x = work.index_select(0, draw.rows[start:end])
        # Relative to the best token: exact, and no temperature is too small.
        x = (x - x.amax(1, keepdim=True)) / draw.temperature[start:end]
        if draw.log_min_p is not None:
            x = x.masked_fill(x < draw.log_min_p[start:end], -math.inf)
        if draw.width == 0:
            return (x + gumbel_noise(keys[start:end], self._all_ids)).argmax(1)
        top_k = None if draw.top_k is None else draw.top_k[start:end]
        top_p = None if draw.top_p is None else draw.top_p[start:end]
        best, token_ids = _keep(x, draw.width, top_k, top_p)
        choice = (best + gumbel_noise(keys[start:end], token_ids)).argmax(1, keepdim=True)
        return token_ids.gather(1, choice).squeeze(1)

    def _at(self, slot: int) -> _Slot:
        state = self._slots[slot]
        assert state is not None, f"slot {slot} is empty"
        return state

    def _index(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self.device)

    def _column(self, values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return to_device(values, dtype, self.device).unsqueeze(1)

    def _count(self, new: NewRequest) -> int:
        if not self._free_rows:
            size = len(self._counts)
            more = (max(1, size), self.vocab_size)
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more)])
            self._in_prompt = torch.cat([self._in_prompt, self._in_prompt.new_zeros(more)])
            self._free_rows = list(range(size, len(self._counts)))
        row = self._free_rows.pop()
        tokens = self._index(new.token_ids)
        self._in_prompt[row] = False
        self._in_prompt[row, tokens[: new.prompt_len]] = True
        output = tokens[new.prompt_len :]
        self._counts[row] = 0
        self._counts[row].scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        return row

    def _prepare(self, slots: Sequence[int], positions: Sequence[int]) -> _Batch:
        states = [self._at(slot) for slot in slots]
        masked = tuple(
            i
            for i, (state, position) in enumerate(zip(states, positions, strict=True))
            if position - state.prompt_len < state.sampling.min_tokens and state.stop_ids
        )
        key = (tuple(slots), masked)
        if self._batch is None or self._batch_key != key:
            self._batch, self._batch_key = self._build(states, masked), key
        return self._batch

    def _build(self, states: list[_Slot], masked: tuple[int, ...]) -> _Batch:
        def is_edited(i: int, state: _Slot) -> bool:
            params = state.sampling
            is_shaped = params.has_penalties or bool(params.logit_bias) or params.guided is not None
            return not params.is_greedy or is_shaped or i in masked

        edited = [i for i, state in enumerate(states) if is_edited(i, state)]
        plain = sorted(set(range(len(states))) - set(edited))
        rows = [(row, i, states[i].sampling) for row, i in enumerate(edited)]
        bias = [(row, *cell) for row, _, params in rows for cell in (params.logit_bias or {}).items()]
        stops = [(row, token) for row, i, _ in rows if i in masked for token in states[i].stop_ids]
        penalised = [(row, params) for row, _, params in rows if params.has_penalties]
        pool_rows = [states[i].pool_row or 0 for _, i, params in rows if params.has_penalties]
        strengths = [
            [params.repetition_penalty, params.presence_penalty, params.frequency_penalty] for _, params in penalised
        ]
        greedy = [row for row, _, params in rows if params.is_greedy]
        guided = [row for row, _, params in rows if params.guided is not None]
        return _Batch(
            plain=self._index(plain) if plain else None,
            edited=self._index(edited) if edited else None,
            bias_cells=(self._index([cell[0] for cell in bias]), self._index([cell[1] for cell in bias])),
            bias=self._column([cell[2] for cell in bias]).squeeze(1) if bias else None,
            masked_cells=(self._index([row for row, _ in stops]), self._index([token for _, token in stops])),
            penalised=self._index([row for row, _ in penalised]) if penalised else None,
            pool_rows=self._index(pool_rows),
            penalties=to_device(strengths, torch.float32, self.device).reshape(-1, 3).T.unsqueeze(2),
            guided=self._index(guided) if guided else None,
            greedy=self._index(greedy) if greedy else None,
            draws=self._draws([member for member in rows if not member[2].is_greedy]),
        )

    def _draws(self, sampled: list[tuple[int, int, SamplingParams]]) -> list[_Draw]:
        kinds: dict[str, list[tuple[int, int, SamplingParams]]] = {}
        for member in sampled:
            params = member[2]
            kind = "free" if params.top_p == 1.0 else "nucleus"
            if 0 < params.top_k < self.vocab_size:
                kind = "small" if params.top_k <= SMALL_TOP_K else "large"
            kinds.setdefault(kind, []).append(member)
        draws = []
        for kind, members in kinds.items():
            params_of = [params for _, _, params in members]
            top_k = [params.top_k if params.top_k > 0 else self.vocab_size for params in params_of]
            width = {"free": 0, "nucleus": None, "large": self.vocab_size, "small": max(top_k)}[kind]
            temperature = [max(params.temperature, MIN_TEMPERATURE) for params in params_of]
            min_p = [math.log(params.min_p) if params.min_p else -math.inf for params in params_of]
            top_p = [params.top_p if params.top_p < 1.0 else TOP_P_OFF for params in params_of]
            draws.append(
                _Draw(
                    rows=self._index([row for row, _, _ in members]),
                    members=[i for _, i, _ in members],
                    temperature=self._column(temperature),
                    log_min_p=self._column(min_p) if max(min_p) > -math.inf else None,
                    top_k=self._index(top_k).unsqueeze(1) if kind in ("small", "large") else None,
                    top_p=self._column(top_p, torch.float64) if min(top_p) < 1.0 else None,
                    width=width,
                )
            )
        return draws


def unpack_bits(masks: Tensor, width: int) -> Tensor:
    """bool [n, width], of bits: int32 [n, ceil(width / 32)], the lowest of each word first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=masks.device)
    return ((masks.view(torch.uint8).unsqueeze(2) >> shifts) & 1).bool().flatten(1)[:, :width]


def _weights(x: Tensor) -> Tensor:
    """exp(x) for x <= 0 in fixed point, int64: sums do not depend on their order."""
    return x.exp().mul_(2.0**WEIGHT_BITS).to(torch.int64)


def _keep(x: Tensor, width: int | None, top_k: Tensor | None, top_p: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens that top_k, then top_p leave: (values, token ids), best first, -inf where cut.

    x: float32 [n, vocab], at most 0.  top_p keeps a token while those ranked above it have less than top_p of
    the mass that top_k left; equal values rank by lower id.
    """
    vocab = x.shape[1]
    if width is None and x.device.type != "cpu":
        width = vocab  # to look whether fewer are enough would wait for the device
    num_best = min(SMALL_TOP_K, vocab) if width is None else width
    best, token_ids = _rank(x, num_best)
    if top_k is not None:
        best = best.masked_fill(torch.arange(num_best, device=x.device) >= top_k, -math.inf)
    if top_p is None:
        return best, token_ids
    weights = _weights(best)
    mass = weights.cumsum(1)
    total = _weights(x).sum(1, keepdim=True) if width is None else mass[:, -1:]
    limit = top_p * total
    if num_best < vocab and width is None and not bool((mass[:, -1:] >= limit).all()):
        return _keep(x, vocab, top_k, top_p)
    cut = mass - weights >= limit
    cut[:, 0] = False  # a top_p that rounds to nothing still leaves the best token
    return best.masked_fill(cut, -math.inf), token_ids


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probabilities on their way to the host: of each row's own token, and of its best ones by rank.

    own: float32 [num_rows].  best: float32 [num_rows, width], best_ids: int64 [num_rows, width].
    counts: how many of the best each row wants.
    """

    own: Tensor
    best: Tensor
    best_ids: Tensor
    counts: list[int]

    def read(self, token_ids: Sequence[int]) -> list[Logprobs]:
        """One entry per row, its own token first; call it once the device is done.

        token_ids: each row's own; a negative one (the row's logits are not finite) gives an empty entry.
        """
        rows = zip(token_ids, self.own.tolist(), self.counts, self.best.tolist(), self.best_ids.tolist(), strict=True)
        return [
            {} if token < 0 else {token: own} | dict(zip(ids[:count], values[:count], strict=True))
            for token, own, count, values, ids in rows
        ]


def pending_logprobs(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> PendingLogprobs:
    """Log-probabilities of each row: of its actual token, and of its best by rank; equal logits rank by lower id.

    logits: float32 [num_rows, vocab], untouched by sampling.  tokens: int64 [num_rows] on the same device, the actual
    tokens.  counts: how many of the best each row wants.
    """
    vocab = logits.shape[1]
    step = max(1, CHUNK_ELEMENTS // vocab)
    width = min(max(counts), vocab)
    own, best, best_ids = [], [], []
    for start in range(0, len(logits), step):
        chunk = logits[start : start + step]
        logprobs = chunk.log_softmax(1)
        picked = tokens[start : start + step].clamp(min=0).unsqueeze(1)
        own.append(logprobs.gather(1, picked).squeeze(1))
        best_ids.append(_rank(chunk, width)[1] if width else picked[:, :0])
        best.append(logprobs.gather(1, best_ids[-1]))
    return PendingLogprobs(
        to_host(torch.cat(own)), to_host(torch.cat(best)), to_host(torch.cat(best_ids)), list(counts)
    )
