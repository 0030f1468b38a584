"""`m3serve calibrate` from the outside: from documents to a plan that serves, Ctrl-C, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.msa.plan_file import PLAN_FILE_NAME, read_document
from service.cli import main
from service.flags import make_settings
from service.serve_command import check
from tests.checkpoints import make_checkpoint
from tests.cluster import Cluster, wait_until

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 800
FLAGS = ("--documents-count", "2", "--length", str(LENGTH), "--dtype", "float32", "--num-threads", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "tiny"
    sizes: dict[str, Any] = {"layers": 4, "sparse": (0, 1, 1, 1), "topk_blocks": 4, "vocab_size": 320}
    return make_checkpoint(path, seed=7, heads=4, kv_heads=2, expert_width=16, **sizes)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents")
    for name in ("scheduler.py", "pages.py", "sampler.py"):
        shutil.copy(ROOT / "engine" / name, path)
    return path


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    assert calibrate(checkpoint, documents, out) == 0
    return out


def calibrate(checkpoint: Path, documents: Path, out: Path, *flags: str) -> int:
    files = ("--model", str(checkpoint), "--documents", str(documents), "--out", str(out))
    return main(["calibrate", *files, *FLAGS, *flags])


def test_a_plan_from_documents(
    checkpoint: Path, documents: Path, calibrated: Path, tmp_path: Path, capsys: Any
) -> None:
    found = read_document(calibrated)
    assert found["search"]["complete"] and len(found["levels"]) == 3 and found["pattern"] == "FSS"
    data = found["data"]
    assert data["documents"] == 2 and len(data["names"]) == 2 and set(data["names"]) < set(os.listdir(documents))
    # Two sequences of each task, whose late answers count beside the documents' late tokens.
    assert data["sequences"] == 2 * len(data["tasks"]) and data["skip_tokens"] == 512
    assert 2 * (LENGTH - 512) < data["counted_tokens"] < data["tokens"] == (2 + data["sequences"]) * LENGTH
    assert calibrated.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    # Again: nothing is left to do, and the tables say what the file says.
    again = Path(shutil.copy(calibrated, tmp_path))
    assert calibrate(checkpoint, documents, again, "--tolerance", "0") == 0
    page, told = capsys.readouterr()
    assert f"{len(found['trials'])} trials are in the file" in told and "tokens/s" not in told
    assert read_document(again)["trials"] == found["trials"]
    for level in found["levels"]:
        assert f"{level['loss']:.5f}" in page and level["pattern"] in page
    assert "plan, by tolerance 0: " in page


def test_it_serves_these_weights_and_no_others(checkpoint: Path, calibrated: Path, tmp_path: Path, capsys: Any) -> None:
    assert str(check(make_settings(model=str(checkpoint), index_plan_file=str(calibrated)))) == "DFSS"
    assert f"index plan from {calibrated}, calibrated on these weights" in capsys.readouterr().err
    # Beside config.json it needs no flag; one flag sets it aside.
    shipped = Path(shutil.copytree(checkpoint, tmp_path / "shipped"))
    shutil.copy(calibrated, shipped / PLAN_FILE_NAME)
    assert str(check(make_settings(model=str(shipped)))) == "DFSS"
    assert str(check(make_settings(model=str(shipped), use_index_cache=False))) == "DFFF"
    capsys.readouterr()
    assert str(check(make_settings(model=str(checkpoint)))) == "DFFF"
    assert f"`m3serve calibrate --model {checkpoint}` finds which can share" in capsys.readouterr().err

    other = make_checkpoint(tmp_path / "other", seed=8, layers=4, sparse=(0, 1, 1, 1), topk_blocks=4, vocab_size=320)
    assert main(["serve", "--model", str(other), "--index-plan-file", str(calibrated)]) == 2
    said = capsys.readouterr().err
    assert "was calibrated on a checkpoint with checkpoint_hash" in said and "starting Ray" not in said
    assert main(["plan", "--config", str(shipped / "config.json"), "--device", "h100"]) == 0
    assert "DFSS" in capsys.readouterr().out


def test_a_group_of_ranks_finds_the_same(
    cluster: Cluster, checkpoint: Path, documents: Path, calibrated: Path, tmp_path: Path
) -> None:
    """The plan of a trial reaches every rank: ranks that disagreed would add up two models."""
    out = tmp_path / "plan.json"
    assert calibrate(checkpoint, documents, out, "--tensor-parallel-size", "2", "--examples", "2") == 0
    one, two = read_document(calibrated), read_document(out)
    assert two["trials"] == pytest.approx(one["trials"], abs=1e-5)
    assert len({round(loss, 4) for loss in one["trials"].values()}) > 2, "the plans differ by more than that"


def test_ctrl_c_keeps_what_was_measured(checkpoint: Path, documents: Path, calibrated: Path, tmp_path: Path) -> None:
    """In the command that needs the engine's libraries alone."""
    out = tmp_path / "plan.json"
    files = ("--model", str(checkpoint), "--documents", str(documents), "--out", str(out), "--documents-count", "2")
    command = [sys.executable, "-m", "service.calibration", *files, "--length", str(LENGTH), "--set", "dtype=float32"]
    process = subprocess.Popen(
        [*command, "--set", "num_threads=1"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: out.exists() or process.poll() is not None, timeout_s=120.0, what="a first trial")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    assert f"stopped; {out} has what was measured" in told
    left = read_document(out)
    assert left["trials"] and not left["search"]["complete"]
    assert calibrate(checkpoint, documents, out) == 0
    assert read_document(out)["trials"] == pytest.approx(read_document(calibrated)["trials"])


def test_the_engine_alone_is_enough() -> None:
    code = (
        "import sys, service.calibration.__main__; "
        "print(sorted({'ray', 'zmq', 'msgspec', 'pydantic', 'fastapi', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--level", "1/4", "--tolerance", "0.1"), "--level 1/4 and --tolerance 0.1: give one of them"),
        (("--levels", ","), "--levels names no level"),
        (("--levels", "1/2", "--level", "1/4"), "--level 1/4: the search ends at 1/2, see --levels"),
        (("--level", "4"), r"a level must be in (0, 1], got 4"),
        (("--blocks", "4"), "blocks must be in [1, 3], the number of sparse layers, got 4"),
        (("--length", "512", "--examples", "0"), "no calibration token lies past the first 512"),
        (("--length", "99999"), "--length 99999: the model takes"),
        (("--examples", "0", "--documents-count", "0"), "there is nothing to evaluate"),
        (("--documents", "/nowhere"), "--documents /nowhere cannot be read"),
        (("--out", "/nowhere/plan.json"), "--out /nowhere/plan.json: there is no such directory"),
    ],
)
def test_what_it_refuses(
    checkpoint: Path, documents: Path, tmp_path: Path, capsys: Any, flags: tuple[str, ...], message: str
) -> None:
    assert calibrate(checkpoint, documents, tmp_path / "plan.json", *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plan_made_by_hand_is_not_overwritten(checkpoint: Path, documents: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "plan.json"
    out.write_text(json.dumps({"format": "m3serve-index-plan", "version": 1, "pattern": "FSS"}))
    assert calibrate(checkpoint, documents, out) == 2
    assert "is a plan that no calibration wrote: name another --out, or remove it" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_plan_and_no_plot(
    checkpoint: Path, documents: Path, calibrated: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "service.calibration.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = Path(shutil.copy(calibrated, tmp_path))
    assert calibrate(checkpoint, documents, out) == 0
    assert "pip install 'm3serve[plots]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]
