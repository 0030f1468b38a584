"""Which sparse layers can do without an indexer of their own: the greedy, training-free search of IndexCache
(arXiv 2603.12201, algorithm 1), given the loss of a pattern.

Every layer starts as F. One step flips each layer that is still F, the first one excepted, to S and back, and keeps the
flip with the lowest loss. N layers take N (N - 1) / 2 trials to the end. In block mode the layers are split into P runs
of neighbours, whose first layers stay F; each run is searched by itself while all layers outside it are F, which takes
about P times fewer trials. The flips of all runs are then merged by how much loss each added to its run, and the
loss of every merged pattern is measured in one trial more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from engine.errors import ConfigError

Loss = Callable[[str], float]


@dataclass(frozen=True, slots=True)
class Removal:
    """One more layer that reuses.

    ordinal: of the layer among the sparse ones.  pattern: F and S, with this flip and all before it.  loss: of that
    pattern.
    """

    ordinal: int
    pattern: str
    loss: float


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """blocks: runs of layers that are searched apart.  stop: share of selecting layers at which the search ends; None:
    to the end.  level: the share of selecting layers of the pattern that is chosen.  tolerance: in its place, the
    sparsest pattern whose loss is at most so many nats above that of F alone.
    """

    blocks: int = 1
    stop: Fraction | None = None
    level: Fraction = Fraction(1, 4)
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None and not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ConfigError(f"tolerance must be a number of nats from 0 on, got {self.tolerance}")


def search(num_sparse: int, loss: Loss, *, max_skipped: int, blocks: int = 1) -> Iterator[Removal]:
    """Flip layers one by one, up to `max_skipped` of them or until only those that must select are left.

    loss: of a pattern of `num_sparse` letters; block mode may ask twice for one.  Ties go to the lower layer.
    """
    base = "F" * num_sparse
    starts = block_starts(num_sparse, blocks)
    if blocks == 1:
        yield from itertools.islice(_greedy(base, range(1, num_sparse), loss), max_skipped)
        return
    runs = itertools.pairwise([*starts, num_sparse])
    base_loss = loss(base)
    logs = [
        _increases(list(itertools.islice(_greedy(base, range(start + 1, end), loss), max_skipped)), base_loss)
        for start, end in runs
    ]
    pattern = base
    for ordinal in itertools.islice(_merge(logs), max_skipped):
        pattern = _flipped(pattern, ordinal)
        yield Removal(ordinal, pattern, loss(pattern))


def block_starts(num_sparse: int, blocks: int) -> list[int]:
    """The first layer, among the sparse ones, of each run of block mode. ConfigError for a number that makes none."""
    if not 1 <= blocks <= max(num_sparse, 1):
        raise ConfigError(f"blocks must be in [1, {num_sparse}], the number of sparse layers, got {blocks}")
    return [i * num_sparse // blocks for i in range(blocks)]


def most_skipped(num_sparse: int, blocks: int) -> int:
    """How many layers a search can flip."""
    return num_sparse - len(block_starts(num_sparse, blocks))


def num_trials(num_sparse: int, *, max_skipped: int, blocks: int = 1) -> int:
    """How many patterns a search measures at most, that of F alone included."""
    starts = [*block_starts(num_sparse, blocks), num_sparse]
    sizes = [end - start - 1 for start, end in itertools.pairwise(starts)]
    trials = sum(size - step for size in sizes for step in range(min(size, max_skipped)))
    return 1 + trials + (min(max_skipped, sum(sizes)) if blocks > 1 else 0)


def skipped_at(num_sparse: int, level: Fraction) -> int:
    """How many layers reuse when the share `level` of them, rounded up, selects."""
    return num_sparse - max(1, math.ceil(num_sparse * level)) if num_sparse else 0


def parse_level(text: str) -> Fraction:
    """A share of layers in (0, 1], written 1/4 or 0.25. ConfigError for anything else."""
    try:
        level = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"a level is a share of layers such as 1/4, got {text!r}") from None
    if not 0 < level <= 1:
        raise ConfigError(f"a level must be in (0, 1], got {text}")
    return level


def _greedy(pattern: str, candidates: Sequence[int], loss: Loss) -> Iterator[Removal]:
    left = list(candidates)
    while left:
        best, ordinal = min((loss(_flipped(pattern, each)), each) for each in left)
        left.remove(ordinal)
        pattern = _flipped(pattern, ordinal)
        yield Removal(ordinal, pattern, best)


def _flipped(pattern: str, ordinal: int) -> str:
    return f"{pattern[:ordinal]}S{pattern[ordinal + 1 :]}"


def _increases(removals: Sequence[Removal], base_loss: float) -> list[tuple[float, int]]:
    """(what the flip added to the loss, its layer), in the order of the flips."""
    before = [base_loss, *(removal.loss for removal in removals)]
    return [(removal.loss - loss, removal.ordinal) for removal, loss in zip(removals, before, strict=False)]


def _merge(logs: Sequence[Sequence[tuple[float, int]]]) -> Iterator[int]:
    """The layers of all logs, the order within each kept; the smallest increase among the next ones first."""
    waiting = [list(reversed(log)) for log in logs if log]
    while waiting:
        chosen = min(waiting, key=lambda log: log[-1])
        yield chosen.pop()[1]
        waiting = [log for log in waiting if log]
