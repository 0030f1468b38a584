"""The HTTP front: routes, tokenisation, and the engine requests behind each call. Loads no torch.

Deployed with `@serve.ingress`; several replicas of it may stand in front of the same engine replicas.
"""

# No postponed annotations here: FastAPI resolves them in the copy that Serve makes, where names that only stand in
# annotations are missing.
import asyncio
import functools
import hashlib
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from engine.errors import EngineDead, RequestError
from engine.tokenizer import Tokenizer
from engine.types import MAX_SEED, EngineInfo, EngineRequest, SamplingParams, check_prompt_len
from service import tracing
from service.auth import ApiKeys
from service.boundary import PAGE_PATH, PUBLIC_PATHS, Boundary, Policy, read_body
from service.chat import Chat
from service.chat_protocol import ChatCompletion, ChatCompletionChunk, ChatRequest
from service.choice import TokenizedPrompt
from service.completion import TextChoice
from service.errors import NotFound, answer, renamed
from service.generation import GenerationRun
from service.grammar_check import GrammarCheck
from service.limits import MAX_BODIES_IN_FLIGHT, BodyBudget, check_prompt_logprobs, check_request_tokens
from service.openapi import openapi_document
from service.playground.routes import Playground
from service.protocol import (
    Completion,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    Prompt,
    Tokenized,
    TokenizeRequest,
    check_token_ids,
)
from service.request_body import RequestBody, check_entries
from service.settings import ServiceSettings
from service.sse import EventStream
from service.stream import EngineClient

# Shorter texts are encoded on the event loop: a hop to a thread costs more than they do. So it is with fewer tokens.
INLINE_ENCODE_CHARS = 4096
# The same for bodies that are parsed.
INLINE_PARSE_BYTES = 64 * 2**10

# No redirects either: their target would be made from the Host header.
app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
app.add_middleware(Boundary)


@app.exception_handler(HTTPException)
async def refuse_route(request: Request, error: HTTPException) -> Response:
    """Unknown paths and methods get an error object too."""
    if error.status_code == 404:
        error.detail = f"there is no route {request.url.path}"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        error.detail = f"{request.url.path} does not allow {request.method}, only {allowed}"
    refusal = answer(error)
    return Response(refusal.json(), refusal.status, dict(refusal.headers), "application/json")


T = TypeVar("T")
Body = TypeVar("Body", bound=RequestBody)


def _json(payload: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(payload), media_type="application/json")


@functools.cache
def software_version() -> str:
    """The installed version; a source tree that is not installed says so."""
    try:
        return version("m3serve")
    except PackageNotFoundError:
        return "source"


# Everything that the handlers use stands above the class: Serve copies the application when it is decorated.


def _check_vocabulary(sampling: SamplingParams, vocab_size: int) -> None:
    for name, token_ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", list(sampling.logit_bias or ())),
    ):
        if token_ids:
            check_token_ids(token_ids, vocab_size, name)


def _engine_requests(
    request_id: str, prompts: list[TokenizedPrompt], sampling: SamplingParams, num_per_prompt: int
) -> list[EngineRequest]:
    """One engine request per choice. Choice i of a prompt samples with seed + i, or a seed of its own."""
    requests: list[EngineRequest] = []
    for prompt in prompts:
        for i in range(num_per_prompt):
            seed = secrets.randbits(63) if sampling.seed is None else _wrap(sampling.seed + i)
            requests.append(
                EngineRequest(
                    request_id=f"{request_id}-{len(requests)}",
                    prompt_token_ids=prompt.token_ids,
                    sampling=replace(sampling, seed=seed),
                )
            )
    return requests


async def _answer(run: GenerationRun, *, stream: bool | None) -> Response:
    if stream:
        return EventStream(run)
    async with run:
        return _json(await run.whole())


def _wrap(seed: int) -> int:
    """Into the range of a signed 64-bit integer."""
    return (seed + MAX_SEED + 1) % (2 * (MAX_SEED + 1)) - MAX_SEED - 1


