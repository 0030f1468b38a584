"""One request to an OpenAI-compatible endpoint, streamed, with the time of each piece of its answer."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import msgspec

from engine.errors import ConfigError
from service.bench.serving.sse import EventDecoder
from service.bench.serving.workload import Prompt

_MAX_ERROR_CHARS = 300


@dataclass(slots=True)
class Outcome:
    """What the client of one request saw. Times in seconds of time.perf_counter.

    due_s: when it should have left; None: whenever there was room.  arrivals_s: of each piece with text.
    output_tokens: as the server says; where it does not, the pieces, and is_counted is false.  failure: what kind of
    error ended it.
    """

    due_s: float | None
    started_s: float = 0.0
    ended_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    is_counted: bool = False
    num_events: int = 0
    failure: str | None = None
    message: str = ""

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0] - self.started_s

    @property
    def e2e_s(self) -> float:
        """To the last piece of text: what ends a stream after it is not waited for."""
        return self.arrivals_s[-1] - self.started_s

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first; None for a single one."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        return [late - early for early, late in pairwise(self.arrivals_s)]

    def fail(self, kind: str, message: object) -> None:
        self.failure, self.message = kind, str(message)[:_MAX_ERROR_CHARS]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def has_text(self) -> bool:
        delta = self.delta
        if delta is None:
            return bool(self.text)
        return bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes. base_url: without a path behind the port, or with the one in front of /v1.  headers: of the
    requests to that address alone.  extra_body: fields that replace those that are sent by default."""

    base_url: str
    endpoint: str
    model: str
    headers: dict[str, str]
    extra_body: dict[str, Any]
    ignore_eos: bool
    timeout_s: float

    @property
    def is_chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The JSON body of a request: streamed, greedy, with the usage at its end."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": prompt.output_tokens, "temperature": 0}
        if self.is_chat:
            body["messages"] = [{"role": "user", "content": prompt.content}]
        else:
            body["prompt"] = prompt.content
        if self.ignore_eos:
            body["ignore_eos"] = True
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        return {name: value for name, value in (body | self.extra_body).items() if value is not None}


class Client:
    """Connections to one target, as many as there are requests. `close` must be awaited.

    target: its model may be set once `model_names` has told which there are.
    """

    def __init__(self, target: Target, *, tls: ssl.SSLContext | None = None) -> None:
        self.target = target
        self._session = aiohttp.ClientSession(
            headers=target.headers,
            # One slow request must not hold up others: every one that needs a connection gets it.
            connector=aiohttp.TCPConnector(limit=0, ssl=tls if tls is not None else True),
            timeout=aiohttp.ClientTimeout(total=target.timeout_s),
        )

    async def close(self) -> None:
        await self._session.close()

    async def model_names(self) -> list[str]:
        """What the endpoint serves. Raises ConfigError when it does not say."""
        url = f"{self.target.base_url}/v1/models"
        # A redirect could take the key elsewhere.
        async with self._session.get(url, allow_redirects=False) as answer:
            text = await answer.text()
        try:
            if answer.status != 200:
                raise ValueError(f"HTTP {answer.status}: {text[:_MAX_ERROR_CHARS]}")
            names = [str(card["id"]) for card in msgspec.json.decode(text)["data"]]
            if not names:
                raise ValueError("no model is served")
        except (ValueError, KeyError, TypeError, msgspec.DecodeError) as error:
            raise ConfigError(f"{url} does not say what is served: {error}") from None
        return names

    async def send(self, prompt: Prompt, due_s: float | None) -> Outcome:
        """Send one request and read its answer to the end; never raises for what goes wrong on the way."""
        outcome = Outcome(due_s)
        payload = msgspec.json.encode(self.target.body(prompt))
        outcome.started_s = time.perf_counter()
        try:
            await self._exchange(payload, outcome)
        except TimeoutError:
            outcome.fail("timeout", f"no end within {self.target.timeout_s:g} s")
        except aiohttp.ClientConnectorError as error:
            outcome.fail("no connection", error)
        except (aiohttp.ClientError, OSError) as error:
            outcome.fail("connection lost", f"{type(error).__name__}: {error}")
        except (msgspec.DecodeError, ValueError) as error:
            outcome.fail("no event", error)
        outcome.ended_s = time.perf_counter()
        return outcome

    async def _exchange(self, payload: bytes, outcome: Outcome) -> None:
        url = self.target.base_url + self.target.endpoint
        headers = {"Content-Type": "application/json"}
        async with self._session.post(url, data=payload, headers=headers, allow_redirects=False) as answer:
            if answer.status != 200:
                outcome.fail(f"HTTP {answer.status}", await answer.text(errors="replace"))
                return
            if not answer.content_type.startswith("text/event-stream"):
                outcome.fail("no stream", f"the answer is {answer.content_type}, not text/event-stream")
                return
            decoder = EventDecoder()
            is_finished = is_done = False
            async for data in answer.content.iter_any():
                now_s = time.perf_counter()
                for event in decoder.feed(data):
                    if event == b"[DONE]":
                        is_done = True
                        continue
                    outcome.num_events += 1
                    is_finished |= _take(event, now_s, outcome)
                if outcome.failure is not None:
                    return
        if not (is_done or is_finished):
            outcome.fail("cut off", f"the stream ended without [DONE], after {len(outcome.arrivals_s)} pieces")
        elif not outcome.arrivals_s:
            outcome.fail("no text", "the stream ended without any text")
        elif not outcome.is_counted:
            outcome.output_tokens = len(outcome.arrivals_s)


def _take(event: bytes, now_s: float, outcome: Outcome) -> bool:
    """Note what one event says; whether it ends a choice."""
    chunk = _decode(event)
    if chunk.error is not None:
        code = chunk.error.get("code") or chunk.error.get("type") if isinstance(chunk.error, dict) else None
        outcome.fail(f"stream: {code or 'error'}", chunk.error)
        return False
    if chunk.usage is not None:
        outcome.prompt_tokens = chunk.usage.prompt_tokens
        outcome.output_tokens = chunk.usage.completion_tokens
        details = chunk.usage.prompt_tokens_details
        outcome.cached_tokens = (details.cached_tokens or 0) if details is not None else 0
        outcome.is_counted = True
    choices = chunk.choices or ()
    if any(choice.has_text() for choice in choices):
        outcome.arrivals_s.append(now_s)
    return any(choice.finish_reason is not None for choice in choices)


_CPU = re.compile(r'^m3_process_cpu_seconds_total\{[^}]*process="([^"]*)"[^}]*\} (\S+)$', re.MULTILINE)


async def service_cpu_seconds(metrics_url: str) -> dict[str, float]:
    """CPU time per kind of process, from m3serve's own exporter. It is another address: no key is sent there.

    Raises ConfigError when it cannot be read.
    """
    try:
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(metrics_url) as answer:
            answer.raise_for_status()
            text = await answer.text()
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise ConfigError(f"--metrics-url {metrics_url} cannot be read: {error}") from None
    seconds: dict[str, float] = {}
    for kind, value in _CPU.findall(text):
        seconds[kind] = seconds.get(kind, 0.0) + float(value)
    return seconds


def failures_by_kind(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """How often each kind of error came, and what the first of it said; the most frequent kind first."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        if outcome.failure is not None:
            entry = found.setdefault(outcome.failure, {"count": 0, "first": outcome.message})
            entry["count"] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]["count"]))
