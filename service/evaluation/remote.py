"""Scores from an OpenAI-compatible endpoint: completions that echo the prompt with its log-probabilities."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np

from engine.errors import ConfigError
from engine.scoring import Score
from service.evaluation.data import Data
from service.evaluation.measure import Measured, measured
from service.evaluation.progress import Progress


class EndpointError(Exception):
    """The endpoint cannot be evaluated; the message says why."""


def model_card(url: str, name: str | None, *, api_key: str | None = None, timeout_s: float = 600.0) -> dict[str, Any]:
    """The entry of /models with this id, or the first. ConfigError when it is not served, EndpointError when nothing
    answers."""
    try:
        with httpx.Client(headers=_headers(api_key), timeout=timeout_s) as client:
            answer = client.get(f"{url.rstrip('/')}/models").raise_for_status().json()
        served = [entry for entry in answer["data"] if isinstance(entry["id"], str)]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError, KeyError) as error:
        raise EndpointError(f"{url}/models does not answer as OpenAI's: {error}") from error
    card = next((entry for entry in served if name in (None, entry["id"])), None)
    if card is None:
        raise ConfigError(f"--served-model {name}: {url} serves only {', '.join(entry['id'] for entry in served)}")
    return dict(card)


def evaluate(
    url: str, card: dict[str, Any], data: Data, *, streams: int, api_key: str | None = None, timeout_s: float = 600.0
) -> Measured:
    """streams: requests at the same time.  timeout_s: of one request. Raises EndpointError."""
    plan = str(card.get("index_plan", card["id"]))
    progress = Progress(plan, data.num_tokens)
    started_s = time.monotonic()
    try:
        scores = asyncio.run(
            _judge(f"{url.rstrip('/')}/completions", card["id"], [*data.documents, *data.sequences], progress.add,
                   streams=streams, api_key=api_key, timeout_s=timeout_s)
        )  # fmt: skip
    finally:
        progress.close()
    nats = [score.nats for score in scores[: len(data.documents)]]
    return measured(data, plan, nats, scores[len(data.documents) :], seconds=time.monotonic() - started_s)


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


async def _judge(
    url: str,
    name: str,
    sequences: Sequence[list[int]],
    done: Callable[[int], None],
    *,
    streams: int,
    api_key: str | None,
    timeout_s: float,
) -> list[Score]:
    slots = asyncio.Semaphore(streams)

    async def one(client: httpx.AsyncClient, token_ids: list[int]) -> Score:
        body = {
            "model": name,
            "prompt": token_ids,
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }
        async with slots:
            try:
                response = await client.post(url, json=body)
            except httpx.HTTPError as error:
                raise EndpointError(f"{url}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise EndpointError(f"{url}: HTTP {response.status_code}: {response.text[:300]}")
        score = read_score(response.json(), len(token_ids))
        done(len(token_ids))
        return score

    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(headers=_headers(api_key), timeout=timeout_s, limits=limits) as client:
        tasks = [asyncio.create_task(one(client, ids)) for ids in sequences]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()


def read_score(answer: Any, length: int) -> Score:
    """Of one completion with echo and logprobs=1, of a prompt of `length` tokens. EndpointError when it lacks them."""
    try:
        logprobs = answer["choices"][0]["logprobs"]
        tokens, values, tops = (logprobs[key][:length] for key in ("tokens", "token_logprobs", "top_logprobs"))
        if not len(tokens) == len(values) == len(tops) == length:
            raise EndpointError(f"the endpoint echoed {len(tokens)} of {length} prompt tokens with log-probabilities")
        nats = [float("nan") if value is None else -float(value) for value in values]
        best = [_is_best(token, value, top) for token, value, top in zip(tokens, values, tops, strict=True)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EndpointError(f"the endpoint does not echo log-probabilities of the prompt: {error!r}") from error
    return Score(np.array(nats, dtype=np.float32), np.array(best, dtype=bool))


def _is_best(token: str, value: float | None, top: dict[str, float] | None) -> bool:
    """The best token stands in `top`, which may also hold the actual one."""
    if value is None or not top:
        return False
    return all(other == token or logprob < value for other, logprob in top.items())
