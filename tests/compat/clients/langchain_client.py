"""LangChain: OpenAI (completions) and ChatOpenAI, invoked, streamed, in batches, with structured output."""

from __future__ import annotations

import asyncio
from typing import Literal

import pydantic
from langchain_openai import ChatOpenAI, OpenAI
from reporting import EXPECTED, MODEL, URL, run, same

llm = OpenAI(base_url=URL, api_key="none", model=MODEL, temperature=0, max_tokens=EXPECTED["max_tokens"], max_retries=0)
chat = ChatOpenAI(base_url=URL, api_key="none", model=MODEL, temperature=0, max_tokens=16, max_retries=0)
MESSAGES = [(message["role"], message["content"]) for message in EXPECTED["messages"]]


class Verdict(pydantic.BaseModel):
    """What the model must fill in."""

    colour: Literal["red", "green"]
    sure: bool


def completion() -> None:
    same(llm.invoke(EXPECTED["prompt"]), EXPECTED["text"])
    same("".join(llm.stream(EXPECTED["prompt"])), EXPECTED["text"])


def invoke() -> None:
    same(chat.invoke(MESSAGES).content, EXPECTED["chat"])


def stream() -> None:
    same("".join(str(chunk.content) for chunk in chat.stream(MESSAGES)), EXPECTED["chat"])


def batch() -> None:
    same([answer.content for answer in chat.batch([MESSAGES, MESSAGES])], [EXPECTED["chat"]] * 2)


def invoke_async() -> None:
    same(asyncio.run(chat.ainvoke(MESSAGES)).content, EXPECTED["chat"])


def structured() -> None:
    long = ChatOpenAI(base_url=URL, api_key="none", model=MODEL, temperature=0, max_tokens=128, max_retries=0)
    verdict = long.with_structured_output(Verdict, method="json_schema").invoke(MESSAGES)
    assert isinstance(verdict, Verdict), verdict


run(
    "langchain-openai",
    [
        ("OpenAI.invoke, .stream", completion),
        ("ChatOpenAI.invoke", invoke),
        ("ChatOpenAI.stream", stream),
        ("ChatOpenAI.batch", batch),
        ("ChatOpenAI.ainvoke", invoke_async),
        ("ChatOpenAI.with_structured_output", structured),
    ],
)
