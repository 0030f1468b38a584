"""Synthetic long-context tasks: seeded, fast, in the form of lines that a user can type.

recall: ` name = value` lines, each repeated later.  needle: `# key name = value` in real text.  copy: a span that comes
again.  tracking: `# set name = value`, `# set other = name`, ..., `# get other = value`.  last_write: a name that is
set several times; `# get` wants the latest value.  Only the value that a repeated line, a `# get` or a copy ends in can
be predicted: these tokens are the answers.

Seeds: training passes a generator made from at most four words of entropy and no spawn key, as
`np.random.default_rng((seed, phase, number))` does; `evaluation_rng` makes the others with a spawn key, so that the two
never meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.evaluation.words import Words

__all__ = ["MAX_HOPS", "MIN_LENGTH", "TASKS", "Example", "Words", "evaluation_rng", "example"]

MIN_LENGTH = 64
MAX_HOPS = 4
_EVALUATION = 0x6576616C
# Tokens of a repeated span that tell which one it is; the others are answers.
_COPY_PREFIX = 4
# Between two lines that belong together, the lines between them not counted.
_MIN_DISTANCE = 16
_NOISE_LINE = 8


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence.

    token_ids: int32 [length].  answer: bool [length], tokens that follow from the context.  distance: int32 [length],
    of an answer, from the line that last gave the value (an earlier answer may have), in tracking from the first line
    of its chain; 0 elsewhere.  hops: int32 [length], of an answer, how many lines lead from the question to the value;
    0 elsewhere.
    """

    token_ids: NDArray[np.int32]
    answer: NDArray[np.bool_]
    distance: NDArray[np.int32]
    hops: NDArray[np.int32]


def evaluation_rng(seed: int, *numbers: int) -> np.random.Generator:
    """A generator that no training run has. seed, numbers: non-negative."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_EVALUATION, *numbers)))


def example(
    task: str,
    length: int,
    rng: np.random.Generator,
    words: Words,
    *,
    pairs: int | None = None,
    held_out: bool = False,
) -> Example:
    """One sequence of `length` tokens.

    pairs: how many names (recall, needle, last_write), chains (tracking) or spans (copy); drawn up to what fills about
    half of the sequence when not given. What does not fit is left out.  held_out: name things by held-out words, for
    evaluation.  ValueError for an unknown task, a short length, or the needle task without filler.
    """
    if task not in _MAKERS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if length < MIN_LENGTH:
        raise ValueError(f"length must be at least {MIN_LENGTH}, got {length}")
    if pairs is not None and pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    if task == "needle" and words.filler is None:
        raise ValueError("the needle task is set in text: words.filler must give it")
    return _MAKERS[task](length, rng, words, pairs, held_out)


class _Lines:
    """The lines of one example, in their order, and the layout among other text."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._tokens: list[int] = []
        self._widths: list[int] = []
        self._value_at: list[int] = []
        self._sources: list[int] = []
        self._hops: list[int] = []
        self._answer: list[bool] = []

    def add(self, head: list[int], value: list[int], tail: list[int], source: int = -1, hops: int = 0) -> int:
        """Append a line and return its number.  source: the line whose value this one asks for; -1: none."""
        asks = source >= 0
        self._tokens += head
        self._tokens += value
        self._tokens += tail
        self._widths.append(len(head) + len(value) + len(tail))
        self._value_at.append(len(head))
        self._sources.append(source)
        self._hops.append(hops)
        self._answer += [False] * len(head) + [asks] * len(value) + [False] * len(tail)
        return len(self._widths) - 1

    def lay_out(
        self,
        places: NDArray[np.float64],
        length: int,
        text: Callable[[int], NDArray[np.int32]],
        *,
        between_lines: bool = True,
    ) -> Example:
        """places: float64 [lines], ascending in [0, 1).  text: gives n tokens to stand around the lines, which begin
        after one of its line breaks if `between_lines`."""
        widths = np.array(self._widths, dtype=np.int64)
        ends = widths.cumsum()
        count = int(np.searchsorted(ends, length, side="right"))
        widths, total = widths[:count], int(ends[count - 1]) if count else 0
        before = ends[:count] - widths
        around = text(length - total)
        gaps = (places[:count] * (length - total + 1)).astype(np.int64)
        if between_lines:
            breaks = np.concatenate([[0], np.flatnonzero(self._words.breaks_line[around]) + 1])
            gaps = breaks[np.searchsorted(breaks, gaps, side="right") - 1]
        starts = gaps + before
        inside = np.repeat(gaps, widths) + np.arange(total)

        token_ids = np.empty(length, dtype=np.int32)
        token_ids[inside] = self._tokens[:total]
        outside = np.ones(length, dtype=bool)
        outside[inside] = False
        token_ids[outside] = around
        if between_lines:
            # The text goes on with the indentation that it had.
            inner = gaps > 0
            token_ids[(starts + widths - 1)[inner]] = around[gaps[inner] - 1]
        answer = np.zeros(length, dtype=bool)
        answer[inside] = self._answer[:total]
        sources = np.array(self._sources[:count], dtype=np.int64)
        value_starts = starts + np.array(self._value_at[:count], dtype=np.int64)
        distance = np.zeros(length, dtype=np.int32)
        distance[inside] = np.repeat(value_starts - value_starts[sources], widths)
        hops = np.zeros(length, dtype=np.int32)
        hops[inside] = np.repeat(np.array(self._hops[:count], dtype=np.int32), widths)
        return Example(token_ids, answer, distance * answer, hops * answer)


