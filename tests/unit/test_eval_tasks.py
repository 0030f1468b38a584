"""The synthetic tasks: a solver that knows nothing of how they are made finds their answers in the context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from deploy.demo.vocabulary import train_tokenizer
from service.evaluation.tasks import MAX_HOPS, TASKS, Example, Words, evaluation_rng, example

TOKENIZER = train_tokenizer(3072)
TEXT = np.array(TOKENIZER.encode("def f(x):\n    return x\n\n\nclass A:\n    b = 1\n" * 2000).ids, dtype=np.int32)
LENGTH = 2048
SEEDS = range(4)


def text(rng: np.random.Generator, count: int) -> NDArray[np.int32]:
    start = int(rng.integers(len(TEXT) - count))
    return TEXT[start : start + count]


WORDS = Words.from_tokenizer(TOKENIZER, text)
NO_TEXT = Words.from_tokenizer(TOKENIZER)


def made(task: str, seed: int, *, held_out: bool = True, words: Words = WORDS, length: int = LENGTH) -> Example:
    return example(task, length, np.random.default_rng(seed), words, held_out=held_out)


def answers(found: Example) -> list[tuple[int, int]]:
    """[start, end) of every answer."""
    flags = np.concatenate([[0], found.answer.astype(np.int8), [0]])
    return [(int(a), int(b)) for a, b in np.flatnonzero(np.diff(flags)).reshape(-1, 2)]


class Lines:
    """The lines of a sequence as a reader sees them: `name = value`, with or without what stands before the name."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self.starts = [0, *(i + 1 for i, token in enumerate(self.ids) if WORDS.breaks_line[token])]

    def line_of(self, position: int) -> list[int]:
        """What stands in its line before a position."""
        start = max(start for start in self.starts if start <= position)
        return self.ids[start:position]

    def value_of(self, before_value: list[int], until: int) -> tuple[int, list[int]] | None:
        """Where the latest line that begins so has its value, and the value."""
        for start in reversed(self.starts):
            at = start + len(before_value)
            if at < until and self.ids[start:at] == before_value:
                end = at
                while end < until and not WORDS.breaks_line[self.ids[end]]:
                    end += 1
                return at, self.ids[at:end]
        return None


def latest(candidates: Sequence[tuple[int, list[int]] | None]) -> tuple[int, list[int]]:
    return max(each for each in candidates if each is not None)


def solve(task: str, lines: Lines, start: int) -> tuple[list[int], int, int]:
    """(answer, distance, hops) of the question that ends at `start`."""
    question = lines.line_of(start)
    # Its own line is not its context.
    until = start - len(question)
    if task in ("recall", "needle"):
        at, value = latest([lines.value_of(question, until)])
        return value, start - at, 1
    name = question[len(WORDS.get) :]
    assert question == WORDS.get + name
    if task == "last_write":
        at, value = latest([lines.value_of(WORDS.set + name, until), lines.value_of(question, until)])
        return value, start - at, 1
    hops = 0
    while (found := lines.value_of(WORDS.set + name, until)) is not None:
        at, value = found
        name = value + WORDS.equals
        hops += 1
    return value, start - at, hops


@pytest.mark.parametrize("task", [task for task in TASKS if task != "copy"])
def test_a_solver_finds_every_answer(task: str) -> None:
    count, hops = 0, set()
    for seed in SEEDS:
        found = made(task, seed)
        lines = Lines(found.token_ids.tolist())
        for start, end in answers(found):
            value, distance, steps = solve(task, lines, start)
            assert value[: end - start] == found.token_ids[start:end].tolist()
            # All of the value is asked for, but what the end of the sequence cuts off.
            assert len(value) == end - start or end == LENGTH
            assert set(found.distance[start:end].tolist()) == {distance}
            assert set(found.hops[start:end].tolist()) == {steps}
            hops.add(steps)
            count += 1
    assert count > 20
    assert hops == (set(range(1, MAX_HOPS + 1)) if task == "tracking" else {1})


