"""The search for layers that can share a selection, on losses that are known in advance."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.msa.calibrate import SearchOptions, block_starts, most_skipped, num_trials, parse_level, search, skipped_at


def additive(*costs: float) -> Callable[[str], float]:
    """Each layer that reuses costs its own, whatever the others do."""
    return lambda pattern: 1.0 + sum(cost for letter, cost in zip(pattern, costs, strict=True) if letter == "S")


class Counted:
    """A loss that remembers what it was asked."""

    def __init__(self, loss: Callable[[str], float]) -> None:
        self.loss = loss
        self.asked: list[str] = []

    def __call__(self, pattern: str) -> float:
        self.asked.append(pattern)
        return self.loss(pattern)


def run_length(pattern: str) -> float:
    """Layers suffer from a far source, the more the farther: what is cheap depends on what was flipped before."""
    return float(sum(len(list(run)) ** 2 for letter, run in itertools.groupby(pattern) if letter == "S"))


def ordinals(num_sparse: int, loss: Callable[[str], float], blocks: int = 1, max_skipped: int = 99) -> list[int]:
    return [removal.ordinal for removal in search(num_sparse, loss, max_skipped=max_skipped, blocks=blocks)]


def test_the_cheapest_layer_goes_first() -> None:
    found = list(search(5, additive(0, 4, 1, 3, 2), max_skipped=99))
    assert [removal.ordinal for removal in found] == [2, 4, 3, 1]
    assert [removal.pattern for removal in found] == ["FFSFF", "FFSFS", "FFSSS", "FSSSS"]
    assert [removal.loss for removal in found] == [2, 4, 7, 11]


def test_it_is_greedy_on_what_was_flipped_before() -> None:
    assert ordinals(6, run_length) == [1, 3, 5, 2, 4]


def test_ties_go_to_the_lower_layer() -> None:
    assert ordinals(6, lambda pattern: 0.0) == [1, 2, 3, 4, 5]


def test_the_first_layer_always_selects() -> None:
    assert 0 not in ordinals(5, additive(-9, 1, 1, 1, 1))
    assert ordinals(1, additive(0)) == []


def test_it_stops_where_it_was_told() -> None:
    loss = Counted(additive(0, 4, 1, 3, 2))
    assert ordinals(5, loss, max_skipped=2) == [2, 4]
    assert len(loss.asked) == 4 + 3


@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 12))
def test_the_number_of_trials(num_sparse: int, blocks: int, max_skipped: int) -> None:
    blocks = min(blocks, num_sparse)
    loss = Counted(run_length)
    found = ordinals(num_sparse, loss, blocks, max_skipped)
    assert len(found) == min(max_skipped, most_skipped(num_sparse, blocks)) == len(set(found))
    # One for F alone, which block mode measures itself.
    asked = len(loss.asked) + (blocks == 1)
    assert asked == num_trials(num_sparse, max_skipped=max_skipped, blocks=blocks)


def test_the_number_of_trials_for_the_released_model() -> None:
    assert num_trials(57, max_skipped=56) == 1 + 57 * 56 // 2
    assert num_trials(57, max_skipped=skipped_at(57, Fraction(1, 4))) == 1 + 1491
    assert num_trials(57, max_skipped=56, blocks=4) < 450


# --- block mode ---


def test_runs_are_searched_apart_and_merged_by_what_each_flip_adds() -> None:
    costs = (9, 5, 1, 9, 4, 2)
    loss = Counted(additive(*costs))
    found = list(search(6, loss, max_skipped=99, blocks=2))
    assert block_starts(6, 2) == [0, 3]
    assert [removal.ordinal for removal in found] == [2, 5, 4, 1]
    assert [removal.loss for removal in found] == [additive(*costs)(removal.pattern) for removal in found]
    assert found[-1].pattern == "FSSFSS"
    # While one run is searched the other selects.
    assert [pattern for pattern in loss.asked if "S" in pattern[:3] and "S" in pattern[3:]] == [
        removal.pattern for removal in found[1:]
    ]


def test_the_order_within_a_run_is_kept() -> None:
    """A flip that pays only after another one cannot come before it."""

    def loss(pattern: str) -> float:
        return {"FF": 0.0, "SF": 3.0, "FS": 5.0, "SS": 1.0}[pattern[1:3]] + (2.0 if pattern[4] == "S" else 0.0)

    assert ordinals(6, loss, blocks=2) == [5, 4, 1, 2]


@pytest.mark.parametrize("blocks", [0, -1, 7])
def test_blocks_without_a_layer_are_refused(blocks: int) -> None:
    with pytest.raises(ConfigError, match=rf"blocks must be in \[1, 6\], the number of sparse layers, got {blocks}"):
        ordinals(6, run_length, blocks=blocks)


# --- levels ---


@pytest.mark.parametrize(
    ("num_sparse", "level", "skipped"),
    [(57, "1/4", 42), (57, "1/2", 28), (57, "1/8", 49), (57, "1", 0), (9, "0.25", 6), (6, "1/100", 5), (1, "1/4", 0)],
)
def test_a_level_skips_as_many_as_the_frequency(num_sparse: int, level: str, skipped: int) -> None:
    assert skipped_at(num_sparse, parse_level(level)) == skipped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quarter", "a level is a share of layers such as 1/4, got 'quarter'"),
        ("1/0", "a level is a share"),
        ("0", r"a level must be in \(0, 1\], got 0"),
        ("5/4", r"a level must be in \(0, 1\], got 5/4"),
        ("-1/4", r"a level must be in \(0, 1\]"),
    ],
)
def test_wrong_levels(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_level(text)


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_wrong_tolerances(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="tolerance must be a number of nats from 0 on"):
        SearchOptions(tolerance=tolerance)
