"""The bodies of /v1/chat/completions; see service/protocol.py for the rules that all bodies follow."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import field_validator

from engine.errors import RequestError
from engine.types import GuidedSpec, SamplingParams
from service.chat_messages import Message, read_messages, read_tools
from service.chat_template import check_variables
from service.errors import renamed
from service.parsers.arguments import Schema
from service.protocol import AnswerHead, GenerationRequest, Usage
from service.request_body import quote

MAX_TEMPLATE_KWARGS = 64
THINKING_MODES = ("enabled", "disabled", "adaptive")
# MiniMax-M3 knows whether to think, not how long.
_MODE_OF_EFFORT = {
    "none": "disabled",
    "minimal": "disabled",
    "low": "adaptive",
    "medium": "adaptive",
    "high": "enabled",
    "xhigh": "enabled",
    "max": "enabled",
}
_TEXT_ONLY = "the model takes and gives text only"


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    max_entries: ClassVar[dict[str, int]] = {
        **GenerationRequest.max_entries,
        "chat_template_kwargs": MAX_TEMPLATE_KWARGS,
        "metadata": 64,
        "modalities": 8,
    }
    refused: ClassVar[dict[str, str]] = {
        **GenerationRequest.refused,
        "audio": _TEXT_ONLY,
        "function_call": "use tool_choice",
        "functions": "use tools",
        "moderation": "there is no moderation",
        "prediction": "there is no predicted output",
        "prompt_cache_options": "prefixes are cached without being asked for, as long as there is room",
        "prompt_cache_retention": "prefixes are cached as long as there is room",
        "verbosity": "the model does not know it",
        "web_search_options": "there is no web search",
        "add_generation_prompt": "the answer is always the assistant's next message",
        "add_special_tokens": "the chat template writes them",
        "best_of": "candidates are not ranked",
        "chat_template": "the checkpoint's template is used",
        "continue_final_message": "the answer is always the assistant's next message",
        "documents": "the model's chat format has none",
        "echo": "/v1/completions has it",
        "prompt": "this route takes messages",
        "prompt_logprobs": "/v1/completions has it",
    }
    tolerated: ClassVar[dict[str, str]] = {
        **GenerationRequest.tolerated,
        "metadata": "it is for the client's own records, and nothing is stored",
        "modalities": 'only `["text"]` is accepted',
        "prompt_cache_key": "prefixes are cached without it",
        "safety_identifier": "it asks for nothing",
        "service_tier": "only `auto` and `default` are accepted: there is one",
        "store": "only `false` is accepted: nothing is stored",
    }

    messages: list[Any]  # of Message
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None  # of dict
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    modalities: list[str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _messages(cls, value: Any) -> list[Message]:
        return read_messages(value)

    @field_validator("tools", mode="before")
    @classmethod
    def _tools(cls, value: Any) -> Any:
        return None if value is None else read_tools(value)

    def check(self, *, max_choices: int) -> None:
        super().check(max_choices=max_choices)
        if self.num_choices_per_prompt > max_choices:
            raise RequestError(f"n must be in [1, {max_choices}], got {self.n}", param="n")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        given = {name: getattr(self, name) for name in ("max_completion_tokens", "max_tokens")}
        if None not in given.values() and len(set(given.values())) > 1:
            raise RequestError(
                f"max_tokens is the old name of max_completion_tokens: they must be equal, got {self.max_tokens} "
                f"and {self.max_completion_tokens}",
                param="max_tokens",
            )
        if self.reasoning_effort is not None and self.reasoning_effort not in _MODE_OF_EFFORT:
            raise RequestError(
                f"reasoning_effort must be one of {', '.join(_MODE_OF_EFFORT)}, got {quote(self.reasoning_effort)}",
                param="reasoning_effort",
            )
        self._check_tolerated()
        check_variables(self.chat_template_kwargs or {})
        if self.thinking_mode not in (None, *THINKING_MODES):
            raise RequestError(
                f"chat_template_kwargs.thinking_mode must be one of {', '.join(THINKING_MODES)}, "
                f"got {quote(self.thinking_mode)}",
                param="chat_template_kwargs",
            )
        self._check_tool_choice()

    def _check_tolerated(self) -> None:
        """Values that ask for something."""
        for name, value, accepted in (
            ("modalities", self.modalities, (None, ["text"])),
            ("service_tier", self.service_tier, (None, "auto", "default")),
            ("store", self.store, (None, False)),
        ):
            if value not in accepted:
                raise RequestError(
                    f"{name}={quote(value)} is not supported, only {quote(accepted[-1])}",
                    param=name,
                    code="unsupported_parameter",
                )

    def _check_tool_choice(self) -> None:
        choice = self.tool_choice
        if choice in (None, "auto", "none"):
            return
        if isinstance(choice, dict) and choice.get("type") not in (None, "function"):
            raise RequestError(
                f"tool_choice.type {quote(choice['type'])} is not supported: only 'function'",
                param="tool_choice",
                code="unsupported_parameter",
            )
        if choice != "required" and not isinstance(self._named_tool, str):
            raise RequestError(
                'tool_choice must be "auto", "none", "required" or '
                f'{{"type": "function", "function": {{"name": ...}}}}, got {quote(choice)}',
                param="tool_choice",
            )
        if not self.tools:
            raise RequestError("tool_choice needs tools", param="tool_choice")
        if choice != "required" and self._named_tool not in self.schemas:
            raise RequestError(
                f"tool_choice names {quote(self._named_tool)}, which is not in tools", param="tool_choice"
            )

    @property
    def _named_tool(self) -> Any:
        function = self.tool_choice.get("function") if isinstance(self.tool_choice, dict) else None
        return function.get("name") if isinstance(function, dict) else None

    @property
    def thinking_mode(self) -> Any:
        """enabled, disabled or adaptive; None: what the template does without being told."""
        given = (self.chat_template_kwargs or {}).get("thinking_mode")
        if given is None and self.reasoning_effort is not None:
            return _MODE_OF_EFFORT.get(self.reasoning_effort)
        return given

    @property
    def variables(self) -> dict[str, Any]:
        """What the template is given beside messages and tools."""
        variables = {**(self.chat_template_kwargs or {}), "thinking_mode": self.thinking_mode}
        return {name: value for name, value in variables.items() if value is not None}

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of: all, or none when tool_choice says so."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def schemas(self) -> dict[str, Schema]:
        """The JSON schema of each usable tool's arguments."""
        functions = [tool["function"] for tool in self.usable_tools]
        return {function["name"]: function.get("parameters") or {} for function in functions}

    @property
    def has_strict_tools(self) -> bool:
        """Whether calls have to fit their schemas, if there are any."""
        return any(tool["function"].get("strict") for tool in self.usable_tools)

    @property
    def forced_tools(self) -> dict[str, Schema] | None:
        """The tools of which one has to be called, None when none has to."""
        if self.tool_choice == "required":
            return self.schemas
        name = self._named_tool
        return None if name is None else {name: self.schemas[name]}

    @property
    def max_calls(self) -> int | None:
        """How many calls one answer may hold, None: any number."""
        return 1 if self.parallel_tool_calls is False or self._named_tool is not None else None

    def sampling(self, room: int, guided: GuidedSpec | None) -> SamplingParams:
        """The engine's view. room: tokens that the model's context has left, which is what an absent limit means.

        guided: what the text has to match, in place of what the body says of it.
        """
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        limit = getattr(self, name)
        if limit is not None and limit > room:
            raise RequestError(
                f"{name} is {limit}, and after the prompt the context has room for {room} tokens",
                param=name,
                code="context_length_exceeded",
            )
        given = {**self._given(), "max_tokens": room if limit is None else limit, "guided": guided, "logprobs": None}
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        with renamed(logprobs="top_logprobs", max_tokens=name):
            return SamplingParams(**given)


# --- answers; UNSET fields are left out ----------------------------------------------------------------


class TopLogprob(msgspec.Struct):
    """bytes: of the token, which alone may be no valid text."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """content: one entry for each generated token, those of reasoning and tool calls too."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct):
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


class ToolCallEntry(msgspec.Struct):
    id: str
    function: FunctionCall
    type: str = "function"


class ToolCallDelta(msgspec.Struct):
    """A call in a stream: complete, in one piece."""

    index: int
    id: str
    function: FunctionCall
    type: str = "function"


class AssistantMessage(msgspec.Struct):
    """content: null when there are only reasoning or calls."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallEntry] | UnsetType = UNSET


class MessageDelta(msgspec.Struct):
    """What is new of a message. role: in the first one."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One complete answer. stop_reason: the stop string or stop token id that ended it."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """What is new of one answer."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(AnswerHead, kw_only=True):
    """The answer to /v1/chat/completions."""

    object: str = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage | UnsetType | None = UNSET


class ChatCompletionChunk(AnswerHead, kw_only=True):
    """One event of its stream."""

    object: str = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
