"""Runs the engine requests behind one HTTP request that generates, and answers whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from engine.types import EngineRequest, RequestEvent
from service import sse
from service.boundary import DEADLINE_MESSAGE, report
from service.choice import Choice, TokenizedPrompt, chunk_usage, usage_of
from service.errors import DeadlineExceeded, answer
from service.protocol import AnswerHead, GenerationRequest
from service.series import RequestTimer
from service.stream import EngineClient

if TYPE_CHECKING:  # at run time only where tracing is on
    from service.tracing_ingress import ChoiceTrace, HttpTrace

EngineStream = AsyncGenerator[RequestEvent, None]


class EventMerge:
    """The event streams of several choices as one, in order of arrival. `close` must be called.

    Nothing is pulled ahead of the reader beyond one event per choice: what piles up stays in the streams,
    which merge it and bound it.
    """

    def __init__(self, streams: Sequence[EngineStream], deadline_s: float | None = None) -> None:
        """deadline_s: time of the event loop; None: there is none."""
        self._deadline_s = deadline_s
        self._queue: asyncio.Queue[tuple[int, RequestEvent | Exception]] = asyncio.Queue(len(streams))
        # All tasks begin in one turn of the event loop, so that their requests leave in one submit.
        self._tasks = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(streams)]

    async def get(self) -> list[tuple[int, RequestEvent]]:
        """At least one event, and all others that are there already.

        Raises what a stream raised, and DeadlineExceeded.
        """
        try:
            async with asyncio.timeout_at(self._deadline_s):
                arrived = [await self._queue.get()]
        except TimeoutError:
            raise DeadlineExceeded(DEADLINE_MESSAGE) from None
        if self._deadline_s is not None and asyncio.get_running_loop().time() >= self._deadline_s:
            # Events that are always there would never let the time run out.
            raise DeadlineExceeded(DEADLINE_MESSAGE)
        while not self._queue.empty():
            arrived.append(self._queue.get_nowait())
        events: list[tuple[int, RequestEvent]] = []
        for index, item in arrived:
            if isinstance(item, Exception):
                raise item
            events.append((index, item))
        return events

    def stop(self, index: int) -> None:
        """End one stream early: its request is aborted in the engine."""
        self._tasks[index].cancel()

    async def close(self) -> None:
        """End all streams and wait until each has told the engine."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self, index: int, stream: EngineStream) -> None:
        async with aclosing(stream) as events:
            try:
                async for event in events:
                    await self._queue.put((index, event))
            except Exception as error:  # not handled here: `get` raises it where the answer is made
                await self._queue.put((index, error))


class GenerationRun:
    """One HTTP request on its way through the engine: an asynchronous context that owns its engine requests.

    engine_requests, choices, timers: one per choice.  head: the envelope of the answer, without choices; chunk_head:
    that of a chunk.  deadline_s: time of the event loop by which the last event must have come.  trace: of the HTTP
    request, if it is traced.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompts: Sequence[TokenizedPrompt],
        engine_requests: Sequence[EngineRequest],
        choices: Sequence[Choice],
        *,
        timers: Sequence[RequestTimer],
        head: AnswerHead,
        chunk_head: AnswerHead,
        client: EngineClient,
        deadline_s: float | None = None,
        trace: HttpTrace | None = None,
    ) -> None:
        self._request = request
        self._prompts = prompts
        self._engine_requests = engine_requests
        self._choices = choices
        self._timers = timers
        self._head = head
        self._chunk_head = chunk_head
        self._client = client
        self._deadline_s = deadline_s
        self._trace = trace
        self._choice_traces: list[ChoiceTrace] = []
        self._num_open = len(self._choices)
        self._news: list[Choice] = []
        self._begun = False
        self._failed = False
        self._failure_code: str | None = None

    async def __aenter__(self) -> GenerationRun:
        traces: list[ChoiceTrace | None] = [None] * len(self._engine_requests)
        if self._trace is not None:
            self._choice_traces = self._trace.choices(self._engine_requests, self._head)
            traces = [*self._choice_traces]
        pairs = zip(self._engine_requests, traces, strict=True)
        streams = [self._client.generate(request, trace) for request, trace in pairs]
        self._merge = EventMerge(streams, self._deadline_s)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._merge.close()
        # A deadline is the client's wish, or the operator's: its end is an abort.
        failed = self._failed or (isinstance(error, Exception) and not isinstance(error, DeadlineExceeded))
        if self._choice_traces:
            code = answer(error).code if isinstance(error, Exception) else self._failure_code
            for choice in self._choices:
                self._end_trace(choice, "error" if failed else "abort", code)
        if failed and not self._begun:
            return  # refused: counted as such, never run
        for choice, timer in zip(self._choices, self._timers, strict=True):
            # What has not ended by now was abandoned by the client or lost by us.
            timer.finished(choice.finish_reason or ("error" if failed else "abort"))

    async def start(self) -> None:
        """Wait for the first events: what goes wrong before them can still become an HTTP status."""
        self._news = await self._advance()

    async def whole(self) -> AnswerHead:
        """Run to the end and answer in one piece."""
        while self._num_open:
            await self._advance()
        self._sent(self._choices)
        return msgspec.structs.replace(
            self._head,
            choices=[choice.whole() for choice in self._choices],
            usage=usage_of(self._prompts, self._choices),
        )

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The stream after `start`: chunks as they come, the usage if asked for, then [DONE], once.

        Each piece holds everything that is there by then, in as many events as there are choices with news.
        """
        try:
            while self._num_open:
                if piece := self._chunks():
                    yield piece
                    self._sent(self._news)
                self._news = await self._advance()
            last = self._chunks() + self._usage_chunk()
        except Exception as error:  # the status line is out: the error travels in the stream
            self._failed = not isinstance(error, DeadlineExceeded)
            self._news = []
            refusal = report(error, self._head.id)
            self._failure_code = refusal.code
            if self._trace is not None:
                self._trace.fail(refusal.code)
            last = sse.event(refusal.body)
        yield last + sse.DONE
        self._sent(self._news)

    async def _advance(self) -> list[Choice]:
        """Take what the engine sent; returns the choices that it was for."""
        touched: dict[int, Choice] = {}
        arrived = await self._merge.get()
        self._begun = True
        for index, event in arrived:
            choice = self._choices[index]
            if choice.finish_reason is not None:
                continue  # sent before the engine heard of a stop string
            touched[index] = choice
            if choice.push(event):
                self._num_open -= 1
                if self._choice_traces:
                    self._end_trace(choice)
                if event.finish_reason is None:
                    self._merge.stop(index)
        return list(touched.values())

    def _end_trace(self, choice: Choice, otherwise: str = "abort", code: str | None = None) -> None:
        self._choice_traces[choice.index].end(
            choice.finish_reason or otherwise,
            num_tokens=choice.num_tokens,
            num_cached_tokens=choice.num_cached_tokens,
            code=code,
        )

    def _sent(self, choices: Sequence[Choice]) -> None:
        for choice in choices:
            self._timers[choice.index].sent(choice.num_tokens)

    def _chunks(self) -> bytes:
        usage = chunk_usage(self._request, self._prompts, self._choices)
        out = []
        for choice in self._news:
            if (news := choice.take()) is not None:
                out.append(sse.event(msgspec.structs.replace(self._chunk_head, choices=[news], usage=usage)))
        return b"".join(out)

    def _usage_chunk(self) -> bytes:
        options = self._request.stream_options
        if options is None or not options.include_usage:
            return b""
        usage = usage_of(self._prompts, self._choices)
        return sse.event(msgspec.structs.replace(self._chunk_head, choices=[], usage=usage))
