"""What is evaluated: documents and synthetic sequences, fixed by tokenizer, documents, sizes and seed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from engine.errors import ConfigError
from engine.tokenizer import Tokenizer
from service.evaluation.documents import Document
from service.evaluation.tasks import MIN_LENGTH, TASKS, evaluation_rng, example
from service.evaluation.words import Words

# Bounds of the buckets, in tokens.
POSITIONS = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)
DISTANCES = (0, 128, *POSITIONS[1:])
# Tokens of a sequence per name, chain or span in it.
_DENSITY = {"recall": 64, "needle": 256, "copy": 512, "tracking": 256, "last_write": 512}
# Tokens that must be the same for a position to be a copy.
_COPY_CONTEXT = 3


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is evaluated. length: tokens of every sequence.  documents: at most.  examples: sequences per task.
    skip_tokens: positions below it attend to every block, under any plan."""

    length: int
    documents: int
    examples: int
    seed: int
    skip_tokens: int
    tasks: tuple[str, ...] = TASKS

    def __post_init__(self) -> None:
        for name, low in (("length", MIN_LENGTH), ("documents", 0), ("examples", 0), ("seed", 0), ("skip_tokens", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.documents and not (self.examples and self.tasks):
            raise ConfigError("documents=0 and examples=0: there is nothing to evaluate")
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ConfigError(f"tasks must be of {', '.join(TASKS)}, got {unknown[0]!r}")


@dataclass(frozen=True, slots=True)
class Answers:
    """Every question of the synthetic sequences; all arrays have one entry per question.

    sequence: which sequence.  task: index into Sizes.tasks.  start, end: positions of the answer's tokens.
    distance: from what it repeats, in tokens.  hops: lines from question to value.
    """

    sequence: NDArray[np.int64]
    task: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    distance: NDArray[np.int64]
    hops: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.task)


@dataclass(frozen=True, slots=True)
class Data:
    """What every plan is evaluated on.

    documents: token ids of each, all of one length.  names: theirs.  token_bytes: int64 [documents, length], of text.
    far_copy: bool [documents, length], tokens that repeat what followed the same three tokens, last seen more than
    skip_tokens before.  sequences: token ids of the synthetic ones.  sha256: of all token ids.
    """

    sizes: Sizes
    names: list[str]
    documents: list[list[int]]
    token_bytes: NDArray[np.int64]
    far_copy: NDArray[np.bool_]
    sequences: list[list[int]]
    answers: Answers
    sha256: str = field(default="")

    @property
    def num_tokens(self) -> int:
        return self.sizes.length * (len(self.documents) + len(self.sequences))


def make_data(directory: Path, texts: Sequence[Document], sizes: Sizes) -> Data:
    """Tokenise the texts with the tokenizer of a checkpoint directory and make the synthetic sequences.

    Only documents with `sizes.length` tokens count, cut to it. Raises ConfigError when there are none, CheckpointError
    for a bad tokenizer.
    """
    tokenizer = Tokenizer.from_dir(directory)
    encoded = tokenizer.encode_batch([text.text for text in texts])
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    long = [i for i, ids in enumerate(encoded) if len(begin) + len(ids) >= sizes.length]
    if sizes.documents and not long:
        longest = max(map(len, encoded), default=0)
        raise ConfigError(
            f"no document has --length {sizes.length} tokens: the longest of {len(encoded)} has {longest}"
        )
    # Evenly spread: neighbours are often of one kind.
    chosen = [long[i] for i in _spread(len(long), sizes.documents)]
    documents = [(begin + encoded[i])[: sizes.length] for i in chosen]
    sequences: list[list[int]] = []
    answers = _no_answers()
    if sizes.examples:
        words = _words(directory, encoded)
        sequences, answers = _synthetic(words, sizes)
    digest = hashlib.sha256()
    for ids in [*documents, *sequences]:
        digest.update(np.array(ids, dtype="<i4").tobytes())
    token_bytes = [[len(tokenizer.token_bytes(token)) for token in ids] for ids in documents]
    return Data(
        sizes=sizes,
        names=[texts[i].name for i in chosen],
        documents=documents,
        token_bytes=np.array(token_bytes, dtype=np.int64).reshape(len(documents), sizes.length),
        far_copy=np.array([far_copies(ids, sizes.skip_tokens) for ids in documents], dtype=bool).reshape(
            len(documents), sizes.length
        ),
        sequences=sequences,
        answers=answers,
        sha256=digest.hexdigest(),
    )


def far_copies(token_ids: Sequence[int], min_distance: int) -> NDArray[np.bool_]:
    """bool [length]: tokens that follow the same three tokens as the last time, which ended more than `min_distance`
    tokens before: what a model can only know from far away."""
    found = np.zeros(len(token_ids), dtype=bool)
    last: dict[tuple[int, ...], int] = {}
    for i in range(_COPY_CONTEXT, len(token_ids)):
        context = tuple(token_ids[i - _COPY_CONTEXT : i])
        earlier = last.get(context)
        found[i] = earlier is not None and i - earlier > min_distance and token_ids[earlier] == token_ids[i]
        last[context] = i
    return found


def _spread(count: int, wanted: int) -> list[int]:
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def _words(directory: Path, encoded: Sequence[list[int]]) -> Words:
    try:
        words = Words.from_tokenizer(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))
    except ValueError as error:
        raise ConfigError(f"{directory}: {error}; --examples 0 leaves the tasks out") from None
    text = np.array(list(itertools.chain.from_iterable(encoded)), dtype=np.int32)

    def filler(rng: np.random.Generator, count: int) -> NDArray[np.int32]:
        if len(text) < count:
            raise ConfigError(f"the documents have {len(text)} tokens in all, the tasks need {count} in a row")
        start = int(rng.integers(len(text) - count + 1))
        return text[start : start + count]

    words.filler = filler
    return words


def _synthetic(words: Words, sizes: Sizes) -> tuple[list[list[int]], Answers]:
    sequences: list[list[int]] = []
    rows: list[tuple[int, int, int, int, int, int]] = []
    for task_id, task in enumerate(sizes.tasks):
        for number in range(sizes.examples):
            # Seeded by name: which other tasks run changes nothing.
            rng = evaluation_rng(sizes.seed, TASKS.index(task), number)
            made = example(task, sizes.length, rng, words, pairs=max(4, sizes.length // _DENSITY[task]), held_out=True)
            for start, end in _runs(made.answer, single=task == "copy"):
                rows.append((len(sequences), task_id, start, end, int(made.distance[start]), int(made.hops[start])))
            sequences.append(made.token_ids.tolist())
    table = np.array(rows, dtype=np.int64).reshape(len(rows), 6)
    return sequences, Answers(*table.T)


def _no_answers() -> Answers:
    return Answers(*np.zeros((6, 0), dtype=np.int64))


def _runs(answer: NDArray[np.bool_], *, single: bool) -> list[tuple[int, int]]:
    """[start, end) of each answer: tokens in a row, or every token by itself."""
    if single:
        return [(int(i), int(i) + 1) for i in np.flatnonzero(answer)]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], answer.astype(np.int8), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
