"""`m3serve monitor`, the Prometheus configuration, and the compose file for people with Docker."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy import tools
from deploy.tools import ToolMissing
from service.cli import main
from service.exporter import Exporter
from service.prometheus import DIRECTORY, configuration
from tests.cluster import free_port, process_exists, wait_until

DEPLOY = DIRECTORY.parent
START_TIMEOUT_S = 60.0


@pytest.fixture
def promtool() -> Path:
    """Skips the test where there is no Prometheus."""
    try:
        tools.find("prometheus")
        return tools.find("promtool")
    except ToolMissing as error:
        pytest.skip(str(error))


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[Exporter]:
    started = Exporter(tmp_path / "series", port=0)
    yield started
    started.close()


def fails(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["monitor", *flags]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    return out.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--retention", "5x"], "--retention must be a number and one of ms, s, m, h, d, w, y, got '5x'"),
        (["--retention", "0d"], "got '0d'"),
        (["--prometheus-port", "70000"], "--prometheus-port must be in [0, 65535], got 70000"),
        (["--metrics-url", "nowhere"], "'nowhere' is no address of metrics"),
        (["--metrics-url", "https://a:1"], "HOST:PORT"),
        (["--ray-metrics", "a:99999"], "'a:99999' is no address of metrics"),
        (["--ray-metrics", "http://user:secret@a:1"], "HOST:PORT"),
        (["--dir", "/dev/null/x"], "--dir /dev/null/x: Not a directory"),
    ],
)
def test_wrong_flags_are_told_before_anything_starts(
    capsys: pytest.CaptureFixture[str], promtool: Path, flags: list[str], says: str
) -> None:
    assert says in fails(capsys, "--prometheus-port", "0", *flags)


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str], promtool: Path, exporter: Exporter) -> None:
    message = fails(capsys, "--prometheus-port", str(exporter.port))
    assert f"--prometheus-port {exporter.port}" in message and "in use" in message


def test_monitor_scrapes_says_what_is_down_and_stops_on_ctrl_c(
    tmp_path: Path, promtool: Path, exporter: Exporter
) -> None:
    target, nobody = f"127.0.0.1:{exporter.port}", f"127.0.0.1:{free_port()}"
    flags = ["--prometheus-port", "0", "--dir", str(tmp_path / "kept"), "--ray-metrics", nobody]
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "monitor", *flags, "--metrics-url", f"http://{target}/metrics"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: dict[str, list[str]] = {"stdout": [], "stderr": []}
    readers = [
        threading.Thread(target=lambda lines, stream: lines.extend(stream), args=(said[name], stream), daemon=True)
        for name, stream in (("stdout", process.stdout), ("stderr", process.stderr))
    ]
    for reader in readers:
        reader.start()
    try:
        wait_until(
            lambda: any("ray at" in line for line in said["stderr"]), timeout_s=START_TIMEOUT_S, what="a first scrape"
        )
        [line] = said["stdout"]
        match = re.match(r"m3serve monitor ready: (http://127\.0\.0\.1:\d+) scrapes ", line)
        assert match is not None, line
        assert f"m3serve: m3serve at {target} is up\n" in said["stderr"]
        assert any(line.startswith(f"m3serve: ray at {nobody} is down: ") for line in said["stderr"])
        reply = httpx.get(f"{match[1]}/api/v1/query", params={"query": 'up{job="m3serve"}'}, trust_env=False)
        [sample] = reply.json()["data"]["result"]
        assert sample["value"][1] == "1"
        rules = httpx.get(f"{match[1]}/api/v1/rules", trust_env=False).json()["data"]["groups"]
        assert {rule["name"] for group in rules for rule in group["rules"]} >= {"M3EngineStalled"}
        [prometheus] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    for reader in readers:
        reader.join(timeout=5)
    assert said["stderr"][-1] == "m3serve: stopped\n"
    assert not process_exists(int(prometheus))
    assert list((tmp_path / "kept" / "data").iterdir())


def test_the_configuration_for_people_is_the_one_that_monitor_uses(promtool: Path, tmp_path: Path) -> None:
    written = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())
    used = configuration({"m3serve": "127.0.0.1:9400", "ray": "http://127.0.0.1:9401/metrics"})
    assert used.pop("rule_files") == [str(DIRECTORY / name) for name in written.pop("rule_files")]
    assert used == written
    done = subprocess.run([promtool, "check", "config", DIRECTORY / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_other_targets_and_intervals() -> None:
    config = configuration({"ray": "http://host:1/other"}, rules=Path("/r.yaml"), scrape_interval="1s")
    ours, ray = config["scrape_configs"]
    assert ours["static_configs"] == [{"targets": ["127.0.0.1:9400"]}]
    assert (ray["static_configs"], ray["metrics_path"]) == ([{"targets": ["host:1"]}], "/other")
    assert config["rule_files"] == ["/r.yaml"]
    assert config["global"] == {"scrape_interval": "1s", "evaluation_interval": "1s"}


# --- compose.yaml: Docker is not needed for these -----------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return document


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """Path in the container -> file or directory of the checkout."""
    split = (mount.split(":") for mount in service["volumes"] if mount.startswith("."))
    return {target: DEPLOY / source for source, target, _ in split}


def test_compose_pins_images_and_mounts_what_is_there(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
        assert mounts(service)
        for path in mounts(service).values():
            assert path.exists(), path
        assert all(mount.endswith(":ro") for mount in service["volumes"] if mount.startswith("."))
        named = {mount.split(":")[0] for mount in service["volumes"] if not mount.startswith(".")}
        assert named <= compose["volumes"].keys()


def test_compose_listens_on_loopback_alone_and_holds_no_password(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert all(service["network_mode"] == "host" and "ports" not in service for service in services.values())
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    environment = services["grafana"]["environment"]
    assert environment["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert (environment["GF_AUTH_DISABLE_LOGIN_FORM"], environment["GF_AUTH_BASIC_ENABLED"]) == ("true", "false")
    assert not [name for name in environment if "PASSWORD" in name or "SECRET" in name]
    assert all(isinstance(value, str) for value in environment.values())


def test_grafana_finds_prometheus_and_the_dashboards(compose: dict[str, Any]) -> None:
    grafana = compose["services"]["grafana"]
    there = mounts(grafana)
    provisioning = there["/etc/grafana/provisioning"]
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"]
    assert source["url"] == "http://127.0.0.1:9090"
    scraped = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
    [provider] = yaml.safe_load((provisioning / "dashboards" / "m3serve.yaml").read_text())["providers"]
    dashboards = there[provider["options"]["path"]]
    uids = {json.loads(path.read_text())["uid"] for path in dashboards.glob("*.json")}
    assert len(uids) == 4
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (there[str(home.parent)] / home.name).is_file()


def test_docker_compose_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("docker with its compose plugin is not installed")
    command = [docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
