"""The service's settings: complete, documented, strict."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import EngineConfig
from engine.errors import ConfigError
from service.settings import ServiceSettings


def test_every_setting_has_help() -> None:
    for name, field in ServiceSettings.model_fields.items():
        assert field.description, name


def test_engine_settings_are_all_there_with_their_defaults_and_help() -> None:
    for field in fields(EngineConfig):
        setting = ServiceSettings.model_fields[field.name]
        assert setting.description == field.metadata["help"]
    assert ServiceSettings(model="/m").engine_config() == EngineConfig(model="/m")


def test_variables_are_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3SERVE_REPLICAS", "3")
    monkeypatch.setenv("M3SERVE_HF_OVERRIDES", '{"rope_theta": 1.0}')
    # As Serve validates the `args` of its YAML.
    settings = ServiceSettings.model_validate({"model": "/m", "port": 9000})
    assert (settings.replicas, settings.port, settings.hf_overrides) == (3, 9000, {"rope_theta": 1.0})
    assert ServiceSettings(model="/m", replicas=1).replicas == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": 0}, "replicas"),
        ({"port": 65536}, "port"),
        ({"step_timeout_s": float("inf")}, "step_timeout_s"),
        ({"step_timeout_s": 0}, "step_timeout_s"),
        ({"max_queued_requests": -1}, "max_queued_requests"),
        ({"tensor_parallel_size": "two"}, "tensor_parallel_size"),
        ({"min_replicas": 2}, r"max_replicas\n.*must be set where min_replicas \(2\) is"),
        ({"min_replicas": 3, "max_replicas": 2}, r"max_replicas\n.*at least min_replicas \(3\)"),
        ({"replicas": 3, "max_replicas": 2}, r"max_replicas\n.*at least replicas \(3\)"),
        ({"target_tokens_per_replica": 0}, "target_tokens_per_replica"),
        ({"upscale_delay_s": -1}, "upscale_delay_s"),
        ({"prefix_routing_slack": -0.1}, "prefix_routing_slack"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServiceSettings.model_validate({"model": "/m"} | wrong)


def test_the_engine_checks_its_own() -> None:
    with pytest.raises(ConfigError, match="backend"):
        ServiceSettings(model="/m", backend="cpu").engine_config()


def test_model_name_is_the_directory_unless_given() -> None:
    assert ServiceSettings(model="/models/m3/").model_name == "m3"
    assert ServiceSettings(model="/models/m3/", served_model_name="minimax").model_name == "minimax"
