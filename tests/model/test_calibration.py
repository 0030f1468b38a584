"""Calibration of real checkpoints: plans that change on a loaded engine, the plan file, and which weights it suits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM, SamplingParams, scoring
from engine.calibration import CalibrationData, calibrate, uniform_patterns
from engine.checkpoint_hash import checkpoint_hash
from engine.config import EngineConfig, resolve_model
from engine.errors import ConfigError
from engine.msa.calibrate import Removal, SearchOptions, num_trials
from engine.msa.plan_file import PLAN_FILE_NAME, read_plan_file
from engine.types import Output
from tests.checkpoints import make_checkpoint
from tests.golden.compare import open_llm
from tests.golden.configs import make_prompt

TOPK = 4
EXACT = TOPK * 128
VOCAB_SIZE = 320
SPARSE = (0, 1, 1, 1, 1)
LENGTH = 700


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("calibration"))


def write(path: Path, **changes: Any) -> Path:
    sizes: dict[str, Any] = {"layers": len(SPARSE), "sparse": SPARSE, "topk_blocks": TOPK, "vocab_size": VOCAB_SIZE}
    return make_checkpoint(path, **({"seed": 22, "heads": 4, "expert_width": 16} | sizes | changes))


def prompt(length: int, seed: int) -> list[int]:
    return make_prompt(length, vocab_size=VOCAB_SIZE, seed=seed)


# --- a plan that changes ---


@pytest.fixture(scope="module")
def switched(checkpoint: Path) -> Iterator[LLM]:
    with open_llm(checkpoint, chunk=512, index_reuse="audited", enable_prefix_caching=True) as llm:
        yield llm


def generate(llm: LLM, *, prompt_logprobs: int | None = 0) -> list[Output]:
    sampling = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=1, prompt_logprobs=prompt_logprobs)
    return llm.generate([prompt(1100, 1), prompt(800, 2)], sampling)


def seen(outputs: list[Output]) -> list[Any]:
    return [(each.token_ids, each.logprobs, each.prompt_logprobs, each.num_cached_tokens) for each in outputs]


@pytest.mark.parametrize("pattern", ["FSSS", "FFSF", "FFFF", "FSFS"])
def test_a_plan_set_at_run_time_equals_one_that_was_loaded(checkpoint: Path, switched: LLM, pattern: str) -> None:
    """Token for token and bit for bit, with an engine that owns no index weights in S layers; and the counts agree."""
    with open_llm(checkpoint, chunk=512, index_topk_pattern=pattern, enable_prefix_caching=True) as lean:
        # Pages of the plan before are not found.
        switched.set_plan(pattern)
        assert str(switched.plan) == str(lean.plan)
        before = dict(switched.stats.selections_computed), dict(switched.stats.selections_reused)
        for prompt_logprobs in (0, None):
            outputs = generate(switched, prompt_logprobs=prompt_logprobs)
            assert seen(outputs) == seen(generate(lean, prompt_logprobs=prompt_logprobs))
        assert outputs[0].num_cached_tokens == 1024, "of its own plan they are"
        for now, then, expected in (
            (switched.stats.selections_computed, before[0], lean.stats.selections_computed),
            (switched.stats.selections_reused, before[1], lean.stats.selections_reused),
        ):
            grown = {layer: now[layer] - then.get(layer, 0) for layer in now}
            assert {layer: count for layer, count in grown.items() if count} == {
                layer: count for layer, count in expected.items() if count
            }


def test_plans_that_cannot_be_set(checkpoint: Path, switched: LLM) -> None:
    with pytest.raises(ConfigError, match="needs 4 letters"):
        switched.set_plan("FS")
    with pytest.raises(ConfigError, match="must be F"):
        switched.set_plan("SFFF")
    with open_llm(checkpoint) as lean, pytest.raises(ConfigError, match="set_plan needs index_reuse=audited, got lean"):
        lean.set_plan("FSFF")
    guard = {"index_reuse": "audited", "index_topk_freq": 2, "audit_overlap_floor": 0.5}
    with open_llm(checkpoint, **guard) as guarded, pytest.raises(ConfigError, match="audit_overlap_floor"):
        guarded.set_plan("FFFF")


# --- the calibration ---


class Heard:
    """What a calibration tells; may interrupt it."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.begun: tuple[int, int] = (0, 0)
        self.tokens = 0
        self.trials: list[str] = []
        self.removals: list[str] = []
        self._interrupt_after = interrupt_after

    def begin(self, measured: int, left: int) -> None:
        self.begun = measured, left

    def add(self, tokens: int) -> None:
        self.tokens += tokens
        if len(self.trials) == self._interrupt_after:
            raise KeyboardInterrupt

    def trial(self, pattern: str, loss: float) -> None:
        self.trials.append(pattern)

    def removed(self, removal: Removal, rise: float) -> None:
        self.removals.append(removal.pattern)


