"""`m3serve plan` from the outside: what it prints, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.cli import main

CONFIG = Path(__file__).parents[1] / "unit" / "m3_config.json"
LONG = ("--max-model-len", "131072", "--max-num-seqs", "64")


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M3SERVE_MODEL", raising=False)


def plan(capsys: pytest.CaptureFixture[str], *flags: str, config: Path = CONFIG, status: int = 0) -> str:
    assert main(["plan", "--config", str(config), *flags]) == status
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *flags: str, **rest: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(capsys, "--json", *flags, **rest))
    return found


def test_best_layout_of_each_device(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--format", "mxfp8", *LONG)
    assert {device["device"]: device["best"] for device in found["devices"]} == {
        "mi300x": 4, "mi325x": 2, "mi350x": 2, "mi355x": 2, "h100": 8, "h200": 4,
    }  # fmt: skip
    assert found["model"]["checkpoint_bytes"] == 442_007_940_096
    assert found["model"]["parameters"] == 426_174_572_928
    four = next(rank for rank in found["ranks"] if rank["tensor_parallel_size"] == 4)
    assert (four["page_bytes"], four["kv_token_bytes"], four["index_token_bytes"]) == (5_799_936, 30720, 14592)
    assert four["weight_bytes"] == sum(four["weights"].values())
    for device in found["devices"]:
        for layout in device["layouts"]:
            fits = layout["reason"] is None
            assert fits == (layout["kv_tokens"] >= 131072) == (layout["replicas_per_node"] > 0)
            assert not fits or layout["concurrent_requests"] == min(64, layout["kv_tokens"] // 131072)


def test_page_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--format", "mxfp8", "--device", "mi300x", *LONG)
    text, found = plan(capsys, *flags), document(capsys, *flags)
    layout = next(each for each in found["devices"][0]["layouts"] if each["tensor_parallel_size"] == 4)
    [row] = [line for line in text.splitlines() if line.startswith("mi300x") and line.endswith("best")]
    shown = [str(cell) for cell in row.split()]
    assert shown[:4] == ["mi300x", "192.0", "4", "GPUs"]
    counts = ("kv_tokens", "full_requests", "replicas_per_node", "kv_tokens_per_node")
    assert shown[5:-1] == [f"{layout[key]:,}" for key in counts]
    assert "426.2 billion parameters in 60 layers, DDDFFF" in text and "442.0 GB" in text
    assert f"{layout['concurrent_requests']} of max_num_seqs=64 requests" in text
    assert "2 GPUs: weights 205.9 GiB" in text, "a device that was asked for says why fewer GPUs do not do"


def test_no_fit_gives_the_sum_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "--device", "h100", status=1)
    assert "h100: does not fit" in text
    assert "8 GPUs: weights 99.6 GiB + buffers and runtime 2.0 GiB exceed 79.1 GiB" in text
    flags = ("--memory-gib", "60", "--format", "mxfp8", "--tensor-parallel-size", "8")
    text = plan(capsys, *flags, status=1)
    assert "60 GiB: does not fit" in text and "one request of 1,048,576 tokens needs 44.2 GiB (max_model_len=" in text
    longest = text.split("max_model_len=")[1].split()[0]
    assert "best" in plan(capsys, *flags, "--max-model-len", longest)


def test_settings_change_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    def bytes_of(*flags: str) -> tuple[int, int]:
        [rank] = document(capsys, "--tensor-parallel-size", "4", *flags, status=0)["ranks"]
        return rank["kv_token_bytes"], rank["index_token_bytes"]

    fits = ("--format", "mxfp4", "--device", "mi355x")
    assert bytes_of(*fits) == (30720, 57 * 256)
    assert bytes_of(*fits, "--kv-cache-dtype", "fp8", "--index-cache-dtype", "fp8") == (60 * 2 * 132, 57 * 132)
    assert bytes_of(*fits, "--index-topk-freq", "4") == (30720, 15 * 256)
    assert bytes_of(*fits, "--index-topk-freq", "4", "--index-reuse", "audited") == (30720, 57 * 256)
    assert bytes_of(*fits, "--dtype", "float32") == (61440, 57 * 512)


def test_checkpoint_says_its_format(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    raw = json.loads(CONFIG.read_text())
    ignored = ["lm_head", "model.embed_tokens", "vision_tower"]
    ignored += [f"language_model.model.layers.{layer}.block_sparse_moe.gate" for layer in range(3, 60)]
    raw["quantization_config"] = {
        "quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32],
        "ignored_layers": ignored,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = document(capsys, config=tmp_path / "config.json")
    assert (found["model"]["format"], found["model"]["checkpoint_bytes"]) == ("mxfp8", 442_007_940_096)
    assert main(["plan", "--model", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    # As if it were the plain checkpoint, whatever its own says.
    raw["quantization_config"] = {"quant_method": "unheard-of"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = document(capsys, "--format", "bf16", config=tmp_path / "config.json")
    assert (found["model"]["format"], found["model"]["checkpoint_bytes"]) == ("bf16", 852_438_813_696)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give --model DIR"),
        (["--config", "nowhere.json"], "nowhere.json cannot be read"),
        (["--config", str(CONFIG), "--model", "m"], "give one of them"),
        (["--config", str(CONFIG), "--format", "int4"], "--format"),
        (["--config", str(CONFIG), "--device", "abacus"], "--device"),
        (["--config", str(CONFIG), "--tensor-parallel-size", "3"], "does not divide num_attention_heads=64"),
        (["--config", str(CONFIG), "--tensor-parallel-size", "16"], "--gpus-per-node is 8"),
        (["--config", str(CONFIG), "--gpus-per-node", "0"], "--gpus-per-node must be at least 1"),
        (["--config", str(CONFIG), "--memory-gib", "nan"], "--memory-gib must be positive"),
        (["--config", str(CONFIG), "--max-model-len", "2000000"], "max_position_embeddings=1048576"),
        (["--config", str(CONFIG), "--index-topk-pattern", "F"], "needs 57 letters"),
        (["--config", str(CONFIG), "--kv-cache-dtype", "int8"], "kv_cache_dtype must be one of auto, fp8"),
        (["--config", str(CONFIG), "--memory-fraction", "2"], "memory_fraction must be in (0, 1]"),
    ],
)
def test_wrong_flags(capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    try:
        status = main(["plan", *flags])
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else -1
    out = capsys.readouterr()
    assert (status, out.out) == (2, "")
    assert says in out.err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "--config config.json --format mxfp4" in text
    assert "--kv-cache-dtype" in text and "--port" not in text
