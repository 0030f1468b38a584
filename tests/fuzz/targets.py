"""What hostile bytes must not do, one function per way in: it takes any bytes, and raises when a promise is broken.

Two drivers feed them: hypothesis (test_targets.py, with every test run) and atheris (`python -m tests.fuzz`, guided by
coverage, for as long as one likes). Only the errors that are meant for the sender may come out of the code under test,
and what they say stays short.
"""

from __future__ import annotations

import asyncio
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import MAX_MESSAGE_CHARS, CheckpointError, ConfigError, RequestError
from engine.model_config import ModelConfig, read_json
from engine.msa.plan_file import read_plan_file
from engine.tensor_files import TensorFiles
from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.transport import Gate, Header, Kind, encode, pack
from engine.types import EngineRequest, SamplingParams, StepPlan, StepResult
from service.auth import ApiKeys
from service.boundary import Boundary, Policy, read_body
from service.chat import Chat
from service.chat_protocol import ChatRequest
from service.errors import answer
from service.limits import BodyBudget, read_timeout
from service.messages import Abort, Accepted, Load, StepEvents, Submit, SubmitReply
from service.protocol import CompletionRequest, DetokenizeRequest, TokenizeRequest, check_token_ids
from service.request_body import RequestBody
from tests.checkpoints import make_checkpoint

MAX_ANSWER_BYTES = 8000
KEY = "a-key-of-the-fuzzer"
TOKEN = bytes(range(16))
STATUSES = {200, 400, 401, 408, 413, 429, 503}
# The types of all sockets, each under a kind.
KINDS: dict[int, Any] = {
    Kind.STEP: StepPlan,
    Kind.RESULT: StepResult,
    Kind.FAILURE: str,
    Kind.ACCEPTED: Accepted,
    Kind.EVENTS: StepEvents,
    Kind.ABORT: Abort,
    Kind.HELLO: int,
    Kind.ALIVE: Load,
    # Not over these sockets but in the same encoding: submits and their replies.
    100: Submit,
    101: SubmitReply,
    102: EngineRequest,
}


@functools.cache
def checkpoint() -> Path:
    """A tiny one, for as long as this process lives."""
    directory = tempfile.TemporaryDirectory(prefix="m3-fuzz-")
    checkpoint.__dict__["kept"] = directory
    return make_checkpoint(Path(directory.name) / "model")


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(checkpoint())


@functools.cache
def chat() -> Chat:
    return Chat(checkpoint(), tokenizer())


@functools.cache
def scratch() -> Path:
    """A directory for files that a target writes."""
    directory = tempfile.TemporaryDirectory(prefix="m3-fuzz-")
    scratch.__dict__["kept"] = directory
    return Path(directory.name)


def body(data: bytes) -> None:
    """The bodies of all routes: taken, or refused with one short error object."""
    for model in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
        try:
            _accept(model, data)
        except RequestError as error:
            refusal = answer(error)
            assert 400 <= refusal.status < 500
            assert len(refusal.json()) < MAX_ANSWER_BYTES, "an answer grows with its request"


def _accept(model: type[RequestBody], data: bytes) -> None:
    taken = model.parse(data)
    if isinstance(taken, CompletionRequest):
        taken.check(max_choices=64)
        sampling = taken.sampling()
        encode(sampling)
        for prompt in taken.prompt:
            if isinstance(prompt, list):
                check_token_ids(prompt, 512, "prompt")
            else:
                tokenizer().encode_batch([prompt])
    elif isinstance(taken, ChatRequest):
        taken.check(max_choices=64)
        pieces, guided = chat().prompt(taken)
        tokenizer().encode_batch(pieces)
        encode(taken.sampling(100, guided))
    elif isinstance(taken, TokenizeRequest):
        tokenizer().encode_batch([taken.prompt])
    elif isinstance(taken, DetokenizeRequest) and taken.tokens:
        check_token_ids(taken.tokens, 512, "tokens")
        tokenizer().decode(taken.tokens, skip_special_tokens=False)


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    """An application as small as one can be: it reads a body and checks it, as the routes do."""
    request = Request(scope, receive)
    budget: BodyBudget = scope["state"]["budget"]
    data = await read_body(scope, request.receive, max_bytes=2000, budget=budget, timeout_s=0.01)
    CompletionRequest.parse(data).sampling()
    await Response(b"{}", media_type="application/json")(scope, receive, send)


