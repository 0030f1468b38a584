"""The chart: what it renders is valid and says what it should, whatever is switched on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from deploy import chart_schema, tools
from deploy.tools import ToolMissing
from service import serve_config
from service.settings import ServiceSettings
from tests.cluster import free_port, wait_until
from tests.deploy import chart, kube_schemas
from tests.deploy.chart import CASES, CHART, EVERYTHING, EXAMPLES, ROOT

try:
    tools.find("helm")
except ToolMissing as error:
    pytest.skip(str(error), allow_module_level=True)

CPU_DEMO = ("-f", str(CHART / "examples" / "cpu-demo.yaml"))
ALL = ("-f", str(EVERYTHING))
PINS = ROOT / "deploy" / "constraints.txt"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
cases = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("values", [(), *(("-f", str(path)) for path in EXAMPLES), ALL], ids=str)
def test_lint_is_strict(values: tuple[str, ...]) -> None:
    assert "0 chart(s) failed" in chart.helm("lint", "--strict", str(CHART), *values)


@cases
def test_every_object_fits_its_strict_schema(case: str) -> None:
    documents = chart.objects(*CASES[case])
    assert documents
    for document in documents:
        kube_schemas.validate(document)
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayService", ("spec", "serveConfig"), "x"),
        ("RayService", ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "shmSize"), "1Gi"),
        ("RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "replcas"), 1),
        ("RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "rayStartParams", "num-gpus"), 8),
        ("RayService", ("metadata", "label"), {}),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "scrapeTimeOut"), "1s"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "alerts"), "x"),
        ("HTTPRoute", ("spec", "rules", 0, "timeouts", "total"), "1s"),
        ("NetworkPolicy", ("spec", "ingress", 0, "port"), 1),
        ("Unknown", (), None),
    ],
)
def test_the_schemas_refuse_what_the_api_does_not_know(kind: str, path: tuple[str | int, ...], value: Any) -> None:
    document: Any = {"apiVersion": "v1", "kind": kind, "metadata": {"name": "x"}}
    if path:
        [document] = [document for document in chart.objects(*ALL) if document["kind"] == kind]
        inner = document
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        kube_schemas.validate(document)


@cases
def test_serve_config_is_valid_for_serve_and_for_the_service(case: str) -> None:
    config = chart.serve_config(*CASES[case])
    serve_config.check(config)
    [application] = config["applications"]
    # It would override what build() makes of the settings.
    assert "deployments" not in application
    assert "request_timeout_s" not in config["http_options"]
    assert "data_host" not in application["args"]


def test_values_reach_the_settings() -> None:
    [application] = chart.serve_config(*ALL)["applications"]
    settings = ServiceSettings(**application["args"])
    assert settings.model_name == "m3"
    assert (settings.memory_fraction, settings.kv_cache_dtype, settings.index_topk_freq) == (0.9, "fp8", 4)
    assert (settings.index_skip_topk_offset, settings.index_reuse, settings.use_index_cache) == (1, "audited", True)
    assert (settings.probe_interval, settings.step_timeout_s, settings.max_body_bytes) == (4096, 300.5, 64 * 2**20)
    assert settings.hf_overrides == {"rope_theta": 5000000}
    assert settings.metrics_dir == "/metrics-shm"
    # What nobody set keeps the service's default, and is not written down.
    assert "retry_limit" not in application["args"]
    assert "max_queued_requests" not in application["args"]


def test_every_setting_has_one_place_in_the_values() -> None:
    free = set(chart_schema.settings_schema()["properties"])
    [everything] = chart.serve_config(*ALL)["applications"]
    [demo] = chart.serve_config(*CPU_DEMO)["applications"]
    named = (set(everything["args"]) | set(demo["args"])) - free
    unset = {"index_topk_pattern"}
    assert named | unset == chart_schema.NAMED
    assert free | chart_schema.NAMED | chart_schema.NOT_IN_A_CLUSTER == set(ServiceSettings.model_fields)


def test_schema_follows_the_settings() -> None:
    for path, content in chart_schema.generated().items():
        assert (ROOT / path).read_text() == content, f"{path} is out of date: make generate"


def test_schema_and_values_name_the_same_keys() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(below: dict[str, Any], value: dict[str, Any], path: str) -> None:
        assert set(below["properties"]) - {"global"} == set(value), path
        for key, inner in below["properties"].items():
            # Maps of free keys, and the settings, which are a list of what may be set.
            if "properties" in inner and key != "settings":
                compare(inner, value[key], f"{path}.{key}")

    compare(schema, values, "values")


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == project["version"]
    cluster = chart.ray_service()["spec"]["rayClusterConfig"]
    pins = dict(line.split("==") for line in PINS.read_text().splitlines() if "==" in line)
    assert cluster["rayVersion"] == pins["ray"], "of the images"


# --- what must and must not be rendered -------------------------------------------------------------------------


@cases
def test_pods_keep_the_rules_of_ray_and_the_operator(case: str) -> None:
    service = chart.ray_service(*CASES[case])
    custom = case == "everything"
    for name, pod in kube_schemas.pods(service).items():
        spec = pod["spec"]
        ray = spec["containers"][0]
        # The operator takes the first container for Ray's.
        assert ray["name"] == ("ray-head" if name == "head" else "ray-worker")
        # Its own probes ask Serve too; they are replaced only where the values say so.
        assert all((probe in ray) == custom for probe in ("readinessProbe", "livenessProbe", "startupProbe"))
        ports = {port["name"]: port["containerPort"] for port in ray["ports"]}
        assert ports.keys() >= {"serve", "metrics"}
        assert ("haproxy-metrics" in ports) == (case != "nothing")
        assert spec["securityContext"]["runAsNonRoot"] is True
        is_autoscaled = case in ("everything", "mi325x-8-2xtp4")
        assert spec["automountServiceAccountToken"] is (is_autoscaled and name == "head")
        assert len({volume["name"] for volume in spec["volumes"]}) == len(spec["volumes"])
        assert {mount["name"] for c in spec["containers"] for mount in c.get("volumeMounts", [])} <= {
            volume["name"] for volume in spec["volumes"]
        }
        names = [variable["name"] for variable in ray["env"]]
        assert len(set(names)) == len(names)
        assert not {"ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "PROMETHEUS_MULTIPROC_DIR"} & set(names)
        assert all(isinstance(variable.get("value", ""), str) for variable in ray["env"])
        assert ("RAY_SERVE_ENABLE_HA_PROXY" in names) == (case != "nothing")
    assert "ROCR_VISIBLE_DEVICES" not in chart.text(*CASES[case])


def test_rays_own_ports_ask_for_a_token() -> None:
    assert chart.ray_service()["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    everything = chart.ray_service(*ALL)["spec"]["rayClusterConfig"]
    assert everything["authOptions"] == {"mode": "token", "secretName": "ray-token"}


def test_head_and_workers_have_the_same_serve_flags() -> None:
    head, worker = kube_schemas.pods(chart.ray_service()).values()
    assert head["spec"]["containers"][0]["env"] == worker["spec"]["containers"][0]["env"]
    assert chart.ray_service()["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_gpus_are_requested_and_told_to_ray() -> None:
    [group] = chart.ray_service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["amd.com/gpu"] == resources["requests"]["amd.com/gpu"] == 8
    assert (group["rayStartParams"]["num-gpus"], group["rayStartParams"]["num-cpus"]) == ("8", "64")
    h100 = chart.worker("-f", str(CHART / "examples" / "h100-8.yaml"))
    assert h100["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    [demo] = chart.ray_service(*CPU_DEMO)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert "gpu" not in json.dumps(demo["template"])
    assert demo["rayStartParams"]["num-gpus"] == "0"


@pytest.mark.parametrize("longest", [1, 600, 7200])
def test_what_ends_streams_is_later_than_the_longest_one_and_in_order(longest: int) -> None:
    given = ("--set", f"drain.longestGenerationSeconds={longest},httpRoute.enabled=true,httpRoute.parentRefs[0].name=g")
    spec = chart.ray_service(*given)["spec"]
    worker = chart.worker(*given)["spec"]
    env = {variable["name"]: variable.get("value") for variable in worker["containers"][0]["env"]}
    [application] = chart.serve_config(*given)["applications"]
    ends = [
        longest,
        application["args"]["graceful_shutdown_timeout_s"],
        int(env["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]),
        int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]),
        worker["terminationGracePeriodSeconds"],
    ]
    assert ends == sorted(set(ends))
    assert spec["rayClusterDeletionDelaySeconds"] > longest
    assert int(env["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]) > longest
    assert chart.one("HTTPRoute", *given)["spec"]["rules"][0]["timeouts"]["request"] == f"{longest}s"
    assert kube_schemas.pods(chart.ray_service(*given))["head"]["spec"]["terminationGracePeriodSeconds"] == ends[-1]


def test_secrets_are_references() -> None:
    rendered = chart.objects(*ALL)
    assert not [document for document in rendered if document["kind"] == "Secret"]
    cluster = chart.ray_service(*ALL)["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"] == {
        "valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}
    }
    download = chart.worker(*ALL)["spec"]["initContainers"][0]
    assert download["env"][0]["valueFrom"] == {"secretKeyRef": {"name": "huggingface", "key": "token"}}


def test_api_keys_are_mounted_where_the_service_reads_them() -> None:
    [application] = chart.serve_config(*ALL)["applications"]
    pod = chart.worker(*ALL)["spec"]
    [mount] = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "api-keys"]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == "api-keys"]
    assert application["args"]["api_key_file"] == f"{mount['mountPath']}/keys"
    assert mount["readOnly"] and "subPath" not in mount, "a file that is mounted alone does not follow the secret"
    assert volume["secret"]["secretName"] == "api-keys"
    assert volume["secret"]["items"] == [{"key": "list", "path": "keys"}]
    assert "api-keys" not in json.dumps(chart.worker(*CPU_DEMO)), "none unless a secret is named"
    with pytest.raises(chart.HelmFailed, match="api_keys"):
        chart.text(*CPU_DEMO, *chart.set_json({"settings.api_keys": "a-key-in-the-values"}))


def test_weights_are_read_only_where_they_are_served() -> None:
    for case in CASES:
        spec = chart.worker(*CASES[case])["spec"]
        [mount] = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "weights"]
        assert mount["readOnly"] is True
        [application] = chart.serve_config(*CASES[case])["applications"]
        assert application["args"]["model"].startswith(mount["mountPath"])
        [volume] = [volume for volume in spec["volumes"] if volume["name"] == "weights"]
        downloads = [c for c in spec.get("initContainers", []) if c["name"] == "download"]
        source = next(key for key in volume if key != "name")
        if downloads:
            assert downloads[0]["volumeMounts"] == [mount | {"readOnly": False}]
            assert volume[source].get("readOnly", False) is False
        elif source == "persistentVolumeClaim":
            assert volume[source]["readOnly"] is True
        head = kube_schemas.pods(chart.ray_service(*CASES[case]))["head"]["spec"]
        assert "weights" not in {volume["name"] for volume in head["volumes"]}


def test_network_policy_opens_what_is_needed_and_no_more() -> None:
    policy = chart.one("NetworkPolicy")["spec"]
    inside, clients, operator, monitoring = policy["ingress"]
    own = {"app.kubernetes.io/name": "m3serve", "app.kubernetes.io/instance": chart.RELEASE}
    assert policy["podSelector"]["matchLabels"] == own
    assert inside == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert [port["port"] for port in clients["ports"]] == [8000]
    assert [port["port"] for port in operator["ports"]] == [8265, 8000]
    assert operator["from"]
    assert [port["port"] for port in monitoring["ports"]] == [9400, 8080, 9101]
    assert monitoring["from"]
    for pod in kube_schemas.pods(chart.ray_service()).values():
        assert pod["metadata"]["labels"].items() >= own.items()


def test_monitor_finds_the_ports_of_the_pods() -> None:
    monitor = chart.one("PodMonitor", *ALL)["spec"]
    pods = kube_schemas.pods(chart.ray_service(*ALL)).values()
    wanted = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    offered = {port["name"] for pod in pods for c in pod["spec"]["containers"] for port in c.get("ports", [])}
    assert wanted == {"m3-metrics", "metrics", "haproxy-metrics"} <= offered
    for pod in pods:
        assert pod["metadata"]["labels"].items() >= monitor["selector"]["matchLabels"].items()
    assert chart.one("PodMonitor", *ALL)["metadata"]["labels"]["release"] == "prometheus"


def test_rules_and_dashboards_are_the_generated_ones_unchanged() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text())
    assert chart.one("PrometheusRule", *ALL)["spec"]["groups"] == rules["groups"]
    maps = [d for d in chart.objects(*ALL) if d["metadata"].get("labels", {}).get("grafana_dashboard") == "1"]
    shown = {name: content for document in maps for name, content in document["data"].items()}
    assert len(maps) == len(DASHBOARDS) > 0
    for path in DASHBOARDS:
        assert json.loads(shown[path.name]) == json.loads(path.read_text())
        assert shown[path.name] == path.read_text().rstrip("\n")
        assert len(shown[path.name]) < 2**20


def test_alerts_link_to_the_runbook_where_it_can_be_read() -> None:
    base = "https://git.example.com/m3serve/deploy/RUNBOOK.md"
    groups = chart.one("PrometheusRule", *ALL, "--set", f"monitoring.rules.runbookUrl={base}")["spec"]["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert alerts
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"{base}#{rule['alert'].lower()}"


def test_budget_leaves_all_workers_but_one() -> None:
    def budgets(*given: str) -> dict[str, int]:
        found = [document for document in chart.objects(*given) if document["kind"] == "PodDisruptionBudget"]
        return {
            document["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: document["spec"]["minAvailable"]
            for document in found
        }

    assert budgets() == {}
    assert budgets(*CASES["new-cluster"]) == {"worker": 2}
    assert budgets(*ALL) == {"worker": 1, "head": 1}


def test_text_of_extra_objects_goes_through_templates() -> None:
    names = {document["metadata"]["name"]: document for document in chart.objects(*ALL)}
    assert names["demo-text"]["kind"] == "ConfigMap"
    assert names["demo-map"]["data"]["host"] == "demo-served-serve-svc"


def test_long_names_leave_room_for_the_operators_suffixes() -> None:
    service = chart.ray_service("--set", f"nameOverride={'n' * 40},fullnameOverride={'f' * 60}")
    assert service["metadata"]["name"] == "f" * 40


# --- the chart as a package, and what it starts -------------------------------------------------------------------


def test_package_is_complete_without_the_checkout(tmp_path: Path) -> None:
    chart.helm("package", str(CHART), "--destination", str(tmp_path))
    [packed] = tmp_path.glob("m3serve-*.tgz")
    with tarfile.open(packed) as tar:
        members = {member.name: member for member in tar.getmembers()}
        assert all(member.isfile() for member in members.values())
        for path in DASHBOARDS:
            file = tar.extractfile(f"m3serve/files/dashboards/{path.name}")
            assert file is not None
            assert file.read() == path.read_bytes()
    assert {"m3serve/files/rules.yaml", "m3serve/values.schema.json", "m3serve/README.md"} <= members.keys()
    assert chart.objects(*ALL, chart=packed) == chart.objects(*ALL)


def test_notes_show_a_request_and_what_this_version_cannot_do() -> None:
    def notes(*given: str) -> str:
        printed = chart.helm("install", chart.RELEASE, str(CHART), "--dry-run=client", *given)
        return printed.partition("NOTES:")[2]

    gpu, demo = notes(), notes(*CPU_DEMO)
    assert "port-forward service/demo-m3serve-serve-svc 8000:8000" in gpu
    assert '"model": "MiniMax-M3"' in gpu
    assert "runs tensor-parallel groups on CPU only" in gpu
    assert '"model": "m3-nano"' in demo
    assert "WARNING" not in demo
    assert "WARNING" not in notes("--set", "engine.tensorParallelSize=1,engine.replicas=8,model.format=none")
    assert "4 GPUs are asked for and not used" in notes("--set", "engine.tensorParallelSize=4,model.format=mxfp8")
    assert "9 are enough whatever Ray does" not in gpu


def test_the_demos_init_container_makes_the_model_that_is_served(tmp_path: Path) -> None:
    [download] = chart.worker(*CPU_DEMO)["spec"]["initContainers"]
    [application] = chart.serve_config(*CPU_DEMO)["applications"]
    model = application["args"]["model"]
    command = [str(tmp_path / Path(model).name) if word == model else word for word in download["command"]]
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, timeout=120, cwd=ROOT)
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / Path(model).name).iterdir()}


def test_the_sidecar_serves_its_series(tmp_path: Path) -> None:
    spec = chart.worker()["spec"]
    sidecar = spec["containers"][1]
    port = free_port()
    replaced = {"python": sys.executable, "/metrics-shm": str(tmp_path), "0.0.0.0": "127.0.0.1", "9400": str(port)}
    process = subprocess.Popen(
        [replaced.get(word, word) for word in sidecar["command"]], cwd=ROOT, env=dict(os.environ)
    )
    path = sidecar["livenessProbe"]["httpGet"]["path"]

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(answers, timeout_s=60, what="an answer of the sidecar")
    finally:
        process.terminate()
        process.wait(timeout=30)
    mounts = [{mount["mountPath"] for mount in container["volumeMounts"]} for container in spec["containers"][:2]]
    assert "/metrics-shm" in mounts[0] & mounts[1]
