"""A running service whose processes can be found, struck and counted."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.context import _get_global_client

from service.settings import ServiceSettings
from tests.cluster import Cluster, process_exists, wait_until

CALL_TIMEOUT_S = 20.0
RECOVERY_TIMEOUT_S = 120.0
APPLICATION = "service"


@dataclass(frozen=True, slots=True)
class Group:
    """The processes of one engine replica."""

    replica: int
    workers: tuple[int, ...]

    @property
    def pids(self) -> set[int]:
        return {self.replica, *self.workers}


class Fleet:
    """The service under test. settings: by which it was deployed."""

    def __init__(self, cluster: Cluster, url: str, settings: ServiceSettings) -> None:
        self.url = url
        self.settings = settings
        self.model_name = settings.model_name
        self.replicas = settings.replicas
        self._cluster = cluster
        self._ingress_replicas = settings.ingress_replicas
        self._handle = serve.get_deployment_handle("Engine", APPLICATION)

    def groups(self) -> list[Group]:
        """Every engine replica that runs."""
        running = set(self._running("Engine"))
        found: dict[int, Group] = {}
        # A call goes to some replica: ask until each has answered.
        for _ in range(200):
            if found.keys() >= running:
                return [found[pid] for pid in sorted(running)]
            asked = [self._handle.pids.remote() for _ in range(4)]
            for replica, *workers in (answer.result(timeout_s=CALL_TIMEOUT_S) for answer in asked):
                found[replica] = Group(replica, tuple(workers))
        raise AssertionError(f"replicas {running - found.keys()} do not answer")

    def ingresses(self) -> list[int]:
        """Every HTTP front process."""
        return sorted(self._running("Ingress"))

    def controller(self) -> int:
        """Serve's controller."""
        pid: int = ray.get(_get_global_client()._controller.get_pid.remote(), timeout=CALL_TIMEOUT_S)
        return pid

    def proxy(self) -> int:
        """Serve's HTTP proxy."""
        [details] = _get_global_client().get_serve_details()["proxies"].values()
        actor = ray.get_actor(details["actor_name"], namespace="serve")
        pid: int = ray.get(actor.__ray_call__.remote(_own_pid), timeout=CALL_TIMEOUT_S)
        return pid

    def everything(self) -> dict[str, int]:
        """Every process that a request goes through, by a name of its own."""
        pids = {"controller": self.controller(), "proxy": self.proxy()}
        pids |= {f"ingress {i}": pid for i, pid in enumerate(self.ingresses())}
        for i, group in enumerate(self.groups()):
            pids[f"engine {i}"] = group.replica
            pids |= {f"engine {i} rank {rank}": pid for rank, pid in enumerate(group.workers)}
        return pids

    def num_tasks(self) -> int:
        """Unfinished asyncio tasks in the replicas of both deployments."""
        details: dict[str, Any] = _get_global_client().get_serve_details()["applications"][APPLICATION]
        names = [
            replica["actor_name"]
            for deployment in details["deployments"].values()
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        ]
        actors = [ray.get_actor(name, namespace="serve") for name in names]
        return sum(ray.get([actor.__ray_call__.remote(_own_tasks) for actor in actors], timeout=CALL_TIMEOUT_S))

    def wait_until_whole(self, *, without: set[int] = frozenset()) -> float:  # type: ignore[assignment]
        """Until every replica runs and the service is ready; the seconds it took. without: pids that must be gone."""
        return wait_until(lambda: self._is_whole(without), timeout_s=RECOVERY_TIMEOUT_S, what="the whole service")

    def wait_until_idle(self) -> None:
        """Until no engine holds a page."""
        wait_until(lambda: self.held_pages() == 0, timeout_s=60, what="free pages")

    def held_pages(self) -> int:
        return int(self.series("m3_kv_pages", 'state="held"'))

    def num_moved(self) -> int:
        """Resubmissions that the ingresses have counted."""
        return int(self.series("m3_failovers_total"))

    def series(self, name: str, label: str = "") -> float:
        """Sum of a series over the processes of this service."""
        text = httpx.get(self._cluster.metrics_url).text
        pattern = rf'^{name}{{(?=[^\n]*model_name="{self.model_name}")(?=[^\n]*{label})[^\n]*}} (\S+)$'
        return sum(float(value) for value in re.findall(pattern, text, re.MULTILINE))

    def _is_whole(self, without: set[int]) -> bool:
        if any(process_exists(pid) for pid in without):
            return False
        engines, ingresses = self._running("Engine"), self._running("Ingress")
        if len(engines) != self.replicas or len(ingresses) != self._ingress_replicas:
            return False
        if not all(process_exists(pid) for pid in (*engines, *ingresses)):
            return False  # Serve has not noticed yet
        try:
            return httpx.get(f"{self.url}/ready", timeout=CALL_TIMEOUT_S).status_code == 200
        except httpx.HTTPError:
            return False

    def _running(self, deployment: str) -> list[int]:
        details: dict[str, Any] = _get_global_client().get_serve_details()["applications"][APPLICATION]
        replicas = details["deployments"][deployment]["replicas"]
        return [each["pid"] for each in replicas if each["state"] == "RUNNING"]


@contextlib.contextmanager
def open_fleet(
    cluster: Cluster, checkpoint: Path, *, replicas: int = 1, ingress_replicas: int = 1, **settings: Any
) -> Iterator[Fleet]:
    """A service of engine replicas with two tensor-parallel ranks each."""
    defaults: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "index_topk_freq": 2,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
        "max_model_len": 2048,
        "num_pages": 400,
        # What is stopped must be found out in a test's time.
        "step_timeout_s": 6.0,
        "silence_timeout_s": 5.0,
        "health_check_timeout_s": 3.0,
    }
    name = f"faults-{replicas}-{ingress_replicas}"
    chosen = cluster.settings(
        checkpoint,
        served_model_name=name,
        replicas=replicas,
        ingress_replicas=ingress_replicas,
        **(defaults | settings),
    )
    with cluster.service(chosen) as url:
        fleet = Fleet(cluster, url, chosen)
        fleet.wait_until_whole()
        yield fleet


def _own_pid(_actor: Any) -> int:
    return os.getpid()


def _own_tasks(_actor: Any) -> int:
    gc.collect()
    return sum(isinstance(each, asyncio.Task) and not each.done() for each in gc.get_objects())
