"""`m3serve bench` as a person runs it: what it counts, and what it says when it cannot measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kernels.api import resolve
from service import cli
from service.bench import floors, kernel_cases, kernels
from service.bench.floors import H100, M3_RANK, Floor
from service.bench.gpu_timing import Protocol
from service.bench.kernel_inputs import Bench
from service.bench.slice_model import TINY_RANK, SliceFloors
from tests.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
K = 1024


def test_offline(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    cases = ["--prefill-tokens", "40", "--decode-batches", "1,3", "--context-tokens", "20", "--decode-steps", "4"]
    arguments = ["--model", str(checkpoint), "--repeats", "1", "--num-threads", "1", "--dtype", "float32"]
    assert cli.main(["bench", "offline", *arguments, *cases, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert [(row["case"], row["batch"], row["context_tokens"]) for row in document["rows"]] == [
        ("prefill", 1, 40),
        ("decode", 1, 20),
        ("decode", 3, 20),
    ]
    for row in document["rows"]:
        tokens = row["context_tokens"] if row["case"] == "prefill" else row["batch"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["median_ms"] * 1e3)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "outside_forward" in printed.err


def test_plans(checkpoint: Path, tmp_path: Path) -> None:
    """Every plan in every case, the first of them twice; what reuses a selection runs no indexer."""
    out = tmp_path / "bench.json"
    sizes = ["--prefill-tokens", "300", "--context-tokens", "900", "--decode-batches", "1,4", "--decode-steps", "40"]
    fixed = [f"--set={pair}" for pair in ("num_threads=1", "dtype=float32", "max_num_batched_tokens=512")]
    arguments = ["--model", str(checkpoint), "--compare", "F,FSS", "--repeats", "1", *sizes, *fixed, "--out", str(out)]
    assert cli.main(["bench", "plans", *arguments]) == 0
    rows = json.loads(out.read_text())["rows"]
    plans = ["DDFFF", "DDFSS", "DDFFF"]
    assert [(row["plan"], row["case"], row["batch"]) for row in rows] == [
        (plan, *case) for plan in plans for case in (("prefill", 1), ("decode", 1), ("decode", 4))
    ]
    for row, first in zip(rows, rows[:3] * 3, strict=True):
        tokens = row["context_tokens"] if row["case"] == "prefill" else row["batch"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["median_ms"] * 1e3)
        assert row["against_first"] == pytest.approx(row["tokens_per_s"] / first["tokens_per_s"])
        assert 0 < row["indexer_share"] < 1


def test_plans_refuses_what_it_cannot_measure(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for compare, named in (("F,1", "twice"), ("x", "'x'"), (",", "names no plan")):
        assert cli.main(["bench", "plans", "--model", str(checkpoint), "--compare", compare]) == 2
        assert named in capsys.readouterr().err
    assert (
        cli.main(
            [
                "bench",
                "plans",
                "--model",
                str(checkpoint),
                "--compare",
                "F",
                "--decode-batches",
                "",
                "--prefill-tokens",
                "",
            ]
        )
        == 2
    )
    assert "nothing to measure" in capsys.readouterr().err


def test_metrics(checkpoint: Path, tmp_path: Path) -> None:
    """The cost is the sum of its parts, each of which was really measured."""
    out = tmp_path / "bench.json"
    sizes = ["--batches", "1,3", "--context-tokens", "20", "--steps", "40", "--num-threads", "1"]
    assert cli.main(["bench", "metrics", "--model", str(checkpoint), *sizes, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["context_tokens"]) for row in rows] == [(1, 20), (3, 20)]
    for row in rows:
        parts_us = [row["counting us"], row["series us"], row["probe us"]]
        assert min(parts_us[:2]) > 0 and row["series max us"] >= row["series us"]
        assert row["cost %"] == pytest.approx(sum(parts_us) / row["step ms"] / 10)


@pytest.mark.parametrize(
    ("floor", "us"),
    [
        (floors.indexer_decode(M3_RANK, 64, 32 * K), 178),
        (floors.indexer_decode(M3_RANK, 1, 128 * K), 11.1),
        (floors.indexer_decode(M3_RANK, 64, 32 * K, floors.FP8), 178 * 132 / 256),
        (floors.sparse_decode(M3_RANK, 64, 32 * K), 22.3),
        (floors.sparse_decode(M3_RANK, 1, 8 * K), 0.35),
        (floors.dense_decode(M3_RANK, 64, 32 * K), 356),
        (floors.indexer_prefill(M3_RANK, 8 * K, 8 * K), 10.9),
        (floors.indexer_prefill(M3_RANK, 8 * K, 128 * K), 337),
        (floors.sparse_prefill(M3_RANK, 8 * K, 32 * K), 174),
        (floors.dense_prefill(M3_RANK, 8 * K, 8 * K), 348),
        (floors.qk_norm_rope_insert(M3_RANK, 8 * K, index=True), 27.8),
        (floors.add_rms_norm(M3_RANK, 8 * K), 133),
        (floors.linear(50016, 6144, 1), 203.5),
        (floors.experts(M3_RANK, 1), 46.9),
        (floors.experts(M3_RANK, 8 * K), 1468),
    ],
)
def test_floors(floor: Floor, us: float) -> None:
    """Worked out by hand from the sizes of one M3 rank, at 3.02 TB/s and 790 TFLOP/s."""
    assert floor.us(H100) == pytest.approx(us, rel=5e-3)
    assert floor.kind(H100) == ("FLOP" if floor.flops / 790e12 * 1e6 > 0.99 * us else "bytes")


def test_pairs_of_sparse_prefill() -> None:
    for queries, context, limit in [(5, 5, 3), (5, 20, 3), (3, 4, 9), (4, 8, 7), (1, 1, 1), (6, 9, 6)]:
        visible = range(context - queries + 1, context + 1)
        assert floors.selected_pairs(queries, context, limit) == sum(min(keys, limit) for keys in visible)
        assert floors.causal_pairs(queries, context) == sum(visible)


def test_floors_of_the_slice() -> None:
    slice_floors = SliceFloors(M3_RANK, "DDD" + "F" * 9, element=2, kv_element=2, index_element=2)
    # 9 x 5 experts, 12 attentions, 3 dense MLPs, the head: what one token reads.
    assert slice_floors.weight_bytes(4.0) == pytest.approx(2.9e9, rel=0.03)
    assert slice_floors.decode(1, 8 * K, 4.0).us(H100) == pytest.approx(970, rel=0.03)
    # 2 x 1.15 G weights a token, and attention.
    assert slice_floors.prefill(8 * K).flops == pytest.approx(18.8e12 + 1.9e12, rel=0.02)
    lean = SliceFloors(M3_RANK, "DDDFSSSFSSSF", element=2, kv_element=2, index_element=2)
    saved = slice_floors.decode(64, 32 * K, 111.0).num_bytes - lean.decode(64, 32 * K, 111.0).num_bytes
    index_weights = 2 * 256 * 6144
    assert saved == 6 * (64 * 32 * K * 256 + index_weights)
    assert floors.expected_experts(128, 4, 64) == pytest.approx(111.2, abs=0.1)


def test_floors_of_packed_weights() -> None:
    """A scale of one byte stands beside 32 codes of one byte, or of half of one."""
    expert = M3_RANK.expert_elements
    tokens = 2 * 2 * M3_RANK.hidden
    assert floors.experts(M3_RANK, 1, 4, "mxfp8").num_bytes == 5 * expert * 33 / 32 + tokens
    assert floors.experts(M3_RANK, 1, 4, "mxfp4").num_bytes == 5 * expert * 17 / 32 + tokens
    assert floors.linear(64, 32, 1, "mxfp8").num_bytes == 64 * 33 + 2 * 96
    plan = "DDD" + "F" * 9
    plain, eight, four = (SliceFloors(M3_RANK, plan, 2, 2, 2, kind).weight_bytes(4.0) for kind in floors.WEIGHT_BYTES)
    # MXFP4 packs the experts alone, MXFP8 attention and dense layers too; nothing packs head and router.
    unpacked = 2 * M3_RANK.vocab * M3_RANK.hidden + 4 * 9 * 128 * M3_RANK.hidden
    assert eight == pytest.approx(unpacked + (plain - unpacked) * 33 / 64)
    assert four == pytest.approx(plain - 9 * 5 * expert * (2 - 17 / 32))


def test_kernels_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    assert cli.main(["bench", "kernels", "--dry-run", "--filter", "indexer decode 8k", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == [
        f"indexer decode {n} x 8k{fp8}" for fp8 in ("", " fp8") for n in (1, 16, 64)
    ]
    assert rows[2].pop("floor_us") == pytest.approx(44.44, rel=1e-3)
    assert rows[2] == {
        "case": "indexer decode 64 x 8k",
        "time_us": None,
        "floor": "bytes",
        "ratio": None,
        "baseline_us": 52.3,
        "baseline": "vLLM 0.33",
    }
    printed = capsys.readouterr()
    assert printed.out == "" and "baseline_us" in printed.err


def test_every_published_time_belongs_to_a_case() -> None:
    names = [case.name for case in kernel_cases.all_cases(M3_RANK)]
    assert len(set(names)) == len(names)
    assert kernels.VLLM_US.keys() <= set(names)


def _tiny_bench() -> Bench:
    return Bench(resolve("torch"), TINY_RANK, torch.float32, cold_bytes=1e3, max_len=1024, min_calls=2)


def test_kernel_cases_run() -> None:
    """Every case prepares its inputs and calls its operation; without a GPU, the oracle's."""
    sizes = kernel_cases.Sizes(
        decode=((2, 700),),
        prefill=((64, 700),),
        dense_decode=((2, 300),),
        dense_prefill=((64, 300),),
        layer_tokens=(2,),
        weight_tokens=(2,),
        sampled=(1,),
    )
    cases = kernel_cases.all_cases(TINY_RANK, sizes)
    rows = kernels.measure_cases(cases, _tiny_bench(), H100, Protocol(0, 1))
    assert [row["case"] for row in rows] == [case.name for case in cases]
    for row in rows:
        assert "error" not in row, row
        if row["time_us"] is None:
            assert row["case"].startswith(("block unions", "sample")) and row["note"]
        else:
            assert row["ratio"] == pytest.approx(row["time_us"] / row["floor_us"])
    baselines = {row["baseline"] for row in rows if row["case"].startswith("linear")}
    assert baselines == {"F.linear"}
    hit = next(row for row in rows if row["case"] == "experts 2")
    assert hit["note"].endswith("routed experts hit")


