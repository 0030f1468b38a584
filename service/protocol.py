"""The bodies of the HTTP API: what a client may send, and what it gets back.

Field names, defaults and meaning are OpenAI's; extensions have vLLM's names. Types are strict: a string is
not a number, a boolean is not an integer. A field that we would not honour is refused by name. null: not
given. Ranges are checked where the values are used, in `SamplingParams`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import field_validator

from engine.errors import RequestError
from engine.types import MAX_LOGIT_BIAS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, SamplingParams
from service.limits import MAX_PROMPTS
from service.request_body import RequestBody, check_entries, quote
from service.structured import GuidedFields

MAX_N = 128

Prompt = str | list[int]


class StreamOptions(RequestBody):
    """include_usage: one last chunk with the usage.  continuous_usage_stats: usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(GuidedFields):
    """What every request that generates text may ask for."""

    max_entries: ClassVar[dict[str, int]] = {
        "stop": MAX_STOP_STRINGS,
        "stop_token_ids": MAX_STOP_TOKEN_IDS,
        "logit_bias": MAX_LOGIT_BIAS,
        **GuidedFields.max_entries,
    }
    refused: ClassVar[dict[str, str]] = {
        "use_beam_search": "there is no beam search",
        "truncate_prompt_tokens": "a prompt that is too long is refused, never cut",
    }
    tolerated: ClassVar[dict[str, str]] = {
        "user": "OpenAI's clients send it on behalf of their own users; it asks for nothing",
    }

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _logit_bias(cls, value: Any) -> Any:
        return parse_logit_bias(value)

    @property
    def num_choices_per_prompt(self) -> int:
        return 1 if self.n is None else self.n

    def check(self, *, max_choices: int) -> None:
        """The rules that no single field can state. max_choices: limit of prompts times n."""
        if not 1 <= self.num_choices_per_prompt <= MAX_N:
            raise RequestError(f"n must be in [1, {MAX_N}], got {self.num_choices_per_prompt}", param="n")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", param="stream_options")

    def _given(self) -> dict[str, Any]:
        """The sampling fields that are there, by the engine's names, which are the same."""
        names = {"guided", *(type(self).model_fields.keys() & SamplingParams.__dataclass_fields__.keys())}
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    refused: ClassVar[dict[str, str]] = {
        **GenerationRequest.refused,
        "prompt_embeds": "prompts are text or token ids",
        "suffix": "the model does not fill in the middle",
    }
    tolerated: ClassVar[dict[str, str]] = {
        **GenerationRequest.tolerated,
        "best_of": "only the value of `n` is accepted: candidates are not ranked",
    }

    prompt: list[Any]  # of str, or of list[int]: every accepted form becomes a list of prompts
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> list[Prompt]:
        return parse_prompts(value)

    @property
    def generates_nothing(self) -> bool:
        """max_tokens 0 with echo, as evaluation tools ask for the prompt's own log-probabilities."""
        return bool(self.echo) and self.max_tokens == 0

    def check(self, *, max_choices: int) -> None:
        super().check(max_choices=max_choices)
        n = self.num_choices_per_prompt
        if len(self.prompt) * n > max_choices:
            raise RequestError(
                f"{len(self.prompt)} prompts times n={n} are {n * len(self.prompt)} choices, "
                f"at most {max_choices} are allowed",
                param="prompt" if len(self.prompt) > max_choices else "n",
            )
        if self.best_of is not None and self.best_of != n:
            raise RequestError(
                f"best_of must be equal to n ({n}) or absent: candidates are not ranked; got {self.best_of}",
                param="best_of",
                code="unsupported_parameter",
            )
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs needs stream=false", param="prompt_logprobs")

    def sampling(self) -> SamplingParams:
        """The engine's view of this request; absent fields take the engine's defaults, which are OpenAI's."""
        given = self._given()
        if self.generates_nothing:
            # The engine always generates; the one token is dropped and not counted.
            given |= {"max_tokens": 1, "min_tokens": 0}
        if self.echo and self.logprobs is not None:
            given["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return SamplingParams(**given)


def parse_prompts(value: Any) -> list[Prompt]:
    """Every form of `prompt` as a list of prompts: one string, strings, one list of ids, lists of ids."""
    is_token_ids = isinstance(value, list) and bool(value) and type(value[0]) in (int, float, bool)
    if isinstance(value, str) or is_token_ids:
        value = [value]
    if not isinstance(value, list):
        raise _prompt_type(f"prompt must be a string or a list, got {quote(value)}")
    if not value:
        raise RequestError("prompt is an empty list", param="prompt", code="empty_prompt")
    check_entries("prompt", value, MAX_PROMPTS, param="prompt")
    kind = type(value[0])
    for i, prompt in enumerate(value):
        if kind not in (str, list) or type(prompt) is not kind:
            raise _prompt_type(f"prompt must hold only strings or only lists of token ids, got {quote(prompt)} at {i}")
        if not prompt:
            raise RequestError(f"prompt {i} is empty: it needs at least one token", param="prompt", code="empty_prompt")
        if isinstance(prompt, list) and (j := first_not_int(prompt)) is not None:
            raise _prompt_type(f"prompt {i} must hold integer token ids, got {quote(prompt[j])} at {j}")
    return value


def first_not_int(values: list[Any]) -> int | None:
    """Where the first value stands that is no integer, None if all are. true is none, though it is an instance."""
    if set(map(type, values)) <= {int}:
        return None
    return next(i for i, value in enumerate(values) if type(value) is not int)


def _prompt_type(message: str) -> RequestError:
    return RequestError(message, param="prompt", code="invalid_type")


def parse_logit_bias(value: Any) -> Any:
    """JSON has only string keys: {"50256": -100} becomes {50256: -100}."""
    if not isinstance(value, dict):
        return value
    bias = {}
    for key, amount in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(
                f"logit_bias must have token ids as keys, got {quote(key)}",
                param="logit_bias",
                code="invalid_type",
            )
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            raise RequestError(
                f"logit_bias must have numbers as values, got {quote(amount)} for token {key}",
                param="logit_bias",
                code="invalid_type",
            )
        bias[int(key)] = amount
    return bias


def check_token_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    """RequestError for the first id that the model does not have. Entries must be integers already."""
    if min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    i, token = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < vocab_size)
    raise RequestError(f"{param} has token id {quote(token)} at {i}, ids must be in [0, {vocab_size - 1}]", param=param)


