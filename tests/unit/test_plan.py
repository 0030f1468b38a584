"""Index plans: the rule, every refusal, and how the knobs of several sources combine."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.msa.plan import KNOBS, IndexKnobs, IndexPlan, Role, resolve_knobs
from engine.msa.plan_file import PlanFile, read_document, read_plan_file, write_document

M3 = [False] * 3 + [True] * 57

layouts = st.lists(st.booleans(), max_size=70)


def rule(is_sparse: list[bool], freq: int, offset: int) -> str:
    """M3's rule, written over layers instead of ordinals."""
    letters, ordinal = "", 0
    for sparse in is_sparse:
        if not sparse:
            letters += "D"
            continue
        distance = ordinal - offset if ordinal > offset else 0
        letters += "F" if distance % freq == 0 else "S"
        ordinal += 1
    return letters


# --- the rule ---


@given(layouts, st.integers(1, 80), st.integers(0, 80))
def test_any_frequency_and_offset_builds_the_rule(is_sparse: list[bool], freq: int, offset: int) -> None:
    assert str(IndexPlan.build(is_sparse, freq=freq, offset=offset)) == rule(is_sparse, freq, offset)


@given(layouts, st.data())
def test_any_legal_pattern_builds_and_overrides_the_rest(is_sparse: list[bool], data: st.DataObject) -> None:
    num_sparse = sum(is_sparse)
    tail = data.draw(st.text(st.sampled_from("FS"), min_size=max(num_sparse - 1, 0), max_size=max(num_sparse - 1, 0)))
    pattern = "F" + tail if num_sparse else ""
    plan = IndexPlan.build(is_sparse, freq=3, offset=2, pattern=pattern)
    assert str(plan).replace("D", "") == pattern
    assert [role is Role.DENSE for role in plan.roles] == [not sparse for sparse in is_sparse]
    assert IndexPlan.parse(str(plan)) == plan


@given(layouts, st.text(st.sampled_from("FSDfs 1"), max_size=72))
def test_any_illegal_pattern_is_refused(is_sparse: list[bool], pattern: str) -> None:
    num_sparse = sum(is_sparse)
    legal = len(pattern) == num_sparse and set(pattern) <= {"F", "S"} and not pattern.startswith("S")
    if legal:
        assert str(IndexPlan.build(is_sparse, pattern=pattern)).replace("D", "") == pattern
    else:
        with pytest.raises(ConfigError, match=r"must be F|index_topk_pattern"):
            IndexPlan.build(is_sparse, pattern=pattern)


@pytest.mark.parametrize(
    ("freq", "offset", "num_compute", "first_layers", "last_layer"),
    [
        (1, 0, 57, [3, 4, 5, 6], 59),
        (1, 9, 57, [3, 4, 5, 6], 59),
        (2, 0, 29, [3, 5, 7], 59),
        (3, 0, 19, [3, 6], 57),
        (4, 0, 15, [3, 7, 11], 59),
        (4, 1, 15, [3, 4, 8, 12], 56),
        (4, 2, 16, [3, 4, 5, 9], 57),
        (4, 3, 17, [3, 4, 5, 6, 10], 58),
        (8, 0, 8, [3, 11], 59),
    ],
)
def test_the_released_model(freq: int, offset: int, num_compute: int, first_layers: list[int], last_layer: int) -> None:
    plan = IndexPlan.build(M3, freq=freq, offset=offset)
    computing = plan.layers(Role.COMPUTE)
    assert len(computing) == num_compute
    assert len(plan.layers(Role.REUSE)) == 57 - num_compute
    assert list(computing[: len(first_layers)]) == first_layers
    assert computing[-1] == last_layer
    assert plan.layers(Role.DENSE) == (0, 1, 2)


def test_the_letters_of_frequency_four() -> None:
    assert str(IndexPlan.build(M3, freq=4)) == "DDD" + "FSSS" * 14 + "F"


