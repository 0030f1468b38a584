"""What crosses the seams of the engine: requests and events outside, step plans and results inside.

Plain dataclasses, so that `engine` runs without any transport library; the sockets encode them with msgspec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from engine.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**63 - 1
MAX_GUIDED_CHARS = 64 * 1024
GUIDED_KINDS = ("json_object", "json_schema", "regex", "choice", "grammar")


class FinishReason(StrEnum):
    """Why a request ended. Every request ends with exactly one of them."""

    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"  # the caller went away or asked for it
    ERROR = "error"  # the engine could not go on with this request; the event carries the reason


def _shown(value: Any) -> str:
    """A value for a message: short, whatever the client sent."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep nesting
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _number(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise RequestError(f"{name} must be a finite number, got {_shown(value)}", param=name, code="invalid_type")
    if value < low or value > high or (low_open and value == low):
        left = "(" if low_open else "["
        raise RequestError(f"{name} must be in {left}{low:g}, {high:g}], got {_shown(value)}", param=name)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {_shown(value)}", param=name, code="invalid_type")
    if not low <= value <= high:
        raise RequestError(f"{name} must be in [{low}, {high}], got {_shown(value)}", param=name)


def _sequence(name: str, value: Any, limit: int) -> None:
    if not isinstance(value, list | tuple):
        raise RequestError(f"{name} must be a list, got {type(value).__name__}", param=name, code="invalid_type")
    if len(value) > limit:
        raise RequestError(f"{name} has {len(value)} entries, at most {limit} are allowed", param=name)


def check_prompt_len(num_tokens: int, max_model_len: int) -> None:
    """RequestError when a prompt leaves no room for a token to generate."""
    if num_tokens >= max_model_len:
        raise RequestError(
            f"prompt has {num_tokens} tokens, and with one to generate more than max_model_len "
            f"({max_model_len} tokens)",
            param="prompt",
            code="context_length_exceeded",
        )


@dataclass(frozen=True, slots=True)
class GuidedSpec:
    """What the text of one request has to match, from its first character to its end of sequence.

    kind: "json_object": any JSON object. "json_schema": JSON that `text`, a JSON schema, accepts. "regex": the whole
    text matches the regular expression `text`. "choice": one of the strings of `text`, a JSON list. "grammar": `text`
    is a context-free grammar in llguidance's Lark syntax, whose rule `start` the text derives from.
    reasoning_end_id: the token that ends the model's reasoning, which comes first and is free but for the end of
    sequence; None: there is none, and the first token is bound already.
    reasoning_start_id: the token that opens the reasoning, when the model may choose to, as its first token; None: the
    prompt opened it.
    """

    kind: str
    text: str = ""
    reasoning_end_id: int | None = None
    reasoning_start_id: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in GUIDED_KINDS:
            raise RequestError(
                f"guided kind must be one of {', '.join(GUIDED_KINDS)}, got {_shown(self.kind)}", param="guided"
            )
        if not isinstance(self.text, str):
            raise RequestError(f"guided text must be a string, got {_shown(self.text)}", param="guided")
        if len(self.text) > MAX_GUIDED_CHARS:
            raise RequestError(
                f"{self.kind} has {len(self.text)} characters, at most {MAX_GUIDED_CHARS} are allowed", param="guided"
            )
        if self.reasoning_start_id is not None and self.reasoning_end_id is None:
            raise RequestError("guided reasoning_start_id needs reasoning_end_id", param="guided")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request picks its tokens. Checked on construction; raises RequestError naming the field.

    The noise of a sampled token is a function of (seed, position) alone: the same seed gives the same tokens in
    any batch, on any replica, before and after preemption or failover.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None  # None: drawn when the request is accepted
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None  # per generated token: the chosen one plus this many best
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    guided: GuidedSpec | None = None  # what the output has to match

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}", param="min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise RequestError(
                    f"{name} must be true or false, got {_shown(value)}", param=name, code="invalid_type"
                )
        if self.guided is not None and (self.ignore_eos or self.min_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise RequestError(
                f"{name} cannot be combined with guided output, whose grammar says where it ends", param=name
            )
        self._check_stop()
        self._check_logit_bias()

    def _check_stop(self) -> None:
        if self.stop is not None and not isinstance(self.stop, str):
            _sequence("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop_strings:
            if not isinstance(text, str):
                raise RequestError(f"stop must hold strings, got {_shown(text)}", param="stop", code="invalid_type")
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise RequestError(
                    f"each stop string must have 1 to {MAX_STOP_CHARS} characters, got {len(text)}", param="stop"
                )
        if self.stop_token_ids is not None:
            _sequence("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
            for token in self.stop_token_ids:
                _integer("stop_token_ids", token, 0, 2**31 - 1)

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, dict):
            raise RequestError("logit_bias must map token ids to numbers", param="logit_bias", code="invalid_type")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries, at most {MAX_LOGIT_BIAS} are allowed",
                param="logit_bias",
            )
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -100.0, 100.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, whatever form they were given in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the token counts of the request change its logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(slots=True)
class EngineRequest:
    """One sequence to generate.

    prompt_token_ids: never empty.  output_token_ids: tokens already delivered by a replica that died; they are
    recomputed, not sent again.  sampling.seed must be set by the caller when it is not greedy: a
    resubmission has to draw the same noise.  trace_parent: W3C traceparent of whoever wants a Timeline.
    resubmitted: a replica had accepted it, so that it is not refused for want of room.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output_token_ids: list[int] = field(default_factory=list)
    trace_parent: str | None = None
    resubmitted: bool = False


# One position's log-probabilities: the actual token first, then the best ones by rank. Natural logarithm of the
# softmax of the raw logits, before temperature, penalties and bias.
Logprobs = dict[int, float]


@dataclass(slots=True)
class RequestEvent:
    """What one engine step did for one request.

    index: how many tokens of this request earlier events (of any replica) delivered: a gap shows a lost message.
    token_ids: new tokens of this step.  logprobs: aligned with token_ids when asked for.
    prompt_logprobs: once, with the first token: [prompt_len], None first.
    finish_reason: set on the last event, which may carry no token.
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    stop_token_id: int | None = None  # the token that ended it, when finish_reason is STOP
    error: str | None = None


@dataclass(slots=True)
class Output:
    """A finished request of `LLM.generate`."""

    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[Logprobs] | None
    prompt_logprobs: list[Logprobs | None] | None
    num_cached_tokens: int
    prompt_token_ids: list[int]


# In place of a sampled token.
NOT_SAMPLED = -1  # the row did not sample
NOT_FINITE = -2  # the row's logits hold a NaN or an infinity
NOT_GUIDED = -3  # the row's grammar cannot go on


# --- inside the engine: one StepPlan per step to every rank, one StepResult back from rank 0 -------------------


@dataclass(slots=True)
class NewRequest:
    """A request that enters (or re-enters, after preemption) a worker's state.

    slot: row of the worker's persistent state, [0, max_num_seqs).
    token_ids: everything known so far, prompt then output.  prompt_len: where the output starts.
    """

    slot: int
    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams


@dataclass(slots=True)
class StepRow:
    """What one request runs in this step.

    The worker keeps the request's tokens and block table: only what is new travels. Positions
    [num_computed_tokens, num_computed_tokens + num_scheduled_tokens) are computed; `sample` says that the last of
    them is the newest token, which a step in flight may still be sampling, so that this step yields another one.
    """

    slot: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    new_page_ids: list[int]
    sample: bool


@dataclass(slots=True)
class StepPlan:
    """One step: the same for every rank of the group.

    rows: decode rows (one token each, the newest of their slot, and they sample) first, then prefill rows.  released:
    slots whose state is dropped before `new` is added.  probe: time indexer and attention per layer.  audit: compare
    the selections that S layers reuse with their own.  fallback: every sparse layer selects for itself, the S layers
    too.  index_plan: letters of another index plan, by which this step runs; None: the loaded one, or its fallback.
    cleared: pages to fill with zeros before anything else.
    """

    step_id: int
    rows: list[StepRow]
    num_decode_rows: int
    new: list[NewRequest] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    probe: bool = False
    audit: bool = False
    fallback: bool = False
    index_plan: str | None = None
    cleared: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_scheduled_tokens for row in self.rows)


