"""Executor of a tensor-parallel group: one Ray actor per rank, steps over ZMQ, all ranks killed when one is lost.

Keeping the `run()` references as sentinels of the ranks' life is vLLM's RayExecutorV2 idea.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import zmq
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineDead, M3Error
from engine.rank_actor import RankActor, WorkerAddress
from engine.transport import Gate, Header, Kind, bind_pull, connect_push, encode, new_epoch, new_token, pack
from engine.types import EngineInfo, RankTimes, StepPlan, StepResult

log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 10.0
# How soon a waiting `collect` notices that the monitor thread declared the group dead.
DEATH_POLL_S = 0.05


def ensure_ray(num_cpus: int) -> Callable[[], None] | None:
    """Join the cluster of RAY_ADDRESS, else start a local one. Returns how to leave what this call joined, if it did.

    num_cpus: logical CPUs that a local cluster must offer, whatever the machine has.
    """
    if ray.is_initialized():
        return None
    # Ray's own variable. Without it Ray would look for any cluster on this machine.
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    else:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    leave: Callable[[], None] = ray.shutdown
    return leave


def rank_resources(backend: str, cluster: dict[str, float]) -> dict[str, float]:
    """What Ray reserves for one rank: a GPU too, unless the backend is torch's or the cluster has none."""
    on_gpu = backend in ("triton", "aiter") or (backend == "auto" and cluster.get("GPU", 0) > 0)
    return {"CPU": 1.0, "GPU": 1.0} if on_gpu else {"CPU": 1.0}


@dataclass(frozen=True, slots=True)
class _Outstanding:
    step_id: int
    submitted_s: float


