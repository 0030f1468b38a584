"""The OpenAPI document of the HTTP API, made from the bodies in service/protocol.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel

from service.chat_messages import MAX_MESSAGES, MAX_TOOLS
from service.chat_protocol import ChatCompletion, ChatRequest
from service.errors import ErrorBody
from service.limits import MAX_PROMPTS, MAX_TIMEOUT_S, MIN_TIMEOUT_S, TIMEOUT_HEADER
from service.protocol import (
    Completion,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    Tokenized,
    TokenizeRequest,
)
from service.settings import ServiceSettings

_REF = "#/components/schemas/{name}"
_SECURITY = "api_key"


class Empty(msgspec.Struct):
    """No content: the status says it."""


@dataclass(frozen=True, slots=True)
class Route:
    """errors: statuses beside those of every route.  public: needs no key."""

    method: str
    path: str
    summary: str
    answer: type[msgspec.Struct]
    body: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    streams: bool = False
    public: bool = False


_BODY_ERRORS = (400, 408, 413, 429)
ROUTES = (
    Route("get", "/health", "This process answers", Empty, public=True),
    Route("get", "/ready", "An engine replica answers", Empty, public=True),
    Route("get", "/v1/models", "The served model", ModelList),
    Route("get", "/v1/models/{name}", "The served model by its name", ModelCard, errors=(404,)),
    Route(
        "post",
        "/v1/completions",
        "Continue prompts",
        Completion,
        CompletionRequest,
        errors=(404, *_BODY_ERRORS),
        streams=True,
    ),
    Route(
        "post",
        "/v1/chat/completions",
        "Answer a conversation",
        ChatCompletion,
        ChatRequest,
        errors=(404, *_BODY_ERRORS),
        streams=True,
    ),
    Route("post", "/tokenize", "Text to token ids", Tokenized, TokenizeRequest, errors=(404, *_BODY_ERRORS)),
    Route("post", "/detokenize", "Token ids to text", Detokenized, DetokenizeRequest, errors=(404, *_BODY_ERRORS)),
)
# Of every route: a header that is not taken, no key, a deadline, a method that it lacks, a fault of ours, no engine.
_COMMON_ERRORS = (400, 401, 405, 408, 500, 503)

# Fields that take more forms than their types say, since validators make them one.
_TEXT = {"type": "string", "minLength": 1}
_TOKEN_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_STOP_AND_BIAS: dict[str, dict[str, Any]] = {
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}]},
    "logit_bias": {
        "anyOf": [
            {
                "type": "object",
                "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                "additionalProperties": {"type": "number"},
            },
            {"type": "null"},
        ]
    },
}
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
_CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "function"],
}


def _message(roles: list[str], required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"role": {"enum": roles}, "content": _CONTENT, **properties},
        "required": ["role", *required],
        "additionalProperties": False,
    }


_MESSAGE = {
    "anyOf": [
        _message(["root", "system", "developer", "user"], ["content"], name={"type": "string"}),
        _message(
            ["assistant"],
            [],
            content={"anyOf": [_CONTENT, {"type": "null"}]},
            name={"type": "string"},
            reasoning_content={"type": "string"},
            tool_calls={"type": "array", "items": _CALL},
        ),
        _message(["tool"], ["content", "tool_call_id"], tool_call_id={"type": "string"}),
    ]
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                "description": {"type": "string"},
                "parameters": {"type": "object"},
                "strict": {"type": ["boolean", "null"]},
            },
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}
_FORMS: dict[type[BaseModel], dict[str, dict[str, Any]]] = {
    CompletionRequest: {
        "prompt": {
            "anyOf": [
                _TEXT,
                _TOKEN_IDS,
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TEXT},
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TOKEN_IDS},
            ]
        },
        **_STOP_AND_BIAS,
    },
    ChatRequest: {
        "messages": {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": _MESSAGE},
        "tools": {"anyOf": [{"type": "array", "maxItems": MAX_TOOLS, "items": _TOOL}, {"type": "null"}]},
        **_STOP_AND_BIAS,
    },
}


def openapi_document(settings: ServiceSettings) -> dict[str, Any]:
    """The document for this service: with a security scheme where keys are needed."""
    answers = [ErrorBody, *{route.answer: None for route in ROUTES}]
    _, components = msgspec.json.schema_components(answers, ref_template=_REF)
    for route in ROUTES:
        if route.body is not None:
            components |= _body_schemas(route.body)
    needs_key = settings.api_key_file is not None or settings.api_keys is not None
    longest_s = settings.request_timeout_s or MAX_TIMEOUT_S
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route, needs_key=needs_key, longest_s=longest_s)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "m3serve", "version": "1", "description": f"Serves the model {settings.model_name}."},
        "paths": paths,
        "components": {"schemas": components},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {_SECURITY: {"type": "http", "scheme": "bearer"}}
    return document


def _body_schemas(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template=_REF.replace("{name}", "{model}"))
    below: dict[str, Any] = schema.pop("$defs", {})
    schema["properties"] |= _FORMS.get(model, {})
    return {**below, model.__name__: schema}


def _operation(route: Route, *, needs_key: bool, longest_s: float) -> dict[str, Any]:
    ok: dict[str, Any] = {"application/json": {"schema": _ref(route.answer)}}
    if route.streams:
        ok["text/event-stream"] = {}
    responses: dict[str, Any] = {"200": {"description": "The answer", "content": ok}}
    error = {"description": "An error object", "content": {"application/json": {"schema": _ref(ErrorBody)}}}
    for status in sorted({*_COMMON_ERRORS, *route.errors}):
        responses[str(status)] = error
    operation: dict[str, Any] = {
        "summary": route.summary,
        "parameters": [
            {
                "name": TIMEOUT_HEADER,
                "in": "header",
                "required": False,
                "description": "Answer within this time or not at all",
                "schema": {"type": "number", "minimum": MIN_TIMEOUT_S, "maximum": longest_s},
            }
        ],
        "responses": responses,
    }
    if "{name}" in route.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"].append(name)
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": _REF.format(name=route.body.__name__)}}},
        }
    if needs_key and not route.public:
        operation["security"] = [{_SECURITY: []}]
    return operation


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}
