"""Flags of the evaluation that do not come from the settings. Loads no library of the service."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import PAGE_SIZE, ModelConfig
from engine.errors import ConfigError
from service.evaluation.data import Data, Sizes, make_data
from service.evaluation.documents import read_documents, shipped_documents
from service.evaluation.progress import say
from service.evaluation.tasks import TASKS

_DEFAULT_LENGTH = 8192


@dataclass(frozen=True, slots=True)
class Choice:
    """What the flags of `add_data_flags` said."""

    documents: Path
    documents_count: int
    examples: int
    length: int | None
    tasks: tuple[str, ...]
    data_seed: int


def add_data_flags(parser: argparse._ActionsContainer, *, documents: str, count: int, examples: str, seed: int) -> None:
    """Flags that choose documents, tasks and sizes, for `choice`.

    documents: which ones come with the package for this.  count: of documents.  examples: what a sequence per task is
    for.  seed: of the tasks.
    """
    parser.add_argument(
        "--documents", type=Path, metavar="PATH",
        help=f"text: a directory, a text file or a .jsonl(.xz) file; default: {documents}",
    )  # fmt: skip
    parser.add_argument(
        "--documents-count", type=int, default=count, metavar="N", help=f"documents at most; 0: none ({count})"
    )
    parser.add_argument("--examples", type=int, default=2, metavar="N", help=f"{examples}; 0: none (2)")
    parser.add_argument(
        "--length", type=int, metavar="N",
        help="tokens of every document and sequence; default: 8192, or what the model takes less one",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", default=",".join(TASKS), metavar="NAME,NAME", help=f"of {', '.join(TASKS)}; default: all"
    )
    parser.add_argument("--data-seed", type=int, default=seed, metavar="N", help=f"of the tasks ({seed})")


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    """The data flags of an evaluation, and where its JSON goes."""
    add_data_flags(
        parser,
        documents="those that come with the package for this, of which the demo checkpoint has seen nothing",
        count=8,
        examples="sequences per task",
        seed=0,
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything there as JSON")


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE of a setting of the engine; VALUE is JSON or text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r}: expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def choice(args: argparse.Namespace) -> Choice:
    """The parsed flags."""
    return Choice(
        documents=args.documents or shipped_documents(),
        documents_count=args.documents_count,
        examples=args.examples,
        length=args.length,
        tasks=tuple(task for task in args.tasks.split(",") if task),
        data_seed=args.data_seed,
    )


def data_for(
    directory: Path, model: ModelConfig, chosen: Choice, *, max_model_len: int | None, command: str = "eval"
) -> Data:
    """The data for a checkpoint. max_model_len: of the engine; default: the checkpoint's limit.  command: that tells
    how much there is.

    Raises ConfigError for sizes that the engine would not take.
    """
    # The engine wants room for one more token than a prompt has.
    limit = (max_model_len or model.max_positions) - 1
    length = chosen.length if chosen.length is not None else min(_DEFAULT_LENGTH, limit)
    if length > limit:
        raise ConfigError(f"--length {length}: the model takes {limit} tokens and one more")
    sizes = Sizes(
        length=length,
        documents=chosen.documents_count,
        examples=chosen.examples,
        seed=chosen.data_seed,
        skip_tokens=model.topk_blocks * PAGE_SIZE,
        tasks=chosen.tasks,
    )
    data = make_data(directory, read_documents(chosen.documents), sizes)
    say(
        f"{len(data.documents)} documents and {len(data.sequences)} synthetic sequences of {length} tokens, "
        f"{len(data.answers)} questions",
        command,
    )
    return data