@given(layouts, st.integers(1, 9), st.integers(0, 9))
def test_every_sparse_layer_has_a_source_at_or_above_it(is_sparse: list[bool], freq: int, offset: int) -> None:
    plan = IndexPlan.build(is_sparse, freq=freq, offset=offset)
    for layer_id, role in enumerate(plan.roles):
        if role is Role.DENSE:
            with pytest.raises(ValueError, match=f"layer {layer_id} is dense"):
                plan.source(layer_id)
            continue
        source = plan.source(layer_id)
        assert plan.roles[source] is Role.COMPUTE and source <= layer_id
        assert Role.COMPUTE not in plan.roles[source + 1 : layer_id + 1]
        assert (source == layer_id) == (role is Role.COMPUTE)


@pytest.mark.parametrize("freq", [0, -1, -(10**30)])
def test_frequency_below_one(freq: int) -> None:
    with pytest.raises(ConfigError, match=f"index_topk_freq must be >= 1, got {freq}"):
        IndexPlan.build(M3, freq=freq)


def test_negative_offset() -> None:
    with pytest.raises(ConfigError, match="index_skip_topk_offset must be >= 0, got -1"):
        IndexPlan.build(M3, freq=4, offset=-1)


def test_messages_say_what_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs 57 letters, one per sparse layer, got 3: 'FSS'"):
        IndexPlan.build(M3, pattern="FSS")
    with pytest.raises(ConfigError, match=r"only the letters F and S, got \['X'\]"):
        IndexPlan.build(M3, pattern="F" * 56 + "X")
    with pytest.raises(ConfigError, match=r"first sparse layer from layer 0 on must be F.*DDDSF"):
        IndexPlan.build(M3, pattern="S" + "F" * 56)


def test_a_pipeline_stage_must_start_with_a_selection() -> None:
    IndexPlan.build(M3, freq=4, stage_starts=(0, 31))
    with pytest.raises(ConfigError, match="first sparse layer from layer 30 on must be F"):
        IndexPlan.build(M3, freq=4, stage_starts=(0, 30))


# --- knobs of several sources ---

OFF = IndexKnobs()


def resolve(config: dict[str, Any], overrides: dict[str, Any] | None = None, **settings: Any) -> IndexKnobs:
    return resolve_knobs([("config.json", config), ("hf_overrides", overrides or {}), ("settings", settings)])


def test_nothing_set_is_off() -> None:
    assert resolve({}) == OFF
    assert resolve(dict.fromkeys(KNOBS)) == OFF


