"""How the tokens of one step are divided over requests: decodes first, then prompts, where short ones are not held up
by long ones.

A prompt that is computed beside decodes makes them wait, so its share of such a step has a limit of its own, and the
pause between two tokens of a stream has one with it. Of the prompts' share, long ones together get one half for certain
and short ones the other; what one sort does not want, the other gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.config import EngineConfig

# A step reads all weights, however few tokens it has: small chunks of prompts waste a GPU. A CPU is busy with these.
CPU_PREFILL_TOKENS = 256


class Runnable(Protocol):
    """What the division depends on. num_runnable_tokens: that wait to be computed."""

    @property
    def num_runnable_tokens(self) -> int: ...

    @property
    def is_decoding(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class BudgetLimits:
    """max_num_batched_tokens: of one step.  max_num_prefill_tokens: of those, prompt tokens while requests decode.
    long_prefill_token_threshold: a prompt is long while more tokens wait to be computed; 0: none is."""

    max_num_batched_tokens: int
    max_num_prefill_tokens: int
    long_prefill_token_threshold: int

    @classmethod
    def of(cls, config: EngineConfig, backend: str) -> BudgetLimits:
        """The limits of a step, with what was left unset. backend: as resolved, torch or one for GPUs."""
        budget, prefill = config.max_num_batched_tokens, config.max_num_prefill_tokens
        threshold = config.long_prefill_token_threshold
        if prefill is None:
            prefill = CPU_PREFILL_TOKENS if backend == "torch" else budget
        return cls(budget, prefill, budget if threshold is None else threshold)

    def is_long(self, num_runnable_tokens: int) -> bool:
        """Whether shorter prompts may go before one with so many tokens to compute."""
        return 0 < self.long_prefill_token_threshold < num_runnable_tokens


class StepBudget:
    """The tokens of one step that nobody has yet.

    running: in order of arrival; the first is certain to get a token if it can use one.
    """

    def __init__(self, limits: BudgetLimits, running: Sequence[Runnable]) -> None:
        self._limits = limits
        num_decoding = sum(request.is_decoding for request in running)
        first = running[0] if running else None
        is_kept = first is not None and not first.is_decoding and first.num_runnable_tokens > 0
        self._decode = min(num_decoding, limits.max_num_batched_tokens - is_kept)
        self.prefill = limits.max_num_batched_tokens - self._decode
        if num_decoding:
            self.prefill = min(self.prefill, limits.max_num_prefill_tokens)
        has_long = limits.long_prefill_token_threshold > 0
        self._long = self.prefill - self.prefill // 2 if has_long else self.prefill

    def take(self, request: Runnable) -> int:
        """The share of a request. Callers ask in order of arrival."""
        if request.is_decoding:
            share = min(1, self._decode)
            self._decode -= share
            return share
        share = min(request.num_runnable_tokens, self.prefill)
        if self._limits.is_long(request.num_runnable_tokens):
            share = min(share, self._long)
            self._long -= share
        self.prefill -= share
        return share

    def take_more(self, num_tokens: int) -> int:
        """For a request that has its share and could use `num_tokens` more, when all others have theirs."""
        share = min(num_tokens, self.prefill)
        self.prefill -= share
        return share
