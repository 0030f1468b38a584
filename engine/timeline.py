"""What a traced request went through in the engine: plain times, for the service to make spans of.

Kept only for requests that carry a trace context. All times are time.monotonic() of this process, in seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.types import FinishReason

# A long generation would otherwise leave one entry per token; later steps are summed up.
MAX_STEPS = 128
MAX_PREEMPTIONS = 32


class StepTime(NamedTuple):
    """One step that ran tokens of the request.

    started_s, ended_s: from its planning to its result; with several steps in flight they overlap.
    first_position, num_tokens: what it computed of the request.  batch_rows, batch_tokens: the whole step.
    """

    step_id: int
    started_s: float
    ended_s: float
    first_position: int
    num_tokens: int
    batch_rows: int
    batch_tokens: int


@dataclass(slots=True)
class Timeline:
    """One request on one engine.

    num_resumed_tokens: output that an earlier replica had delivered.  admitted_s, first_token_s: None when it did not
    come that far.  finish_reason: None when the engine was lost, and `error` says why.
    num_output_tokens: resumed ones included.  steps: the first MAX_STEPS; *_not_recorded: sums over the others.
    preempted_s: when it lost its pages, the first MAX_PREEMPTIONS times.
    """

    request_id: str
    trace_parent: str
    prompt_len: int
    num_resumed_tokens: int
    arrival_s: float
    admitted_s: float | None = None
    first_token_s: float | None = None
    ended_s: float = 0.0
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    steps: list[StepTime] = field(default_factory=list)
    num_steps_not_recorded: int = 0
    num_tokens_not_recorded: int = 0
    preempted_s: list[float] = field(default_factory=list)
    num_preemptions: int = 0

    def add_step(self, step: StepTime) -> None:
        """A step with the request in it was collected."""
        if len(self.steps) < MAX_STEPS:
            self.steps.append(step)
            return
        self.num_steps_not_recorded += 1
        self.num_tokens_not_recorded += step.num_tokens

    def preempt(self) -> None:
        """The request goes back to the queue, now."""
        self.num_preemptions += 1
        if len(self.preempted_s) < MAX_PREEMPTIONS:
            self.preempted_s.append(time.monotonic())
