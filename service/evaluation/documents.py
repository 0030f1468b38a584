"""Texts to evaluate on: those that come with the package, or the user's own."""

from __future__ import annotations

import importlib.resources
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

# Whole packages, of which the demo checkpoint has seen nothing, by what they are for.
_SHIPPED = "demo/held_out/{}.jsonl.xz"
_SUFFIXES = frozenset({".py", ".pyi", ".md", ".rst", ".txt"})
_JSON_LINES = (".jsonl", ".jsonl.xz")


@dataclass(frozen=True, slots=True)
class Document:
    """One text and a name for it."""

    name: str
    text: str


def shipped_documents(purpose: str = "test") -> Path:
    """The held-out documents that come with the package. purpose: test, or calibration: they have none in common."""
    return Path(str(importlib.resources.files("deploy") / _SHIPPED.format(purpose)))


def read_documents(path: Path) -> list[Document]:
    """Every text file of a directory, in the order of their paths; the lines of a .jsonl or .jsonl.xz file, each with
    `text` and perhaps `package` and `path`; or one file as one document.

    Raises ConfigError naming what cannot be read, or when there is no text.
    """
    try:
        documents = [document for document in _read(path) if document.text]
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ConfigError(f"--documents {path} cannot be read: {error}") from error
    if not documents:
        kinds = ", ".join(sorted(_SUFFIXES))
        raise ConfigError(f"--documents {path} holds no text: expected files of {kinds}, or a .jsonl file")
    return documents


def _read(path: Path) -> Iterator[Document]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in _SUFFIXES and file.is_file():
                yield Document(file.relative_to(path).as_posix(), file.read_text(encoding="utf-8", errors="replace"))
    elif path.name.endswith(_JSON_LINES):
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        yield from _parse(path, data.decode().splitlines())
    else:
        yield Document(path.name, path.read_text(encoding="utf-8"))


def _parse(path: Path, lines: Iterable[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"--documents {path}, line {number} is not JSON: {error}") from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f'--documents {path}, line {number} needs "text", a string')
        name = "/".join(str(row[key]) for key in ("package", "path") if key in row)
        yield Document(name or f"line {number}", text)
