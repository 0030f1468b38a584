"""The engine replica: a Serve deployment that owns one worker group and answers submits.

Everything here runs on the replica's event loop, except what EngineLoop runs on its own thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import ray
import zmq
import zmq.asyncio
from ray import serve
from zmq.utils.monitor import recv_monitor_message

from engine.engine import EngineCore
from engine.errors import EngineDead
from engine.metrics import EngineStats
from engine.ray_executor import RayExecutor
from engine.transport import Gate, Header, Kind, bind_pull, connect_push, encode, new_epoch, new_token, pack
from engine.types import FinishReason, RequestEvent
from service import tracing
from service.autoscaling import LOAD_METRIC, idle_load
from service.engine_loop import EngineLoop, EngineLoopCallbacks
from service.messages import Abort, Accepted, Description, Ended, Load, Refusal, StepEvents, Submit, SubmitReply
from service.model_identity import engine_identity, model_identity
from service.series import EngineSeries
from service.settings import ServiceSettings

log = logging.getLogger(__name__)

# After its group died, a replica answers its open submits within this time, then its process ends: Serve and the
# routers notice a dead actor at once, an unhealthy one only after three health checks.
EXIT_DELAY_S = 0.5
# How often an ingress hears of this replica at least.
ALIVE_PERIOD_S = 1.0
_submit_decoder = msgspec.msgpack.Decoder(Submit)


@dataclass(slots=True)
class _Peer:
    """One ingress: where its events go."""

    endpoint: str
    token: bytes
    socket: zmq.Socket[Any]
    watcher: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Progress:
    """What a request that still runs has had so far."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(slots=True)
class _Call:
    """One submit that is still open."""

    peer: _Peer
    done: asyncio.Future[str | None]
    running: dict[str, _Progress]
    ended: list[Ended] = field(default_factory=list)