class RayExecutor:
    """Runs StepPlans on the ranks of one group. `submit` and `collect` belong to one thread.

    placement_group: one bundle per rank; made (STRICT_PACK) and removed here when not given.
    step_timeout_s: a step that takes longer means a lost group: a hung rank looks like nothing else.
    start_timeout_s: limit for starting the processes and loading the weights.
    use_tcp: also between processes of one node, which otherwise use unix sockets.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        placement_group: PlacementGroup | None = None,
        step_timeout_s: float = 120.0,
        start_timeout_s: float = 1800.0,
        use_tcp: bool = False,
    ) -> None:
        self._use_tcp = use_tcp
        self._step_timeout_s = step_timeout_s
        self._start_deadline = time.monotonic() + start_timeout_s
        self._token = new_token()
        self._epoch = new_epoch()
        self._gate = Gate(
            "executor",
            self._token,
            {Kind.RESULT: StepResult, Kind.FAILURE: str, Kind.HELLO: int, Kind.TIMES: RankTimes},
        )
        self._rank_times: list[RankTimes] = []
        self._outstanding: deque[_Outstanding] = deque()
        self._collected_s = 0.0
        self._lock = threading.Lock()
        self._cause: str | None = None
        self._closing = False
        self._workers: list[Any] = []
        self._run_refs: list[Any] = []
        self._monitor: threading.Thread | None = None
        self._context: zmq.Context[Any] = zmq.Context()
        self._plan_sockets: list[zmq.Socket[Any]] = []
        # mkdtemp makes it private (0700). Socket paths are limited to about 100 characters: keep it in /tmp.
        self.directory = Path(tempfile.mkdtemp(prefix="m3-ranks-", dir="/tmp"))
        self._owns_group = placement_group is None
        self._group = placement_group
        try:
            self.info = self._start(config)
            self.max_in_flight = self.info.max_in_flight
        except BaseException:
            self.close()
            raise

    # --- start-up -------------------------------------------------------------------------------------------

    def _start(self, config: EngineConfig) -> EngineInfo:
        world_size = config.tensor_parallel_size
        bundle = rank_resources(config.backend, ray.cluster_resources())
        self._group = self._group or self._place(world_size, bundle)
        actor_class = ray.remote(RankActor)
        for rank in range(world_size):
            options = actor_class.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=rank
                ),
            )
            worker = options.remote(config, rank=rank, world_size=world_size)
            self._workers.append(worker)
        node_id = ray.get_runtime_context().get_node_id()
        directory = None if self._use_tcp else str(self.directory)
        addresses: list[WorkerAddress] = self._call("listen", node_id, directory)
        self.worker_pids = tuple(address.pid for address in addresses)
        if len({address.node_id for address in addresses}) > 1:
            raise ConfigError(f"the ranks of a group must share one node, got {addresses}")
        proposals: list[int] = self._call("load", addresses[0].store_port, self._step_timeout_s)
        infos: list[EngineInfo] = self._call("allocate", min(proposals))
        _check_agreement(infos)

        all_local = not self._use_tcp and all(address.node_id == node_id for address in addresses)
        self._replies, self.reply_endpoint = bind_pull(
            self._context,
            directory=self.directory if all_local else None,
            name="replies",
            host=ray.util.get_node_ip_address(),
        )
        self.plan_endpoints = tuple(address.endpoint for address in addresses)
        self._plan_sockets = [connect_push(self._context, endpoint) for endpoint in self.plan_endpoints]
        self._run_refs = [
            worker.call.remote("run", self.reply_endpoint, self._token, self._epoch) for worker in self._workers
        ]
        self._monitor = threading.Thread(target=self._watch, name="m3-rank-monitor", daemon=True)
        self._monitor.start()
        self._greet(world_size)
        # All are connected: nobody else has a reason to, and a killed process would leave the socket files behind.
        shutil.rmtree(self.directory, ignore_errors=True)
        log.info("worker group of %d up: pids %s, plan %s", world_size, self.worker_pids, infos[0].plan)
        return infos[0]

    def _place(self, world_size: int, bundle: dict[str, float]) -> PlacementGroup:
        group = placement_group([bundle] * world_size, strategy="STRICT_PACK")
        limit_s = min(PLACEMENT_TIMEOUT_S, self._start_deadline - time.monotonic())
        try:
            ray.get(group.ready(), timeout=limit_s)
        except ray.exceptions.GetTimeoutError:
            remove_placement_group(group)
            raise ConfigError(
                f"no node has room for tensor_parallel_size {world_size} workers of {bundle} each after "
                f"{limit_s:.0f} s; the cluster has {ray.available_resources()} free"
            ) from None
        return group

    def _call(self, method: str, *args: Any) -> list[Any]:
        """One start-up call on every rank. Does not wait for the others once one has failed."""
        refs = [worker.call.remote(method, *args) for worker in self._workers]
        pending = list(refs)
        while pending:
            left_s = self._start_deadline - time.monotonic()
            done, pending = ray.wait(pending, num_returns=1, timeout=max(left_s, 0.0))
            if not done:
                raise EngineDead(f"{method} of rank {refs.index(pending[0])} took longer than start_timeout_s")
            try:
                ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, M3Error):
                    raise error.cause from None
                raise EngineDead(f"{method} of rank {refs.index(done[0])} failed: {error}") from error
            except ray.exceptions.RayActorError as error:
                raise EngineDead(f"rank {refs.index(done[0])} died during {method}: {error}") from error
        return list(ray.get(refs))

    def _greet(self, world_size: int) -> None:
        """Wait until a message has gone to every rank and back."""
        for rank, plan_socket in enumerate(self._plan_sockets):
            plan_socket.send_multipart(pack(self._token, Header(Kind.HELLO, self._epoch, 0), encode(rank)))
        silent = set(range(world_size))
        while silent:
            self.check_alive()
            if time.monotonic() > self._start_deadline:
                raise EngineDead(f"ranks {sorted(silent)} did not answer within start_timeout_s")
            message = self._receive(DEATH_POLL_S)
            if message is not None and message[0].kind == Kind.HELLO:
                silent.discard(message[1])

    # --- steps ----------------------------------------------------------------------------------------------

    def submit(self, plan: StepPlan) -> None:
        """Send one step to every rank."""
        self.check_alive()
        frames = pack(self._token, Header(Kind.STEP, self._epoch, plan.step_id), encode(plan))
        try:
            for plan_socket in self._plan_sockets:
                plan_socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self._fail("a rank does not read its steps")
            self.check_alive()
        self._outstanding.append(_Outstanding(plan.step_id, time.monotonic()))

    def collect(self) -> StepResult:
        """Rank 0's answer to the oldest step that was submitted."""
        step = self._outstanding.popleft()
        # It runs once the step before it is done.
        started_s = max(step.submitted_s, self._collected_s)
        while True:
            self.check_alive()
            left_s = started_s + self._step_timeout_s - time.monotonic()
            if left_s <= 0:
                self._fail(f"step {step.step_id} took longer than {self._step_timeout_s:g} s")
                continue
            message = self._receive(min(left_s, DEATH_POLL_S))
            if message is None:
                continue
            header, body = message
            if isinstance(body, RankTimes):
                self._rank_times.append(body)
            elif isinstance(body, str):
                self._fail(body)
            elif not isinstance(body, StepResult) or body.step_id != step.step_id:
                self._fail(f"rank 0 answered step {header.sequence}, not {step.step_id}")
            else:
                self._collected_s = time.monotonic()
                body.rank_times += self._rank_times
                self._rank_times.clear()
                return body

    def _receive(self, timeout_s: float) -> tuple[Header, Any] | None:
        """The next message of this group, if one comes in time."""
        if not self._replies.poll(timeout_s * 1000):
            return None
        message = self._gate.admit(self._replies.recv_multipart(zmq.NOBLOCK))
        return message if message is not None and message[0].epoch == self._epoch else None

    @property
    def num_dropped(self) -> int:
        """Messages without the group's token, or that did not decode, on the reply socket."""
        return self._gate.dropped

    def check_alive(self) -> None:
        """Raise EngineDead when the group is gone or closed. Any thread."""
        if self._closing:
            raise EngineDead("the executor is closed")
        if self._cause is not None:
            raise EngineDead(self._cause)

    # --- death ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Body of the monitor thread: a `run` that ended means that its rank is lost, and the group with it."""
        while not self._closing and self._cause is None:
            try:
                done, _ = ray.wait(self._run_refs, num_returns=1, timeout=1.0)
                if not done or self._closing:
                    continue
                rank = self._run_refs.index(done[0])
                try:
                    ray.get(done[0], timeout=1.0)
                    cause = f"rank {rank} left its loop"
                except ray.exceptions.RayTaskError as error:
                    cause = f"rank {rank} failed: {error.cause!r}"
                except ray.exceptions.RayError as error:
                    cause = f"rank {rank} died: {type(error).__name__}"
            except Exception as error:
                # Ray itself is going down: the ranks go with it.
                cause = f"lost touch with the ranks: {error!r}"
            self._fail(cause)

    def _fail(self, cause: str) -> None:
        """Declare the group dead and kill every rank: the survivors would wait for the lost one for ever."""
        with self._lock:
            if self._cause is not None or self._closing:
                return
            self._cause = f"worker group lost: {cause}"
        log.error("%s", self._cause)
        self._kill_all()

    def _kill_all(self) -> None:
        if not ray.is_initialized():
            return
        for worker in self._workers:
            ray.kill(worker, no_restart=True)
        # A stopped process does not obey ray.kill; with its placement group gone the raylet kills it by signal.
        if self._owns_group and self._group is not None:
            remove_placement_group(self._group)

    def close(self) -> None:
        """Kill the ranks and free the sockets, the directory and the placement group. Safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._kill_all()
        # Joined before Ray can be shut down: ray.wait in a thread must not outlive it.
        if self._monitor is not None:
            self._monitor.join(CLOSE_TIMEOUT_S)
        if ray.is_initialized() and self._run_refs:
            ray.wait(self._run_refs, num_returns=len(self._run_refs), timeout=CLOSE_TIMEOUT_S)
        self._context.destroy(linger=0)
        shutil.rmtree(self.directory, ignore_errors=True)


def _check_agreement(infos: list[EngineInfo]) -> None:
    """Raise EngineDead when ranks resolved different engines: they would plan different pages or layers."""
    # What one rank holds of the weights may differ from another's.
    common = [replace(info, weight_bytes=0, ledger={}) for info in infos]
    for rank, info in enumerate(common):
        if info != common[0]:
            raise EngineDead(f"rank {rank} resolved {info}, rank 0 resolved {common[0]}")
