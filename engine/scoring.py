"""How well a model predicts given tokens: the loss of each of them, and whether it was the likeliest one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.types import Logprobs, SamplingParams

if TYPE_CHECKING:
    from engine.llm import LLM

# Tokens whose log-probabilities are held as dictionaries at the same time, and between two calls of `progress`.
_AT_ONCE = 16_000


@dataclass(frozen=True, slots=True)
class Score:
    """One sequence, teacher-forced. Position 0 has no prediction: its loss is NaN, and it is never the likeliest.

    nats: float32 [length], minus the log-probability of each token.  best: bool [length], whether the token is the
    likeliest one (of equals, the one with the lowest id).
    """

    nats: NDArray[np.float32]
    best: NDArray[np.bool_]


def score(
    llm: LLM, token_ids: Sequence[list[int]], progress: Callable[[int], None] | None = None
) -> list[NDArray[np.float32]]:
    """The loss of every token in nats, float32 [length] per sequence, NaN first; in the order given.

    progress: called with the number of tokens that are done since its last call.
    Raises RequestError for a sequence that the engine does not take: it must leave room for one more token.
    """
    scored: list[NDArray[np.float32]] = []
    for prompt_logprobs in _prompt_logprobs(llm, token_ids, 0, progress):
        scored.append(losses(prompt_logprobs))
    return scored


def judge(llm: LLM, token_ids: Sequence[list[int]], progress: Callable[[int], None] | None = None) -> list[Score]:
    """As `score`, with the rank: one more value per position is computed."""
    return [judged(each) for each in _prompt_logprobs(llm, token_ids, 1, progress)]


def losses(prompt_logprobs: Sequence[Logprobs | None]) -> NDArray[np.float32]:
    """float32 [length] of `Output.prompt_logprobs`, NaN where there is no prediction."""
    values = [float("nan") if each is None else -next(iter(each.values())) for each in prompt_logprobs]
    return np.array(values, dtype=np.float32)


def judged(prompt_logprobs: Sequence[Logprobs | None]) -> Score:
    """Of `Output.prompt_logprobs` that were asked for with one best token per position."""
    # The actual token comes first; the best one is another entry unless it is the same token.
    best = [each is not None and len(each) == 1 for each in prompt_logprobs]
    return Score(losses(prompt_logprobs), np.array(best, dtype=bool))


def _prompt_logprobs(
    llm: LLM, token_ids: Sequence[list[int]], top: int, progress: Callable[[int], None] | None
) -> Iterator[list[Logprobs | None]]:
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top)
    for part in _parts(token_ids):
        for output in llm.generate(part, sampling):
            assert output.prompt_logprobs is not None
            yield output.prompt_logprobs
        if progress is not None:
            progress(sum(map(len, part)))


def _parts(token_ids: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    part: list[list[int]] = []
    for ids in token_ids:
        part.append(ids)
        if sum(map(len, part)) >= _AT_ONCE:
            yield part
            part = []
    if part:
        yield part