@serve.ingress(app)
class Ingress:
    """One HTTP front process."""

    async def __init__(self, settings: ServiceSettings, engine: DeploymentHandle) -> None:  # type: ignore[misc]
        self._settings = settings
        Boundary.policy = Policy(
            keys=ApiKeys.of(settings),
            request_timeout_s=settings.request_timeout_s,
            cors_allow_origins=tuple(settings.cors_allow_origins),
            public_paths=PUBLIC_PATHS | {PAGE_PATH} if settings.enable_playground else PUBLIC_PATHS,
        )
        self._bodies = BodyBudget(MAX_BODIES_IN_FLIGHT * settings.max_body_bytes)
        self._tracer = Boundary.tracer = tracing.open_ingress(settings, serve.get_replica_context().replica_tag)
        self._tokenizer = Tokenizer.from_dir(settings.model)
        # Long prompts are encoded beside the event loop, so that health checks and streams go on.
        self._encoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")
        self._created = int(time.time())
        self._client = EngineClient(settings)
        self._series = self._client.series
        self._chat = Chat(settings.model, self._tokenizer)
        self._grammar_check = GrammarCheck(settings.model, self._tokenizer, self._series)
        self._playground = Playground(settings)
        await self._client.start(engine)

    async def __del__(self) -> None:
        await self._client.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._grammar_check.close()
        if self._tracer is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._tracer.close)

    async def drain(self) -> int:
        """Take no new requests from now on; how many have not ended. Called before the application is taken off."""
        Boundary.is_draining = True
        return Boundary.num_running

    async def check_health(self) -> None:
        """Raise EngineDead when Serve should replace this process."""
        self._client.check_health()

    @app.get("/health")
    async def health(self) -> Response:
        """This process answers; says nothing about engines."""
        return Response(b"{}", media_type="application/json")

    @app.get("/ready")
    async def ready(self) -> Response:
        """200 only while an engine replica answers."""
        if not self._client.ready():
            raise EngineDead("no engine replica answers")
        return Response(b"{}", media_type="application/json")

    @app.get("/v1/models")
    async def models(self) -> Response:
        return _json(ModelList(data=[await self._model_card()]))

    @app.get("/v1/models/{name:path}")
    async def model(self, name: str) -> Response:
        self._check_model(name)
        return _json(await self._model_card())

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        request.state.series = self._series
        body = await self._read(request, CompletionRequest)
        self._check_model(body.model)
        body.check(max_choices=self._settings.max_prompts)
        timers = [self._series.timer() for _ in range(len(body.prompt) * body.num_choices_per_prompt)]
        sampling = body.sampling()
        info = await self._client.info()
        _check_vocabulary(sampling, info.vocab_size)
        await self._grammar_check.check(sampling.guided, body.guided_param)
        trace = request.state.trace
        with nullcontext() if trace is None else trace.part("tokenize"):
            prompts = await self._tokenize(body.prompt, info, add_special_tokens=body.add_special_tokens)
            num_tokens = self._check_lengths(prompts, body.num_choices_per_prompt, info)
            check_prompt_logprobs(
                num_tokens,
                body.num_choices_per_prompt,
                sampling.prompt_logprobs,
                param="logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
            )
            if body.echo:
                await self._beside(num_tokens > INLINE_ENCODE_CHARS, lambda: [prompt.echo for prompt in prompts])
        head = Completion(**self._head("cmpl", info), choices=[])
        n = body.num_choices_per_prompt
        requests = _engine_requests(head.id, prompts, sampling, n)
        run = GenerationRun(
            body,
            prompts,
            requests,
            [TextChoice(i, prompts[i // n], body, sampling) for i in range(len(requests))],
            timers=timers,
            head=head,
            chunk_head=head,
            client=self._client,
            deadline_s=request.state.deadline_s,
            trace=trace,
        )
        return await _answer(run, stream=body.stream)

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        request.state.series = self._series
        body = await self._read(request, ChatRequest)
        self._check_model(body.model)
        body.check(max_choices=self._settings.max_prompts)
        n = body.num_choices_per_prompt
        timers = [self._series.timer() for _ in range(n)]
        info = await self._client.info()
        trace = request.state.trace
        with nullcontext() if trace is None else trace.part("tokenize"), renamed(prompt="messages"):
            pieces, guided = await self._beside(self._chat.is_long(body), lambda: self._chat.prompt(body))
            # The template has written the special tokens.
            encoded = await self._tokenize([*pieces], info, add_special_tokens=False)
            token_ids = [token_id for piece in encoded for token_id in piece.token_ids]
            prompts = [TokenizedPrompt("".join(pieces), token_ids, self._tokenizer)]
            num_tokens = self._check_lengths(prompts, n, info)
        sampling = body.sampling(info.max_model_len - num_tokens, guided)
        _check_vocabulary(sampling, info.vocab_size)
        await self._grammar_check.check(sampling.guided, body.guided_param or "tools")
        head = self._head("chatcmpl", info)
        requests = _engine_requests(head["id"], prompts, sampling, n)
        run = GenerationRun(
            body,
            prompts,
            requests,
            self._chat.choices(body, prompts[0], requests),
            timers=timers,
            head=ChatCompletion(**head, choices=[]),
            chunk_head=ChatCompletionChunk(**head, choices=[]),
            client=self._client,
            deadline_s=request.state.deadline_s,
            trace=trace,
        )
        return await _answer(run, stream=body.stream)

    @app.post("/tokenize")
    async def tokenize(self, request: Request) -> Response:
        body = await self._read(request, TokenizeRequest)
        self._check_model(body.model)
        info = await self._client.info()
        token_ids: list[int] = []
        if body.prompt:
            [prompt] = await self._tokenize([body.prompt], info, add_special_tokens=body.add_special_tokens)
            token_ids = prompt.token_ids
        text_of = self._tokenizer.token_text

        def make() -> Response:
            texts = [text_of(token_id) for token_id in token_ids] if body.return_token_strs else None
            return _json(Tokenized(len(token_ids), info.max_model_len, token_ids, texts))

        return await self._beside(len(token_ids) > INLINE_ENCODE_CHARS, make)

    @app.post("/detokenize")
    async def detokenize(self, request: Request) -> Response:
        body = await self._read(request, DetokenizeRequest)
        self._check_model(body.model)
        if body.tokens:
            info = await self._client.info()
            check_entries("tokens", body.tokens, info.max_model_len, param="tokens")
            check_token_ids(body.tokens, info.vocab_size, "tokens")
        return await self._beside(
            len(body.tokens) > INLINE_ENCODE_CHARS,
            lambda: _json(Detokenized(self._tokenizer.decode(body.tokens, skip_special_tokens=False))),
        )

    @app.get("/")
    async def page(self) -> Response:
        """A page to try the model, where enable_playground is set."""
        return self._playground.page()

    @app.get("/playground/layers")
    async def layers(self) -> Response:
        """For that page: what the index cache did, by layer."""
        return await self._playground.layers()

    @app.get("/openapi.json")
    async def openapi(self) -> Response:
        """The document of this API, where enable_docs is set. There is no page that shows it."""
        if not self._settings.enable_docs:
            raise HTTPException(404)
        return Response(msgspec.json.encode(openapi_document(self._settings)), media_type="application/json")

    async def _read(self, request: Request, model: type[Body]) -> Body:
        """The body of a request, checked."""
        body = await read_body(
            request.scope, request.receive, max_bytes=self._settings.max_body_bytes, budget=self._bodies
        )
        return await self._beside(len(body) > INLINE_PARSE_BYTES, lambda: model.parse(body))

    async def _beside(self, is_long: bool, work: Callable[[], T]) -> T:
        """Work that takes long, in a thread, so that the event loop goes on."""
        if not is_long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work)

    def _check_lengths(self, prompts: list[TokenizedPrompt], num_per_prompt: int, info: EngineInfo) -> int:
        """Their tokens, each prompt once. The engine checks too; here, what is refused costs nothing more."""
        for prompt in prompts:
            check_prompt_len(len(prompt.token_ids), info.max_model_len)
        num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        check_request_tokens(num_tokens, num_per_prompt)
        return num_tokens

    def _check_model(self, name: str | None) -> None:
        served = self._settings.model_name
        if name is not None and name != served:
            raise NotFound(f"model {name!r} is not served here, only {served!r}", param="model", code="model_not_found")

    async def _model_card(self) -> ModelCard:
        info = await self._client.info()
        return ModelCard(
            id=self._settings.model_name,
            created=self._created,
            max_model_len=info.max_model_len,
            index_plan=info.plan,
        )

    def _head(self, prefix: str, info: EngineInfo) -> dict[str, Any]:
        """The fields of an AnswerHead."""
        identity = "\n".join((software_version(), info.namespace, info.plan))
        return {
            "id": f"{prefix}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": self._settings.model_name,
            "system_fingerprint": f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
        }

    async def _tokenize(
        self, prompts: list[Prompt], info: EngineInfo, *, add_special_tokens: bool | None
    ) -> list[TokenizedPrompt]:
        """Prompts as token ids, all of one request in one go."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            token_ids = [prompt for prompt in prompts if isinstance(prompt, list)]
            for ids in token_ids:
                check_token_ids(ids, info.vocab_size, "prompt")
            return [TokenizedPrompt(None, ids, self._tokenizer) for ids in token_ids]
        # Absent means true, as with vLLM: what the tokenizer itself adds to a raw prompt, often nothing.
        special = add_special_tokens is not False
        started_s = time.monotonic()
        encoded = await self._beside(
            sum(map(len, texts)) > INLINE_ENCODE_CHARS,
            lambda: self._tokenizer.encode_batch(texts, add_special_tokens=special),
        )
        self._series.observe_tokenize(time.monotonic() - started_s)
        for i, ids in enumerate(encoded):
            if not ids:
                raise RequestError(f"prompt {i} has no tokens", param="prompt", code="empty_prompt")
        return [TokenizedPrompt(text, ids, self._tokenizer) for text, ids in zip(texts, encoded, strict=True)]