def _noise(rng: np.random.Generator, words: Words, length: int) -> NDArray[np.int32]:
    """Lines of random words."""
    noise = words.plain[rng.integers(len(words.plain), size=length)]
    noise[rng.random(length) < 1 / _NOISE_LINE] = words.newline[-1]
    return noise


def _surroundings(rng: np.random.Generator, words: Words, *, real: bool) -> Callable[[int], NDArray[np.int32]]:
    filler = words.filler
    if filler is not None and real:
        return lambda length: filler(rng, length) if length else np.zeros(0, dtype=np.int32)
    return lambda length: _noise(rng, words, length)


def _distances(rng: np.random.Generator, length: int, size: int) -> NDArray[np.float64]:
    """Shares of the sequence, half of them uniform, half with every octave from _MIN_DISTANCE tokens on as likely as
    another."""
    draws = rng.random(size)
    return np.where(rng.random(size) < 0.5, draws, np.exp(-draws * np.log(length / _MIN_DISTANCE)))


def _ends(rng: np.random.Generator, length: int, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(first, later) places."""
    distance = _distances(rng, length, size)
    later = distance + rng.random(size) * (1 - distance)
    return later - distance, later


def _after(rng: np.random.Generator, length: int, first: NDArray[np.float64]) -> NDArray[np.float64]:
    """A place after each given one, at such a distance where the sequence allows it."""
    later = first + _distances(rng, length, len(first))
    return np.where(later < 1, later, first + rng.random(len(first)) * (1 - first))


def _names(rng: np.random.Generator, words: Words, count: int, *, held_out: bool) -> list[list[int]]:
    """The tokens of `count` distinct names, of one word or two; in half of the cases many begin alike."""
    allowed = words.held_out if held_out else words.training
    if rng.random() < 0.5:
        allowed = rng.choice(allowed, max(1, count // 2))
    found: dict[int, list[int]] = {}
    base = len(words.lists) + 1
    while len(found) < count:
        size = count + 8
        firsts = rng.choice(allowed, size)
        seconds = np.where(rng.random(size) < 0.5, rng.choice(words.training, size), -1)
        for first, second in zip(firsts.tolist(), seconds.tolist(), strict=True):
            name = words.lists[first]
            found.setdefault(first * base + second + 1, name if second < 0 else name + words.lists[second])
    return list(found.values())[:count]


def _values(rng: np.random.Generator, words: Words, count: int) -> list[list[int]]:
    """The tokens of `count` values, of one word or two."""
    firsts = rng.choice(words.training, count).tolist()
    seconds = rng.choice(words.training, count).tolist()
    single = (rng.random(count) < 0.5).tolist()
    lists = words.lists
    return [lists[a] if one else lists[a] + lists[b] for a, b, one in zip(firsts, seconds, single, strict=True)]


def _count(rng: np.random.Generator, pairs: int | None, low: int, high: int) -> int:
    return pairs if pairs is not None else int(rng.integers(low, max(low, high) + 1))


def _look_up(
    length: int, rng: np.random.Generator, words: Words, count: int, head: list[int], *, real: bool, held_out: bool
) -> Example:
    """Lines `head name = value`, each repeated once or twice."""
    names, values = _names(rng, words, count, held_out=held_out), _values(rng, words, count)
    first, later = _ends(rng, length, count)
    more = np.flatnonzero(rng.integers(0, 2, count))
    owners = np.concatenate([np.arange(count), np.arange(count), more])
    places = np.concatenate([first, later, _after(rng, length, first[more])])
    order = places.argsort(kind="stable")
    lines = _Lines(words)
    given: dict[int, int] = {}
    for owner in owners[order].tolist():
        source = given.get(owner, -1)
        name = head + names[owner] + words.equals
        given[owner] = lines.add(name, values[owner], words.newline, source, int(source >= 0))
    return lines.lay_out(places[order], length, _surroundings(rng, words, real=real))


def _recall(length: int, rng: np.random.Generator, words: Words, pairs: int | None, held_out: bool) -> Example:
    count = _count(rng, pairs, 4, length // 32)
    return _look_up(length, rng, words, count, [], real=rng.random() < 0.25, held_out=held_out)


def _needle(length: int, rng: np.random.Generator, words: Words, pairs: int | None, held_out: bool) -> Example:
    count = _count(rng, pairs, max(2, length // 1024), max(4, length // 128))
    return _look_up(length, rng, words, count, words.key, real=True, held_out=held_out)


def _copy(length: int, rng: np.random.Generator, words: Words, pairs: int | None, held_out: bool) -> Example:
    count = _count(rng, pairs, 1, max(1, length // 256))
    sizes = rng.integers(16, max(17, min(65, length // 4)), count).tolist()
    text = _surroundings(rng, words, real=rng.random() < 0.5)
    first, later = _ends(rng, length, count)
    places = np.concatenate([first, later])
    order = places.argsort(kind="stable")
    spans = [text(size).tolist() for size in sizes]
    lines = _Lines(words)
    given: dict[int, int] = {}
    for which in order.tolist():
        span = spans[which % count]
        source = given.get(which % count, -1)
        line = lines.add(span[:_COPY_PREFIX], span[_COPY_PREFIX:], [], source, int(source >= 0))
        given.setdefault(which % count, line)
    return lines.lay_out(places[order], length, text, between_lines=False)


def _tracking(length: int, rng: np.random.Generator, words: Words, pairs: int | None, held_out: bool) -> Example:
    count = _count(rng, pairs, 2, max(4, length // 128))
    hops = rng.integers(1, MAX_HOPS + 1, count)
    names = _names(rng, words, int(hops.sum()), held_out=held_out)
    values = _values(rng, words, count)
    first, later = _ends(rng, length, count)
    events: list[tuple[float, int, int, bool]] = []  # place, chain, link, whether it is a question
    for chain in range(count):
        links = int(hops[chain])
        inner = np.sort(rng.random(links - 1)) * (later[chain] - first[chain]) + first[chain]
        places = np.concatenate([first[chain : chain + 1], inner])
        events += [(place, chain, link, False) for link, place in enumerate(places.tolist())]
        events.append((float(later[chain]), chain, links - 1, True))
        # A name that is asked again would be found in the first answer.
        asked = np.flatnonzero(rng.integers(0, 2, links - 1))
        more = _after(rng, length, places[asked])
        events += [(place, chain, link, True) for place, link in zip(more.tolist(), asked.tolist(), strict=True)]
    events.sort()
    bases = (hops.cumsum() - hops).tolist()
    lines = _Lines(words)
    roots: dict[int, int] = {}
    for _, chain, link, asks in events:
        name = names[bases[chain] + link]
        if asks:
            lines.add(words.get + name + words.equals, values[chain], words.newline, roots[chain], link + 1)
        else:
            value = values[chain] if link == 0 else names[bases[chain] + link - 1]
            line = lines.add(words.set + name + words.equals, value, words.newline)
            roots.setdefault(chain, line)
    places = np.array([event[0] for event in events])
    return lines.lay_out(places, length, _surroundings(rng, words, real=rng.random() < 0.25))


def _last_write(length: int, rng: np.random.Generator, words: Words, pairs: int | None, held_out: bool) -> Example:
    count = _count(rng, pairs, 1, max(2, length // 256))
    names = _names(rng, words, count, held_out=held_out)
    writers = np.repeat(np.arange(count), rng.integers(2, 7, count))
    # Some names are last set early, so that their values must be found far away.
    written = rng.random(len(writers)) * rng.uniform(0.1, 1, count)[writers]
    asked = np.flatnonzero(rng.integers(0, 2, len(writers)))
    if not len(asked):
        asked = np.array([0])
    questions = _after(rng, length, written[asked])
    values = _values(rng, words, len(writers))
    places = np.concatenate([written, questions])
    owners = np.concatenate([writers, writers[asked]])
    order = places.argsort(kind="stable")
    lines = _Lines(words)
    latest: dict[int, tuple[int, list[int]]] = {}
    for event, owner in zip(order.tolist(), owners[order].tolist(), strict=True):
        if event < len(writers):
            value = values[event]
            line = lines.add(words.set + names[owner] + words.equals, value, words.newline)
            latest[owner] = (line, value)
        else:
            source, value = latest[owner]
            line = lines.add(words.get + names[owner] + words.equals, value, words.newline, source, 1)
            latest[owner] = (line, value)
    return lines.lay_out(places[order], length, _surroundings(rng, words, real=rng.random() < 0.25))


_MAKERS: dict[str, Callable[[int, np.random.Generator, Words, int | None, bool], Example]] = {
    "recall": _recall,
    "needle": _needle,
    "copy": _copy,
    "tracking": _tracking,
    "last_write": _last_write,
}
TASKS = tuple(_MAKERS)
