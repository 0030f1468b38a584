"""Every sampling field with every kind of wrong value: the refusal names the field and shows little of the value."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.types import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
    StepPlan,
    StepRow,
)

INT32 = 2**31 - 1
DENORMAL = 5e-324

# name: lowest allowed, highest allowed; for numbers also the value just below
INTEGERS = {
    "max_tokens": (1, INT32),
    "top_k": (-1, INT32),
    "seed": (-(2**63), 2**63 - 1),
    "min_tokens": (0, 16),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
NUMBERS = {
    "temperature": (0.0, 100.0, -DENORMAL),
    "top_p": (DENORMAL, 1.0, 0.0),
    "min_p": (0.0, 1.0, -DENORMAL),
    "repetition_penalty": (DENORMAL, 100.0, 0.0),
    "presence_penalty": (-2.0, 2.0, math.nextafter(-2.0, -3.0)),
    "frequency_penalty": (-2.0, 2.0, math.nextafter(-2.0, -3.0)),
}
FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
LISTS = ("stop", "stop_token_ids", "logit_bias")
HUGE = 10**5000  # Python refuses to print it


def refused(name: str, value: Any, code: str) -> str:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert (caught.value.param, caught.value.code) == (name, code)
    assert len(caught.value.message) < 250
    return caught.value.message


def test_the_tables_cover_every_field() -> None:
    assert {*INTEGERS, *NUMBERS, *FLAGS, *LISTS, "guided"} == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    low, high = INTEGERS[name]
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in ("3", 3.0, math.nan, math.inf, True, [3], {}, b"3", "x" * 10**6, [[]] * 10**5):
        assert "must be an integer" in refused(name, value, "invalid_type")
    for value in (low - 1, high + 1, HUGE, -HUGE):
        refused(name, value, "invalid_value")


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    low, high, below = NUMBERS[name]
    for value in (low, high, 1):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in ("1", None, math.nan, math.inf, -math.inf, True, [1.0], {}, 1j, "x" * 10**6):
        assert "must be a finite number" in refused(name, value, "invalid_type")
    for value in (below, math.nextafter(high, 200.0), 1e308, -1e308, HUGE, -HUGE):
        assert "must be in " in refused(name, value, "invalid_value")


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str) -> None:
    for value in (True, False):
        assert getattr(SamplingParams(**{name: value}), name) is value
    for value in (None, 0, 1, "true", [], HUGE):
        assert "must be true or false" in refused(name, value, "invalid_type")


def test_optional_fields_may_be_unset() -> None:
    unset = SamplingParams(
        seed=None, stop=None, stop_token_ids=None, logit_bias=None, logprobs=None, prompt_logprobs=None
    )
    assert unset == SamplingParams()
    for name in ("max_tokens", "top_k", "min_tokens"):
        refused(name, None, "invalid_type")


def test_min_tokens_is_at_most_max_tokens() -> None:
    assert SamplingParams(max_tokens=5, min_tokens=5).min_tokens == 5
    with pytest.raises(RequestError, match=r"min_tokens must be at most max_tokens \(5\), got 6"):
        SamplingParams(max_tokens=5, min_tokens=6)


def test_stop_strings() -> None:
    assert SamplingParams().stop_strings == SamplingParams(stop=[]).stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")
    longest = ["x" * MAX_STOP_CHARS] * MAX_STOP_STRINGS
    assert SamplingParams(stop=longest).stop_strings == tuple(longest)
    for value in (5, 1.5, math.nan, True, {"a": 1}, {"a"}, b"ab", HUGE, [5], [None], [b"a"], [["a"] * 10**5]):
        refused("stop", value, "invalid_type")
    for value in ("", ["a", ""], "x" * (MAX_STOP_CHARS + 1), "x" * 2**20, ["a"] * (MAX_STOP_STRINGS + 1)):
        refused("stop", value, "invalid_value")


def test_stop_token_ids() -> None:
    assert SamplingParams(stop_token_ids=[0, INT32]).stop_token_ids == [0, INT32]
    assert SamplingParams(stop_token_ids=[]).stop_token_ids == []
    for value in (5, "5", {5: 1}, {5}, math.nan, ["5"], [5.0], [True], [None], [[5]], [math.nan]):
        refused("stop_token_ids", value, "invalid_type")
    for value in ([-1], [INT32 + 1], [HUGE], [1] * (MAX_STOP_TOKEN_IDS + 1)):
        refused("stop_token_ids", value, "invalid_value")


def test_logit_bias() -> None:
    assert SamplingParams(logit_bias={0: -100, INT32: 100.0}).logit_bias == {0: -100, INT32: 100.0}
    for value in (5, "{}", [[1, 2]], {"5": 1.0}, {5.0: 1.0}, {True: 1.0}, {1: "2"}, {1: None}, {1: math.nan}):
        refused("logit_bias", value, "invalid_type")
    for value in ({1: math.inf}, {1: -math.inf}, {1: True}):
        refused("logit_bias", value, "invalid_type")
    too_many = dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)
    for out in ({-1: 1.0}, {INT32 + 1: 1.0}, {1: 100.5}, {1: -100.5}, {1: HUGE}, {HUGE: 1.0}, too_many):
        refused("logit_bias", out, "invalid_value")


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_is_greedy_and_has_penalties() -> None:
    assert SamplingParams(temperature=0).is_greedy and not SamplingParams(temperature=DENORMAL).is_greedy
    assert not SamplingParams().has_penalties
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", -0.1), ("frequency_penalty", 0.1)):
        assert SamplingParams(**{name: value}).has_penalties


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
)


@given(st.sampled_from([field.name for field in fields(SamplingParams)]), junk)
def test_any_value_is_taken_as_it_is_or_refused_by_name(name: str, value: Any) -> None:
    try:
        params = SamplingParams(**{name: value})
    except RequestError as error:
        assert error.param in (name, "min_tokens")
        assert error.param == name or name == "max_tokens"
    else:
        assert getattr(params, name) is value


def test_a_plan_counts_its_tokens() -> None:
    rows = [StepRow(0, 5, 1, [], True), StepRow(1, 0, 128, [3], False)]
    assert StepPlan(step_id=1, rows=rows, num_decode_rows=1).num_tokens == 129
    assert StepPlan(step_id=1, rows=[], num_decode_rows=0).num_tokens == 0