def request(data: bytes) -> None:
    """Headers and body pieces of any content: one whole answer with a known status, none without the key."""
    lines = data.split(b"\n")
    headers = []
    while lines and b":" in lines[0]:
        name, _, value = lines.pop(0).partition(b":")
        headers.append((name.lower(), value))
    asyncio.run(_request(headers, lines))


async def _request(headers: list[tuple[bytes, bytes]], pieces: list[bytes]) -> None:
    budget = BodyBudget(3000)
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": headers,
        "state": {"budget": budget},
    }
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if messages and len(pieces) % 3:
        messages[-1]["more_body"] = False
    elif len(pieces) % 2:
        messages.append({"type": "http.disconnect"})
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(10.0)
        raise AssertionError("a deadline ends the wait for a body that stalls")

    async def send(message: Any) -> None:
        sent.append(message)

    Boundary.policy = Policy(keys=_keys())
    try:
        await _boundary()(scope, receive, send)
    finally:
        Boundary.policy = None
    assert budget.used == 0, "memory of the body is not given back"
    if not sent:
        assert len(pieces) % 2 and not len(pieces) % 3, "only a client that left gets no answer"
        return
    start, *bodies = sent
    assert start["type"] == "http.response.start" and start["status"] in STATUSES, start
    assert [message.get("more_body", False) for message in bodies][-1] is False
    json.loads(b"".join(message["body"] for message in bodies))
    valid = [value for name, value in headers if name == b"authorization"]
    if start["status"] != 401:
        assert len(valid) == 1 and KEY.encode() in valid[0], "a request without the key passed"
    assert KEY.encode() not in b"".join(message["body"] for message in bodies)


@functools.cache
def _boundary() -> Boundary:
    return Boundary(_echo)


@functools.cache
def _keys() -> ApiKeys:
    return ApiKeys(None, KEY)


def timeout_header(data: bytes) -> None:
    """The deadline header: a time within its bounds, or a refusal that names it."""
    headers = Headers(raw=[(b"x-request-timeout-seconds", part) for part in data.split(b"\n")])
    try:
        seconds = read_timeout(headers, 100.0)
    except RequestError as error:
        assert error.param == "x-request-timeout-seconds" and len(error.message) < 300
    else:
        assert seconds is not None and 0.3 < seconds < 100.0


def key_file(data: bytes) -> None:
    """Key files of any content: keys, or an error that quotes nothing of them."""
    path = scratch() / "keys"
    path.write_bytes(data)
    try:
        keys = ApiKeys(str(path), None)
    except ConfigError as error:
        said = str(error).encode().replace(str(path).encode(), b"")
        assert not any(line.strip() in said for line in data.splitlines() if len(line.strip()) > 12)
    else:
        assert len(keys) > 0


def socket_frames(data: bytes) -> None:
    """Messages of any frames: let in only with the token, as a value of the kind's type, never an exception."""
    gate = Gate("fuzz", TOKEN, KINDS)
    frames = data.split(b"\n--\n")
    assert gate.admit(frames) is None or frames[0] == TOKEN
    kind = data[0] % 128 if data else 0
    for number in (kind, *KINDS):
        message = gate.admit(pack(TOKEN, Header(number, 1, 2), data[1:]))
        if message is not None:
            header, value = message
            assert header == Header(number, 1, 2)
            assert encode(value), "what came in can be sent on"
    strange = bytes([TOKEN[0] ^ 1]) + TOKEN[1:]
    assert gate.admit(pack(strange, Header(Kind.FAILURE, 1, 2), encode("x"))) is None


