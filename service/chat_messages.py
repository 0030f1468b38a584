"""Messages and tools of a chat request: checked, and brought into the form that chat templates expect.

Checked here and not by pydantic, which would collect an error for every entry of a large body: the first one is
enough, and it names its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from pydantic_core import from_json

from engine.errors import RequestError
from service.request_body import check_entries, quote

MAX_MESSAGES = 8192
MAX_PARTS = 8192
MAX_TOOLS = 256
MAX_TOOL_CALLS = 256
SYSTEM_ROLES = frozenset({"system", "developer"})
# Beside "content", by role; "root" is MiniMax-M3's own, for what stands before the system prompt.
_FIELDS: dict[str, frozenset[str]] = {
    "root": frozenset({"name"}),
    "system": frozenset({"name"}),
    "developer": frozenset({"name"}),
    "user": frozenset({"name"}),
    "assistant": frozenset({"name", "reasoning_content", "tool_calls"}),
    "tool": frozenset({"tool_call_id"}),
}
# Of answers that clients send back as they came; anything but these values would be lost.
_EMPTY: tuple[Any, ...] = (None, [], "")
_REFUSED_FIELDS = {
    "refusal": "the model does not mark refusals",
    "audio": "the model takes text only",
    "function_call": "calls stand in tool_calls",
    "annotations": "the model takes text only",
}
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Entry = dict[str, Any]


class Message(dict[str, Any]):
    """One message, which knows its place in the request, so that an error can name it."""

    def __init__(self, index: int, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self._index = index

    @property
    def index(self) -> int:
        return self._index


def read_messages(value: Any) -> list[Message]:
    """Every message with text as its content and objects as the arguments of calls. Raises RequestError.

    Results of parallel calls come in the order of the calls: the format of MiniMax-M3 has no ids. Messages of the
    system in front are one, since the format has one.
    """
    messages = _list("messages", value, MAX_MESSAGES)
    if not messages:
        _refuse("messages", "messages is an empty list", code="empty_prompt")
    read = [Message(i, _read_message(f"messages[{i}]", message)) for i, message in enumerate(messages)]
    return _merge_system(list(_in_call_order(read)))


def _read_message(where: str, value: Any) -> Entry:
    message = _object(where, value)
    role = _text(f"{where}.role", message.get("role"))
    if role == "function":
        _unsupported(f"{where}.role", "'function' is not supported: results have the role 'tool'")
    if role not in _FIELDS:
        _refuse(f"{where}.role", f"{where}.role must be one of {', '.join(_FIELDS)}, got {quote(role)}")
    read: Entry = {"role": role, "content": ""}
    for name, entry in message.items():
        if name in ("role", "content") or entry is None:
            continue
        if name in _FIELDS[role]:
            read[name] = entry
        elif name not in _REFUSED_FIELDS:
            _refuse(f"{where}.{name[:80]}", f"unknown field {quote(name)} in {where}", code="unknown_parameter")
        elif entry not in _EMPTY:
            _unsupported(f"{where}.{name}", f"is not supported: {_REFUSED_FIELDS[name]}")
    for name in ("name", "reasoning_content", "tool_call_id"):
        if name in read:
            _text(f"{where}.{name}", read[name])
    if role == "tool" and "tool_call_id" not in read:
        _missing(f"{where}.tool_call_id")
    if "tool_calls" in read:
        calls = _list(f"{where}.tool_calls", read.pop("tool_calls"), MAX_TOOL_CALLS)
        if calls:
            read["tool_calls"] = [_read_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    content = message.get("content")
    if content is not None:
        read["content"] = _read_content(f"{where}.content", content)
    elif role != "assistant":
        _missing(f"{where}.content")
    return read


def _read_content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _refuse(where, f"{where} must be a string or a list of parts, got {quote(content)}", code="invalid_type")
    texts = []
    for i, value in enumerate(_list(where, content, MAX_PARTS)):
        if type(value) is dict and value.get("type") == "text" and type(value.get("text")) is str:
            texts.append(value["text"])
            continue
        part = _object(f"{where}[{i}]", value)
        kind = _text(f"{where}[{i}].type", part.get("type"))
        if kind != "text":
            _unsupported(f"{where}[{i}].type", f"{quote(kind)} is not supported: the service takes text only")
        texts.append(_text(f"{where}[{i}].text", part.get("text")))
    return "".join(texts)


def _read_call(where: str, value: Any) -> Entry:
    call = _object(where, value)
    if call.get("type", "function") != "function":
        _unsupported(f"{where}.type", f"{quote(call['type'])} is not supported: only 'function'")
    function = _object(f"{where}.function", call.get("function"))
    text = _text(f"{where}.function.arguments", function.get("arguments"))
    try:
        # An empty text is what some clients send for no arguments.
        arguments = from_json(text or "{}", allow_inf_nan=False)
    except ValueError as error:
        _refuse(f"{where}.function.arguments", f"{where}.function.arguments is not valid JSON: {error}")
    if not isinstance(arguments, dict):
        _refuse(f"{where}.function.arguments", f"{where}.function.arguments must be a JSON object, got {quote(text)}")
    return {
        "id": _text(f"{where}.id", call.get("id")),
        "type": "function",
        "function": {"name": _text(f"{where}.function.name", function.get("name")), "arguments": arguments},
    }


def _merge_system(messages: list[Message]) -> list[Message]:
    """One system message where several stand in front. One that comes later has no place in the format."""
    begin = 1 if messages[0]["role"] == "root" else 0
    end = begin
    while end < len(messages) and messages[end]["role"] in SYSTEM_ROLES:
        end += 1
    for message in messages[end:]:
        if message["role"] in SYSTEM_ROLES or message["role"] == "root":
            _unsupported(
                f"messages[{message.index}].role",
                f"{message['role']!r} is not supported here: the model's chat format has it first",
            )
    if end - begin > 1:
        text = "\n\n".join(message["content"] for message in messages[begin:end])
        messages[begin:end] = [Message(messages[begin].index, {**messages[begin], "content": text})]
    return messages


def _in_call_order(messages: list[Message]) -> Iterator[Message]:
    """The results of each assistant message's calls, in the order of the calls: one for each."""
    pending: dict[str, Message | None] = {}  # by the id of the call, in order
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            call_id = message["tool_call_id"]
            if pending.get(call_id, message) is not None:
                where = f"messages[{i}].tool_call_id"
                _refuse(where, f"{where} {quote(call_id)} is not a call of the message before that has no result yet")
            pending[call_id] = message
            if None not in pending.values():
                yield from (result for result in pending.values() if result is not None)
                pending = {}
            continue
        _check_answered(i, pending)
        for call in message.get("tool_calls", ()):
            if call["id"] in pending:
                _refuse(f"messages[{i}].tool_calls", f"messages[{i}].tool_calls has the id {quote(call['id'])} twice")
            pending[call["id"]] = None
        yield message
    _check_answered(len(messages), pending)