@pytest.mark.parametrize("knobs", [{"index_topk_freq": 4}, {"index_topk_pattern": "FSS"}], ids=str)
@pytest.mark.parametrize("switch", [{}, {"use_index_cache": True}], ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_asking_is_enabling_at_every_level(knobs: dict[str, Any], switch: dict[str, Any], level: int) -> None:
    sources: list[dict[str, Any]] = [{}, {}, {}]
    sources[level] = {**knobs, **switch}
    found = resolve(sources[0], sources[1], **sources[2])
    assert found == IndexKnobs(freq=knobs.get("index_topk_freq", 1), pattern=knobs.get("index_topk_pattern"))


def test_enabling_alone_shares_nothing() -> None:
    assert resolve({"use_index_cache": True}) == OFF


def test_frequency_zero_means_one() -> None:
    assert resolve({"index_topk_freq": 0}) == OFF


@pytest.mark.parametrize(
    ("config", "overrides", "settings", "expected"),
    [
        # A later source overrides the same knob, and keeps the others.
        ({"index_topk_freq": 4, "index_skip_topk_offset": 2}, {}, {"index_topk_freq": 2}, IndexKnobs(2, 2)),
        ({"index_topk_freq": 4}, {"index_skip_topk_offset": 1}, {}, IndexKnobs(4, 1)),
        ({"index_topk_freq": 4}, {"index_topk_freq": 2}, {"index_topk_freq": 8}, IndexKnobs(8)),
        ({"index_topk_freq": 4}, {}, {"index_topk_freq": 1}, IndexKnobs(1)),
        # A schedule replaces another one, in whichever spelling.
        ({"index_topk_pattern": "FSS"}, {}, {"index_topk_freq": 2}, IndexKnobs(2)),
        ({"index_topk_freq": 2}, {}, {"index_topk_pattern": "FSS"}, IndexKnobs(pattern="FSS")),
        ({"index_topk_pattern": "FSS"}, {}, {"index_topk_pattern": "FFF"}, IndexKnobs(pattern="FFF")),
        # An offset alone is no schedule.
        ({"index_topk_pattern": "FSS"}, {"index_skip_topk_offset": 1}, {}, IndexKnobs(1, 1, "FSS")),
        # Within one source a pattern overrides the frequency, when the plan is built.
        ({"index_topk_pattern": "FSS", "index_topk_freq": 4}, {}, {}, IndexKnobs(4, 0, "FSS")),
        # An explicit false in a later source switches everything off; asking later switches it on again.
        ({"index_topk_freq": 4, "index_skip_topk_offset": 1}, {}, {"use_index_cache": False}, OFF),
        ({"use_index_cache": True, "index_topk_pattern": "FSS"}, {"use_index_cache": False}, {}, OFF),
        ({"index_plan_file": "/nowhere"}, {}, {"use_index_cache": False}, OFF),
        ({"use_index_cache": False}, {}, {"index_topk_freq": 4}, IndexKnobs(4)),
        ({"index_topk_freq": 4}, {"use_index_cache": False}, {"use_index_cache": True}, IndexKnobs(4)),
        ({"use_index_cache": False, "index_topk_freq": 1}, {}, {}, OFF),
        ({"use_index_cache": False, "index_topk_pattern": "FFF"}, {}, {}, OFF),
        # A later source settles what an earlier one contradicts itself about.
        ({"use_index_cache": False, "index_topk_freq": 4}, {}, {"use_index_cache": True}, IndexKnobs(4)),
        ({"use_index_cache": False, "index_topk_freq": 4}, {}, {"use_index_cache": False}, OFF),
        ({"use_index_cache": False, "index_topk_freq": 4}, {}, {"index_topk_freq": 2}, IndexKnobs(2)),
    ],
)
def test_layering(config: dict, overrides: dict, settings: dict, expected: IndexKnobs) -> None:
    assert resolve(config, overrides, **settings) == expected


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    "asking", [{"index_topk_freq": 4}, {"index_topk_pattern": "FS"}, {"index_plan_file": "/nowhere"}], ids=str
)
def test_one_source_may_not_contradict_itself(level: int, asking: dict[str, Any]) -> None:
    sources: list[dict[str, Any]] = [{}, {}, {}]
    sources[level] = {"use_index_cache": False, **asking}
    name = ("config.json", "hf_overrides", "settings")[level]
    with pytest.raises(ConfigError, match=f"{name} says use_index_cache=false and also {next(iter(asking))}="):
        resolve(sources[0], sources[1], **sources[2])


def test_two_spellings_of_a_pattern_in_one_source() -> None:
    with pytest.raises(ConfigError, match="sets both index_plan_file and index_topk_pattern"):
        resolve({}, index_plan_file="plan.json", index_topk_pattern="FS")


KNOB_TYPES = {"use_index_cache": bool, "index_topk_pattern": str, "index_plan_file": str}
WRONG = [
    (knob, value)
    for knob in KNOBS
    for value in (True, "4", 4, 4.0, math.nan, math.inf, [4], {}, b"4")
    if type(value) is not KNOB_TYPES.get(knob, int)
]


@pytest.mark.parametrize(("knob", "value"), WRONG, ids=repr)
def test_wrong_types(knob: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"hf_overrides: {knob} must be of type (bool|int|str), got "):
        resolve({}, {knob: value})


@pytest.mark.parametrize(("knob", "least"), [("index_topk_freq", 1), ("index_skip_topk_offset", 0)])
def test_negative_values_are_refused_even_when_switched_off(knob: str, least: int) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {knob} must be >= {least}, got -1"):
        resolve({knob: -1}, use_index_cache=False)


def test_unknown_knob() -> None:
    with pytest.raises(ConfigError, match="settings: unknown index cache knob 'freq'; known: use_index_cache"):
        resolve({}, freq=4)


