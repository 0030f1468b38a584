"""The ingress's side of the token plane: one event stream per request, whatever happens to the replica behind it.

Loads no torch. All calls are made on the event loop that called `start`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextvars import Context
from typing import TYPE_CHECKING, Any

import ray
import zmq
import zmq.asyncio

from engine.errors import EngineDead, Overloaded
from engine.transport import Gate, Kind, bind_pull, encode, new_epoch, new_token
from engine.types import EngineInfo, EngineRequest, RequestEvent
from service.batcher import Batcher
from service.messages import Accepted, Load, StepEvents, Submit, SubmitReply, full_queue
from service.probe import EngineProbe
from service.replica_choice import Departure, ReplicaChooser
from service.replica_table import ReplicaTable
from service.series import IngressSeries
from service.settings import ServiceSettings
from service.submit_batch import SubmitBatch, call_replica, describe_gap
from service.token_stream import TokenStream

if TYPE_CHECKING:  # at run time only where tracing is on
    from service.tracing_ingress import ChoiceTrace

log = logging.getLogger(__name__)

# How often overdue submits and silent replicas are looked for.
SWEEP_PERIOD_S = 0.5
# The reply to a submit and the events travel on different paths: how long the last events may come after it.
LAST_EVENTS_TIMEOUT_S = 2.0
# A replica that is about to end refuses what it is still sent: the routers need a moment to find out. The pause before
# the next try doubles up to the limit; such tries are bounded by the stream's deadline, not by the retry limit.
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0


class EngineClient:
    """Sends requests to engine replicas and yields their events. One per ingress process."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self.series = IngressSeries(settings.model_name, configured_replicas=settings.fewest_replicas)
        # Attempt ids are unique over all ingress processes.
        self._client_id = f"{new_epoch():016x}"
        self._epoch = new_epoch()
        self.token = new_token()
        self._gate = Gate("events", self.token, {Kind.ACCEPTED: Accepted, Kind.EVENTS: StepEvents, Kind.ALIVE: Load})
        self._streams: dict[str, TokenStream] = {}
        self._batches: dict[int, SubmitBatch] = {}
        self._context: zmq.Context[Any] = zmq.Context()
        self._replicas = ReplicaTable(self._context, self._epoch)
        self._batcher = Batcher(self._send)
        self._num_attempts = 0
        self.num_submits = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped: str | None = None  # why no more requests are taken

    async def start(self, handle: Any) -> None:
        """Bind the event socket and begin to watch the replicas behind `handle` (a Serve DeploymentHandle)."""
        self._handle = handle
        self._chooser = ReplicaChooser(self._settings, self.series, handle)
        self._probe = EngineProbe(handle, self._chooser)
        host = self._settings.data_host or ray.util.get_node_ip_address()
        self._socket, self.endpoint = bind_pull(
            zmq.asyncio.Context(self._context), directory=None, name="events", host=host
        )
        for work in (self._read_events(), self._probe.run(), self._sweep()):
            task = asyncio.create_task(work)
            task.add_done_callback(self._watch)
            self._tasks.append(task)

    async def close(self) -> None:
        """End every stream with EngineDead and free the sockets. Safe to call twice."""
        if self._context.closed:
            return
        self._stop("the service is shutting down")
        calls = [batch.call for batch in self._batches.values() if batch.call is not None]
        for task in (*self._tasks, *calls):
            task.cancel()
        await asyncio.gather(*self._tasks, *calls, return_exceptions=True)
        # Every socket by hand: a context waits for ever for one that it does not know of.
        self._socket.close(linger=0)
        self._replicas.close()
        self._context.term()

    def check_health(self) -> None:
        """Raise EngineDead when this client can serve no more requests, whatever the replicas do."""
        if self._stopped is not None:
            raise EngineDead(self._stopped)

    def _watch(self, task: asyncio.Task[None]) -> None:
        """A task that ends by itself has a bug: nobody would read events, or end what waits for them."""
        if self._stopped is None:
            # Cancelled: by zmq, whose waits end so when their socket is closed.
            error = None if task.cancelled() else task.exception()
            log.critical("the token plane failed", exc_info=error)
            self._stop(f"the token plane of this front failed: {error!r}")

    def _stop(self, cause: str) -> None:
        self._stopped = self._stopped or cause
        for stream in self._streams.values():
            stream.fail(EngineDead(cause))
        self._streams.clear()

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
        self._check_room()
        stream = TokenStream(request, self._settings.max_undelivered_tokens, trace)
        stream.accept_by_s = time.monotonic() + self._settings.submit_timeout_s
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
        return await self._probe.info()

    def ready(self) -> bool:
        """Whether some replica answered lately."""
        return self._stopped is None and self._probe.ready()

    @property
    def attempt_ids(self) -> list[str]:
        """Ids under which the engine knows the requests in flight."""
        return list(self._streams)

    @property
    def num_dropped(self) -> int:
        """Messages on the event socket that were not let in."""
        return self._gate.dropped

    # --- sending ----------------------------------------------------------------------------------------------

    def _check_room(self) -> None:
        """Overloaded when no replica takes one more request: what they would say costs each refusal a call."""
        if not (loads := self._chooser.full()):
            return
        # These tell their load with every step. What others have told may be long past.
        reporting = {batch.replica_id for batch in self._batches.values()}
        if all(load.replica_id in reporting for load in loads):
            raise full_queue(loads[0].requests, loads[0].max_requests)

    def _queue(self, stream: TokenStream) -> None:
        """Give the stream a new attempt and send it with the next batch."""
        if stream.ended:
            return
        if self._stopped is not None:
            stream.fail(EngineDead(self._stopped))
            return
        self._num_attempts += 1
        stream.attempt_id = f"{self._client_id}.{self._num_attempts:x}"
        self._streams[stream.attempt_id] = stream
        if stream.trace is not None:
            stream.trace.begin_attempt(stream.attempt_id, num_resumed_tokens=len(stream.token_ids))
        self._batcher.add(stream)

    def _send(self, streams: list[TokenStream]) -> asyncio.Future[list[None]]:
        """Start submits for these streams; the future is done when replicas have them, or none will."""
        departures, unfit = self._chooser.assign([stream for stream in streams if not stream.ended])
        for stream in unfit:
            self._cannot_go(stream)
        return asyncio.gather(*(self._depart(departure) for departure in departures))

    def _depart(self, departure: Departure) -> asyncio.Future[None]:
        """Start one submit."""
        self.num_submits += 1
        on_its_way = asyncio.get_running_loop().create_future()
        batch = SubmitBatch(self.num_submits, departure.attempt_ids, time.monotonic(), on_its_way, departure.tickets)
        self._batches[batch.submit_id] = batch
        for stream in departure.streams:
            stream.submit_id = batch.submit_id
        requests = [stream.attempt() for stream in departure.streams]
        self.series.observe_submit(len(requests))
        submit = Submit(batch.submit_id, self.endpoint, self.token, requests, self._chooser.model, departure.identity)
        # Of no HTTP request: Serve names and cancels calls by the request in whose context they are made.
        batch.call = asyncio.create_task(self._call(batch, encode(submit), departure.target), context=Context())
        return batch.on_its_way

    def _cannot_go(self, stream: TokenStream) -> None:
        """No replica that runs may take the stream: new ones wait for one that does."""
        del self._streams[stream.attempt_id]
        if stream.token_ids:
            # On other weights or another index plan it would go on as another text.
            stream.fail(EngineDead("the engines were updated to another model or index plan while the request ran"))
        elif time.monotonic() >= stream.accept_by_s:
            stream.fail(stream.late(self._settings))
        else:
            self._try_again(stream)

    async def _call(self, batch: SubmitBatch, payload: bytes, target: str | None) -> None:
        """The submit itself: open until all its requests have ended, wherever their events went."""
        try:
            reply = await call_replica(self._handle, payload, target)
            if reply.dead is not None:
                self._lost(batch, reply.dead)
            elif reply.unfit is not None:
                self._chooser.described(reply.unfit)
                for stream in self._take_open(batch):
                    self._try_again(stream)
            else:
                await self._settle(batch, reply)
        except Overloaded as error:
            for stream in self._take_open(batch):
                stream.fail(error)
        except Exception as error:  # whatever Ray raises for a replica that died or cannot be reached
            self._lost(batch, f"{type(error).__name__}: {error}")
        finally:
            del self._batches[batch.submit_id]
            batch.release()

    def _take_open(self, batch: SubmitBatch) -> list[TokenStream]:
        return [self._streams.pop(name) for name in batch.open_streams(self._streams)]

    def _lost(self, batch: SubmitBatch, cause: str) -> None:
        """The replica of a batch is gone: move what it had not finished."""
        log.warning("%s lost: %s", batch.replica, cause.splitlines()[0])
        if batch.epoch is not None:
            self._replicas.drop(batch.epoch)
        self._move(batch, cause)

    def _move(self, batch: SubmitBatch, cause: str) -> None:
        """Resubmit what a batch has not finished. Only a replica that had accepted it counts as a lost one."""
        self._probe.doubt(others=len(self._replicas) > 0)
        if batch.epoch is None:
            self.series.count_not_accepted()
        for stream in self._take_open(batch):
            if batch.epoch is not None:
                self._retry(stream, "replica_lost", cause)
                continue
            if stream.trace is not None:
                stream.trace.failed_over("not_accepted", cause)
            self._try_again(stream)

    def _try_again(self, stream: TokenStream) -> None:
        """No replica has taken the stream so far: send it once more, until its time is up."""
        pause_s = min(FIRST_PAUSE_S * 2**stream.num_refused, MAX_PAUSE_S)
        stream.num_refused += 1
        asyncio.get_running_loop().call_later(pause_s, self._queue, stream)

    def _retry(self, stream: TokenStream, kind: str, cause: str) -> None:
        """Resubmit the rest of a stream that a replica had. kind: as in the series; cause: for people."""
        if stream.ended:
            return
        if stream.num_retries >= self._settings.retry_limit:
            self.series.count_given_up()
            stream.fail(EngineDead(f"given up after {stream.num_retries} resubmissions: {cause}"))
            return
        stream.num_retries += 1
        stream.accept_by_s = time.monotonic() + self._settings.failover_timeout_s
        if stream.lost_s is None:
            stream.lost_s = time.monotonic()
        self.series.count_failover(kind)
        if stream.trace is not None:
            stream.trace.failed_over(kind, cause)
        self._try_again(stream)

    async def _settle(self, batch: SubmitBatch, reply: SubmitReply) -> None:
        """Compare the replica's account of a finished submit with what arrived, and fetch what is missing."""
        open_until_s = time.monotonic() + LAST_EVENTS_TIMEOUT_S
        while any(name in self._streams for name in batch.attempt_ids) and time.monotonic() < open_until_s:
            for ended in reply.ended:
                if ended.refusal is not None and (stream := self._streams.pop(ended.request_id, None)):
                    stream.fail(ended.refusal.error())
            await asyncio.sleep(0.01)
        accounts = {ended.request_id: ended for ended in reply.ended}
        self.series.count_token_mismatches(batch.num_mismatches(reply))
        for name in batch.attempt_ids:
            if (stream := self._streams.pop(name, None)) is not None:
                self._retry(stream, "events_lost", describe_gap(stream, accounts.get(name)))

    # --- receiving --------------------------------------------------------------------------------------------

    async def _read_events(self) -> None:
        while True:
            message = self._gate.admit(await self._socket.recv_multipart())
            if message is None:
                self.series.count_dropped_message()
                continue
            header, body = message
            self._replicas.heard(header.epoch)
            if isinstance(body, Accepted):
                self._accept(header.epoch, body)
                continue
            if isinstance(body, Load):
                self._chooser.heard(body)
                continue
            self._chooser.heard(body.load)
            # An attempt that was given up may still run, on a replica that stood still for a while.
            unknown = [event.request_id for event in body.events if not self._take(event)]
            self._replicas.abort(header.epoch, unknown)
            for refusal in body.refusals:
                if (stream := self._streams.pop(refusal.request_id, None)) is not None:
                    stream.fail(refusal.error())

    def _accept(self, epoch: int, accepted: Accepted) -> None:
        self._probe.answered()
        self._chooser.heard(accepted.load)
        self._replicas.accepted(epoch, accepted)
        batch = self._batches.get(accepted.submit_id)
        if batch is None:
            return
        batch.epoch, batch.replica_id = epoch, accepted.replica_id
        batch.release()
        for name in batch.attempt_ids:
            if (stream := self._streams.get(name)) is not None:
                stream.num_refused = 0
                stream.was_accepted = True
                stream.identity = accepted.identity
                if stream.trace is not None:
                    stream.trace.accepted(accepted.replica_id)
        # Their callers left before it was known where to send the abort.
        self._replicas.abort(epoch, [name for name in batch.attempt_ids if name not in self._streams])

    def _take(self, event: RequestEvent) -> bool:
        """Give an event to its stream; False when it goes on though nobody waits for it."""
        attempt_id = event.request_id
        stream = self._streams.get(attempt_id)
        if stream is None:
            return event.finish_reason is not None
        if not stream.push(event):
            self._abort([attempt_id])
            self._retry(stream, "events_lost", f"event {event.index} came where {len(stream.token_ids)} was due")
            return True
        if stream.lost_s is not None:
            self.series.observe_failover(time.monotonic() - stream.lost_s)
            stream.lost_s = None
        if event.finish_reason is not None:
            del self._streams[attempt_id]
            if (batch := self._batches.get(stream.submit_id)) is not None:
                batch.num_delivered[attempt_id] = len(stream.token_ids)
        elif stream.ended:
            self._abort([attempt_id])
        return True

    # --- aborting ---------------------------------------------------------------------------------------------

    def _abort(self, attempt_ids: list[str]) -> None:
        """Forget attempts; tell their replica about those that it still runs."""
        for attempt_id in attempt_ids:
            stream = self._streams.pop(attempt_id, None)
            batch = None if stream is None else self._batches.get(stream.submit_id)
            if batch is not None and batch.epoch is not None and attempt_id in batch.attempt_ids:
                self._replicas.abort(batch.epoch, [attempt_id])

    # --- watching ---------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Fail the streams that no replica accepted in time, move those of silent replicas, publish."""
        while True:
            await asyncio.sleep(SWEEP_PERIOD_S)
            self.series.publish()
            busy = {batch.epoch for batch in self._batches.values() if batch.epoch is not None}
            self._replicas.tick(SWEEP_PERIOD_S, busy)
            for batch in list(self._batches.values()):
                self._look_after(batch)

    def _look_after(self, batch: SubmitBatch) -> None:
        now_s, limit_s = time.monotonic(), self._settings.silence_timeout_s
        if batch.epoch is not None:
            if (silent_s := self._replicas.silent_s(batch.epoch)) > limit_s:
                self._withdraw(batch, f"said nothing for {silent_s:g} s, limit {limit_s:g} s (silence_timeout_s)")
            return
        waiting = batch.open_streams(self._streams)
        for name, stream in list(waiting.items()):
            if now_s >= stream.accept_by_s:
                del waiting[name], self._streams[name]
                stream.fail(stream.late(self._settings))
                self._probe.doubt(others=False)
        if not waiting:
            batch.cancel()
        elif now_s - batch.sent_s > limit_s:
            self._withdraw(batch, f"did not accept a submit within {limit_s:g} s (silence_timeout_s)")

    def _withdraw(self, batch: SubmitBatch, cause: str) -> None:
        """Move what a batch has not finished away from a replica that may yet come back to it."""
        log.warning("%s %s", batch.replica, cause)
        if batch.epoch is not None:
            self._replicas.abort(batch.epoch, batch.attempt_ids)
        self._move(batch, cause)
        batch.cancel()