def _check_answered(end: int, pending: Mapping[str, Message | None]) -> None:
    missing = [call_id for call_id, result in pending.items() if result is None]
    if missing:
        _refuse("messages", f"before messages[{end}] there is no result for the tool call {quote(missing[0])}")


def read_tools(value: Any) -> list[Entry]:
    """Tools as they were sent, each a function with a name of its own. Raises RequestError."""
    tools = _list("tools", value, MAX_TOOLS)
    names: set[str] = set()
    for i, entry in enumerate(tools):
        where = f"tools[{i}]"
        tool = _object(where, entry)
        _only(where, tool, ("type", "function"))
        if tool.get("type") != "function":
            _unsupported(f"{where}.type", f"{quote(tool.get('type'))} is not supported: only 'function'")
        function = _object(f"{where}.function", tool.get("function"))
        _only(f"{where}.function", function, ("name", "description", "parameters", "strict"))
        name = _text(f"{where}.function.name", function.get("name"))
        if not _TOOL_NAME.fullmatch(name):
            _refuse(
                f"{where}.function.name",
                f"{where}.function.name must have 1 to 64 of a-z, A-Z, 0-9, _ and -, got {quote(name)}",
            )
        if name in names:
            _refuse(f"{where}.function.name", f"{where}.function.name {quote(name)} is there twice")
        names.add(name)
        if function.get("description") is not None:
            _text(f"{where}.function.description", function["description"])
        if function.get("parameters") is not None:
            _object(f"{where}.function.parameters", function["parameters"])
        if not isinstance(function.get("strict"), bool | None):
            _refuse(f"{where}.function.strict", f"{where}.function.strict must be true or false", code="invalid_type")
    return tools


def _only(where: str, value: Entry, names: Iterable[str]) -> None:
    for name in value:
        if name not in names:
            _refuse(f"{where}.{name[:80]}", f"unknown field {quote(name)} in {where}", code="unknown_parameter")


def _list(where: str, value: Any, limit: int) -> list[Any]:
    if not isinstance(value, list):
        _refuse(where, f"{where} must be a list, got {quote(value)}", code="invalid_type")
    check_entries(where, value, limit, param=where)
    return value


def _object(where: str, value: Any) -> Entry:
    if value is None:
        _missing(where)
    if not isinstance(value, dict):
        _refuse(where, f"{where} must be an object, got {quote(value)}", code="invalid_type")
    return value


def _text(where: str, value: Any) -> str:
    if value is None:
        _missing(where)
    if not isinstance(value, str):
        _refuse(where, f"{where} must be a string, got {quote(value)}", code="invalid_type")
    return value


def _missing(where: str) -> NoReturn:
    _refuse(where, f"{where} is required", code="missing_required_parameter")


def _unsupported(where: str, reason: str) -> NoReturn:
    _refuse(where, f"{where}: {reason}", code="unsupported_parameter")


def _refuse(param: str, message: str, *, code: str = "invalid_value") -> NoReturn:
    raise RequestError(message, param=param, code=code)
