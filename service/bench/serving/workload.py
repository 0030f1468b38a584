"""What is sent: prompts and output lengths of four kinds of workload, the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError
from engine.tokenizer import Tokenizer

MIN_TOKENS = 4
# Without a tokenizer a text is taken for so many characters a token.
CHARS_PER_TOKEN = 4
# One token each in most vocabularies, with the space in front of them.
_WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("program", "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother"),
    *("area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business"),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request.

    content: text, or token ids as JSON, which takes a tenth of a list's memory.  input_tokens: what it should have; the
    server's count is the one that is reported.  group: of prompts with the same beginning; or the component of a mix.
    """

    content: str | msgspec.Raw
    input_tokens: int
    output_tokens: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a mix: requests of these lengths, as often as the weight says beside others'."""

    input_tokens: int
    output_tokens: int
    weight: float


class TokenSource:
    """Random content of a length in tokens.

    Token ids below `max_token_id` where the endpoint takes them; else text: random tokens of `tokenizer`, decoded, or
    without one a word per token.
    """

    def __init__(self, rng: random.Random, *, max_token_id: int, as_text: bool, tokenizer: Tokenizer | None) -> None:
        self._rng = rng
        self._max_token_id = max_token_id
        self._as_text = as_text
        self._tokenizer = tokenizer

    def piece(self, num_tokens: int) -> list[Any]:
        """Tokens, or words: pieces put one behind the other make a prompt."""
        if self._as_text and self._tokenizer is None:
            return self._rng.choices(_WORDS, k=num_tokens)
        return [self._rng.randrange(self._max_token_id) for _ in range(num_tokens)]

    def content(self, pieces: Sequence[Any]) -> str | msgspec.Raw:
        if not self._as_text:
            return msgspec.Raw(msgspec.json.encode(pieces))
        if self._tokenizer is None:
            return " ".join(pieces)
        return self._tokenizer.decode(pieces)


def _length(rng: random.Random, mean: int, ratio: float) -> int:
    """Uniform in [mean * (1 - ratio), mean * (1 + ratio)], at least 1."""
    return max(1, rng.randint(round(mean * (1 - ratio)), round(mean * (1 + ratio))))


def random_prompts(
    count: int, source: TokenSource, rng: random.Random, *, input_tokens: int, output_tokens: int, ratio: float
) -> list[Prompt]:
    """Prompts that share nothing, with lengths spread by `ratio` around the given ones."""
    prompts = []
    for _ in range(count):
        length, output = _length(rng, input_tokens, ratio), _length(rng, output_tokens, ratio)
        prompts.append(Prompt(source.content(source.piece(length)), length, output))
    return prompts


def shared_prefix_prompts(
    count: int,
    source: TokenSource,
    rng: random.Random,
    *,
    num_prefixes: int,
    prefix_tokens: int,
    input_tokens: int,
    output_tokens: int,
    ratio: float,
) -> list[Prompt]:
    """Each group of prompts begins with the same `prefix_tokens` tokens; `input_tokens` of its own follow. Groups are
    of the same size, in random order."""
    prefixes = [source.piece(prefix_tokens) for _ in range(num_prefixes)]
    groups = [i % num_prefixes for i in range(count)]
    rng.shuffle(groups)
    prompts = []
    for group in groups:
        own, output = _length(rng, input_tokens, ratio), _length(rng, output_tokens, ratio)
        content = source.content([*prefixes[group], *source.piece(own)])
        prompts.append(Prompt(content, prefix_tokens + own, output, group))
    return prompts


def mixed_prompts(
    count: int, source: TokenSource, rng: random.Random, *, components: Sequence[Component], ratio: float
) -> list[Prompt]:
    """Short and long requests among each other. Numbers follow the weights to within one, the order is random."""
    total = sum(component.weight for component in components)
    bounds, below = [0], 0.0
    for component in components:
        below += component.weight
        bounds.append(round(count * below / total))
    order = [i for i in range(len(components)) for _ in range(bounds[i + 1] - bounds[i])]
    rng.shuffle(order)
    prompts = []
    for index in order:
        component = components[index]
        length = _length(rng, component.input_tokens, ratio)
        output = _length(rng, component.output_tokens, ratio)
        prompts.append(Prompt(source.content(source.piece(length)), length, output, index))
    return prompts


def sharegpt_prompts(
    path: Path,
    count: int,
    rng: random.Random,
    *,
    tokenizer: Tokenizer | None,
    output_tokens: int | None,
    max_input_tokens: int,
) -> list[Prompt]:
    """First questions of conversations, with the length of the answer they got as the number of tokens to generate.

    The file is ShareGPT's: a JSON list of {"conversations": [{"from", "value"}, ...]}, or of {"messages": [{"role",
    "content"}, ...]}. Conversations with a question or an answer of fewer than 4 tokens are left out, and questions of
    more than `max_input_tokens`. Fewer than `count` are repeated. Raises ConfigError when none is left.
    """
    measure = _counter(tokenizer)
    pairs = _conversations(path)
    rng.shuffle(pairs)
    prompts: list[Prompt] = []
    for question, answer in pairs:
        if len(prompts) == count:
            break
        length, output = measure(question), output_tokens or measure(answer)
        if MIN_TOKENS <= length <= max_input_tokens and output >= MIN_TOKENS:
            prompts.append(Prompt(question, length, output))
    if not prompts:
        raise ConfigError(
            f"--dataset-path {path}: none of {len(pairs)} conversations has a question of {MIN_TOKENS} to "
            f"{max_input_tokens} tokens and an answer of {MIN_TOKENS} or more"
        )
    return [prompts[i % len(prompts)] for i in range(count)]


def _counter(tokenizer: Tokenizer | None) -> Callable[[str], int]:
    if tokenizer is None:
        return lambda text: -(-len(text) // CHARS_PER_TOKEN)
    return lambda text: len(tokenizer.encode(text))


def _conversations(path: Path) -> list[tuple[str, str]]:
    """Question and answer of the first turn of each conversation that has both."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--dataset-path {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--dataset-path {path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ConfigError(f"--dataset-path {path} must hold a list of conversations, got {type(entries).__name__}")
    pairs = [pair for entry in entries if (pair := _first_turn(entry)) is not None]
    if not pairs:
        raise ConfigError(f"--dataset-path {path}: none of {len(entries)} entries has a question with an answer")
    return pairs


def _first_turn(entry: Any) -> tuple[str, str] | None:
    if not isinstance(entry, dict):
        return None
    turns = entry.get("conversations") or entry.get("messages") or []
    said: list[tuple[str, str]] = []
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict):
            role, text = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content")
            if role != "system" and isinstance(text, str):
                said.append((str(role), text))
    if len(said) < 2 or said[0][0] not in ("human", "user"):
        return None
    return said[0][1], said[1][1]