def data(seed: int = 0) -> CalibrationData:
    documents = [prompt(LENGTH, seed), prompt(LENGTH - 50, seed + 1)]
    return CalibrationData.make(documents, [], skip_tokens=EXACT, about={"source": "test"})


def run(checkpoint: Path, out: Path, heard: Heard, options: SearchOptions | None = None, **settings: Any) -> Any:
    fixed = {"backend": "torch", "dtype": "float32", "num_threads": 1}
    return calibrate(checkpoint, data(), options or SearchOptions(), fixed | settings, out, heard)


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Heard]:
    out, heard = tmp_path_factory.mktemp("plan") / "plan.json", Heard()
    return out, run(checkpoint, out, heard), heard


def test_the_plan_file_has_every_level_and_its_evidence(checkpoint: Path, calibrated: tuple[Path, Any, Heard]) -> None:
    out, found, heard = calibrated
    assert json.loads(out.read_text()) == {"format": "m3serve-index-plan", "version": 1} | found
    assert [level["skipped"] for level in found["levels"]] == [0, 1, 2, 3]
    assert [level["pattern"] for level in found["levels"]][1:] == heard.removals
    assert found["pattern"] == found["chosen"]["pattern"] == "FSSS", "a quarter of four layers"
    assert found["checkpoint_hash"] == checkpoint_hash(checkpoint) and found["topk_blocks"] == TOPK
    assert found["sparse_layers"] == [1, 2, 3, 4] and found["search"] == {"blocks": 1, "complete": True}
    assert found["data"]["counted_tokens"] == LENGTH + LENGTH - 50 - 2 * EXACT
    assert [row["pattern"] for row in found["uniform"]] == list(uniform_patterns(4).values()) == ["FSFS", "FSSF"]
    for row in (*found["levels"], *found["uniform"]):
        assert row["loss"] == found["trials"][row["pattern"]]
        assert row["delta"] == row["loss"] - found["levels"][0]["loss"]
    assert [found["sparse_layers"][each["ordinal"]] for each in found["removals"]] == [
        each["layer"] for each in found["removals"]
    ]
    # A trial each, none twice.
    assert heard.trials == list(found["trials"]) and heard.tokens == len(heard.trials) * data().num_tokens
    assert heard.begun == (0, 2 + num_trials(4, max_skipped=3)) and len(heard.trials) <= heard.begun[1]


def test_a_trial_is_what_an_engine_with_that_plan_says(checkpoint: Path, calibrated: tuple[Path, Any, Heard]) -> None:
    """The losses of the file, from engines that loaded each pattern, past the positions where all plans agree."""
    _, found, _ = calibrated
    assert len(set(found["trials"].values())) > 3, "the plans differ on this data"
    scores = {}
    for pattern in ("FFFF", "FSSS", found["levels"][1]["pattern"]):
        with open_llm(checkpoint, chunk=2048, index_topk_pattern=pattern, max_num_seqs=4) as llm:
            scores[pattern] = nats = scoring.score(llm, data().token_ids)
        late = np.concatenate([each[EXACT:] for each in nats]).astype(np.float64)
        assert found["trials"][pattern] == pytest.approx(late.mean(), abs=1e-9)
    for one, other in zip(scores["FFFF"], scores["FSSS"], strict=True):
        assert np.array_equal(one[1:EXACT], other[1:EXACT]) and not np.array_equal(one[EXACT:], other[EXACT:])