class TokenizeRequest(RequestBody):
    """POST /tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestBody):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]

    @field_validator("tokens", mode="before")
    @classmethod
    def _tokens(cls, value: Any) -> Any:
        if isinstance(value, list) and (i := first_not_int(value)) is not None:
            raise RequestError(
                f"tokens must hold integer token ids, got {quote(value[i])} at {i}", param="tokens", code="invalid_type"
            )
        return value


# --- answers; UNSET fields are extensions, left out unless asked for ---------------------------------


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    """Tokens of one HTTP request: each prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct):
    """OpenAI's four aligned lists. text_offset: characters from the start of the choice's text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class TokenLogprob(msgspec.Struct):
    """vLLM's entry of prompt_logprobs. rank: from 1; null when the token is not among the best asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


class CompletionChoice(msgspec.Struct):
    """One choice, whole or what is new of it. stop_reason: the stop string or stop token id that ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, TokenLogprob] | None] | UnsetType = UNSET


class AnswerHead(msgspec.Struct, kw_only=True):
    """How the answers of all routes that generate begin, and their chunks. Each adds its `choices` and the `usage`."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class Completion(AnswerHead, kw_only=True):
    """The answer to /v1/completions; with stream, each chunk has the same shape."""

    object: str = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    """One entry of /v1/models. index_plan: one letter per layer, see the README."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "m3serve"
    max_model_len: int
    index_plan: str


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    prompt: str
