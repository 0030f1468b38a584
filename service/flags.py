"""Command line flags made from ServiceSettings: names, types, defaults and help exist once, in the settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Collection
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from engine.config import EngineConfig
from engine.errors import ConfigError
from service.settings import ENVIRONMENT_ONLY, ServiceSettings

_ENGINE_FIELDS = frozenset(field.name for field in dataclasses.fields(EngineConfig))
_INDEX_FIELDS = frozenset({"use_index_cache", "probe_interval"})


def add_settings(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """One flag per setting, or only for those named. A flag that is not given leaves the choice to M3SERVE_* variables
    and defaults."""
    wanted = (ServiceSettings.model_fields.keys() if only is None else set(only)) - ENVIRONMENT_ONLY
    fields = {name: field for name, field in ServiceSettings.model_fields.items() if name in wanted}
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(map(_group, fields))}
    for name, field in fields.items():
        flag = "--" + name.replace("_", "-")
        options: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": _help(field).replace("%", "%%"),
        }
        kind = _kind(field)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is list:
            options |= {"nargs": "+", "metavar": "TEXT"}
        else:
            options["type"] = _json_object if kind is dict else kind
            options["metavar"] = {int: "N", float: "X", dict: "JSON"}.get(kind, "TEXT")
        groups[_group(name)].add_argument(flag, **options)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line."""
    return {name: value for name, value in vars(args).items() if name in ServiceSettings.model_fields}


def make_settings(**values: Any) -> ServiceSettings:
    """Settings from these values and the environment; ConfigError names flag, limit and value."""
    try:
        return ServiceSettings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        flag = f"--{name.replace('_', '-')} (M3SERVE_{name.upper()})"
        raise ConfigError(f"{flag}: {first['msg']}, got {first['input']!r}") from None


def _group(name: str) -> str:
    if name.startswith(("index_", "audit_")) or name in _INDEX_FIELDS:
        return "index cache"
    return "model and engine" if name in _ENGINE_FIELDS else "service"


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    default = field.get_default(call_default_factory=True)
    if field.is_required() or default is None or default == [] or "default:" in text:
        return text
    shown = json.dumps(default) if isinstance(default, bool | dict) else default
    return f"{text} (default: {shown})"


def _kind(field: FieldInfo) -> type:
    """The plain type behind `X` or `X | None`."""
    annotation: Any = field.annotation
    if isinstance(annotation, types.UnionType):
        [annotation] = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
    kind = typing.get_origin(annotation) or annotation
    assert isinstance(kind, type), f"no flag can be made for {annotation}"
    return kind


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value
