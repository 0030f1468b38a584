"""Signatures of AITER's functions as text: of the released wheel and of a later state of its sources.

Nothing of AITER is imported: signatures are read from its sources, and calls are bound to them.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("signatures.json")
# Where functions are defined that packages further up only pass on.
DEFINED_IN = {
    "aiter.fused_qknorm_idxrqknorm": "aiter/ops/fused_qknorm_idxrqknorm.py",
    "aiter.reshape_and_cache": "aiter/ops/cache.py",
    "aiter.reshape_and_cache_with_pertoken_quant": "aiter/ops/cache.py",
    "aiter.biased_grouped_topk": "aiter/ops/topk.py",
    "aiter.topk_gating": "aiter/ops/topk.py",
}


@dataclass(frozen=True)
class Source:
    """One state of AITER. functions: dotted path -> its parameters, as in a def statement."""

    origin: str
    functions: Mapping[str, str]

    def signature(self, path: str) -> inspect.Signature:
        """Raises AttributeError when there is no such function."""
        if path not in self.functions:
            raise AttributeError(f"not in {self.origin}")
        return parse(self.functions[path])


def load() -> dict[str, Source]:
    """The committed signatures, by the name of the source."""
    found = json.loads(FILE.read_text())
    return {name: Source(each["origin"], each["functions"]) for name, each in found.items()}


def parse(parameters: str) -> inspect.Signature:
    """Parameters without annotations; a default that is no literal stays text."""
    [definition] = ast.parse(f"def function({parameters}): ...").body
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    kinds = [inspect.Parameter.POSITIONAL_ONLY] * len(arguments.posonlyargs)
    kinds += [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(arguments.args)
    found = [_parameter(*each) for each in zip(positional, kinds, defaults, strict=True)]
    if arguments.vararg:
        found.append(inspect.Parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(_parameter(each, inspect.Parameter.KEYWORD_ONLY, default))
    if arguments.kwarg:
        found.append(inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(found)


def _parameter(argument: ast.arg, kind: inspect._ParameterKind, default: ast.expr | None) -> inspect.Parameter:
    value: object = inspect.Parameter.empty
    if default is not None:
        try:
            value = ast.literal_eval(default)
        except ValueError:
            value = ast.unparse(default)
    return inspect.Parameter(argument.arg, kind, default=value)


def read_source(directory: Path) -> Source:
    """Signatures of the functions of signatures.json as a directory with the package `aiter` in it has them."""
    paths = {path for source in load().values() for path in source.functions}
    functions = {path: text for path in sorted(paths) if (text := _read(directory, path)) is not None}
    return Source(str(directory), functions)


def _read(directory: Path, path: str) -> str | None:
    module, _, name = path.rpartition(".")
    file = directory / DEFINED_IN.get(path, f"{module.replace('.', '/')}.py")
    if not file.exists():
        return None
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            node = next(each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
            del node.args.args[0]
            name = node.name
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            return ast.unparse(node.args)
    return None