def text(data: bytes) -> None:
    """Text of any kind: its tokens are in the vocabulary and give the text back, whole and token by token."""
    source = data.decode("utf-8", "surrogateescape")
    try:
        ids = tokenizer().encode(source)
    except RequestError as error:
        assert error.param == "prompt" and any(0xD800 <= ord(char) < 0xE000 for char in source)
        return
    assert all(0 <= token < tokenizer().vocab_size for token in ids)
    assert tokenizer().decode(ids, skip_special_tokens=False) == source
    detokenizer = IncrementalDetokenizer(tokenizer(), SamplingParams(skip_special_tokens=False))
    assert "".join(detokenizer.push([token]) for token in ids) + detokenizer.finish() == source


def stops(data: bytes) -> None:
    """Tokens of any order with stop strings: the text ends before the first of them, whatever the pieces."""
    head, _, tail = data.partition(b"\n")
    strings = [part.decode("utf-8", "replace")[:20] for part in head.split(b",") if part][:8] or ["x"]
    ids = [byte * 2 % tokenizer().vocab_size for byte in tail]
    sampling = SamplingParams(stop=strings, skip_special_tokens=False, include_stop_str_in_output=bool(len(tail) % 2))
    whole = "".join(_decode_all(ids, sampling, 1))
    assert whole == "".join(_decode_all(ids, sampling, 3)) == "".join(_decode_all(ids, sampling, len(ids) + 1))
    free = "".join(_decode_all(ids, SamplingParams(skip_special_tokens=False), 1))
    ends = [free.find(stop) + len(stop) for stop in strings if stop in free]
    if not ends:
        assert whole == free
        return
    end = min(ends)
    found = max((stop for stop in strings if free[:end].endswith(stop)), key=len)
    assert whole == free[: end if sampling.include_stop_str_in_output else end - len(found)]


def _decode_all(ids: list[int], sampling: SamplingParams, step: int) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer(), sampling)
    pieces = [detokenizer.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    return [*pieces, detokenizer.finish()]


def token_ids(data: bytes) -> None:
    """Any numbers as token ids: text, or a refusal."""
    ids = [int.from_bytes(data[i : i + 3], "little", signed=True) for i in range(0, len(data), 3)]
    try:
        tokenizer().decode(ids)
    except RequestError as error:
        assert error.param == "tokens" and min(ids) < 0
    for token in ids:
        tokenizer().token_text(token)


def config(data: bytes) -> None:
    """config.json of any content: a model, or an error that names what is wrong."""
    _checkpoint_file("config.json", data, lambda path: ModelConfig.from_hf(read_json(path / "config.json")))


def tokenizer_file(data: bytes) -> None:
    """tokenizer.json of any content."""
    _checkpoint_file("tokenizer.json", data, Tokenizer.from_dir)


def plan_file(data: bytes) -> None:
    """Index plan files of any content."""
    _checkpoint_file("index_plan.json", data, lambda path: read_plan_file(path / "index_plan.json"))


def tensors(data: bytes) -> None:
    """A safetensors file of any content: its tensors, or an error that names the file."""

    def open_and_close(path: Path) -> None:
        files = TensorFiles(path)
        try:
            for name in files.names():
                stored = files[name]
                assert stored.offset + stored.row_bytes >= 0
        finally:
            files.close()

    _checkpoint_file("model.safetensors", data, open_and_close)


def tensors_header(data: bytes) -> None:
    """The same with a length that fits: the fuzzer need not guess it."""
    tensors(len(data).to_bytes(8, "little") + data)


def tensors_index(data: bytes) -> None:
    """The index of a checkpoint's files, of any content."""
    _checkpoint_file("model.safetensors.index.json", data, lambda path: TensorFiles(path).close())


def _checkpoint_file(name: str, data: bytes, read: Callable[[Path], object]) -> None:
    directory = scratch() / name.partition(".")[0]
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_bytes(data)
    try:
        read(directory)
    except (CheckpointError, ConfigError) as error:
        assert len(str(error)) < MAX_MESSAGE_CHARS + 10, "the message grows with the file"
    finally:
        path.unlink()


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        body,
        request,
        timeout_header,
        key_file,
        socket_frames,
        text,
        stops,
        token_ids,
        config,
        tokenizer_file,
        plan_file,
        tensors,
        tensors_header,
        tensors_index,
    )
}
