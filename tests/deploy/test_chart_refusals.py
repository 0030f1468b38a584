"""What the chart refuses while rendering: impossible layouts with their numbers, and every misspelt value."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from deploy import tools
from deploy.tools import ToolMissing
from engine.config import EngineConfig
from engine.errors import ConfigError
from tests.deploy import chart
from tests.deploy.chart import CHART, HelmFailed

try:
    tools.find("helm")
except ToolMissing as error:
    pytest.skip(str(error), allow_module_level=True)

CPU = {"accelerator": "cpu", "worker.gpus": 0, "model.format": "none"}
DOWNLOAD = {"model.weights.source": "download", "model.weights.download.command": ["true"]}


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(HelmFailed) as failed:
        chart.text(*chart.set_json(values))
    return " ".join(str(failed.value).split())


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"engine.tensorParallelSize": 16}, ["tensorParallelSize is 16", "worker.gpus 8", "STRICT_PACK"]),
        ({"worker.gpus": 12}, ["worker.gpus is 12", "tensorParallelSize 8", "4 GPUs of every pod would stay idle"]),
        ({"engine.replicas": 2}, ["engine.replicas is 2", "1 worker pods of 8 GPUs hold 1 groups of 8"]),
        ({"engine.maxReplicas": 2}, ["engine.maxReplicas is 2", "1 worker pods of 8 GPUs hold 1 groups of 8"]),
        ({"engine.minReplicas": 1}, ["engine.minReplicas", "set engine.maxReplicas too"]),
        ({"engine.replicas": 2, "engine.maxReplicas": 1}, ["engine.maxReplicas is 1, and engine.replicas 2"]),
        ({"engine.tensorParallelSize": 3, "worker.gpus": 3}, ["tensorParallelSize is 3", "64 query heads"]),
        ({"engine.tensorParallelSize": 6, "worker.gpus": 6}, ["tensorParallelSize is 6", "64 query heads"]),
        ({"accelerator": "mi999"}, ['accelerator is "mi999"', "cpu, h100, h200, mi300x"]),
        ({"worker.gpus": 0}, ["worker.gpus is 0 with accelerator mi300x"]),
        (CPU | {"worker.gpus": 2}, ["worker.gpus is 2", "accelerator cpu has no resourceName"]),
        ({"engine.backend": "torch"}, ["engine.backend torch runs on CPU", "8 GPUs of each pod idle"]),
        (CPU | {"engine.backend": "triton"}, ["engine.backend triton needs GPUs"]),
        (CPU | {"engine.backend": "aiter"}, ["engine.backend aiter needs GPUs"]),
        (
            {"accelerator": "h100", "engine.backend": "aiter"},
            ["engine.backend aiter is for AMD GPUs", "h100 is nvidia.com/gpu"],
        ),
        (
            {"worker.resources": {"limits": {"cpu": "10"}}, "worker.resources.requests.cpu": "10"},
            [
                "1 engine replicas x (8 ranks + 1) + 2 HTTP processes + 1 more during an update take 12 CPUs",
                "1 worker pods x 10 CPUs",
                "are 10",
            ],
        ),
        (
            {"worker.resources.limits.cpu": "7500m", "worker.resources.requests.cpu": "7500m"},
            ["a group of 8 ranks", "worker.resources has 7"],
        ),
        (
            {
                "worker.resources.limits.cpu": "7",
                "worker.resources.requests.cpu": "7",
                "accelerator": "mi325x",
                "engine.tensorParallelSize": 4,
                "engine.replicas": 4,
                "worker.replicas": 4,
                "worker.gpus": 4,
                "http.replicas": 9,
            },
            [
                "4 engine replicas x (4 ranks + 1) + 9 HTTP processes + 5 more during an update take 34 CPUs",
                "4 worker pods x 7 CPUs",
                "are 28",
            ],
        ),
        (
            {
                "accelerator": "mi325x",
                "engine.tensorParallelSize": 4,
                "engine.replicas": 3,
                "worker.replicas": 3,
                "worker.gpus": 8,
                "worker.resources.limits.cpu": "3",
            },
            ["a group of 4 ranks", "worker.resources has 3"],
        ),
        (
            {
                "accelerator": "mi325x",
                "engine.tensorParallelSize": 4,
                "engine.replicas": 5,
                "worker.replicas": 4,
                "http.replicas": 1,
                "worker.resources.limits.cpu": "7",
            },
            # Enough CPUs in all, and one of the four pods must hold two groups.
            ["2 groups of 4 ranks in one pod take 8 CPUs", "worker.resources has 7"],
        ),
        (
            {"worker.resources.limits.cpu": None, "worker.resources.requests.cpu": None},
            ["worker.resources needs a cpu"],
        ),
        # 79 - 793.9 / 8 - 4
        ({"accelerator": "h100"}, ["the weights do not fit", "79 GiB (accelerators.h100)", "99.2", "leaves -24.3 GiB"]),
        # 192 - 793.9 / 4 - 4
        ({"engine.tensorParallelSize": 4}, ["the weights do not fit", "793.9 GiB / 4 ranks = 198.5", "leaves -10.5"]),
        (
            {"model.format": "bf16", "engine.dtype": "float32"},
            ["the weights do not fit", "1587.8 GiB / 8 ranks", "leaves -10.5"],
        ),
        (
            {"accelerator": "h100", "model.format": "mxfp8", "engine.maxModelLen": 1048576},
            ["the KV pages do not fit", "leaves 23.5 GiB", "20 GiB are for pages", "1048576 tokens", "x 45312 bytes"],
        ),
        (
            {"accelerator": "h100", "model.format": "mxfp8", "engine.maxModelLen": None},
            ["the KV pages do not fit", "one request of 1048576 tokens (engine.maxModelLen)", "takes 44.3 GiB"],
        ),
        ({"engine.memoryFraction": 0.01}, ["the KV pages do not fit", "engine.memoryFraction 0.01", "5.5 GiB"]),
        ({"settings.num_pages": 1000}, ["the KV pages do not fit", "5.4 GiB are for pages", "settings.num_pages"]),
        ({"settings.num_pages": 1000000}, ["settings.num_pages does not fit", "its pages take 5401.6 GiB"]),
        ({"model.path": "/data/m3"}, ["model.path /data/m3 is not in model.weights.mountPath /models"]),
        ({"model.path": "/models2/m3"}, ["model.path /models2/m3 is not in"]),
        ({"model.weights.pvc.claimName": ""}, ["model.weights.pvc.claimName is empty"]),
        ({"model.weights.source": "hostPath"}, ["set model.weights.hostPath.path"]),
        ({"model.weights.source": "download"}, ["set model.weights.download.command"]),
        (
            DOWNLOAD | {"model.weights.pvc.create": True},
            ["pvc.create is true", "source download does not use the claim"],
        ),
        (
            DOWNLOAD | {"model.weights.download.into": "pvc", "worker.replicas": 2},
            ["download.into pvc with 2 worker pods", "the same files"],
        ),
        ({"env": [{"name": "ROCR_VISIBLE_DEVICES", "value": "0"}]}, ["env ROCR_VISIBLE_DEVICES is refused"]),
        ({"worker.env": [{"name": "CUDA_VISIBLE_DEVICES", "value": "0"}]}, ["env CUDA_VISIBLE_DEVICES is refused"]),
        ({"head.env": [{"name": "PROMETHEUS_MULTIPROC_DIR", "value": "/x"}]}, ["PROMETHEUS_MULTIPROC_DIR is refused"]),
        (
            {"env": [{"name": "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "value": "1"}]},
            ["derived from drain.longestGenerationSeconds"],
        ),
        ({"upgradeStrategy.type": "NewClusterWithIncrementalUpgrade"}, ["needs autoscaling.enabled: true"]),
        (
            {"upgradeStrategy.type": "NewClusterWithIncrementalUpgrade", "autoscaling.enabled": True},
            ["needs upgradeStrategy.incremental.gatewayClassName"],
        ),
        ({"upgradeStrategy.incremental.stepSizePercent": 60}, ["stepSizePercent 60 is more than maxSurgePercent 50"]),
        ({"gcsFaultTolerance.enabled": True}, ["needs gcsFaultTolerance.redisAddress"]),
        ({"httpRoute.enabled": True}, ["needs httpRoute.parentRefs"]),
        ({"podDisruptionBudget.minAvailable": 2}, ["minAvailable is 2", "1 worker pods"]),
        ({"worker.maxReplicas": 2}, ["for autoscaling.enabled: true"]),
        (
            {"autoscaling.enabled": True, "worker.minReplicas": 2},
            ["worker.minReplicas 2 <= worker.replicas 1 <= worker.maxReplicas 1 does not hold"],
        ),
        ({"http.port": 8265}, ["http.port is 8265", "Ray's dashboard"]),
        ({"monitoring.exporter.port": 9101}, ["haproxy.metricsPort is 9101", "the port of monitoring.exporter.port"]),
        ({"fullnameOverride": "8b-model"}, ["called 8b-model", "starts with a letter"]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_refused_with_a_message_that_names_limit_and_value(values: dict[str, Any], parts: list[str]) -> None:
    message = refusal(values)
    missing = [part for part in parts if part not in message]
    assert not missing, message


@pytest.mark.parametrize(
    "values",
    [
        # Just fits, where one step further is refused above.
        {"engine.replicas": 1, "worker.resources.limits.cpu": "12"},
        {"settings.num_pages": 1024},
        {"accelerator": "h100", "model.format": "mxfp8", "engine.maxModelLen": 450000},
        {"autoscaling.enabled": True, "worker.maxReplicas": 2, "engine.replicas": 2},
        {"model.format": "none", "accelerator": "h100"},
        {"haproxy.enabled": False, "monitoring.exporter.port": 9101},
        {"model.weightsGiB": 500, "accelerator": "h100", "engine.maxModelLen": 8192},
        CPU | {"engine.tensorParallelSize": 3, "engine.replicas": 4},
        DOWNLOAD,
        {"fullnameOverride": "m3"},
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_not_refused(values: dict[str, Any]) -> None:
    assert chart.ray_service(*chart.set_json(values))


def test_an_unknown_key_is_refused_on_every_level(tmp_path: Any) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    typos: dict[str, Any] = {}
    paths: list[str] = []

    def add(below: dict[str, Any], into: dict[str, Any], path: str) -> None:
        while "$ref" in below:
            below = schema["definitions"][below["$ref"].rpartition("/")[2]]
        if below.get("additionalProperties") is False:
            into["mispelt"] = 1
            paths.append(path)
        for key, inner in below.get("properties", {}).items():
            if inner.get("type") == "object" or "$ref" in inner:
                add(inner, into.setdefault(key, {}), f"{path}/{key}")

    add(schema, typos, "")
    values = tmp_path / "values.yaml"
    # Empty maps were left where a definition turned out to be no object.
    values.write_text(yaml.safe_dump(_without_empty(typos)))
    with pytest.raises(HelmFailed) as failed:
        chart.text("-f", str(values))
    message = str(failed.value)
    missing = [path for path in paths if f"at '{path}': additional properties 'mispelt' not allowed" not in message]
    assert not missing
    assert len(paths) > 30


def _without_empty(value: dict[str, Any]) -> dict[str, Any]:
    cleaned = {key: _without_empty(inner) if isinstance(inner, dict) else inner for key, inner in value.items()}
    return {key: inner for key, inner in cleaned.items() if inner != {}}


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"engine.replicas": 0}, "/engine/replicas"),
        ({"engine.maxModelLen": "long"}, "/engine/maxModelLen"),
        ({"engine.backend": "cuda"}, "/engine/backend"),
        ({"settings.tensor_parallel_size": 4}, "/settings"),
        ({"settings.host": "0.0.0.0"}, "/settings"),
        ({"settings.step_timeout_s": 0}, "/settings/step_timeout_s"),
        ({"env": [{"name": "A", "value": 1}]}, "/env/0/value"),
        ({"worker.env": [{"name": "A", "valuefrom": {}}]}, "/worker/env/0"),
        ({"worker.resources.requests.memory": "lots"}, "/worker/resources/requests/memory"),
        ({"worker.resources.limit": {}}, "/worker/resources"),
        ({"accelerators.mine": {"resourceName": "amd.com/gpu"}}, "/accelerators/mine"),
        ({"accelerators.mine": {"resourceName": "amd.com/gpus", "memoryGiB": 1}}, "/accelerators/mine/resourceName"),
        ({"image.digest": "latest"}, "/image/digest"),
        ({"upgradeStrategy.type": "Recreate"}, "/upgradeStrategy/type"),
        ({"model.path": "models/m3"}, "/model/path"),
        ({"gcsFaultTolerance.redisPassword": "secret"}, "/gcsFaultTolerance"),
        ({"monitoring.podMonitor.interval": "15"}, "/monitoring/podMonitor/interval"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_where_it_stands(values: dict[str, Any], where: str) -> None:
    assert f"at '{where}'" in refusal(values)


@pytest.mark.parametrize(
    ("value", "setting"),
    [
        ("backend", "backend"),
        ("dtype", "dtype"),
        ("kvCacheDtype", "kv_cache_dtype"),
        ("indexCacheDtype", "index_cache_dtype"),
        ("indexCache.reuse", "index_reuse"),
    ],
)
def test_choices_are_those_of_the_engine(value: str, setting: str) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["engine"]
    for step in value.split("."):
        schema = schema["properties"][step]
    for choice in schema["enum"]:
        EngineConfig.from_kwargs("model", **{setting: choice})
    with pytest.raises(ConfigError) as refused:
        EngineConfig.from_kwargs("model", **{setting: "nothing"})
    # The message lists them all.
    assert f"one of {', '.join(schema['enum'])}," in str(refused.value)
