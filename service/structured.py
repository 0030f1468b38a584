"""The body fields that say what a text has to match, as OpenAI and vLLM name them, and the GuidedSpec they ask for."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema, field_validator

from engine.errors import RequestError
from engine.guided import MAX_CHOICES
from engine.types import GuidedSpec
from service.request_body import RequestBody, quote

_FORMATS = ("text", "json_object", "json_schema")
# A JSON schema, or the text of one.
_SCHEMA_OR_TEXT = Annotated[Any, WithJsonSchema({"type": ["object", "string", "null"]})]


def _schema_or_text(field: str, value: Any) -> Any:
    if value is not None and not isinstance(value, dict | str):
        raise RequestError(
            f"{field} must be a JSON schema, an object or its text, got {quote(value)}",
            param=field,
            code="invalid_type",
        )
    return value


class NamedSchema(RequestBody):
    """response_format.json_schema. name, description: for the client's own use.  strict: every schema is enforced."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestBody):
    """OpenAI's `response_format`."""

    type: str
    json_schema: NamedSchema | None = None

    def given(self) -> tuple[str, str, Any] | None:
        """(field, kind, what the text must match), None for any text."""
        if self.type not in _FORMATS:
            raise RequestError(
                f"response_format.type must be one of {', '.join(_FORMATS)}, got {quote(self.type)}",
                param="response_format",
            )
        if self.type != "json_schema":
            if self.json_schema is not None:
                raise RequestError(
                    f"response_format.json_schema belongs to the type json_schema, got {self.type}",
                    param="response_format.json_schema",
                )
            return None if self.type == "text" else ("response_format", "json_object", "")
        if self.json_schema is None or self.json_schema.json_schema is None:
            missing = "response_format.json_schema" + ("" if self.json_schema is None else ".schema")
            raise RequestError(f"{missing} is required", param=missing, code="missing_required_parameter")
        return "response_format", "json_schema", self.json_schema.json_schema


class StructuredOutputs(RequestBody):
    """vLLM's `structured_outputs`: one of these."""

    max_entries: ClassVar[dict[str, int]] = {"choice": MAX_CHOICES}

    json_schema: _SCHEMA_OR_TEXT = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @field_validator("json_schema", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        return _schema_or_text("structured_outputs.json", value)

    def given(self) -> list[tuple[str, str, Any]]:
        """(field, kind, what the text must match) of each that is there."""
        values = (
            ("json", "json_schema", self.json_schema),
            ("regex", "regex", self.regex),
            ("choice", "choice", self.choice),
            ("grammar", "grammar", self.grammar),
            ("json_object", "json_object", "" if self.json_object else None),
        )
        return [(f"structured_outputs.{name}", kind, value) for name, kind, value in values if value is not None]


class GuidedFields(RequestBody):
    """What a request may say of the text it wants; at most one of them. The guided_ names are vLLM's older ones."""

    max_entries: ClassVar[dict[str, int]] = {"guided_choice": MAX_CHOICES}

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _SCHEMA_OR_TEXT = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @field_validator("guided_json", mode="before")
    @classmethod
    def _guided_json(cls, value: Any) -> Any:
        return _schema_or_text("guided_json", value)

    @property
    def guided(self) -> GuidedSpec | None:
        """What the text has to match, None for any text. RequestError when several fields say it."""
        named = self._guided_by()
        if named is None:
            return None
        field, kind, value = named
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        try:
            return GuidedSpec(kind, text)
        except RequestError as error:
            raise RequestError(error.message, param=field, code=error.code) from None

    @property
    def guided_param(self) -> str | None:
        """The field that `guided` was read from."""
        named = self._guided_by()
        return None if named is None else named[0]

    def _guided_by(self) -> tuple[str, str, Any] | None:
        values = (
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
        )
        given = [each for each in values if each[2] is not None]
        if self.structured_outputs is not None:
            given += self.structured_outputs.given()
        if self.response_format is not None and (named := self.response_format.given()) is not None:
            given.append(named)
        if len(given) > 1:
            names = " and ".join(field for field, _, _ in given)
            raise RequestError(f"{names}: at most one field may say what the text has to match", param=given[1][0])
        return given[0] if given else None
