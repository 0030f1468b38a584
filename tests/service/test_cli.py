"""The command line: flags made from the settings, errors told before anything starts, and one real run."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from service.cli import build_parser, main
from service.flags import given_settings, make_settings
from service.settings import ENVIRONMENT_ONLY, ServiceSettings
from tests.cluster import wait_until
from tests.serve_command import ANY_PORTS, START_TIMEOUT_S, Command


def parse(*flags: str) -> dict[str, Any]:
    return given_settings(build_parser().parse_args(["serve", *flags]))


def fails(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What the command says on stderr before it ends with status 2."""
    try:
        status = main(["serve", *flags])
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else -1
    assert status == 2
    out = capsys.readouterr()
    assert out.out == "" and "starting Ray" not in out.err
    return out.err


def test_every_setting_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--api-keys" not in text and "M3SERVE_API_KEYS" in text, "a command line is no place for secrets"
    for name in ServiceSettings.model_fields.keys() - ENVIRONMENT_ONLY:
        field = ServiceSettings.model_fields[name]
        assert f"--{name.replace('_', '-')}" in text
        assert field.description and " ".join(field.description.split()) in text.replace("- ", "-"), name
    assert "examples:" in text


def test_flags_take_the_types_of_their_settings() -> None:
    flags = ["--model", "m", "--index-topk-freq", "4", "--memory-fraction", "0.25", "--no-use-index-cache"]
    assert parse(*flags, "--hf-overrides", '{"a": 1}', "--enable-prefix-caching") == {
        "model": "m",
        "index_topk_freq": 4,
        "memory_fraction": 0.25,
        "use_index_cache": False,
        "hf_overrides": {"a": 1},
        "enable_prefix_caching": True,
    }
    assert parse() == {}, "a flag that is not given leaves the choice to the environment"


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3SERVE_MODEL", "from-env")
    monkeypatch.setenv("M3SERVE_REPLICAS", "3")
    settings = make_settings(**parse("--replicas", "2"))
    assert (settings.model, settings.replicas) == ("from-env", 2)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--mod", "x"], "--mod"),
        (["--max-num-seqs", "many"], "--max-num-seqs"),
        (["--max-num-seqs", "1.5"], "--max-num-seqs"),
        (["--hf-overrides", "{"], "--hf-overrides"),
        (["--hf-overrides", "[1]"], "must be a JSON object"),
        (["--port", "70000"], "--port"),
        (["--replicas", "0"], "--replicas"),
        (["--step-timeout-s", "nan"], "--step-timeout-s"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
        (["--backend", "cuda"], "backend"),
        (["--memory-fraction", "2"], "memory_fraction"),
        (["--index-topk-pattern", "SFF"], "first sparse layer"),
        (["--index-topk-pattern", "FF"], "index_topk_pattern needs 3 letters"),
        (["--index-topk-freq", "-1"], "index_topk_freq"),
        (["--max-model-len", "1000000"], "max_position_embeddings"),
        (["--hf-overrides", '{"head_dims": 64}'], "head_dim"),
    ],
)
def test_wrong_settings_end_the_command_before_anything_starts(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, flags: list[str], says: str
) -> None:
    assert says in fails(capsys, "--model", str(checkpoint), *flags)


def test_wrong_checkpoints_end_the_command_before_anything_starts(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    assert "config.json" in fails(capsys, "--model", str(tmp_path / "nowhere"))
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in fails(capsys, "--model", str(tmp_path))


def test_an_open_service_is_said_to_be_open(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ("--model", str(checkpoint), "--backend", "cuda")
    assert "no API key is needed: whoever reaches 0.0.0.0" in fails(capsys, *wrong, "--host", "0.0.0.0")
    assert "no API key" not in fails(capsys, *wrong)
    keys = tmp_path / "keys"
    assert f"api_key_file {keys} cannot be read" in fails(capsys, *wrong, "--api-key-file", str(keys))
    keys.write_text("0123456789abcdef")
    said = fails(capsys, *wrong, "--host", "0.0.0.0", "--api-key-file", str(keys))
    assert "no API key" not in said and "backend" in said
    monkeypatch.setenv("M3SERVE_API_KEYS", "a secret that is no key")
    said = fails(capsys, *wrong)
    assert "M3SERVE_API_KEYS: entry 1 is no key" in said and "secret" not in said


def test_ports_in_use_are_named(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = str(owner.getsockname()[1])
        for flag in ("--port", "--metrics-port", "--ray-metrics-port"):
            others = list(ANY_PORTS)
            message = fails(capsys, "--model", str(checkpoint), *others, flag, port)
            assert flag in message and port in message and "in use" in message


def test_a_wrong_value_is_quoted_with_its_flag() -> None:
    with pytest.raises(ConfigError, match=r"--metrics-port \(M3SERVE_METRICS_PORT\).*got -1"):
        make_settings(model="m", metrics_port=-1)


@pytest.fixture
def serve_command() -> Iterator[Any]:
    started: list[Command] = []

    def start(*flags: str, **variables: str) -> Command:
        started.append(Command(*flags, **variables))
        return started[-1]

    yield start
    for command in started:
        command.end()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the command asks for")
def test_a_backend_without_its_gpu_is_refused_before_anything_waits_for_one(
    serve_command: Any, checkpoint: Path
) -> None:
    command = serve_command("--model", str(checkpoint), "--backend", "triton")
    assert command.process.wait(timeout=START_TIMEOUT_S) == 2, command.errors
    wait_until(
        lambda: any("backend=triton needs a GPU for each of 1 replicas x 1 ranks" in line for line in command.errors),
        timeout_s=5,
        what="the error line",
    )


def test_a_truncated_shard_ends_the_command_with_its_name(serve_command: Any, checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    shard = sorted(broken.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    command = serve_command("--model", str(broken))
    assert command.process.wait(timeout=START_TIMEOUT_S) == 2, command.errors
    wait_until(
        lambda: bool(command.errors) and command.errors[-1].startswith("m3serve: error:"),
        timeout_s=5,
        what="the error line",
    )
    assert shard.name in command.errors[-1], "the last line says what to mend"
