"""Serve config files: what Ray would ignore or refuse late is named before anything is deployed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from engine.errors import ConfigError
from service import cli
from service.app import build
from service.serve_config import check, check_file

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy" / "serve").glob("*.yaml"))
DOCUMENT: dict[str, Any] = {
    "proxy_location": "HeadOnly",
    "http_options": {"host": "0.0.0.0", "port": 8000},
    "applications": [
        {
            "name": "m3serve",
            "route_prefix": "/",
            "import_path": "service.app:build",
            "runtime_env": {"env_vars": {"ANY": "thing"}},
            "args": {"model": "/models/m", "tensor_parallel_size": 8},
            "deployments": [
                {
                    "name": "Engine",
                    "ray_actor_options": {"num_cpus": 2, "resources": {"mine": 1}},
                    "autoscaling_config": {"min_replicas": 1, "max_replicas": 2},
                }
            ],
        }
    ],
}


def test_a_right_config_passes() -> None:
    check(DOCUMENT)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_files_of_the_project_pass(file: Path) -> None:
    document = check_file(file)
    [application] = document["applications"]
    assert application["args"]["model"] and document["http_options"]["port"] == 8000


def test_there_are_files_of_the_project() -> None:
    assert [file.name for file in FILES] == ["cpu-demo.yaml", "mi300x-8.yaml"]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("http_option",), {}, r"http_option: there is no such key; the nearest is http_options$"),
        (("http_options", "hots"), "x", r"http_options\.hots: there is no such key; the nearest is host$"),
        (("http_options", "port"), "many", r"http_options\.port: .*got 'many'"),
        (("logging_config",), {"log_levle": "INFO"}, r"logging_config\.log_levle: .*the nearest is log_level$"),
        (("applications", 0, "argz"), {}, r"applications\[0\]\.argz: .*the nearest is args$"),
        (("applications", 0, "qwertz"), {}, r"applications\[0\]\.qwertz: there is no such key$"),
        (
            ("applications", 0, "import_path"),
            "service.app:buidl",
            r"import_path service\.app:buidl: .*service\.app:build",
        ),
        (
            ("applications", 0, "import_path"),
            "no.such:thing",
            r"import_path no\.such:thing: there is nothing to import",
        ),
        (("applications", 0, "runtime_env", "env_var"), {}, r"runtime_env\.env_var: .*the nearest is env_vars"),
        (
            ("applications", 0, "deployments", 0, "health_check_timeout"),
            5,
            r"applications\[0\]\.deployments\[0\]\.health_check_timeout: .*health_check_timeout_s",
        ),
        (
            ("applications", 0, "deployments", 0, "ray_actor_options", "num_cpu"),
            5,
            r"deployments\[0\]\.ray_actor_options\.num_cpu: .*the nearest is num_cpus",
        ),
        (
            ("applications", 0, "deployments", 0, "autoscaling_config", "max_replica"),
            5,
            r"deployments\[0\]\.autoscaling_config\.max_replica: .*the nearest is max_replicas",
        ),
        (("applications", 0, "deployments", 0, "max_ongoing_requests"), -1, r"max_ongoing_requests: .*got -1"),
        (
            ("applications", 0, "args", "tensor_parallel_siz"),
            8,
            r"applications\[0\]\.args\.tensor_parallel_siz: .*the nearest is tensor_parallel_size",
        ),
        (("applications", 0, "args", "max_num_seqs"), "x", r"applications\[0\]\.args\.max_num_seqs: .*got 'x'"),
        (("applications", 0, "args", "max_num_seqs"), 0, r"applications\[0\]\.args: .*max_num_seqs.*0"),
        (("applications", 0, "args", "kv_cache_dtype"), "int8", r"applications\[0\]\.args: .*kv_cache_dtype.*int8"),
        (
            ("applications", 0, "args", "port"),
            80,
            r"args\.port: does not belong in a Serve config; set http_options\.port",
        ),
        (("applications", 0, "args"), {}, r"applications\[0\]\.args\.model: Field required"),
        (("applications",), [], None),
    ],
)
def test_a_wrong_config_is_refused_by_name(path: tuple[str | int, ...], value: Any, says: str | None) -> None:
    document = copy.deepcopy(DOCUMENT)
    inner: Any = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    if says is None:
        check(document)
        return
    with pytest.raises(ConfigError, match=says):
        check(document)


def test_ray_itself_would_take_an_unknown_key() -> None:
    """The reason for all this; when it changes, the check has less to do."""
    document = copy.deepcopy(DOCUMENT)
    document["applications"][0]["deployments"][0]["health_check_timeout"] = 5
    ServeDeploySchema.model_validate(document)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("applications: []\napplications: []\n", "the key applications stands twice"),
        ("applications: [\n", "expected the node content"),
        ("- 1\n", "a Serve config is a mapping with the key applications, got list"),
        ("", "got NoneType"),
        ("http_options: {port: 8000}\n", "applications: Field required"),
        ("applications: [1]\n", r"applications\[0\]: .*got 1"),
        ("? [1]\n: 2\n", "found unhashable key"),
        ("1: 2\napplications: []\n", "1: there is no such key"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        check_file(file)
    assert str(error.value).startswith(str(file))


def test_a_merge_key_is_no_repetition(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(DOCUMENT) + "controller_options: &a {}\ngrpc_options: {<<: *a, port: 9000}\n")
    assert check_file(file)["grpc_options"] == {"port": 9000}


def test_the_command_names_file_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(DOCUMENT))
    assert cli.main(["check-config", str(file), *map(str, FILES)]) == 0
    assert capsys.readouterr().out.count(": ok\n") == 1 + len(FILES)
    file.write_text(yaml.safe_dump(DOCUMENT | {"proxy_locaton": "HeadOnly"}))
    assert cli.main(["check-config", str(file)]) == 2
    assert f"{file}: proxy_locaton: there is no such key; the nearest is proxy_location" in capsys.readouterr().err


def test_serve_turns_args_into_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function that a cluster calls: unknown settings are refused there too, and variables are read."""
    call_user_app_builder_with_args_if_necessary(build, {"model": "/nowhere", "replicas": 2})
    with pytest.raises(ValueError, match="replica_count"):
        call_user_app_builder_with_args_if_necessary(build, {"model": "/nowhere", "replica_count": 2})
    monkeypatch.setenv("M3SERVE_BACKEND", "wrong")
    with pytest.raises(ConfigError, match="backend"):
        call_user_app_builder_with_args_if_necessary(build, {"model": "/nowhere"})
