"""`m3serve eval` from the outside: plans side by side, the endpoint's figures, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.cli import main
from tests.cluster import Cluster

ROOT = Path(__file__).parents[2]
SIZES = ("--documents", "service/evaluation", "--length", "768", "--documents-count", "3", "--examples", "1")
ENGINE = ("--backend", "torch", "--dtype", "float32", "--num-threads", "1")


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M3SERVE_MODEL", raising=False)
    monkeypatch.chdir(ROOT)


def run(checkpoint: Path, *flags: str, status: int = 0) -> None:
    assert main(["eval", "--model", str(checkpoint), *SIZES, *flags]) == status


def without_time(found: dict[str, Any]) -> dict[str, Any]:
    plans = [{k: v for k, v in plan.items() if k not in ("seconds", "tokens_per_s")} for plan in found["plans"]]
    return {"data": found["data"], "plans": plans}


def test_plans_side_by_side(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    run(checkpoint, *ENGINE, "--compare", "F,FSS", "--index-reuse", "audited", "--out", str(out))
    found = json.loads(out.read_text())
    base, other = found["plans"]
    assert (base["plan"], other["plan"]) == ("DDFFF", "DDFSS")
    loss = {row["part"]: row for row in base["loss"]}
    assert loss["0-512"]["tokens"] == 3 * 511 and loss["512-1k"]["tokens"] == 3 * 256
    change = {row["part"]: row["difference"] for row in other["loss_difference"]}
    # The tiny model selects 4 blocks: below 512 tokens a plan changes nothing.
    assert change["0-512"] == 0.0 != change["512-1k"]
    assert len(base["correct"]) == found["data"]["questions"] > 30 and set(base["correct"]) <= {"0", "1"}
    assert base["mean_overlap"] is None and set(other["overlap"]) == {"3", "4"}
    assert 0.25 <= other["mean_overlap"] < 1
    assert found["data"]["sha256"] and found["versions"]["m3serve"] and found["checkpoint"] == checkpoint.name
    shown = capsys.readouterr()
    assert "DDFFF" in shown.out and f"DDFSS: mean overlap {other['mean_overlap']:.3f}" in shown.out
    assert "tokens/s" in shown.err and "left" in shown.err

    # The engine's libraries alone give the same figures.
    alone = tmp_path / "alone.json"
    flags = ["--compare", "F,FSS", *(f"--set={each}" for each in ("backend=torch", "dtype=float32", "num_threads=1"))]
    command = [
        sys.executable,
        "-m",
        "service.evaluation",
        "--model",
        str(checkpoint),
        *SIZES,
        *flags,
        "--out",
        str(alone),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    same = without_time(json.loads(alone.read_text()))
    expected = without_time(found)
    for plan in expected["plans"]:
        plan |= {"overlap": {}, "mean_overlap": None}
    assert same == expected


def test_an_endpoint_has_the_figures_of_its_engine(
    cluster: Cluster, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--index-topk-freq", "2", "--out")
    run(checkpoint, *ENGINE, *flags, str(tmp_path / "offline.json"))
    with cluster.service(cluster.settings(checkpoint, index_topk_freq=2, max_model_len=2048)) as url:
        run(checkpoint, "--url", f"{url}/v1", "--out", str(tmp_path / "http.json"))
        capsys.readouterr()
        run(checkpoint, "--url", f"{url}/v1", "--length", "2048", status=2)
        assert "--length 2048: the model takes 2047 tokens and one more" in capsys.readouterr().err
        run(checkpoint, "--url", f"{url}/v1", "--served-model", "another", status=2)
        assert f"serves only {checkpoint.name}" in capsys.readouterr().err
        run(checkpoint, "--url", url, status=1)
        assert f"{url}/models does not answer" in capsys.readouterr().err
    offline, http = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("offline", "http"))
    assert http["source"].startswith("http://") and offline["source"] == "offline"
    assert http["data"] == offline["data"]
    [ours], [theirs] = offline["plans"], http["plans"]
    assert ours["plan"] == theirs["plan"] == "DDFSF"
    assert ours["correct"] == theirs["correct"] and ours["accuracy"] == theirs["accuracy"]
    for mine, other in zip(ours["loss"], theirs["loss"], strict=True):
        assert mine["part"] == other["part"] and mine["nats"] == pytest.approx(other["nats"], abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--compare", "F,2,F"), "--compare names the plan DDFFF twice"),
        (("--compare", "nowhere.json"), "--compare 'nowhere.json': expected a number"),
        (("--compare", ","), "--compare names no plan"),
        (("--length", "9000"), "--length 9000: the model takes 8191 tokens and one more"),
        (("--documents", "service/sse.py", "--length", "8191"), "no document has --length 8191 tokens"),
        (("--tasks", "sums"), "tasks must be of recall"),
        (("--examples", "-1"), "examples must be at least 0, got -1"),
        (("--documents", "nowhere"), "--documents nowhere cannot be read"),
        (("--url", "http://127.0.0.1:9/v1", "--compare", "F,2"), "--compare and --url"),
    ],
)
def test_what_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    run(checkpoint, *flags, status=2)
    assert message in capsys.readouterr().err


def test_no_endpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(checkpoint, "--url", "http://127.0.0.1:9/v1", status=1)
    assert "m3serve eval: error: http://127.0.0.1:9/v1/models does not answer" in capsys.readouterr().err
