"""Strict schemas of the objects that the chart renders: a key that the API does not know is an error.

The API server drops unknown keys or only warns: a misspelt `sizeLimt` would silently mean no limit.
"""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from jsonschema import Draft202012Validator

KUBERNETES = "1.34"
DIRECTORY = Path(__file__).parent / "crds"
CUSTOM = {
    ("ray.io/v1", "RayService"): "rayservice-v1.json.gz",
    ("monitoring.coreos.com/v1", "PodMonitor"): "podmonitor-v1.json",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "prometheusrule-v1.json",
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): "httproute-v1.json",
}


def validate(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError; also for an object that there is no schema for."""
    key = document["apiVersion"], document["kind"]
    if key in CUSTOM:
        _custom(CUSTOM[key]).validate(document)
        # kubernetes-validate leaves metadata of custom resources alone: borrow a ConfigMap's.
        _core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
    else:
        _core(document)
    if document["kind"] == "RayService":
        for pod in pods(document).values():
            _core(pod)


def pods(ray_service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pods that the operator would make, by group: as objects of their own."""
    cluster = ray_service["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {
        name: {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **group["template"]["metadata"]},
            "spec": group["template"]["spec"],
        }
        for name, group in groups.items()
    }


def _core(document: dict[str, Any]) -> None:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.SchemaNotFoundError as error:
        raise jsonschema.ValidationError(error.message) from None


@functools.cache
def _custom(file: str) -> Draft202012Validator:
    content = (DIRECTORY / file).read_bytes()
    return Draft202012Validator(_strict(json.loads(gzip.decompress(content) if file.endswith(".gz") else content)))


def _strict(schema: Any) -> Any:
    """A schema of the API server as one that refuses unknown keys, wherever it lists the known ones."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {
        # Names of properties are not keywords.
        key: {name: _strict(below) for name, below in value.items()} if key == "properties" else _strict(value)
        for key, value in schema.items()
    }
    if strict.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    if (
        "properties" in strict
        and "additionalProperties" not in strict
        and not strict.get("x-kubernetes-preserve-unknown-fields")
    ):
        strict["additionalProperties"] = False
    return strict
