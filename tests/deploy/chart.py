"""The chart, rendered by a real helm. `python -m tests.deploy.chart` counts and checks all that the cases render."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from deploy import tools
from tests.deploy import kube_schemas

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
EVERYTHING = Path(__file__).with_name("values-everything.yaml")
HELM_TIMEOUT_S = 60.0
RELEASE = "demo"
# name -> values files and what is set on top.
CASES: dict[str, tuple[str, ...]] = {
    "defaults": (),
    **{path.stem: ("-f", str(path)) for path in EXAMPLES},
    "everything": ("-f", str(EVERYTHING)),
    "nothing": (
        *("--set", "haproxy.enabled=false,monitoring.exporter.enabled=false,networkPolicy.enabled=false"),
        *("--set", "serviceAccount.create=false,podDisruptionBudget.enabled=false,http.excludeHeadPod=false"),
    ),
    "new-cluster": ("--set", "upgradeStrategy.type=NewCluster,worker.replicas=3,engine.replicas=3"),
}


class HelmFailed(Exception):
    """helm ended with an error; the message is what it printed."""


def helm(*arguments: str) -> str:
    """Run helm, with caches of its own; its output. Raises HelmFailed, or ToolMissing where there is no helm."""
    program = tools.find("helm")
    with tempfile.TemporaryDirectory(prefix="m3-helm-") as home:
        own = {f"HELM_{name}_HOME": f"{home}/{name}" for name in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [str(program), *arguments],
            # No cluster is asked for anything, whatever the caller's shell points at.
            env=os.environ | own | {"KUBECONFIG": f"{home}/none"},
            capture_output=True,
            text=True,
            timeout=HELM_TIMEOUT_S,
            check=False,
        )
    if done.returncode != 0:
        raise HelmFailed(done.stdout + done.stderr)
    return done.stdout


@functools.cache
def text(*arguments: str, chart: Path = CHART) -> str:
    """What `helm template` prints."""
    return helm("template", RELEASE, str(chart), "--namespace", "models", *arguments)


def objects(*arguments: str, chart: Path = CHART) -> list[dict[str, Any]]:
    """The rendered objects."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(text(*arguments, chart=chart), Loader=loader) if document]


def one(kind: str, *arguments: str) -> dict[str, Any]:
    """The only object of that kind."""
    [found] = [document for document in objects(*arguments) if document["kind"] == kind]
    return found


def ray_service(*arguments: str) -> dict[str, Any]:
    """The RayService."""
    return one("RayService", *arguments)


def serve_config(*arguments: str) -> dict[str, Any]:
    """serveConfigV2, which is YAML in a string."""
    config: dict[str, Any] = yaml.safe_load(ray_service(*arguments)["spec"]["serveConfigV2"])
    return config


def worker(*arguments: str) -> dict[str, Any]:
    """The workers' pod."""
    return kube_schemas.pods(ray_service(*arguments))[
        ray_service(*arguments)["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["groupName"]
    ]


def set_json(values: dict[str, Any]) -> tuple[str, ...]:
    """Arguments that set nested values, of any type, over those of files."""
    return tuple(word for key, value in values.items() for word in ("--set-json", f"{key}={json.dumps(value)}"))


def main() -> None:
    """Check every object of every case, and count them by kind."""
    kinds: Counter[str] = Counter()
    for arguments in CASES.values():
        for document in objects(*arguments):
            kube_schemas.validate(document)
            kinds[document["kind"]] += 1
    print(f"{kinds.total()} rendered objects of {len(CASES)} cases validated: {dict(kinds.most_common())}")


if __name__ == "__main__":
    main()
