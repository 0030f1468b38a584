"""The real service over real HTTP: Serve, worker process, tokens and text, with the openai client and without."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from engine import LLM, SamplingParams
from engine.types import GuidedSpec, Output
from tests.cluster import Cluster, wait_until

MODEL = "tiny"
PROMPT = "def add(a, b):\n    return a + b\n"
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def url(cluster: Cluster, checkpoint: Path) -> Iterator[str]:
    settings = cluster.settings(checkpoint, served_model_name=MODEL, max_num_seqs=8)
    with cluster.service(settings) as base:
        wait_until(lambda: httpx.get(f"{base}/ready").status_code == 200, timeout_s=30, what="readiness")
        yield base


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, dtype="float32", backend="torch", num_threads=1) as offline:
        yield offline


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0) as made:
        yield made


def post(url: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(url: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, after checking its framing."""
    response = httpx.post(f"{url}/v1/completions", json={**body, "stream": True}, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), "a stream ends with one [DONE]"
    assert all(chunk.startswith("data: {") and "\n" not in chunk for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> tuple[str, list[int], str]:
    """Text, token ids and finish reason of one choice of a stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    assert [choice["finish_reason"] is None for choice in choices] == [True] * (len(choices) - 1) + [False]
    token_ids = [token for choice in choices for token in choice.get("token_ids", [])]
    return "".join(choice["text"] for choice in choices), token_ids, choices[-1]["finish_reason"]


def offline(llm: LLM, prompt: str | list[int], **sampling: Any) -> Output:
    return llm.generate([prompt], SamplingParams(**sampling))[0]


# --- the openai client -------------------------------------------------------------------------------------------


def test_sync_client_gets_what_the_offline_api_gives(client: openai.OpenAI, llm: LLM) -> None:
    expected = offline(llm, PROMPT, max_tokens=12, temperature=0)
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
    )
    [choice] = answer.choices
    assert choice.text == expected.text
    assert choice.token_ids == expected.token_ids  # type: ignore[attr-defined]
    assert choice.prompt_token_ids == expected.prompt_token_ids  # type: ignore[attr-defined]
    assert choice.finish_reason == expected.finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.model == MODEL and answer.object == "text_completion"


def test_sync_stream_joins_to_the_same_text(client: openai.OpenAI, llm: LLM) -> None:
    expected = offline(llm, PROMPT, max_tokens=12, temperature=0.8, seed=11)
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=12,
            temperature=0.8,
            seed=11,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == expected.text
    assert len(parts) > 1, "tokens are sent as they come"
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 12
    assert all(part.usage is None for part in parts)
    assert len({part.id for part in chunks}) == 1


def test_concurrent_async_clients_get_the_tokens_they_get_alone(url: str, llm: LLM) -> None:
    sampling = {"max_tokens": 24, "temperature": 1.0}

    async def stream(client: openai.AsyncOpenAI, seed: int) -> str:
        pieces = await client.completions.create(model=MODEL, prompt=PROMPT, seed=seed, stream=True, **sampling)
        return "".join([part.choices[0].text async for part in pieces])

    async def whole(client: openai.AsyncOpenAI, seed: int) -> str:
        return (await client.completions.create(model=MODEL, prompt=PROMPT, seed=seed, **sampling)).choices[0].text

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0) as client:
            return list(await asyncio.gather(stream(client, 1), stream(client, 2), whole(client, 3)))

    alone = [offline(llm, PROMPT, seed=seed, **sampling).text for seed in (1, 2, 3)]
    assert asyncio.run(together()) == alone
    assert len(set(alone)) == 3


def test_errors_reach_the_client_as_its_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10**6, stream=True)
    assert caught.value.code == "context_length_exceeded", "a stream's early errors are real statuses"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt=PROMPT)
    assert missing.value.code == "model_not_found"


def test_models(client: openai.OpenAI, llm: LLM) -> None:
    [card] = client.models.list().data
    assert card == client.models.retrieve(MODEL)
    assert card.id == MODEL
    assert card.max_model_len == llm.info.max_model_len  # type: ignore[attr-defined]
    assert card.index_plan == str(llm.plan)  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# --- choices -----------------------------------------------------------------------------------------------------


def test_choice_i_samples_with_seed_plus_i_whole_and_streamed(url: str, llm: LLM) -> None:
    prompts = [PROMPT, "import os\n"]
    body: dict[str, Any] = {"prompt": prompts, "n": 2, "max_tokens": 8, "seed": 2**63 - 1}
    seeds = [2**63 - 1, -(2**63)]
    expected = [offline(llm, prompt, max_tokens=8, seed=seed) for prompt in prompts for seed in seeds]
    answer = post(url, **body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == [output.text for output in expected]
    assert answer["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in expected[::2])
    assert answer["usage"]["completion_tokens"] == 32
    chunks = events(url, **body, return_token_ids=True)
    for index, output in enumerate(expected):
        assert joined(chunks, index) == (output.text, output.token_ids, "length")
    order = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
    assert order != sorted(order), "choices of a stream interleave"


def test_all_prompt_forms_say_the_same(url: str) -> None:
    token_ids = httpx.post(f"{url}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    texts = [
        [choice["text"] for choice in post(url, prompt=form, max_tokens=6, temperature=0)["choices"]]
        for form in (PROMPT, [PROMPT, PROMPT], token_ids, [token_ids, token_ids])
    ]
    assert [len(row) for row in texts] == [1, 2, 1, 2]
    assert len({text for row in texts for text in row}) == 1


def test_without_a_seed_answers_differ(url: str) -> None:
    answer = post(url, prompt=PROMPT, n=4, max_tokens=16)
    assert len({choice["text"] for choice in answer["choices"]}) > 1


# --- log-probabilities and echo ----------------------------------------------------------------------------------


def test_logprobs_are_the_engines(url: str, llm: LLM) -> None:
    expected = offline(llm, PROMPT, max_tokens=6, temperature=0, logprobs=3)
    assert expected.logprobs is not None
    [choice] = post(url, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3)["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx(
        [entries[token] for token, entries in zip(expected.token_ids, expected.logprobs, strict=True)], abs=1e-5
    )
    assert [len(top) for top in logprobs["top_logprobs"]] == [3] * 6
    assert [max(top.values()) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"], "greedy"
    ids = post(url, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=0, return_tokens_as_token_ids=True)
    assert ids["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in expected.token_ids]
    streamed: dict[str, list[Any]] = {key: [] for key in logprobs}
    for chunk in events(url, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3):
        for key, values in chunk["choices"][0]["logprobs"].items():
            streamed[key] += values
    assert streamed["tokens"] == logprobs["tokens"] and streamed["text_offset"] == logprobs["text_offset"]
    assert streamed["token_logprobs"] == pytest.approx(logprobs["token_logprobs"], abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_returns_the_prompt_and_its_logprobs(url: str, llm: LLM, stream: bool) -> None:
    expected = offline(llm, PROMPT, max_tokens=4, temperature=0, prompt_logprobs=1)
    assert expected.prompt_logprobs is not None
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 4,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }
    if stream:
        choices = [chunk["choices"][0] for chunk in events(url, **body)]
        text = "".join(choice["text"] for choice in choices)
        tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        values = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
        offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    else:
        [choice] = post(url, **body)["choices"]
        text, logprobs = choice["text"], choice["logprobs"]
        tokens, values, offsets = (logprobs[key] for key in ("tokens", "token_logprobs", "text_offset"))
    assert text == PROMPT + expected.text
    num_prompt_tokens = len(expected.prompt_token_ids)
    assert len(tokens) == len(values) == len(offsets) == num_prompt_tokens + 4
    assert values[0] is None
    assert values[1:num_prompt_tokens] == pytest.approx(
        [
            entries[token]
            for token, entries in zip(expected.prompt_token_ids[1:], expected.prompt_logprobs[1:], strict=True)
            if entries is not None
        ],
        abs=1e-5,
    )
    for token, begin, end in zip(tokens, offsets, [*offsets[1:], len(text)], strict=True):
        assert token.startswith("bytes:") or text[begin:end] == token


def test_max_tokens_zero_gives_the_prompts_logprobs_alone(url: str) -> None:
    answer = post(url, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    [choice] = answer["choices"]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_have_vllms_shape(url: str) -> None:
    [choice] = post(url, prompt=PROMPT, max_tokens=1, prompt_logprobs=2, return_token_ids=True)["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None and len(others) == len(choice["prompt_token_ids"]) - 1
    for token_id, entries in zip(choice["prompt_token_ids"][1:], others, strict=True):
        assert len(entries) in (2, 3) and str(token_id) in entries
        ranks = sorted(entry["rank"] for entry in entries.values() if entry["rank"] is not None)
        assert ranks == [1, 2]


# --- stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(url: str, llm: LLM, include: bool) -> None:
    free = offline(llm, PROMPT, max_tokens=16, temperature=0, logprobs=0)
    middle = len(free.text) // 2
    stop = free.text[middle - 2 : middle + 2]
    end = free.text.index(stop)
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 16,
        "temperature": 0,
        "stop": [stop, "never in the text"],
        "include_stop_str_in_output": include,
    }
    expected = offline(llm, PROMPT, max_tokens=16, temperature=0, stop=[stop], include_stop_str_in_output=include)
    answer = post(url, **body, return_token_ids=True)
    [choice] = answer["choices"]
    assert choice["text"] == free.text[: end + len(stop) if include else end] == expected.text
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["token_ids"] == free.token_ids[: len(choice["token_ids"])] == expected.token_ids
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"]) < 16
    assert joined(events(url, **body, return_token_ids=True)) == (choice["text"], choice["token_ids"], "stop")


def test_stop_token_ids(url: str, llm: LLM) -> None:
    free = offline(llm, PROMPT, max_tokens=16, temperature=0)
    stop = free.token_ids[5]
    [choice] = post(url, prompt=PROMPT, max_tokens=16, temperature=0, stop_token_ids=[stop], return_token_ids=True)[
        "choices"
    ]
    length = free.token_ids.index(stop) + 1
    assert choice["token_ids"] == free.token_ids[:length], "the stop token is counted"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert free.text.startswith(choice["text"]) and len(choice["text"]) < len(free.text)


# --- usage, ids, small routes ------------------------------------------------------------------------------------


def test_usage_counts_cached_tokens(url: str) -> None:
    prompt = [7 + i % 301 for i in range(300)]
    first, second = (post(url, prompt=prompt, max_tokens=1)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == 256


def test_continuous_usage(url: str) -> None:
    chunks = events(
        url,
        prompt=PROMPT,
        max_tokens=5,
        ignore_eos=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 5 and counts[0] < 5
    assert [chunk["choices"] == [] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_ids_and_fingerprint(url: str) -> None:
    response = httpx.post(
        f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "mine-1"}
    )
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    other = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert len(other.headers.get_list("x-request-id")) == 1
    assert response.json()["id"] != other.json()["id"]
    assert response.json()["system_fingerprint"] == other.json()["system_fingerprint"]


def test_tokenize_and_back(url: str, llm: LLM) -> None:
    text = "naïve 😀 text"
    tokenized = httpx.post(f"{url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokenized["count"] == len(tokenized["tokens"]) == len(tokenized["token_strs"])
    assert tokenized["max_model_len"] == llm.info.max_model_len
    back = httpx.post(f"{url}/detokenize", json={"tokens": tokenized["tokens"]})
    assert back.json() == {"prompt": text}
    assert httpx.post(f"{url}/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_a_long_prompt_is_encoded_beside_the_event_loop(url: str) -> None:
    text = "x = 1\n" * 20_000
    count = httpx.post(f"{url}/tokenize", json={"prompt": text}, timeout=TIMEOUT_S).json()["count"]
    assert count > 20_000


# --- text that has to match --------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_response_format_whole_and_streamed(client: openai.OpenAI, url: str, llm: LLM) -> None:
    schema_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 200, "seed": 4}
    whole = client.completions.create(**fields, extra_body={"response_format": schema_format}).choices[0]
    assert whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.text), PERSON)
    spec = GuidedSpec("json_schema", json.dumps(PERSON))
    assert whole.text == offline(llm, PROMPT, max_tokens=200, seed=4, guided=spec).text
    streamed = joined(events(url, **fields, response_format=schema_format))
    assert (streamed[0], streamed[2]) == (whole.text, "stop")
    for same in ({"guided_json": PERSON}, {"structured_outputs": {"json": json.dumps(PERSON)}}):
        choice = post(url, **fields, **same)["choices"][0]
        jsonschema.validate(json.loads(choice["text"]), PERSON)
    fields["max_tokens"] = 8
    text = post(url, **fields, response_format={"type": "text"})["choices"][0]["text"]
    assert text == post(url, **fields)["choices"][0]["text"]


def test_every_way_to_say_what_text_has_to_match(url: str) -> None:
    fields = {"prompt": [PROMPT, "x"], "n": 2, "max_tokens": 60}
    for given, pattern in (
        ({"guided_choice": ["left", "right"]}, "left|right"),
        # Not \d: the grammar engine knows digits of a newer Unicode than this Python does.
        ({"guided_regex": r"[0-9]{3}-[a-f]+!"}, r"[0-9]{3}-[a-f]+!"),
        ({"guided_grammar": 'root ::= "<" [xy]{2,5} ">"'}, "<[xy]{2,5}>"),
        ({"structured_outputs": {"choice": ["\u4e2d", "b c"]}}, "\u4e2d|b c"),
        ({"structured_outputs": {"grammar": 'start: "a"~2..4'}}, "a{2,4}"),
        ({"structured_outputs": {"json_object": True}}, r"(?s)\{.*"),
    ):
        for choice in post(url, **fields, **given)["choices"]:
            whole = choice["finish_reason"] == "stop"
            assert re.fullmatch(pattern, choice["text"]) or (not whole and "choice" not in str(given)), choice


def test_what_cannot_be_matched_is_a_400_that_names_the_field(cluster: Cluster, url: str) -> None:
    def refused(**given: Any) -> tuple[str, str, str]:
        response = httpx.post(f"{url}/v1/completions", json={"prompt": "a", **given}, timeout=TIMEOUT_S)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert len(error["message"]) < 700
        return error["param"], error["code"], error["message"]

    assert refused(guided_regex="(")[:2] == ("guided_regex", "invalid_grammar")
    impossible = {"type": "object", "properties": {"a": False}, "required": ["a"]}
    schema_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": impossible}}
    param, code, message = refused(response_format=schema_format)
    assert (param, code) == ("response_format", "invalid_grammar") and "Unsatisfiable" in message
    assert "no text matches" in refused(structured_outputs={"regex": r"[^\s\S]"})[2]
    assert refused(guided_grammar="x" * 70_000)[:2] == ("guided_grammar", "invalid_value")
    assert "at most one" in refused(guided_regex="a", guided_choice=["a"])[2]
    before = {cache: cluster_series(cluster, f'm3_grammars_total{{cache="{cache}"') for cache in ("hit", "miss")}
    for _ in range(2):
        post(url, prompt="a", guided_regex="[0-9]{3}x")
    for cache, count in before.items():
        assert cluster_series(cluster, f'm3_grammars_total{{cache="{cache}"') == count + 1


def test_health_and_readiness(url: str) -> None:
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/ready").status_code == 200


def test_a_disconnect_ends_the_request_in_the_engine(cluster: Cluster, url: str) -> None:
    before = cluster_series(cluster, 'm3_request_success_total{finished_reason="abort"')
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": True},
        timeout=TIMEOUT_S,
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        wait_until(lambda: cluster_series(cluster, "m3_num_requests_running") == 1, timeout_s=10, what="its steps")
    wait_until(lambda: cluster_series(cluster, "m3_num_requests_running") == 0, timeout_s=10, what="the abort")
    assert cluster_series(cluster, 'm3_request_success_total{finished_reason="abort"') == before + 1
    assert post(url, prompt=PROMPT, max_tokens=1)["choices"]


def test_a_client_that_gives_up_waiting_ends_the_request_too(cluster: Cluster, url: str) -> None:
    before = cluster_series(cluster, 'm3_request_success_total{finished_reason="abort"')
    body = {"prompt": PROMPT, "n": 2, "max_tokens": 4000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.5)
    wait_until(
        lambda: (
            cluster_series(cluster, 'm3_request_success_total{finished_reason="abort"') == before + 2
            and cluster_series(cluster, "m3_num_requests_running") == 0
        ),
        timeout_s=10,
        what="the abort of both choices",
    )


def cluster_series(cluster: Cluster, prefix: str) -> float:
    """The sum of the series that begin with `prefix` and belong to this module's model."""
    lines = httpx.get(cluster.metrics_url).text.splitlines()
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if line.startswith(prefix) and f'model_name="{MODEL}"' in line
    )
