"""Every target with mutations of inputs that are right. M3_FUZZ_EXAMPLES: how many per target, 120 unless set."""

from __future__ import annotations

import copy
import json
import logging
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import documents, seeds
from tests.fuzz.targets import TARGETS

NUM_EXAMPLES = int(os.environ.get("M3_FUZZ_EXAMPLES", "120"))
# Values that code forgets about.
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.5, -0.0, 1e-320, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", " ", "\x00", "\ud800", "\uffff", "x" * 5000, "../x", "a\x00b", "re:(", "re:(a+)+$", "*", "["),
    *([], {}, [[]], [None], [0] * 300, {"": 0}, {"a": {"a": {"a": []}}}, ["x"] * 300),
]
_nasty = st.sampled_from(NASTY)
_places = st.lists(st.integers(0, 1000), min_size=1, max_size=4)


def mutated(document: Any, edits: list[tuple[list[int], str, Any]]) -> Any:
    """A copy of a JSON value with values replaced, removed or added at places that the numbers choose."""
    changed: Any = copy.deepcopy(document)
    for place, kind, value in edits:
        parent, key = None, None
        below = changed
        for number in place:
            keys: list[Any] = list(below) if isinstance(below, dict) else list(range(len(below)))
            if not keys:
                break
            parent, key = below, keys[number % len(keys)]
            below = below[key]
            if not isinstance(below, dict | list):
                break
        if parent is None:
            continue
        value = copy.deepcopy(value)
        if kind == "replace":
            parent[key] = value
        elif kind == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[str(value)[:20]] = copy.deepcopy(below)
        else:
            parent.append(value)
    return changed


_edits = st.lists(st.tuples(_places, st.sampled_from(["replace", "replace", "remove", "add"]), _nasty), max_size=3)


@st.composite
def inputs(draw: st.DrawFn, target: str) -> bytes:
    """A right input with a few edits, of JSON values where it is JSON, and of bytes."""
    known = documents(target)
    if known is None:
        data = draw(st.sampled_from(seeds(target)))
    else:
        data = json.dumps(mutated(draw(st.sampled_from(known)), draw(_edits))).encode()
    for _ in range(draw(st.integers(0, 0 if known is not None and draw(st.booleans()) else 3))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 8)))
        piece = draw(st.one_of(st.binary(max_size=6), st.sampled_from([b"\n", b",", b'"', b"[" * 300, b"\xff" * 4])))
        data = data[:at] + piece + data[end:]
    return data


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", TARGETS)
def test_right_inputs_are_inside_the_promise(target: str) -> None:
    for data in (*seeds(target), b"", b"\x00", b"{}", b"[]", b"[" * 50_000):
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
def test_mutations(target: str) -> None:
    run = TARGETS[target]

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(inputs(target))
    def check(data: bytes) -> None:
        run(data)

    check()