def test_a_huge_frequency_computes_once() -> None:
    plan = resolve({}, index_topk_freq=10**30).build_plan(M3)
    assert plan.layers(Role.COMPUTE) == (3,)


# --- plan files ---


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


GOOD = {"format": "m3serve-index-plan", "version": 1, "pattern": "FSF"}


def test_plan_file_is_a_pattern(tmp_path: Path) -> None:
    file = write(tmp_path / "plan.json", GOOD | {"evidence": [1, 2]})
    assert read_plan_file(file) == PlanFile(file, "FSF")
    full = write(tmp_path / "calibrated.json", GOOD | {"checkpoint_hash": "ab", "topk_blocks": 8, "trials": {}})
    assert read_plan_file(full) == PlanFile(full, "FSF", "ab", 8)
    assert resolve({"index_topk_freq": 2}, index_plan_file=str(file)) == IndexKnobs(pattern="FSF")
    assert resolve({"index_plan_file": str(file)}, index_topk_pattern="FFF") == IndexKnobs(pattern="FFF")
    assert resolve({"index_plan_file": str(file)}, index_topk_freq=4) == IndexKnobs(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("\x00\xff", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ([], "must be JSON with"),
        ({"pattern": "FSF"}, "must be JSON with"),
        (GOOD | {"version": 2}, "must be JSON with"),
        (GOOD | {"version": "1"}, "must be JSON with"),
        (GOOD | {"format": "other"}, "must be JSON with"),
        (GOOD | {"pattern": None}, 'needs "pattern": a string of F and S, got None'),
        (GOOD | {"pattern": ["F"]}, 'needs "pattern"'),
        (GOOD | {"checkpoint_hash": 5}, '"checkpoint_hash" must be a string, got 5'),
        (GOOD | {"topk_blocks": "8"}, "\"topk_blocks\" must be an integer, got '8'"),
    ],
)
def test_broken_plan_files(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_plan_file(write(tmp_path / "plan.json", content))


def test_missing_and_oversized_plan_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"index_plan_file .*none.json is not a file"):
        read_plan_file(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="is not a file"):
        read_plan_file(tmp_path)
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(16 * 2**20 + 1)
    with pytest.raises(ConfigError, match="is larger than 16777216 bytes"):
        read_plan_file(tmp_path / "big.json")


def test_a_document_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    write_document(file, {"pattern": "FS", "levels": [1]})
    assert read_document(file) == {"format": "m3serve-index-plan", "version": 1, "pattern": "FS", "levels": [1]}
    with pytest.raises(TypeError):
        write_document(file, {"pattern": object()})
    assert read_plan_file(file).pattern == "FS"
    assert list(tmp_path.iterdir()) == [file]


# --- what the user is told ---


def note(knobs: IndexKnobs, max_tokens: int = 4096) -> tuple[int, str] | None:
    return knobs.note("DIR", exact_tokens=2048, max_tokens=max_tokens)


def test_the_origin_of_a_plan_is_told(tmp_path: Path) -> None:
    by_hand = write(tmp_path / "hand.json", GOOD)
    level, text = note(resolve({}, index_plan_file=str(by_hand))) or (0, "")
    assert level == logging.WARNING and f"index plan from {by_hand}: it has no checkpoint_hash" in text
    calibrated = write(tmp_path / "calibrated.json", GOOD | {"checkpoint_hash": "ab"})
    level, text = note(resolve({}, index_plan_file=str(calibrated))) or (0, "")
    assert level == logging.INFO and text == f"index plan from {calibrated}, calibrated on these weights"


def test_who_sets_nothing_is_pointed_at_the_calibration() -> None:
    level, text = note(resolve({})) or (0, "")
    assert level == logging.INFO
    assert "`m3serve calibrate --model DIR` finds which can share beyond 2048 tokens" in text
    assert note(resolve({}), max_tokens=2048) is None, "below that every plan is the same"
    for chosen in ({"index_topk_freq": 1}, {"use_index_cache": False}, {"index_topk_freq": 4}):
        assert note(resolve({}, **chosen)) is None
