"""litellm as a library: text and chat, whole and streamed, sync and async."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
from reporting import EXPECTED, MODEL, URL, run, same

COMMON: dict[str, Any] = {"api_base": URL, "api_key": "none", "temperature": 0, "max_retries": 0, "timeout": 120}
TEXT = COMMON | {
    "model": f"text-completion-openai/{MODEL}",
    "prompt": EXPECTED["prompt"],
    "max_tokens": EXPECTED["max_tokens"],
}
CHAT = COMMON | {"model": f"openai/{MODEL}", "messages": EXPECTED["messages"], "max_tokens": 16}


def text() -> None:
    same(litellm.text_completion(**TEXT).choices[0].text, EXPECTED["text"])


def text_stream() -> None:
    same("".join(c.choices[0].text or "" for c in litellm.text_completion(**TEXT, stream=True)), EXPECTED["text"])


def text_async() -> None:
    same(asyncio.run(litellm.atext_completion(**TEXT)).choices[0].text, EXPECTED["text"])


def chat() -> None:
    same(litellm.completion(**CHAT).choices[0].message.content or "", EXPECTED["chat"])


def chat_stream() -> None:
    chunks = list(litellm.completion(**CHAT, stream=True))
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks), EXPECTED["chat"])


def chat_vllm() -> None:
    """The provider for servers of vLLM's API."""
    fields = CHAT | {"model": f"hosted_vllm/{MODEL}"}
    same(litellm.completion(**fields).choices[0].message.content or "", EXPECTED["chat"])


run(
    "litellm",
    [
        ("text_completion", text),
        ("text_completion, streamed", text_stream),
        ("atext_completion", text_async),
        ("completion", chat),
        ("completion, streamed", chat_stream),
        ("completion as hosted_vllm", chat_vllm),
    ],
)
