"""The openai package: sync and async, whole and streamed, its helpers and its exceptions."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pydantic
from reporting import EXPECTED, MODEL, URL, run, same

client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0, timeout=120)
async_client = openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0, timeout=120)
PROMPT: dict[str, Any] = {
    "model": MODEL,
    "prompt": EXPECTED["prompt"],
    "max_tokens": EXPECTED["max_tokens"],
    "temperature": 0,
}
CHAT: dict[str, Any] = {"model": MODEL, "messages": EXPECTED["messages"], "max_tokens": 16, "temperature": 0}


class Verdict(pydantic.BaseModel):
    """What the model must fill in."""

    colour: Literal["red", "green"]
    sure: bool


def models() -> None:
    same([card.id for card in client.models.list()], [MODEL])
    same(client.models.retrieve(MODEL).id, MODEL)


def completion() -> None:
    answer = client.completions.create(**PROMPT)
    same(answer.choices[0].text, EXPECTED["text"])
    assert answer.usage is not None
    same(answer.usage.completion_tokens, len(EXPECTED["token_ids"]))


def completion_stream() -> None:
    chunks = list(client.completions.create(**PROMPT, stream=True, stream_options={"include_usage": True}))
    same("".join(chunk.choices[0].text for chunk in chunks if chunk.choices), EXPECTED["text"])
    assert chunks[-1].usage is not None
    same(chunks[-1].usage.completion_tokens, len(EXPECTED["token_ids"]))


def async_completions() -> None:
    async def work() -> list[str]:
        async def whole() -> str:
            return (await async_client.completions.create(**PROMPT)).choices[0].text

        async def streamed() -> str:
            stream = await async_client.completions.create(**PROMPT, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(whole(), streamed(), whole(), streamed())

    same(asyncio.run(work()), [EXPECTED["text"]] * 4)


def errors() -> None:
    for fields, kind in (
        ({"temperature": -1}, openai.BadRequestError),
        ({"model": "other"}, openai.NotFoundError),
        ({"max_tokens": 10**9}, openai.BadRequestError),
    ):
        try:
            client.completions.create(**(PROMPT | fields))
        except kind:
            continue
        raise AssertionError(f"{fields} was answered")


def chat() -> None:
    answer = client.chat.completions.create(**CHAT)
    same(answer.choices[0].message.content or "", EXPECTED["chat"])
    same(answer.choices[0].message.role, "assistant")


def chat_stream() -> None:
    chunks = list(client.chat.completions.create(**CHAT, stream=True))
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), EXPECTED["chat"])


def chat_stream_helper() -> None:
    with client.chat.completions.stream(**CHAT) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        # Not get_final_completion: this client refuses what max_tokens has cut.
        last = stream.current_completion_snapshot.choices[0]
    same((text, last.message.content or "", last.finish_reason), (EXPECTED["chat"], EXPECTED["chat"], "length"))


def chat_parse() -> None:
    fields = CHAT | {"max_tokens": 128}
    parsed = client.chat.completions.parse(**fields, response_format=Verdict).choices[0].message.parsed
    assert isinstance(parsed, Verdict), parsed


def chat_tools() -> None:
    """A call that must be made, of the one function there is: its arguments fit the schema. Without thinking, which
    this small model would not end in time."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    fields: dict[str, Any] = CHAT | {"max_tokens": 128, "tools": [tool]}
    quick = {"chat_template_kwargs": {"thinking_mode": "disabled"}}
    answer = client.chat.completions.create(**fields, tool_choice="required", extra_body=quick)
    calls = answer.choices[0].message.tool_calls or []
    assert calls and calls[0].type == "function", answer
    same(calls[0].function.name, "weather")
    assert json.loads(calls[0].function.arguments)["city"] in ("Rome", "Oslo"), calls


run(
    "openai",
    [
        ("models", models),
        ("completions", completion),
        ("completions, streamed", completion_stream),
        ("async completions, 4 at once", async_completions),
        ("exceptions", errors),
        ("chat", chat),
        ("chat, streamed", chat_stream),
        ("chat.completions.stream", chat_stream_helper),
        ("chat.completions.parse", chat_parse),
        ("chat with a required tool", chat_tools),
    ],
)
