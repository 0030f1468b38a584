"""The ingress's side of the token plane: one event stream per request, whatever happens to the replica behind it.

Loads no torch. All calls are made on the event loop that called `start`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import msgspec
import ray
import zmq
import zmq.asyncio
from ray.serve.exceptions import BackPressureError

from engine.errors import EngineDead, Overloaded
from engine.transport import Gate, Header, Kind, bind_pull, connect_push, encode, new_epoch, new_token, pack
from engine.types import EngineInfo, EngineRequest, RequestEvent
from service.batcher import Batcher
from service.messages import Abort, Accepted, Ended, StepEvents, Submit, SubmitReply
from service.series import IngressSeries
from service.settings import ServiceSettings
from service.token_stream import TokenStream

if TYPE_CHECKING:  # at run time only where tracing is on
    from service.tracing_ingress import ChoiceTrace

log = logging.getLogger(__name__)

PROBE_PERIOD_S = 2.0
# A replica that does not answer a probe within this time does not count as ready.
PROBE_TIMEOUT_S = 4.0
# How often overdue submits are looked for.
SWEEP_PERIOD_S = 0.5
# A replica without requests for so long may have been removed; its next Accepted brings it back.
FORGET_AFTER_S = 60.0
# The reply to a submit and the events travel on different paths: how long the last events may come after it.
LAST_EVENTS_TIMEOUT_S = 2.0
RETRY_BACKOFF_S = 0.25
_info_decoder = msgspec.msgpack.Decoder(EngineInfo)
_reply_decoder = msgspec.msgpack.Decoder(SubmitReply)


@dataclasses.dataclass(slots=True)
class _Batch:
    """One submit and what is known of it.

    attempt_ids: of its requests.  deadline_s: when a replica must have accepted it.
    """

    submit_id: int
    attempt_ids: list[str]
    deadline_s: float
    on_its_way: asyncio.Future[None]
    call: asyncio.Task[None] | None = None
    replica_id: str | None = None


@dataclasses.dataclass(slots=True)
class _Replica:
    """Where to send aborts."""

    socket: zmq.Socket[Any]
    token: bytes
    used_at_s: float


class EngineClient:
    """Sends requests to engine replicas and yields their events. One per ingress process."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self.series = IngressSeries(settings.model_name, configured_replicas=settings.replicas)
        # Attempt ids are unique over all ingress processes.
        self._client_id = f"{new_epoch():016x}"
        self._epoch = new_epoch()
        self.token = new_token()
        self._gate = Gate("events", self.token, {Kind.ACCEPTED: Accepted, Kind.EVENTS: StepEvents})
        self._streams: dict[str, TokenStream] = {}
        self._batches: dict[int, _Batch] = {}
        self._replicas: dict[str, _Replica] = {}
        self._batcher = Batcher(self._send)
        self._num_attempts = 0
        self.num_submits = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._info: EngineInfo | None = None
        self._answered_at_s: float | None = None
        self._probe_now = asyncio.Event()
        self._closed = False

    async def start(self, handle: Any) -> None:
        """Bind the event socket and begin to watch the replicas behind `handle` (a Serve DeploymentHandle)."""
        self._handle = handle
        self._context: zmq.Context[Any] = zmq.Context()
        host = self._settings.data_host or ray.util.get_node_ip_address()
        self._socket, self.endpoint = bind_pull(
            zmq.asyncio.Context(self._context), directory=None, name="events", host=host
        )
        for work in (self._read_events(), self._probe(), self._sweep()):
            self._tasks.append(asyncio.create_task(work))

    async def close(self) -> None:
        """End every stream with EngineDead and free the sockets. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        calls = [batch.call for batch in self._batches.values() if batch.call is not None]
        for task in (*self._tasks, *calls):
            task.cancel()
        await asyncio.gather(*self._tasks, *calls, return_exceptions=True)
        for stream in self._streams.values():
            stream.fail(EngineDead("the service is shutting down"))
        self._streams.clear()
        # Every socket by hand: a context waits for ever for one that it does not know of.
        self._socket.close(linger=0)
        for replica in self._replicas.values():
            replica.socket.close(linger=0)
        self._context.term()

    async def generate(
        self, request: EngineRequest, trace: ChoiceTrace | None = None
    ) -> AsyncGenerator[RequestEvent, None]:
        """Events of one request, in order and without gaps; the last one has a finish_reason.

        The request leaves at the first `__anext__`: streams that are started in one turn of the event loop (the
        prompts of one HTTP request) leave in one submit. Events that pile up while the caller is busy are merged
        into one: `token_ids` may hold many tokens. Use `contextlib.aclosing`: closing the generator early aborts
        the request in the engine. `request.sampling.seed` must be set. `request.request_id` need not be unique.

        Raises RequestError (the engine refuses the request) or Overloaded (bounded queue full) before the first
        event, and EngineDead when no replica answers or the retry limit is used up, at any point. A finish_reason
        ERROR comes with `event.error`.
        """
        stream = TokenStream(request, self._settings.max_undelivered_tokens, trace)
        self._queue(stream)
        try:
            while True:
                event = await stream.next()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            stream.ended = True
            self._abort([stream.attempt_id])

    async def info(self) -> EngineInfo:
        """What the engine resolved at load; cached. Raises EngineDead when no replica answers in time."""
        if self._info is None:
            try:
                await asyncio.wait_for(self._ask_info(), PROBE_TIMEOUT_S)
            except Exception as error:
                raise EngineDead(f"no engine replica answers: {error!r}") from error
        assert self._info is not None
        return self._info

    def ready(self) -> bool:
        """Whether some replica answered lately."""
        return self._answered_at_s is not None and (
            time.monotonic() - self._answered_at_s < PROBE_TIMEOUT_S + PROBE_PERIOD_S
        )

    @property
    def attempt_ids(self) -> list[str]:
        """Ids under which the engine knows the requests in flight."""
        return list(self._streams)

    @property
    def num_dropped(self) -> int:
        """Messages on the event socket that were not let in."""
        return self._gate.dropped

    # --- sending ----------------------------------------------------------------------------------------------

    def _queue(self, stream: TokenStream) -> None:
        """Give the stream a new attempt and send it with the next batch."""
        if stream.ended:
            return
        if self._closed:
            stream.fail(EngineDead("the service is shutting down"))
            return
        self._num_attempts += 1
        stream.attempt_id = f"{self._client_id}.{self._num_attempts:x}"
        self._streams[stream.attempt_id] = stream
        if stream.trace is not None:
            stream.trace.begin_attempt(stream.attempt_id, num_resumed_tokens=len(stream.token_ids))
        self._batcher.add(stream)

    def _send(self, streams: list[TokenStream]) -> asyncio.Future[None]:
        """Start one submit; the future is done when a replica has it, or none will."""
        on_its_way: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        live = [stream for stream in streams if not stream.ended]
        if not live:
            on_its_way.set_result(None)
            return on_its_way
        self.num_submits += 1
        # Streams that a client already reads wait longer: there is nothing better to tell it.
        resubmits = all(stream.num_retries for stream in live)
        limit_s = self._settings.failover_timeout_s if resubmits else self._settings.submit_timeout_s
        batch = _Batch(
            self.num_submits,
            [stream.attempt_id for stream in live],
            time.monotonic() + limit_s,
            on_its_way,
        )
        self._batches[batch.submit_id] = batch
        requests = [stream.attempt() for stream in live]
        self.series.observe_submit(len(requests))
        payload = encode(Submit(batch.submit_id, self.endpoint, self.token, requests))
        batch.call = asyncio.create_task(self._call(batch, payload))
        return on_its_way

    async def _call(self, batch: _Batch, payload: bytes) -> None:
        """The submit itself: open until all its requests have ended, wherever their events went."""
        try:
            reply = _reply_decoder.decode(await self._submit(payload))
            if reply.dead is not None:
                self._lost(batch, reply.dead)
            else:
                await self._settle(batch, reply)
        except BackPressureError as error:
            for stream in self._open_streams(batch):
                stream.fail(Overloaded(str(error), retry_after_s=1.0))
        except Exception as error:
            # Whatever Ray raises for a replica that died or cannot be reached.
            self._lost(batch, f"{type(error).__name__}: {error}")
        finally:
            del self._batches[batch.submit_id]
            _set_done(batch.on_its_way)

    async def _submit(self, payload: bytes) -> bytes:
        response = self._handle.submit.remote(payload)
        try:
            reply: bytes = await response
        except asyncio.CancelledError:
            # Otherwise a call that waits for a replica would still reach the next one.
            response.cancel()
            raise
        return reply

    def _open_streams(self, batch: _Batch) -> list[TokenStream]:
        return [self._streams.pop(name) for name in batch.attempt_ids if name in self._streams]

    def _lost(self, batch: _Batch, cause: str) -> None:
        """The replica of a batch is gone: move what it had not finished."""
        log.warning("engine replica %s lost: %s", batch.replica_id, cause.splitlines()[0])
        if batch.replica_id is not None and (replica := self._replicas.pop(batch.replica_id, None)) is not None:
            replica.socket.close(linger=0)
        self._answered_at_s = None
        self._probe_now.set()
        for stream in self._open_streams(batch):
            self._retry(stream, "replica_lost", cause)

    def _retry(self, stream: TokenStream, kind: str, cause: str) -> None:
        """Resubmit a stream's rest. kind: as in the series; cause: for people."""
        if stream.ended:
            return
        if stream.num_retries >= self._settings.retry_limit:
            self.series.count_given_up()
            stream.fail(EngineDead(f"given up after {stream.num_retries} resubmissions: {cause}"))
            return
        stream.num_retries += 1
        if stream.lost_s is None:
            stream.lost_s = time.monotonic()
        self.series.count_failover(kind)
        if stream.trace is not None:
            stream.trace.failed_over(kind, cause)
        # The routers may not know yet that the replica is gone: give them time to find out.
        delay_s = RETRY_BACKOFF_S * (2 ** (stream.num_retries - 1))
        asyncio.get_running_loop().call_later(delay_s, self._queue, stream)

    async def _settle(self, batch: _Batch, reply: SubmitReply) -> None:
        """Compare the replica's account of a finished submit with what arrived, and fetch what is missing."""
        open_until_s = time.monotonic() + LAST_EVENTS_TIMEOUT_S
        while any(name in self._streams for name in batch.attempt_ids) and time.monotonic() < open_until_s:
            for ended in reply.ended:
                if ended.refusal is not None and (stream := self._streams.pop(ended.request_id, None)):
                    stream.fail(ended.refusal.error())
            await asyncio.sleep(0.01)
        accounts = {ended.request_id: ended for ended in reply.ended}
        for name in batch.attempt_ids:
            if (stream := self._streams.pop(name, None)) is not None:
                self._retry(stream, "events_lost", _describe_gap(stream, accounts.get(name)))

    # --- receiving --------------------------------------------------------------------------------------------

    async def _read_events(self) -> None:
        while True:
            message = self._gate.admit(await self._socket.recv_multipart())
            if message is None:
                self.series.count_dropped_message()
                continue
            body = message[1]
            if isinstance(body, Accepted):
                self._accept(body)
                continue
            for event in body.events:
                self._take(event)
            for refusal in body.refusals:
                if (stream := self._streams.pop(refusal.request_id, None)) is not None:
                    stream.fail(refusal.error())

    def _accept(self, accepted: Accepted) -> None:
        batch = self._batches.get(accepted.submit_id)
        if batch is None:
            return
        batch.replica_id = accepted.replica_id
        self._answered_at_s = time.monotonic()
        _set_done(batch.on_its_way)
        replica = self._replicas.get(accepted.replica_id)
        if replica is None:
            control = connect_push(self._context, accepted.control_endpoint)
            replica = self._replicas[accepted.replica_id] = _Replica(control, accepted.control_token, 0.0)
        replica.used_at_s = self._answered_at_s
        for name in batch.attempt_ids:
            if (stream := self._streams.get(name)) is not None and stream.trace is not None:
                stream.trace.accepted(accepted.replica_id)
        # Their callers left before it was known where to send the abort.
        self._send_abort(accepted.replica_id, [name for name in batch.attempt_ids if name not in self._streams])

    def _take(self, event: RequestEvent) -> None:
        attempt_id = event.request_id
        stream = self._streams.get(attempt_id)
        if stream is None:
            return
        if stream.push(event):
            if stream.lost_s is not None:
                self.series.observe_failover(time.monotonic() - stream.lost_s)
                stream.lost_s = None
            if event.finish_reason is not None:
                del self._streams[attempt_id]
            elif stream.ended:
                self._abort([attempt_id])
            return
        self._abort([attempt_id])
        self._retry(stream, "events_lost", f"event {event.index} came where {len(stream.token_ids)} was due")

    # --- aborting ---------------------------------------------------------------------------------------------

    def _abort(self, attempt_ids: list[str]) -> None:
        """Forget attempts; tell their replica about those that it still runs."""
        for attempt_id in attempt_ids:
            if self._streams.pop(attempt_id, None) is None:
                continue
            for batch in self._batches.values():
                if attempt_id in batch.attempt_ids and batch.replica_id is not None:
                    self._send_abort(batch.replica_id, [attempt_id])

    def _send_abort(self, replica_id: str, attempt_ids: list[str]) -> None:
        replica = self._replicas.get(replica_id)
        if replica is None or not attempt_ids:
            return
        frames = pack(replica.token, Header(Kind.ABORT, self._epoch, 0), encode(Abort(attempt_ids)))
        # A replica that does not read its aborts is about to be found dead.
        with contextlib.suppress(zmq.Again):
            replica.socket.send_multipart(frames, zmq.NOBLOCK)

    # --- watching ---------------------------------------------------------------------------------------------

    async def _ask_info(self) -> None:
        self._info = _info_decoder.decode(await self._handle.info.remote())
        self._answered_at_s = time.monotonic()

    async def _probe(self) -> None:
        """Ask some replica for a sign of life, now and then and when one was lost."""
        while True:
            self._probe_now.clear()
            try:
                await asyncio.wait_for(self._ask_info(), PROBE_TIMEOUT_S)
            except Exception as error:
                log.debug("no engine replica answers: %r", error)
                self._answered_at_s = None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._probe_now.wait(), PROBE_PERIOD_S)

    async def _sweep(self) -> None:
        """Fail the streams of submits that no replica accepted in time; forget replicas that have left; publish."""
        while True:
            await asyncio.sleep(SWEEP_PERIOD_S)
            self.series.publish()
            now_s = time.monotonic()
            busy = {batch.replica_id for batch in self._batches.values()}
            for replica_id, replica in list(self._replicas.items()):
                if replica_id not in busy and now_s - replica.used_at_s > FORGET_AFTER_S:
                    replica.socket.close(linger=0)
                    del self._replicas[replica_id]
            for batch in list(self._batches.values()):
                nobody_waits = not any(name in self._streams for name in batch.attempt_ids)
                if batch.replica_id is not None or (now_s < batch.deadline_s and not nobody_waits):
                    continue
                if not nobody_waits:
                    self._answered_at_s = None
                for stream in self._open_streams(batch):
                    stream.fail(EngineDead("no engine replica accepted the request in time"))
                if batch.call is not None:
                    batch.call.cancel()


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _describe_gap(stream: TokenStream, account: Ended | None) -> str:
    if account is None:
        return "the replica did not account for the request"
    return (
        f"the replica ended the request ({account.finish_reason}) after {account.num_output_tokens} tokens, "
        f"{len(stream.token_ids)} arrived"
    )
