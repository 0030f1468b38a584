"""One tensor-parallel rank in its own process, behind a Ray actor that RayExecutor places, starts and watches.

Ray carries start-up and liveness only. Steps arrive on a socket in the long-lived `run`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
import zmq
from torch._C._distributed_c10d import TCPStore

from engine import devices
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.rank_actor import WorkerAddress
from engine.runner import ModelRunner
from engine.transport import Gate, Header, Kind, bind_pull, connect_push, encode, pack
from engine.types import EngineInfo, StepPlan

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# A collective may wait this long at least: ranks of a loaded machine do not start it together.
MIN_COLLECTIVE_TIMEOUT_S = 30.0
# How soon a rank with a step on its device looks whether it is done, or another one has come.
READY_POLL_S = 5e-5


class Worker:
    """A rank. Calls in order: listen, load, allocate, run."""

    def __init__(self, config: EngineConfig, *, rank: int, world_size: int) -> None:
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._context: zmq.Context[Any] = zmq.Context()
        self._plans: zmq.Socket[Any] | None = None
        self._store: TCPStore | None = None
        self._runner: ModelRunner | None = None
        torch.set_num_threads(config.num_threads or max(1, (os.cpu_count() or 1) // world_size))

    def listen(self, node_id: str, directory: str | None) -> WorkerAddress:
        """Bind the step socket: in `directory` on the node `node_id`, which is the executor's, else on tcp."""
        here = ray.get_runtime_context().get_node_id()
        shared = Path(directory) if directory is not None and here == node_id else None
        self._plans, endpoint = bind_pull(
            self._context, directory=shared, name=f"rank{self._rank}", host=ray.util.get_node_ip_address()
        )
        port = None
        if self._rank == 0 and self._world_size > 1:
            # TCPStore would listen on every interface; the ranks of a group share one node.
            listener = socket.create_server((LOOPBACK, 0))
            port = listener.getsockname()[1]
            self._store = TCPStore(
                LOOPBACK,
                port,
                self._world_size,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=MIN_COLLECTIVE_TIMEOUT_S),
                master_listen_fd=listener.detach(),
            )
        return WorkerAddress(here, os.getpid(), endpoint, port)

    def load(self, store_port: int | None, step_timeout_s: float) -> int:
        """Join the group and load this rank's share of the weights; how many pages its memory allows."""
        self._take_gpu()
        if self._world_size > 1:
            self._join(store_port, timedelta(seconds=max(step_timeout_s, MIN_COLLECTIVE_TIMEOUT_S)))
        self._runner = ModelRunner(self._config, rank=self._rank, world_size=self._world_size)
        return self._runner.load().num_pages

    def _take_gpu(self) -> None:
        """Compute on the GPU that Ray assigned to this process, where it did, from the CPUs near it."""
        assigned = [str(each) for each in ray.get_gpu_ids()]
        if not assigned:
            return
        is_hip = torch.version.hip is not None
        devices.check_visibility(os.environ, is_hip=is_hip)
        if not torch.cuda.is_available():
            return  # whoever resolves the kernels says so
        if len(assigned) > 1:
            raise ConfigError(f"rank {self._rank} computes on one GPU, and Ray assigned it {', '.join(assigned)}")
        torch.cuda.set_device(devices.local_index(assigned[0], os.environ, is_hip=is_hip))
        allowed = frozenset(os.sched_getaffinity(0))
        cpus = devices.cpus_to_pin(self._config.numa_pinning, devices.current().pci, allowed)
        if cpus:
            devices.pin(cpus)
        log.info("rank %d runs on %d of %d CPUs", self._rank, len(cpus or allowed), len(allowed))

    def _join(self, store_port: int | None, timeout: timedelta) -> None:
        if self._store is None:
            assert store_port is not None, "rank 0 must listen first"
            self._store = TCPStore(LOOPBACK, store_port, self._world_size, is_master=False, timeout=timeout)
        for name, value in devices.collective_environment().items():
            os.environ.setdefault(name, value)
        device = None
        if self._config.backend != "torch" and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group(
            "gloo" if device is None else "nccl",  # which is RCCL on ROCm
            store=self._store,
            rank=self._rank,
            world_size=self._world_size,
            timeout=timeout,
            device_id=device,
        )

    def allocate(self, num_pages: int) -> EngineInfo:
        """Make the page pools, with as many pages as every rank can hold."""
        assert self._runner is not None, "load comes first"
        return self._runner.allocate(num_pages)

    def run(self, reply_endpoint: str, token: bytes, epoch: int) -> None:
        """Execute steps until the process is killed; Ray kills it when the executor's process dies.

        Raises when a step fails or belongs to another group: the executor sees the actor's call end.
        """
        assert self._runner is not None and self._plans is not None, "listen and load come first"
        runner, plans = self._runner, self._plans
        replies = connect_push(self._context, reply_endpoint)
        gate = Gate(f"rank {self._rank}", token, {Kind.STEP: StepPlan, Kind.HELLO: int})
        running: deque[int] = deque()  # steps that were launched and not answered

        def answer() -> None:
            """Collect the oldest step; rank 0 tells it."""
            with self._told(replies, token, epoch, running[0]):
                result = runner.collect()
            running.popleft()
            header = Header(Kind.RESULT, epoch, result.step_id)
            if self._rank == 0:
                replies.send_multipart(pack(token, header, encode(result)))
                return
            for times in result.rank_times:
                replies.send_multipart(pack(token, header._replace(kind=Kind.TIMES), encode(times)))

        while True:
            # A step that comes while another runs is launched at once: the device must not wait for the host.
            while running and not plans.poll(0):
                if runner.ready():
                    answer()
                else:
                    time.sleep(READY_POLL_S)
            message = gate.admit(plans.recv_multipart())
            if message is None:
                continue
            header, body = message
            if header.epoch != epoch:
                raise RuntimeError(f"rank {self._rank} belongs to group {epoch}, got a step of group {header.epoch}")
            if header.kind == Kind.HELLO:
                replies.send_multipart(pack(token, Header(Kind.HELLO, epoch, 0), encode(self._rank)))
                continue
            plan: StepPlan = body
            with self._told(replies, token, epoch, plan.step_id):
                runner.launch(plan)
            running.append(plan.step_id)

    @contextmanager
    def _told(self, replies: zmq.Socket[Any], token: bytes, epoch: int, step_id: int) -> Iterator[None]:
        """The executor hears why a step failed before this process goes."""
        try:
            yield
        except Exception as error:
            failure = f"rank {self._rank}, step {step_id}: {type(error).__name__}: {error}"
            replies.setsockopt(zmq.LINGER, 1000)
            replies.send_multipart(pack(token, Header(Kind.FAILURE, epoch, step_id), encode(failure)))
            raise
