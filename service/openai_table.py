"""deploy/OPENAI.md: what becomes of every field of a request that OpenAI documents. `make generate` writes it.

The level of a field is read from the body that takes it, so that the document says what the code does.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.chat_protocol import ChatRequest
from service.protocol import CompletionRequest, GenerationRequest

PATH = "deploy/OPENAI.md"
HONOURED, REFUSED, TOLERATED = "honoured", "refused", "tolerated"
ROUTES: dict[str, type[GenerationRequest]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
# The fields of OpenAI's API reference. A test compares them with the installed client.
_BOTH = (
    "model",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "user",
)
DOCUMENTED: dict[str, tuple[str, ...]] = {
    "/v1/chat/completions": (
        "messages",
        *_BOTH,
        "audio",
        "function_call",
        "functions",
        "max_completion_tokens",
        "metadata",
        "modalities",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "service_tier",
        "store",
        "tool_choice",
        "tools",
        "top_logprobs",
        "verbosity",
        "web_search_options",
    ),
    "/v1/completions": ("prompt", *_BOTH, "best_of", "echo", "suffix"),
}
_NOTES = {
    "frequency_penalty": "-2 to 2",
    "logit_bias": "at most 1024 tokens",
    "max_completion_tokens": "absent: as many as the context has room for",
    "max_tokens": "absent: 16 in completions; in chats as `max_completion_tokens`, whose old name it is",
    "messages": "text only, as a string or as text parts; all roles but `function`; with `reasoning_content`, and with "
    "`root` as M3 has it. System messages in front become one, later ones are refused. Each tool call needs its result",
    "model": "absent: the served one",
    "n": "1 to 128, times prompts at most `--max-prompts`; choice i samples with seed + i",
    "parallel_tool_calls": "false: at most one call",
    "presence_penalty": "-2 to 2",
    "reasoning_effort": "none, minimal: no thinking; low, medium: as the model decides; high, xhigh, max: thinking",
    "response_format": "text, json_object, json_schema; binds the content, not reasoning; tools may be called instead",
    "seed": "the same tokens on any replica, in any batch",
    "stop": "at most 16 strings; they end reasoning and tool calls too",
    "stream_options": "include_usage, and vLLM's continuous_usage_stats",
    "tool_choice": "auto, none (the model is not told of tools), required and one function by name (calls are bound to "
    "their schemas)",
    "tools": "functions; arguments are read by their schemas, and bound to them where one is `strict`",
    "top_logprobs": "0 to 20",
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of one route. level: honoured, refused by its name, or tolerated: accepted without an effect."""

    name: str
    level: str
    note: str


def fields(route: str) -> list[Field]:
    """Every field that OpenAI documents for a route, in its order."""
    return [_field(ROUTES[route], name) for name in DOCUMENTED[route]]


def extensions(route: str) -> list[str]:
    """Fields that the route takes beyond those, by name."""
    return sorted(ROUTES[route].model_fields.keys() - set(DOCUMENTED[route]))


def _field(body: type[GenerationRequest], name: str) -> Field:
    if name in body.refused:
        return Field(name, REFUSED, body.refused[name])
    if name in body.tolerated:
        return Field(name, TOLERATED, body.tolerated[name])
    assert name in body.model_fields, f"{name} is neither taken nor refused by name"
    return Field(name, HONOURED, _NOTES.get(name, ""))


_HEAD = """\
# OpenAI's fields

Made from `service/openai_table.py` by `make generate`: do not edit.

*Honoured*: it does what OpenAI says. *Refused*: a 400 that names it, unless it is null. *Tolerated*: accepted, and
changes nothing, which is true to what it asks for. A field that stands nowhere here is refused by its name. A test asks
a running service for each.
"""


def generated() -> dict[str, str]:
    """The document, by its path in the checkout."""
    parts = [_HEAD]
    for route in ROUTES:
        parts.append(f"\n## {route}\n\n| field | | note |\n|---|---|---|\n")
        parts += [f"| `{field.name}` | {field.level} | {field.note} |\n" for field in fields(route)]
        names = ", ".join(f"`{name}`" for name in extensions(route))
        parts.append(f"\nBeyond OpenAI's, with the names that vLLM gives them: {names}.\n")
    return {PATH: "".join(parts)}
