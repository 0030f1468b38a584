"""What every request body has in common: it is read strictly, within bounds, and refused by the name of a field."""

from __future__ import annotations

import difflib
import json
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from engine.errors import RequestError

# Of one object: no body has more, and each one that is unknown would cost an error of its own.
MAX_FIELDS = 64
_MAX_QUOTE_CHARS = 80

Body = TypeVar("Body", bound="RequestBody")

# What a value should have been, by the kind of pydantic's complaint.
_WANTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


class RequestBody(BaseModel):
    """Base of all request bodies. `parse` is the way in."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())

    # Fields of the same API elsewhere that are not honoured here, with the reason.
    refused: ClassVar[dict[str, str]] = {}
    # Fields that are read and change nothing, with the reason why that is true to what they ask for.
    tolerated: ClassVar[dict[str, str]] = {}
    # Lists and objects that are counted before their entries are looked at: an error per entry of a large body takes
    # minutes and gigabytes.
    max_entries: ClassVar[dict[str, int]] = {}

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if isinstance(value, dict):
            check_entries("the body", value, MAX_FIELDS, param=None)
            for name, limit in cls.max_entries.items():
                if isinstance(entries := value.get(name), list | dict):
                    check_entries(name, entries, limit, param=name)
            # null is "not given", of a refused field too.
            return {name: entry for name, entry in value.items() if entry is not None or name not in cls.refused}
        return value

    @classmethod
    def parse(cls: type[Body], body: bytes) -> Body:
        """Read a body; RequestError names the field, what it must be, and what was sent."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            if first["type"] == "json_invalid":
                raise _invalid_json(body, first) from None
            raise cls._refusal(first) from None

    @classmethod
    def _refusal(cls, error: ErrorDetails) -> RequestError:
        names = [str(part)[:_MAX_QUOTE_CHARS] for part in error["loc"] if not isinstance(part, int)]
        param = ".".join(names) or None
        path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"])
        where = path.lstrip(".")[: 2 * _MAX_QUOTE_CHARS] or "the body"
        kind = error["type"]
        if kind == "extra_forbidden":
            return cls._unknown_field(param or "")
        if kind == "missing":
            return RequestError(f"{where} is required", param=param, code="missing_required_parameter")
        if wanted := _WANTED.get(kind):
            message = f"{where} must be {wanted}, got {quote(error['input'])}"
            return RequestError(message, param=param, code="invalid_type")
        return RequestError(f"{where}: {error['msg']}, got {quote(error['input'])}", param=param)

    @classmethod
    def _unknown_field(cls, name: str) -> RequestError:
        if reason := cls.refused.get(name):
            return RequestError(f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")
        close = difflib.get_close_matches(name, cls.model_fields, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return RequestError(f"unknown field {name!r}{hint}", param=name, code="unknown_parameter")


def quote(value: Any) -> str:
    """A value for an error message, as JSON and shortened: it came from outside and may be huge."""
    if isinstance(value, list | dict):
        below = value.values() if isinstance(value, dict) else value
        if len(value) > 8 or any(isinstance(entry, list | dict) for entry in below):
            return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} entries"
    if isinstance(value, str) and len(value) > _MAX_QUOTE_CHARS:
        return f"a string of {len(value)} characters"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_QUOTE_CHARS else f"{text[:_MAX_QUOTE_CHARS]}..."


def check_entries(name: str, entries: list[Any] | dict[Any, Any], limit: int, *, param: str | None) -> None:
    """RequestError when there are more than `limit`."""
    if len(entries) > limit:
        raise RequestError(f"{name} has {len(entries)} entries, at most {limit} are allowed", param=param)


def _invalid_json(body: bytes, error: ErrorDetails) -> RequestError:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as broken:
        byte = body[broken.start]
        message = f"the body is not valid UTF-8: byte 0x{byte:02x} at offset {broken.start}"
        return RequestError(message, code="invalid_utf8")
    reason = error.get("ctx", {}).get("error", error["msg"])
    return RequestError(f"the body is not valid JSON: {reason}", code="invalid_json")
