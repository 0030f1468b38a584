"""A Prometheus server of our own, beside a running service: for `m3serve monitor`, and for tests of what it shows."""

from __future__ import annotations

import copy
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

import deploy
from deploy import tools
from deploy.tools import ToolMissing
from engine.errors import ConfigError, M3Error

DIRECTORY = Path(deploy.__file__).parent / "prometheus"
LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
CHECK_TIMEOUT_S = 60.0
QUERY_TIMEOUT_S = 30.0
POLL_S = 0.05
MAX_PORT = 65535
# What is shown of a program that failed.
ERROR_LINES = 5


class PrometheusFailed(M3Error):
    """Prometheus refused its configuration, did not start, or did not answer."""


def configuration(
    targets: Mapping[str, str], *, rules: Path | None = None, scrape_interval: str | None = None
) -> dict[str, Any]:
    """deploy/prometheus/prometheus.yml with other targets.

    targets: job of that file -> "host:port", or "http://host:port/path".  rules: another rule file.
    scrape_interval: e.g. "1s"; also that of the rules.
    """
    config: dict[str, Any] = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())
    config["rule_files"] = [str(rules or DIRECTORY / "rules.yaml")]
    if scrape_interval is not None:
        config["global"] |= {"scrape_interval": scrape_interval, "evaluation_interval": scrape_interval}
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    for name, target in targets.items():
        host_port, path = _split(target)
        jobs[name]["static_configs"] = [{"targets": [host_port]}]
        if path:
            jobs[name]["metrics_path"] = path
    return config


def _split(target: str) -> tuple[str, str]:
    """The host and port of a target, and its path if it is not the usual one."""
    try:
        url = httpx.URL(target if "://" in target else f"http://{target}")
    except httpx.InvalidURL as error:
        raise ConfigError(f"{target!r} is no address of metrics: {error}") from None
    is_address = url.host and url.port is not None and 0 < url.port <= MAX_PORT
    if url.scheme != "http" or not is_address or url.query or url.userinfo:
        raise ConfigError(f"{target!r} is no address of metrics: it must be HOST:PORT or http://HOST:PORT/PATH")
    path = "" if url.path in ("/", "/metrics") else url.path
    return url.netloc.decode(), path


def find_programs() -> tuple[Path, Path]:
    """Prometheus and promtool. ConfigError, saying how to get them, when they are not there."""
    try:
        return tools.find("prometheus"), tools.find("promtool")
    except ToolMissing as error:
        raise ConfigError(str(error)) from None


class Prometheus:
    """A Prometheus process that listens on loopback. Leaving the `with` block ends it.

    directory: holds configuration, log and data.  port: must be free.  retention: how long samples are kept.
    """

    def __init__(self, config: Mapping[str, Any], directory: Path, *, port: int, retention: str = "1d") -> None:
        program, checker = find_programs()
        self.url = f"http://{LOOPBACK}:{port}"
        self._log = directory / "prometheus.log"
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(copy.deepcopy(dict(config)), sort_keys=False))
        _check(checker, file)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(program),
                    f"--config.file={file}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--storage.tsdb.retention.time={retention}",
                    f"--web.listen-address={LOOPBACK}:{port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._http = httpx.Client(base_url=self.url, timeout=QUERY_TIMEOUT_S, trust_env=False)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_ready(self) -> None:
        """Return once it answers queries. Raises PrometheusFailed when it ends, or does not come up in time."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise PrometheusFailed(self.last_words())
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def last_words(self) -> str:
        """Why it does not run, as far as its log says."""
        status = self.process.poll()
        what = "does not answer" if status is None else f"ended with status {status}"
        lines = self._log.read_text(errors="replace").splitlines()[-ERROR_LINES:]
        return f"Prometheus {what}: {' | '.join(lines)}"

    def has_pages(self) -> bool:
        """Whether this build has the web pages, which the fetched one lacks."""
        return self._request("GET", "/graph").status_code == 200

    def api(self, path: str, **parameters: str | float) -> Any:
        """`data` of the HTTP API's answer to /api/v1/`path`. Raises PrometheusFailed with Prometheus' own words."""
        reply = self._request("POST" if parameters else "GET", f"/api/v1/{path}", **parameters)
        try:
            answer = reply.json()
        except ValueError:
            raise PrometheusFailed(f"{path}: status {reply.status_code}: {reply.text[:200]}") from None
        if answer["status"] != "success":
            raise PrometheusFailed(f"{path} {parameters}: {answer.get('error')}")
        return answer["data"]

    def _request(self, method: str, path: str, **form: str | float) -> httpx.Response:
        try:
            return self._http.request(method, path, data=form, follow_redirects=True)
        except httpx.TransportError as error:
            raise PrometheusFailed(f"{self.last_words()} ({error})") from None

    def query(self, expr: str, *, at_s: float | None = None) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each sample of an instant vector (of a scalar: one, without labels).

        at_s: Unix time; default: now.
        """
        data = self.api("query", query=expr, **({} if at_s is None else {"time": at_s}))
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(sample["metric"], float(sample["value"][1])) for sample in data["result"]]

    def targets(self) -> list[tuple[str, str, str, str]]:
        """Job, address, health ("up", "down", or "unknown" before the first scrape) and last error of each target."""
        found = self.api("targets")["activeTargets"]
        return sorted((t["labels"]["job"], t["labels"]["instance"], t["health"], t["lastError"]) for t in found)


def _check(promtool: Path, file: Path) -> None:
    command: Sequence[str] = (str(promtool), "check", "config", str(file))
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()[-ERROR_LINES:]
        raise PrometheusFailed(f"promtool refused {file}: {' | '.join(line.strip() for line in lines)}")