def test_an_interrupted_calibration_goes_on(
    checkpoint: Path, calibrated: tuple[Path, Any, Heard], tmp_path: Path
) -> None:
    out, expected = tmp_path / "plan.json", calibrated[1]
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, out, Heard(interrupt_after=6))
    left = json.loads(out.read_text())
    assert len(left["trials"]) == 6 and not left["search"]["complete"]
    found = left["removals"]
    assert 1 <= len(found) < len(expected["removals"]) and found == expected["removals"][: len(found)]
    # What is there is a plan already, of the level that was reached.
    assert read_plan_file(out).pattern == left["levels"][-1]["pattern"]
    heard = Heard()
    found = run(checkpoint, out, heard)
    assert heard.begun[0] == 6 and len(heard.trials) == len(expected["trials"]) - 6
    timed = {"seconds", "created"}
    assert {key: found[key] for key in found.keys() - timed} == {key: expected[key] for key in found.keys() - timed}


def test_other_options_reuse_what_was_measured(
    checkpoint: Path, calibrated: tuple[Path, Any, Heard], tmp_path: Path
) -> None:
    out = Path(shutil.copy(calibrated[0], tmp_path))
    expected = calibrated[1]
    rises = sorted(level["delta"] for level in expected["levels"])
    heard = Heard()
    found = run(checkpoint, out, heard, SearchOptions(stop=Fraction(1, 2), level=Fraction(1, 4)))
    assert heard.trials == [] and [level["skipped"] for level in found["levels"]] == [0, 1, 2]
    assert found["pattern"] == expected["levels"][2]["pattern"], "the sparsest that was reached"
    assert found["chosen"]["by"] == "level 1/4, as far as the search went"
    found = run(checkpoint, out, heard, SearchOptions(tolerance=max(rises[0], 0.0)))
    assert heard.trials == []
    assert found["chosen"]["delta"] <= max(rises[0], 0.0) and found["chosen"]["by"].startswith("tolerance")
    found = run(checkpoint, out, heard, SearchOptions(blocks=2))
    assert [level["pattern"][0] + level["pattern"][2] for level in found["levels"]] == ["FF"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_hash": "other"}, "is of another calibration: checkpoint_hash is 'other' there"),
        ({"data_sha256": "other"}, "data_sha256 is 'other' there"),
        ({"engine": {}}, "engine is {} there"),
        ({"trials": None}, "is a plan that no calibration wrote: name another --out, or remove it"),
    ],
)
def test_it_does_not_go_on_with_something_else(
    checkpoint: Path, calibrated: tuple[Path, Any, Heard], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "plan.json"
    content = json.dumps(json.loads(calibrated[0].read_text()) | change)
    out.write_text(content)
    with pytest.raises(ConfigError, match=message):
        run(checkpoint, out, Heard())
    assert out.read_text() == content


def test_what_cannot_be_calibrated(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no calibration token lies past the first 512"):
        CalibrationData.make([prompt(EXACT, 0)], [], skip_tokens=EXACT, about={})
    with pytest.raises(ConfigError, match="load_format=dummy has random weights"):
        run(checkpoint, tmp_path / "plan.json", Heard(), load_format="dummy")
    one = write(tmp_path / "one", layers=2, sparse=(0, 1))
    with pytest.raises(ConfigError, match="fewer than two sparse layers"):
        run(one, tmp_path / "plan.json", Heard())


def test_answers_count_as_much_as_documents() -> None:
    asked = np.zeros(LENGTH, dtype=bool)
    asked[[100, 600, 610]] = True
    made = CalibrationData.make([prompt(LENGTH, 0)], [(prompt(LENGTH, 1), asked)], skip_tokens=EXACT, about={})
    document, answers = made.weights
    assert document.sum() == pytest.approx(0.5) and np.flatnonzero(document).tolist() == list(range(EXACT, LENGTH))
    assert np.flatnonzero(answers).tolist() == [600, 610] and answers[600] == 0.25
    nats = [np.full(LENGTH, 2, dtype=np.float32), np.full(LENGTH, 4, dtype=np.float32)]
    nats[0][0] = nats[1][0] = np.nan
    assert made.loss(nats) == pytest.approx(3.0)
    nats[1][600] = np.inf
    with pytest.raises(RuntimeError, match="the calibration loss is inf"):
        made.loss(nats)


# --- which weights a plan suits ---


def test_the_hash_stands_for_the_weights_not_for_the_files(checkpoint: Path, tmp_path: Path) -> None:
    known = checkpoint_hash(checkpoint)
    assert checkpoint_hash(write(tmp_path / "resharded", shards=5)) == known
    assert checkpoint_hash(Path(shutil.copytree(checkpoint, tmp_path / "moved"))) == known
    assert checkpoint_hash(write(tmp_path / "retrained", seed=23)) != known
    assert checkpoint_hash(write(tmp_path / "other_topk", topk_blocks=5)) != known

    def edited(name: str, **knobs: Any) -> Path:
        path = Path(shutil.copytree(checkpoint, tmp_path / name))
        config = json.loads((path / "config.json").read_text())
        config["text_config"].update(knobs)
        (path / "config.json").write_text(json.dumps(config))
        return path

    assert checkpoint_hash(edited("knobs", index_topk_freq=4, transformers_version="9")) == known
    assert checkpoint_hash(edited("theta", rope_theta=12345.0)) != known


@pytest.mark.parametrize("part", ["self_attn.q_proj.weight", "index_q_proj.weight", "input_layernorm.weight"])
def test_the_hash_changes_with_any_layer(checkpoint: Path, tmp_path: Path, part: str) -> None:
    path = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    known, changed = checkpoint_hash(path), set()
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(part)]:
            save_file(tensors | {name: (tensors[name].float() * 1.01 + 0.01).to(torch.bfloat16)}, file)
            changed.add(checkpoint_hash(path))
        save_file(tensors, file)
    assert known == checkpoint_hash(path) and known not in changed
    assert len(changed) >= sum(SPARSE)


def plan(path: Path, **content: Any) -> str:
    path.write_text(json.dumps({"format": "m3serve-index-plan", "version": 1, "pattern": "FSFS"} | content))
    return str(path)


def letters(checkpoint: Path, **settings: Any) -> str:
    model, knobs = resolve_model(EngineConfig.from_kwargs(checkpoint, **settings))
    return str(knobs.build_plan(model.is_sparse))


def test_a_plan_of_other_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert letters(checkpoint, index_plan_file=plan(file, checkpoint_hash=checkpoint_hash(checkpoint))) == "DFSFS"
    refused = plan(file, checkpoint_hash="0123")
    for serve in (letters, LLM):
        with pytest.raises(
            ConfigError, match=r"was calibrated on a checkpoint with checkpoint_hash 0123, that of .* is"
        ):
            serve(checkpoint, index_plan_file=refused)
    with pytest.raises(ConfigError, match="load_format=dummy has random weights: calibrate this one"):
        letters(checkpoint, index_plan_file=refused, load_format="dummy")
    with pytest.raises(ConfigError, match="calibrated with topk_blocks=16, the model now has 4"):
        letters(checkpoint, index_plan_file=plan(file, topk_blocks=16))
    with pytest.raises(ConfigError, match="has 2 letters, the model has 4 sparse layers"):
        letters(checkpoint, index_plan_file=plan(file, pattern="FS"))
    assert letters(checkpoint, index_plan_file=plan(file)) == "DFSFS", "made by hand"


def test_a_plan_beside_the_checkpoint_is_its_default(checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint, tmp_path / "shipped"))
    file = path / PLAN_FILE_NAME
    plan(file, checkpoint_hash=checkpoint_hash(path))
    assert letters(path) == "DFSFS"
    assert letters(path, use_index_cache=False) == "DFFFF"
    assert letters(path, index_topk_freq=1) == "DFFFF"
    assert letters(path, index_topk_freq=4) == "DFSSS"
    assert letters(path, index_topk_pattern="FFFS") == "DFFFS"
    assert letters(path, hf_overrides={"index_topk_freq": 4}) == "DFSSS"
    assert letters(path, index_plan_file=plan(tmp_path / "other.json", pattern="FFSS")) == "DFFSS"
    assert letters(path, load_format="dummy") == "DFFFF"
    plan(file, checkpoint_hash="0123")
    with pytest.raises(ConfigError, match=rf"index_plan_file {file} was calibrated on a checkpoint"):
        letters(path)
    assert letters(path, use_index_cache=False) == "DFFFF"
