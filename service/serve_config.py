"""Checks a Serve config file before it is deployed: Ray takes keys that it does not know, and ignores them.

A misspelt `health_check_timeout_s` would silently mean the default, a misspelt setting in `args` a failed
deployment minutes later.
"""

from __future__ import annotations

import difflib
import importlib.util
import typing
from collections.abc import Collection, Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from engine.errors import ConfigError
from service.settings import ServiceSettings

IMPORT_PATH = "service.app:build"
# What only `m3serve serve` uses, and where the same is said in a Serve config.
_ELSEWHERE = {
    "host": "set http_options.host",
    "port": "set http_options.port",
    "metrics_port": "the exporter has its own command line (python -m service.exporter)",
    "ray_metrics_port": "ray start has --metrics-export-port",
    "tls_cert_file": "set http_options.ssl_certfile",
    "tls_key_file": "set http_options.ssl_keyfile",
    "api_keys": "a file is no place for secrets: set api_key_file, or the variable M3SERVE_API_KEYS of Ray's processes",
}


def check_file(path: str | Path) -> dict[str, Any]:
    """The document in the file at `path`, checked. Raises ConfigError, which names the file and the key."""
    try:
        # A loader of safe YAML: it makes plain data alone.
        document = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    try:
        check(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    checked: dict[str, Any] = document
    return checked


def check(document: object) -> None:
    """Check the content of a Serve config: every key is known, every value fits, the application can be found.

    `args` of this application are checked as settings, those of others are theirs. Raises ConfigError.
    """
    if not isinstance(document, dict):
        raise ConfigError(f"a Serve config is a mapping with the key applications, got {type(document).__name__}")
    _check_keys(ServeDeploySchema, document, "")
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        raise _config_error(error, ()) from None
    for index, application in enumerate(document["applications"]):
        _check_application(application, f"applications[{index}]")


def _check_application(application: dict[str, Any], where: str) -> None:
    import_path = application["import_path"]
    module, _, attribute = import_path.partition(":")
    if not attribute:
        module, _, attribute = import_path.rpartition(".")
    if f"{module}:{attribute}" != IMPORT_PATH:
        near = difflib.get_close_matches(import_path, [IMPORT_PATH], cutoff=0.8)
        hint = f"; the nearest is {IMPORT_PATH}" if near else ""
        if near or not _can_be_found(module):
            raise ConfigError(f"{where}.import_path {import_path}: there is nothing to import{hint}")
        return
    args = application.get("args") or {}
    _refuse_unknown(args, ServiceSettings.model_fields, f"{where}.args")
    for name, instead in _ELSEWHERE.items():
        if name in args:
            raise ConfigError(f"{where}.args.{name}: does not belong in a Serve config; {instead}")
    try:
        ServiceSettings(**args).engine_config()
    except ValidationError as error:
        raise _config_error(error, (*_steps(where), "args")) from None
    except ConfigError as error:
        raise ConfigError(f"{where}.args: {error}") from None


def _can_be_found(module: str) -> bool:
    try:
        return bool(module) and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _check_keys(model: type[BaseModel], value: dict[Any, Any], where: str) -> None:
    """Refuse keys that `model` has no field for, here and in every model below."""
    _refuse_unknown(value, {field.alias or name for name, field in model.model_fields.items()}, where)
    for name, field in model.model_fields.items():
        path = f"{where}.{name}" if where else name
        inner = value.get(name)
        if name == "runtime_env" and isinstance(inner, dict):
            _refuse_unknown(inner, RuntimeEnv.known_fields, path)
            continue
        for below in _models(field.annotation):
            if isinstance(inner, dict):
                _check_keys(below, inner, path)
            elif isinstance(inner, list):
                for index, item in enumerate(inner):
                    if isinstance(item, dict):
                        _check_keys(below, item, f"{path}[{index}]")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation such as `list[Model] | None`."""
    arguments = typing.get_args(annotation)
    for argument in arguments:
        yield from _models(argument)
    if not arguments and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _refuse_unknown(given: dict[Any, Any], known: Collection[str], where: str) -> None:
    for key in given:
        if key not in known:
            path = f"{where}.{key}" if where else str(key)
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(f"{path}: there is no such key" + (f"; the nearest is {near[0]}" if near else ""))


def _config_error(error: ValidationError, prefix: tuple[str | int, ...]) -> ConfigError:
    """The first of pydantic's errors, as ours."""
    first = error.errors(include_url=False)[0]
    path = ""
    for step in (*prefix, *first["loc"]):
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return ConfigError(f"{path.removeprefix('.') or 'the config'}: {first['msg']}, got {first['input']!r}")


def _steps(where: str) -> tuple[str | int, ...]:
    name, _, index = where.rstrip("]").partition("[")
    return (name, int(index))


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: the last would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            # A merge key may stand beside keys that it sets.
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)
