"""Serve configs are deployed for real: `ray start` and `serve deploy`, in a cluster with a dashboard of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.tools import ToolMissing, find
from service.serve_config import check
from tests.cluster import LOOPBACK, free_port, process_exists, wait_until
from tests.faults.streams import Record, ask_until, bodies, run_streams

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 180.0
# Replicas import and load in a busy machine's time.
READY_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 120.0
NAME = "m3-nano"
EXAMPLE = ROOT / "helm" / "examples" / "cpu-demo.yaml"


class Head:
    """`ray start --head` as a person would run it, but on ports of its own, with a token, and on few resources."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="m3d-", dir="/tmp"))
        self.metrics = self.directory / "metrics"
        self.metrics.mkdir()
        self.token = secrets.token_hex(16)
        self.environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Nothing that runs here is worth waiting for.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }
        self.http_port = free_port()
        self.url = f"http://{LOOPBACK}:{self.http_port}"
        self.address = f"http://{LOOPBACK}:{(dashboard := free_port())}"
        own_ports = ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}", f"--node-ip-address={LOOPBACK}"]
        command += [
            f"--{name}={free_port()}" for name in (*own_ports, "runtime-env-agent-port", "ray-client-server-port")
        ]
        command += ["--num-cpus=8", f"--object-store-memory={100 * 2**20}", f"--temp-dir={self.directory / 'ray'}"]
        self.log = self.directory / "head.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )

    def applications(self) -> dict[str, Any]:
        """What `serve status` shows, as data; empty until the dashboard answers."""
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            response = httpx.get(
                f"{self.address}/api/serve/applications/",
                headers={"Authorization": f"Bearer {self.token}"},
                timeout=10.0,
                trust_env=False,
            )
        except httpx.HTTPError:
            return {}
        return dict(response.json()) if response.status_code == 200 else {}

    def serve(self, *arguments: str) -> str:
        """The output of `serve ARGUMENTS`."""
        done = subprocess.run(
            [str(BIN / "serve"), *arguments, "-a", self.address],
            env=self.environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(self, document: dict[str, Any], checkpoint: Path) -> None:
        """Deploy a config on which only the addresses and directories of this machine are changed; wait for it."""
        document["http_options"] |= {"host": LOOPBACK, "port": self.http_port}
        [application] = document["applications"]
        application["args"] |= {
            "model": str(checkpoint),
            "data_host": LOOPBACK,
            "metrics_dir": str(self.metrics),
        }
        check(document)
        file = self.directory / "serve.yaml"
        file.write_text(yaml.safe_dump(document))
        self.serve("deploy", str(file))
        name = application["name"]

        def is_running() -> bool:
            state = self.applications()["applications"].get(name, {})
            assert state.get("status") != "DEPLOY_FAILED", state
            return state.get("status") == "RUNNING" and state["deployed_app_config"]["args"] == application["args"]

        wait_until(is_running, timeout_s=READY_TIMEOUT_S, what=f"application {name} RUNNING")

    def complete(self, model: str) -> dict[str, Any]:
        """The answer to a request of four tokens."""
        response = httpx.post(
            f"{self.url}/v1/completions",
            json={"model": model, "prompt": "def add(a, b):", "max_tokens": 4, "temperature": 0, "ignore_eos": True},
            timeout=60.0,
            trust_env=False,
        )
        assert response.status_code == 200, response.text
        return dict(response.json())

    def close(self) -> None:
        """End everything that was started; Ray's daemons keep the session of the command."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            pids = self._pids()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5.0)
        wait_until(lambda: not any(map(process_exists, pids)), timeout_s=10.0, what="the end of Ray's processes")
        shutil.rmtree(self.directory, ignore_errors=True)

    def _pids(self) -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[3]) == self.process.pid:
                    found.append(int(stat.parent.name))
        return found


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    started = Head()
    try:
        wait_until(lambda: bool(started.applications()), timeout_s=START_TIMEOUT_S, what="an answer of the dashboard")
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def demo(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint under the name of the one that the configs serve."""
    link = tmp_path_factory.mktemp("models") / NAME
    link.symlink_to(checkpoint)
    return link


def test_the_demo_config_is_deployed_and_answers(head: Head, demo: Path) -> None:
    head.deploy(yaml.safe_load((ROOT / "deploy/serve/cpu-demo.yaml").read_text()), demo)
    assert head.complete(NAME)["usage"]["completion_tokens"] == 4
    status = yaml.safe_load(head.serve("status"))
    assert status["applications"]["m3serve"]["status"] == "RUNNING"
    deployments = status["applications"]["m3serve"]["deployments"]
    assert {name: one["status"] for name, one in deployments.items()} == {"Ingress": "HEALTHY", "Engine": "HEALTHY"}
    assert list(head.metrics.glob("*.db")), "metrics_dir reached the processes"


def test_the_config_of_the_charts_example_replaces_it_under_load(head: Head, demo: Path) -> None:
    """As KubeRay does it: serveConfigV2 of the rendered RayService goes to the same dashboard. No request is lost."""
    try:
        helm = find("helm")
    except ToolMissing as error:
        pytest.skip(str(error))
    command = [str(helm), "template", "demo", str(ROOT / "helm"), "--values", str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    [service] = [one for one in yaml.safe_load_all(done.stdout) if one and one["kind"] == "RayService"]
    document = yaml.safe_load(service["spec"]["serveConfigV2"])
    requests = bodies(NAME, 6, 400)
    answered: list[str] = []

    async def update(_records: Sequence[Record]) -> None:
        deployed = asyncio.create_task(asyncio.to_thread(head.deploy, document, demo))
        answered.extend(await ask_until(deployed, head.url, NAME))
        await deployed

    records = asyncio.run(run_streams(head.url, requests, after_tokens=1, strike=update))
    # In bf16 other neighbours in a step may tip a near-tie: only how many there are is sure.
    assert [(len(r.token_ids), r.finish_reasons, r.num_done, r.error) for r in records] == [
        (400, ["length"], 1, None)
    ] * len(requests)
    assert set(answered) == {"whole"}
    assert head.complete(NAME)["usage"]["completion_tokens"] == 4
