"""Batches of training text and synthetic tasks, each a function of (seed, phase, number) alone.

Worker processes make them ahead of time; text is cut from one long stream of documents, in which files of a package
stand side by side.
"""

from __future__ import annotations

import lzma
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploy.demo.schedule import MICRO_BATCHES, Phase
from service.evaluation.tasks import Words, example

# Shares of the synthetic sequences.
TASK_SHARES = {"recall": 0.35, "needle": 0.25, "tracking": 0.2, "copy": 0.15, "last_write": 0.05}
ANSWER_WEIGHT = 0.5
_AHEAD = 12


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens, targets: int32 [batch, length].  weight: float32 [batch, length]: text tokens sum to 1, answers to
    ANSWER_WEIGHT.  answers: bool [batch, length], whether the target is an answer.  distance: int32 [batch, length], of
    an answer from what it repeats.  queries: int64 [batch, queries], sorted positions that train the indexers.
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    weight: NDArray[np.float32]
    answers: NDArray[np.bool_]
    distance: NDArray[np.int32]
    queries: NDArray[np.int64]


class TextStream:
    """All training tokens in memory, uint16, and windows of them in an order that a seed gives."""

    def __init__(self, directory: Path) -> None:
        files = sorted(directory.glob("train.*.xz"), key=lambda file: int(file.name.split(".")[1]))
        if not files:
            raise FileNotFoundError(f"{directory} holds no train.*.xz: make it with python -m deploy.demo.corpus")
        with ThreadPoolExecutor() as pool:
            parts = list(pool.map(lambda file: lzma.decompress(file.read_bytes()), files))
        self.tokens = np.concatenate([np.frombuffer(part, dtype=np.uint16) for part in parts])

    def window(self, number: int, length: int, seed: int) -> NDArray[np.int32]:
        """Window `number` of an endless series: every epoch cuts the stream elsewhere and takes another order."""
        count = (len(self.tokens) - length) // length
        epoch, place = divmod(number, count)
        rng = np.random.default_rng((seed, epoch))
        offset = int(rng.integers(length))
        # A permutation of [0, count) that needs no table: a multiplication by a unit modulo a prime, cycle-walked.
        start = _permute(place, count, rng) * length + offset
        return self.tokens[start : start + length].astype(np.int32)

    def filler(self, rng: np.random.Generator, length: int) -> NDArray[np.int32]:
        """Text for tasks that are set in text."""
        start = int(rng.integers(len(self.tokens) - length))
        return self.tokens[start : start + length].astype(np.int32)


def _permute(place: int, count: int, rng: np.random.Generator) -> int:
    prime = _next_prime(count)
    factor, shift = int(rng.integers(1, prime)), int(rng.integers(prime))
    while True:
        place = (place * factor + shift) % prime
        if place < count:
            return place


def _next_prime(number: int) -> int:
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number


def make_batch(
    stream: TextStream, words: Words, phase: Phase, number: int, length: int, batch_tokens: int, seed: int
) -> Batch:
    """Micro-batch `number` of a phase, `batch_tokens` tokens in rows of `length`."""
    rows = batch_tokens // length
    ids = np.empty((rows, length + 1), dtype=np.int32)
    answers = np.zeros((rows, length), dtype=bool)
    distance = np.zeros((rows, length), dtype=np.int32)
    text_rows = np.zeros(rows, dtype=bool)
    queries = np.empty((rows, max(1, length // 32)), dtype=np.int64)
    rng = np.random.default_rng((seed, _code(phase.name), number))
    num_tasks = int(phase.synthetic * rows + rng.random())
    names, shares = list(TASK_SHARES), np.array(list(TASK_SHARES.values()))
    for row in range(rows):
        if row >= num_tasks:
            ids[row] = stream.window(number * rows + row, length + 1, seed + _code(phase.name))
            text_rows[row] = True
        else:
            made = example(names[rng.choice(len(names), p=shares / shares.sum())], length + 1, rng, words)
            ids[row], answers[row], distance[row] = made.token_ids, made.answer[1:], made.distance[1:]
        queries[row] = _queries(answers[row], queries.shape[1], rng)
    weight = np.zeros((rows, length), dtype=np.float32)
    weight[text_rows] = 1.0 / max(1, text_rows.sum() * length)
    # A sequence with many answers counts for more, but not in proportion: copies have hundreds.
    per_row = 1.0 / np.sqrt(np.maximum(1, answers.sum(1, keepdims=True)))
    asked = answers * per_row
    weight += (ANSWER_WEIGHT / max(1.0, asked.sum()) * asked).astype(np.float32)
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), weight, answers, distance, queries)


def _queries(answers: NDArray[np.bool_], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions whose attention teaches the indexer: up to half of them answers, the others anywhere past block 1."""
    length = len(answers)
    asked = np.flatnonzero(answers)
    asked = rng.permutation(asked[asked >= min(256, length // 2)])[: count // 2]
    others = rng.integers(min(256, length // 2), length, count - len(asked))
    return np.sort(np.concatenate([asked, others]))


def _code(name: str) -> int:
    return int.from_bytes(name.encode()[:6], "big")


class Feeder:
    """Batches of a phase in order, made by worker processes a few steps ahead."""

    def __init__(self, directory: Path, words: Words, *, batch_tokens: int, seed: int, workers: int) -> None:
        self._settings = (batch_tokens, seed)
        self._pool: ProcessPoolExecutor | None = None
        self.text = TextStream(directory)
        _Worker.stream, _Worker.words = self.text, words
        words.filler = self.text.filler
        if workers:
            # Forked, so that all share the stream; before the first use of a GPU, which does not survive a fork.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(workers, mp_context=context)
            list(self._pool.map(_warm, range(workers)))

    def batches(self, phase: Phase, start: int, stride: int) -> Iterator[Batch]:
        """Micro-batches start, start + stride, ... of a phase; all of a step have one length."""
        waiting: deque[Future[Batch]] = deque()
        number = start

        def arguments() -> tuple[Phase, int, int, int, int]:
            length = phase.length(number // MICRO_BATCHES)
            return phase, number, length, *self._settings

        while True:
            if self._pool is None:
                yield _make(*arguments())
                number += stride
                continue
            while len(waiting) < _AHEAD:
                waiting.append(self._pool.submit(_make, *arguments()))
                number += stride
            yield waiting.popleft().result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class _Worker:
    """What forked workers find in memory."""

    stream: TextStream
    words: Words


def _warm(_: int) -> None:
    pass


def _make(phase: Phase, number: int, length: int, batch_tokens: int, seed: int) -> Batch:
    return make_batch(_Worker.stream, _Worker.words, phase, number, length, batch_tokens, seed)


def load_words(tokenizer: Path) -> Words:
    """The vocabulary of the tasks, from tokenizer.json; its filler is set by who has text."""
    return Words.from_tokenizer(Tokenizer.from_file(str(tokenizer)))
