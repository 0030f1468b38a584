"""What an HTTP front knows of chats: the checkpoint's template, its markers, and how a body becomes a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from engine.errors import RequestError
from engine.tokenizer import Tokenizer
from engine.types import EngineRequest, GuidedSpec
from service.chat_completion import MarkerIds, MessageChoice
from service.chat_markers import MarkerEscapes
from service.chat_protocol import ChatRequest
from service.chat_template import ChatTemplate
from service.choice import TokenizedPrompt
from service.parsers.arguments import Schema
from service.parsers.markers import THINK_END
from service.parsers.message import starts_in_reasoning
from service.tool_grammar import tool_grammar

# Longer conversations are rendered beside the event loop: a hop to a thread costs more than a short one does.
INLINE_MESSAGES = 16
INLINE_CHARS = 4096


class Chat:
    """The chat format of one checkpoint."""

    def __init__(self, model: str | Path, tokenizer: Tokenizer) -> None:
        """Raises CheckpointError when the checkpoint has a template that cannot be read."""
        self._template = ChatTemplate.from_dir(model)
        self._markers = MarkerIds.of(tokenizer)
        self._escapes = MarkerEscapes(tokenizer.added_tokens)

    def is_long(self, body: ChatRequest) -> bool:
        """Whether rendering takes longer than a hop to a thread."""
        if body.usable_tools or len(body.messages) > INLINE_MESSAGES:
            return True
        return sum(len(message["content"]) for message in body.messages) > INLINE_CHARS

    def prompt(self, body: ChatRequest) -> tuple[list[str], GuidedSpec | None]:
        """The prompt, in pieces that are encoded one by one, and what the answer has to match.

        RequestError when there is no template, or when it refuses the messages, and as `_guided` raises it.
        """
        if self._template is None:
            raise RequestError(
                "the checkpoint has no chat template, neither chat_template.jinja nor in tokenizer_config.json: "
                "use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        escapes = self._escapes
        text = self._template.render(
            [escapes.message(message) for message in body.messages],
            tools=[escapes.tool(tool) for tool in body.usable_tools],
            variables=body.variables,
        )
        return escapes.pieces(text), self._guided(body, text)

    def choices(
        self, body: ChatRequest, prompt: TokenizedPrompt, requests: Sequence[EngineRequest]
    ) -> list[MessageChoice]:
        """One for each engine request."""
        assert prompt.text is not None
        in_reasoning = starts_in_reasoning(prompt.text)
        return [
            MessageChoice(i, prompt, body, request.sampling, in_reasoning=in_reasoning, markers=self._markers)
            for i, request in enumerate(requests)
        ]

    def _guided(self, body: ChatRequest, prompt: str) -> GuidedSpec | None:
        """What the answer has to match, after its reasoning. RequestError when the body contradicts itself."""
        spec = self._text_or_calls(body)
        if spec is None or prompt.rstrip().endswith(THINK_END):
            return spec
        markers = self._markers
        if markers.think is None or markers.think_end is None:
            return spec
        start = None if starts_in_reasoning(prompt) else markers.think
        return GuidedSpec(spec.kind, spec.text, reasoning_end_id=markers.think_end, reasoning_start_id=start)

    def _text_or_calls(self, body: ChatRequest) -> GuidedSpec | None:
        spec, forced = body.guided, body.forced_tools
        if forced is not None:
            if spec is not None:
                raise RequestError(
                    f"tool_choice asks for a tool call, and {body.guided_param} for something else", param="tool_choice"
                )
            return self._tool_grammar(body, forced)
        if spec is None:
            return self._tool_grammar(body, body.schemas, free_text=True) if body.has_strict_tools else None
        if not spec.kind.startswith("json") or not body.usable_tools:
            return spec
        # The model may still call a tool: what it says instead is bound.
        try:
            schema = {"type": "object"} if spec.kind == "json_object" else json.loads(spec.text)
        except (ValueError, RecursionError):
            return spec  # whoever compiles it says what is wrong
        return self._tool_grammar(body, body.schemas, otherwise=schema if isinstance(schema, dict) else {})

    def _tool_grammar(
        self, body: ChatRequest, tools: dict[str, Schema], *, free_text: bool = False, otherwise: Schema | None = None
    ) -> GuidedSpec:
        if self._markers.namespace is None:
            raise RequestError(
                "the checkpoint's vocabulary has no token for tool calls: they cannot be bound to a schema",
                param="tools",
                code="unsupported_parameter",
            )
        text = tool_grammar(
            tools, self._markers.namespace, max_calls=body.max_calls, free_text=free_text, otherwise=otherwise
        )
        return GuidedSpec("grammar", text)