def test_a_failing_kernel_does_not_hide_the_others() -> None:
    def fails(bench: Bench) -> kernel_cases.Calls:
        raise RuntimeError("out of registers\nand more")

    works = kernel_cases.Case("works", Floor(1.0), lambda bench: kernel_cases.Calls(lambda call: None, 1))
    cases = [kernel_cases.Case("fails", Floor(1.0), fails), works]
    rows = kernels.measure_cases(cases, _tiny_bench(), H100, Protocol(0, 1))
    assert rows[0]["error"] == "RuntimeError: out of registers" and rows[1]["time_us"] is not None


def test_kernels_need_few_libraries() -> None:
    absent = ("fastapi", "httpx", "pydantic", "ray", "safetensors", "tokenizers", "transformers", "zmq", "msgspec")
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
        "from service.bench import kernels\n"
        "sys.exit(kernels.main(['--dry-run', '--filter', 'swiglu']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 3


def test_slice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "slice.json"
    sizes = ["--prefill-tokens", "150", "--concurrency", "1,3", "--context-tokens", "500", "--decode-steps", "4"]
    settings = ["--backend", "torch", "--dtype", "float32", "--set", "num_threads=1", "--set", "probe_interval=1"]
    loop = ["--repeats", "1", "--requests-per-stream", "2"]
    assert cli.main(["bench", "slice", "--tiny", *sizes, *settings, *loop, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert [engine["plan"] for engine in document["engines"]] == ["DDD" + "F" * 9, "DDDFSSSFSSSF"]
    assert 2.0 == document["engines"][0]["coverage"]["1"] < document["engines"][0]["coverage"]["3"]
    rows: list[dict[str, Any]] = document["rows"]
    cases = ["prefill", "decode", "closed loop", "decode", "closed loop"]
    assert [row["case"] for row in rows] == cases * 2
    for row in rows:
        if row["case"] == "decode":
            assert row["tok_per_s"] == pytest.approx(row["concurrency"] / row["tpot_ms"] * 1e3)
            assert row["preemptions"] == 0 and row["ratio"] > 1 and 0 < row["indexer_share"] < 1
            assert set(row["indexer_ms_per_layer"]) == set(map(str, range(3, 12, row["freq"])))
        elif row["case"] == "closed loop":
            assert row["requests"] == 2 * row["concurrency"]
    assert [(gain["freq"], gain["concurrency"]) for gain in document["gains"]] == [(4, 1), (4, 3)]
    for gain in document["gains"]:
        assert gain["predicted_gain"] == pytest.approx(gain["indexer_share"] * 2 / 3)
    printed = capsys.readouterr()
    assert printed.out == "" and "measured_gain" in printed.err


def test_slice_of_a_group(cluster: Cluster, tmp_path: Path) -> None:
    """Two ranks of the size that one has otherwise: a model twice as wide, with its collectives timed."""
    out = tmp_path / "slice.json"
    sizes = ["--prefill-tokens", "", "--concurrency", "2", "--context-tokens", "200", "--decode-steps", "4"]
    settings = ["--backend", "torch", "--dtype", "float32", "--set", "num_threads=1", "--set", "probe_interval=1"]
    group = ["--tensor-parallel-size", "2", "--freqs", "4"]
    assert cli.main(["bench", "slice", "--tiny", *sizes, *settings, *group, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    [row], [engine] = document["rows"], document["engines"]
    assert document["tensor_parallel_size"] == 2 and engine["kernels"]["all_reduce"] == "gloo"
    assert 0 < row["collective_ms"] < row["tpot_ms"] * 2 and row["experts_hit"] == engine["coverage"]["2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--filter", "indexer decode 7k"], "matches no case; there are: indexer decode, sparse decode"),
        (["kernels", "--max-len", "0"], "must be positive numbers, got '0'"),
        (["slice", "--tiny", "--freqs", "1,x"], "must be numbers separated by commas, got '1,x'"),
        (["slice", "--tiny", "--set", "eager"], "--set 'eager': expected NAME=VALUE"),
        (["slice", "--tiny", "--set", "eager=true"], "unknown settings ['eager']"),
        (["slice", "--tiny", "--bandwidth", "0"], "--bandwidth must be positive, got 0.0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["bench", *arguments])
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else -1
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("kind", "way_out"), [("kernels", "--dry-run"), ("slice", "--tiny")])
def test_no_gpu(kind: str, way_out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", kind]) == 2
    message = capsys.readouterr().err
    assert "torch sees none" in message and way_out in message


@pytest.mark.parametrize(
    ("kind", "word"), [("kernels", "floor"), ("slice", "floor"), ("plans", "the first plan is what the others")]
)
def test_help_teaches(kind: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", kind, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert word in " ".join(text.lower().split()) and f"m3serve bench {kind} --" in text