@dataclass(slots=True)
class LayerSeconds:
    """Time of one operation on a probed step. op: "indexer" or "sparse_attention"; phase: "prefill" or "decode"."""

    op: str
    layer_id: int
    phase: str
    seconds: float


@dataclass(slots=True)
class LayerOverlap:
    """Audit of one reuse layer on one step.

    overlap_sum: sum over (token, index head) of |fresh ∩ reused| / |fresh|, taken only where there was a choice
    (more candidate blocks than topk).  count: how many such (token, head) pairs.
    """

    layer_id: int
    overlap_sum: float
    count: int


@dataclass(slots=True)
class RankTimes:
    """Time of one rank on a probed step: in the model, and of that in collectives, where it waits for the others."""

    rank: int
    forward_s: float
    collective_s: float


@dataclass(slots=True)
class StepResult:
    """What rank 0 answers.

    sampled: one entry per plan row: a token id, NOT_SAMPLED, NOT_FINITE or NOT_GUIDED.
    logprobs: row index -> the sampled token's.  prompt_logprobs: row index -> one entry per scheduled prompt
    position that predicts a known prompt token.
    computed, reused: per layer, how many selections were made / read since the last result.
    rank_times: of rank 0 on a probed step; the executor adds what other ranks have sent by then.
    guided_errors: row index -> why its grammar cannot go on.  num_guided: rows that were sampled under a mask.
    mask_s: host time that making the masks took.
    """

    step_id: int
    sampled: list[int]
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    seconds: list[LayerSeconds] = field(default_factory=list)
    overlaps: list[LayerOverlap] = field(default_factory=list)
    computed: dict[int, int] = field(default_factory=dict)
    reused: dict[int, int] = field(default_factory=dict)
    rank_times: list[RankTimes] = field(default_factory=list)
    forward_s: float = 0.0
    python_s: float = 0.0
    guided_errors: dict[int, str] = field(default_factory=dict)
    num_guided: int = 0
    mask_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What start-up resolved: values that the configuration left open.

    plan: one letter per layer.  fallback_plan: by which steps run while the audit's guard is active; None: there is no
    guard.  page_bytes: of one page over all layers on one rank.
    eos_token_ids: from generation_config.json / config.json.
    namespace: what cached pages are valid for; part of every prefix hash.
    max_in_flight: steps that may be submitted before the first of them is collected.
    kernels: what computes each operation, where the backend has a choice.
    """

    model_name: str
    plan: str
    backend: str
    dtype: str
    num_pages: int
    page_size: int
    page_bytes: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    namespace: str
    weight_bytes: int
    tensor_parallel_size: int
    ledger: dict[str, int]
    max_in_flight: int = 1
    kernels: dict[str, str] = field(default_factory=dict)
    fallback_plan: str | None = None