def test_copies_repeat_what_followed_the_same_tokens() -> None:
    right, count = 0, 0
    for seed in SEEDS:
        found = made("copy", seed)
        ids = found.token_ids
        for i in np.flatnonzero(found.answer):
            distance = found.distance[i]
            assert (ids[i - 4 : i + 1] == ids[i - 4 - distance : i + 1 - distance]).all()
            # The longest earlier context that equals this one foretells the token.
            ends = np.flatnonzero(ids[: i - 1] == ids[i - 1])
            length = [int(np.argmin(np.append(ids[: e + 1][::-1] == ids[i - 1 - e : i][::-1], False))) for e in ends]
            right += ids[ends[int(np.argmax(length))] + 1] == ids[i]
            count += 1
    assert count > 200 and right > 0.98 * count


@pytest.mark.parametrize("task", TASKS)
def test_where_there_is_no_answer_there_is_nothing(task: str) -> None:
    found = made(task, 0)
    assert found.token_ids.shape == found.answer.shape == found.distance.shape == found.hops.shape == (LENGTH,)
    assert (found.token_ids.dtype, found.answer.dtype, found.distance.dtype) == (np.int32, np.bool_, np.int32)
    assert not found.distance[~found.answer].any() and not found.hops[~found.answer].any()
    assert (found.distance[found.answer] > 0).all() and (found.hops[found.answer] > 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides(task: str) -> None:
    first, second, other = (made(task, seed).token_ids.tolist() for seed in (3, 3, 4))
    assert first == second != other


def test_evaluation_has_seeds_of_its_own() -> None:
    draws = {
        tuple(rng.integers(2**32, size=4).tolist())
        for number in range(20)
        for rng in (evaluation_rng(number), evaluation_rng(0, number), np.random.default_rng((0, number)))
    }
    assert len(draws) == 60
    assert evaluation_rng(1, 2).random() == evaluation_rng(1, 2).random()


@pytest.mark.parametrize("task", [task for task in TASKS if task != "needle"])
def test_held_out_words_are_never_used_in_training(task: str) -> None:
    held_out = {WORDS.lists[int(word)][0] for word in WORDS.held_out}
    assert 0.03 < len(held_out) / (len(held_out) + len(WORDS.plain)) < 0.1
    for seed in range(20):
        seen = made(task, seed, held_out=False, words=NO_TEXT).token_ids.tolist()
        assert not held_out & set(seen)
    if task != "copy":
        assert held_out & set(made(task, 0, words=NO_TEXT).token_ids.tolist())


def test_distances_reach_across_the_sequence() -> None:
    for task in TASKS:
        found = [made(task, seed, length=8192) for seed in range(8)]
        distance = np.concatenate([each.distance[each.answer] for each in found])
        for low, high in ((0, 512), (512, 2048), (2048, 8192)):
            assert ((distance >= low) & (distance < high)).mean() > 0.1, (task, low, high)


def test_words_are_what_somebody_types() -> None:
    rng = np.random.default_rng(0)
    for word in rng.choice(len(WORDS.lists), 50):
        ids = WORDS.lists[int(word)]
        typed = TOKENIZER.decode(ids)
        assert typed[0] == " " and typed[1:].isalpha() and TOKENIZER.encode(typed).ids == ids
    shown = TOKENIZER.decode(made("needle", 0).token_ids.tolist())
    questions = [line.strip() for line in shown.split("\n") if line.strip().startswith("# key")]
    assert len(questions) > 10 and all(line.count(" = ") == 1 for line in questions[:-1])


def test_a_small_vocabulary_serves_too() -> None:
    words = Words.from_tokenizer(train_tokenizer(320))
    assert made("recall", 0, words=words).answer.any() and made("tracking", 0, words=words).answer.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sums"}, "task must be one of recall, needle"),
        ({"length": 63}, "length must be at least 64, got 63"),
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"task": "needle", "words": NO_TEXT}, "words.filler must give it"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict[str, object], message: str) -> None:
    given = {"task": "recall", "length": 128, "rng": np.random.default_rng(0), "words": WORDS} | arguments
    with pytest.raises(ValueError, match=message):
        example(**given)  # type: ignore[arg-type]