class EngineReplica:
    """Runs the requests of all ingresses on one worker group."""

    def __init__(self, settings: ServiceSettings) -> None:
        started_s = time.monotonic()
        config = settings.engine_config()
        context = serve.get_replica_context()
        self._replica_id = context.replica_tag
        self._tracer = tracing.open_engine(settings, self._replica_id, str(context.rank.rank))
        executor = RayExecutor(
            config,
            step_timeout_s=settings.step_timeout_s,
            start_timeout_s=settings.start_timeout_s,
        )
        try:
            core = EngineCore(config, executor)
        except BaseException:
            executor.close()
            raise
        self._description = Description(
            self._replica_id, model_identity(settings), engine_identity(config, core.info), core.info
        )
        self._idle = idle_load(settings, self._replica_id, core.info.num_pages * core.info.page_size)
        self._num_tokens = 0
        self._executor = executor
        self._stats = core.stats
        load_s = time.monotonic() - started_s
        self._series = EngineSeries(settings.model_name, str(context.rank.rank), core.info, load_s=load_s)
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._dead: str | None = None
        self._calls: dict[str, _Call] = {}
        self._peers: dict[str, _Peer] = {}
        self._epoch = new_epoch()
        self._control_token = new_token()
        self._gate = Gate("control", self._control_token, {Kind.ABORT: Abort})
        self._data_host = settings.data_host or ray.util.get_node_ip_address()
        self._engine = EngineLoop(
            core,
            EngineLoopCallbacks(
                outcome=self._on_outcome,
                stats=self._on_stats,
                death=self._on_death,
                timelines=None if self._tracer is None else self._tracer.add,
            ),
            check_alive=executor.check_alive,
            max_live_requests=settings.max_live_requests,
            step_timeout_s=settings.step_timeout_s,
        )

    # --- calls through the Serve handle -----------------------------------------------------------------------

    async def submit(self, payload: bytes, *, target: str | None = None) -> bytes:
        """Run the requests of a Submit; a SubmitReply when the last one has ended. target: see TargetRouter."""
        self._start_sockets()
        message = _submit_decoder.decode(payload)
        if self._dead is not None:
            return encode(SubmitReply([], self._dead))
        if message.model not in (None, self._description.model) or (
            message.identity not in (None, self._description.identity)
        ):
            return encode(SubmitReply([], unfit=self._description))
        peer = self._peer(message.endpoint, message.token)
        call = _Call(
            peer,
            asyncio.get_running_loop().create_future(),
            {r.request_id: _Progress(len(r.prompt_token_ids), len(r.output_token_ids)) for r in message.requests},
        )
        self._calls.update(dict.fromkeys(call.running, call))
        self._num_tokens += sum(progress.num_tokens for progress in call.running.values())
        self._series.set_open_requests(len(self._calls))
        # Before the answer: should that find the ingress gone, the abort comes after what it aborts.
        refusals = self._engine.add(message.requests)
        accepted = Accepted(
            message.submit_id,
            self._replica_id,
            self._control_endpoint,
            self._control_token,
            self._load(),
            self._description.identity,
        )
        self._send(peer, Kind.ACCEPTED, accepted)
        self._deliver([], refusals)
        try:
            dead = await call.done
        finally:
            # The caller went away, if any are left.
            self._abort(list(call.running))
        return encode(SubmitReply(call.ended, dead))

    async def describe(self, *, target: str | None = None) -> bytes:
        """Description: what the engine resolved at load. target: see TargetRouter."""
        self._engine.check_health()
        return encode(self._description)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's controller scales by: see service/autoscaling.py."""
        return {LOAD_METRIC: self._load().share}

    async def pids(self) -> list[int]:
        """Processes of this replica: its own, then rank 0, rank 1, ... (for operators and fault tests)."""
        return [os.getpid(), *self._executor.worker_pids]

    async def check_health(self) -> None:
        """Raise EngineDead when this replica should be replaced. O(1)."""
        self._start_sockets()
        self._engine.check_health()

    def __del__(self) -> None:
        # Serve calls this when the replica stops, after its requests have drained.
        if engine := getattr(self, "_engine", None):
            engine.close()
            if self._tracer is not None:
                self._tracer.close()

    # --- from the scheduler thread ----------------------------------------------------------------------------

    def _on_outcome(self, events: list[RequestEvent], refusals: list[Refusal]) -> None:
        if (events or refusals) and self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._deliver, events, refusals)

    def _on_stats(self, stats: EngineStats) -> None:
        self._series.update(stats, dropped_replies=self._executor.num_dropped)

    def _on_death(self, cause: str) -> None:
        self._series.publish(self._stats, dropped_replies=self._executor.num_dropped)
        if self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._die, cause)

    # --- on the event loop ------------------------------------------------------------------------------------

    def _deliver(self, events: list[RequestEvent], refusals: list[Refusal]) -> None:
        """Send one message per ingress, then close the submits that are complete."""
        outgoing: dict[str, StepEvents] = {}
        for event in events:
            call = self._calls.get(event.request_id)
            if call is None:
                continue
            outgoing.setdefault(call.peer.endpoint, StepEvents([], [])).events.append(event)
            self._count(call, event)
        for refusal in refusals:
            call = self._calls.pop(refusal.request_id, None)
            if call is None:
                continue
            outgoing.setdefault(call.peer.endpoint, StepEvents([], [])).refusals.append(refusal)
            progress = call.running.pop(refusal.request_id)
            self._num_tokens -= progress.num_tokens
            call.ended.append(
                Ended(
                    refusal.request_id,
                    progress.num_prompt_tokens,
                    progress.num_output_tokens,
                    0,
                    None,
                    refusal,
                )
            )
            self._close_if_complete(call)
        load = self._load()
        for endpoint, message in outgoing.items():
            if endpoint in self._peers:
                message.load = load
                self._send(self._peers[endpoint], Kind.EVENTS, message)
        self._series.set_open_requests(len(self._calls))

    def _count(self, call: _Call, event: RequestEvent) -> None:
        progress = call.running[event.request_id]
        num_output_tokens = event.index + len(event.token_ids)
        self._num_tokens += num_output_tokens - progress.num_output_tokens
        progress.num_output_tokens = num_output_tokens
        progress.num_cached_tokens = event.num_cached_tokens
        if event.finish_reason is None:
            return
        del self._calls[event.request_id]
        del call.running[event.request_id]
        self._num_tokens -= progress.num_tokens
        call.ended.append(
            Ended(
                event.request_id,
                progress.num_prompt_tokens,
                progress.num_output_tokens,
                progress.num_cached_tokens,
                FinishReason(event.finish_reason),
            )
        )
        self._close_if_complete(call)

    def _load(self) -> Load:
        return self._idle.plus(self._num_tokens, len(self._calls))

    def _close_if_complete(self, call: _Call) -> None:
        if not call.running and not call.done.done():
            call.done.set_result(None)

    def _die(self, cause: str) -> None:
        self._dead = cause
        self._series.count_death()
        log.error("replica %s: %s", self._replica_id, cause)
        for call in {id(call): call for call in self._calls.values()}.values():
            call.running.clear()
            if not call.done.done():
                call.done.set_result(cause)
        self._calls.clear()
        self._num_tokens = 0
        self._series.set_open_requests(0)
        if self._event_loop is not None:
            self._event_loop.call_later(EXIT_DELAY_S, self._exit)

    def _exit(self) -> None:
        # Requests wait for this process to end: what is still to be done has no time to hang.
        self._engine.close(timeout_s=EXIT_DELAY_S)
        if self._tracer is not None:
            self._tracer.close(timeout_s=EXIT_DELAY_S)
        os._exit(1)

    def _abort(self, request_ids: list[str]) -> None:
        if request_ids:
            self._engine.abort(request_ids)

    # --- sockets ----------------------------------------------------------------------------------------------

    def _start_sockets(self) -> None:
        """Bind the control socket, on the event loop of the first call: the constructor has none."""
        if self._event_loop is not None:
            return
        self._event_loop = asyncio.get_running_loop()
        self._context: zmq.Context[Any] = zmq.Context()
        self._control, self._control_endpoint = bind_pull(
            zmq.asyncio.Context(self._context), directory=None, name="control", host=self._data_host
        )
        self._tasks = [asyncio.create_task(self._read_control()), asyncio.create_task(self._tell_alive())]
        for task in self._tasks:
            task.add_done_callback(self._on_task_end)
        try:
            self._engine.check_health()
        except EngineDead as error:
            self._die(str(error))

    async def _read_control(self) -> None:
        while True:
            message = self._gate.admit(await self._control.recv_multipart())
            if message is None:
                self._series.count_dropped_message()
                continue
            self._abort([request_id for request_id in message[1].request_ids if request_id in self._calls])

    async def _tell_alive(self) -> None:
        """Ingresses take a replica that says nothing for long for lost; steps may take long, or give them nothing."""
        while True:
            await asyncio.sleep(ALIVE_PERIOD_S)
            self._series.set_load(self._load().share)
            try:
                self._engine.check_health()
            except EngineDead:
                continue  # what the scheduler thread does not look after had better go elsewhere
            # Those without requests here too: they choose by the load.
            for peer in list(self._peers.values()):
                self._send(peer, Kind.ALIVE, self._load())

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """Such a task ends by a bug alone; without it aborts would not be heard."""
        if self._dead is None:
            self._die(f"the control loop failed: {None if task.cancelled() else task.exception()!r}")

    def _peer(self, endpoint: str, token: bytes) -> _Peer:
        peer = self._peers.get(endpoint)
        if peer is not None and peer.token == token:
            return peer
        if peer is not None:
            self._forget(peer)
        # A plain socket: sends never wait, so the loop needs no notice of it.
        socket = connect_push(self._context, endpoint)
        peer = _Peer(endpoint, token, socket)
        peer.watcher = asyncio.create_task(self._watch(peer))
        self._peers[endpoint] = peer
        return peer

    async def _watch(self, peer: _Peer) -> None:
        """Abort the requests of an ingress that went away."""
        # CLOSED: it refused the connection. An ingress listens before it submits anything.
        monitor = zmq.asyncio.Socket(peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED))
        await recv_monitor_message(monitor)
        log.warning("ingress %s disconnected", peer.endpoint)
        self._forget(peer)

    def _send(self, peer: _Peer, kind: Kind, message: Any) -> None:
        try:
            peer.socket.send_multipart(pack(peer.token, Header(kind, self._epoch, 0), encode(message)), zmq.NOBLOCK)
        except zmq.Again:
            log.error("ingress %s does not read its events", peer.endpoint)
            self._forget(peer)

    def _forget(self, peer: _Peer) -> None:
        """Abort what an ingress that cannot be reached had asked for."""
        if self._peers.get(peer.endpoint) is peer:
            del self._peers[peer.endpoint]
        if peer.watcher is not None and peer.watcher is not asyncio.current_task():
            peer.watcher.cancel()
        peer.socket.disable_monitor()
        peer.socket.close(linger=0)
        self._abort([request_id for request_id, call in self._calls.items() if call.peer is peer])
