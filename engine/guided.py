"""Guided output: grammars, and which tokens may come next in each request that has one.

The grammar engine is llguidance: it walks the vocabulary's trie under a lazily built automaton, so that there is no
table to compile for each pair of grammar and vocabulary. What it decides depends on the grammar and the tokens alone:
its limits count work, not time. So every rank runs its own matchers and all find the same masks, and nothing of them
travels in a StepPlan.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError, RequestError
from engine.types import GuidedSpec, NewRequest

try:
    import llguidance
    from llguidance.gbnf_to_lark import any_to_lark
    from llguidance.numpy import fill_next_token_bitmask
except ImportError:  # a machine for kernels alone
    llguidance = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

MAX_CHOICES = 1024
# Of blanks between two parts of a JSON text: models that may write blanks for ever sometimes do.
BLANKS = r"[ \t\r\n]{1,32}"
# Compiled grammars of one process. A matcher's automaton grows as it is used, to 2 KB a state.
_MAX_CACHED = 64
_MAX_LEXER_STATES = 30_000
# The compiler recurses as deep as a chain of rules is long: 8 MiB hold 2000. Only what is touched becomes memory.
_STACK_BYTES = 256 * 2**20
_MAX_REASON_CHARS = 500

T = TypeVar("T")
Mask = NDArray[np.int32]


def require() -> None:
    """RequestError when this process cannot guide."""
    if llguidance is None:
        raise RequestError(
            "guided output needs the package llguidance, which is not installed",
            param="guided",
            code="unsupported_parameter",
        )


def check(spec: GuidedSpec) -> None:
    """RequestError when the grammar of `spec` is not valid, whatever the vocabulary."""
    require()
    limits = llguidance.LLParserLimits(verbose_errors=False)
    text = grammar_text(spec)
    is_error, messages = _on_deep_stack(
        lambda: llguidance.LLMatcher.validate_grammar_with_warnings(text, None, limits=limits)
    )
    if is_error:
        raise _refusal(spec, " ".join(messages[0].split()))


class Grammars:
    """The grammars of one process over one vocabulary, compiled when they are first asked for. Thread-safe.

    vocab_size, eos_token_ids: as given.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        max_compile_s: float | None = None,
    ) -> None:
        """model: directory of the tokenizer.json, read at first use.  vocab_size: of the logits.  max_compile_s: CPU
        time after which a grammar is refused, though it is valid; not for ranks, which would not all agree."""
        self._file = Path(model) / "tokenizer.json"
        self.vocab_size = vocab_size
        self.eos_token_ids = list(eos_token_ids)
        self._max_compile_s = max_compile_s
        self._lock = threading.Lock()  # of the cache
        self._compiling = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()

    def warm(self) -> None:
        """Read the vocabulary now, which takes seconds for 200,000 tokens. If it cannot be read, `matcher` says so."""
        if llguidance is not None and self._file.is_file() and self.eos_token_ids:
            try:
                with self._compiling:
                    self._vocabulary()
            except CheckpointError as error:
                log.warning("no output can be guided: %s", error)

    def knows(self, spec: GuidedSpec) -> bool:
        """Whether the grammar of `spec` is compiled, and so valid. Never waits for a compilation."""
        return self._find(spec) is not None

    def matcher(self, spec: GuidedSpec) -> llguidance.LLMatcher:
        """A matcher at the start of the grammar of `spec`; the caller owns it.

        RequestError when the grammar is not valid, too large, or no text at all matches it.
        """
        require()
        compiled = self._find(spec)
        if compiled is None:
            with self._compiling:
                compiled = self._find(spec) or _on_deep_stack(lambda: self._compile(spec))
            with self._lock:
                self._compiled[spec.kind, spec.text] = compiled
                if len(self._compiled) > _MAX_CACHED:
                    self._compiled.popitem(last=False)
        return compiled.deep_copy()

    def _find(self, spec: GuidedSpec) -> llguidance.LLMatcher | None:
        key = (spec.kind, spec.text)
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is not None:
                self._compiled.move_to_end(key)
            return compiled

    def _vocabulary(self) -> llguidance.LLTokenizer:
        if self._tokenizer is None:
            self._tokenizer = _read_vocabulary(self._file, self.vocab_size, self.eos_token_ids)
        return self._tokenizer

    def _compile(self, spec: GuidedSpec) -> llguidance.LLMatcher:
        self._vocabulary()
        started_s = time.thread_time()
        limits = llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._vocabulary(), grammar_text(spec), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            reason = _reason(matcher)
            reason = "no text matches it" if reason.startswith("NoExtension") else reason
            raise _refusal(spec, reason)
        seconds = time.thread_time() - started_s
        if self._max_compile_s is not None and seconds > self._max_compile_s:
            raise _refusal(spec, f"it takes {seconds:.1f} s to compile, at most {self._max_compile_s:g} s are allowed")
        return matcher


def grammar_text(spec: GuidedSpec) -> str:
    """What llguidance compiles. RequestError when `spec.text` is not even of the right form."""
    text: str
    if spec.kind in ("json_object", "json_schema"):
        schema = '{"type": "object"}' if spec.kind == "json_object" else spec.text
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": BLANKS})
        except ValueError as error:
            raise _refusal(spec, f"not a JSON schema: {error}") from None
    elif spec.kind == "regex":
        text = llguidance.LLMatcher.grammar_from_regex(spec.text)
    elif spec.kind == "choice":
        text = llguidance.LLMatcher.grammar_from_lark(_choices(spec))
    else:
        try:
            text = llguidance.LLMatcher.grammar_from_lark(any_to_lark(spec.text))
        except Exception as error:  # the converter of other notations raises what it meets
            raise _refusal(spec, str(error)) from None
    return text


def _choices(spec: GuidedSpec) -> str:
    try:
        choices = json.loads(spec.text)
    except ValueError:
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise _refusal(spec, "it must be a list of at least one string, none of them empty")
    if len(choices) > MAX_CHOICES:
        raise _refusal(spec, f"it has {len(choices)} entries, at most {MAX_CHOICES} are allowed")
    return "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)


def _refusal(spec: GuidedSpec, reason: str) -> RequestError:
    return RequestError(f"{spec.kind}: {reason[:_MAX_REASON_CHARS]}", param="guided", code="invalid_grammar")


def _reason(matcher: llguidance.LLMatcher) -> str:
    """Why it failed, on one line."""
    return " ".join(matcher.get_error().split())[:_MAX_REASON_CHARS] or matcher.stop_reason()


def _read_vocabulary(file: Path, vocab_size: int, eos_token_ids: list[int]) -> llguidance.LLTokenizer:
    if not file.is_file():
        raise RequestError(f"guided output needs the tokenizer, and {file} is missing", param="guided")
    if not eos_token_ids:
        raise RequestError("guided output ends with an eos token, and the checkpoint names none", param="guided")
    try:
        stored = json.loads(file.read_bytes())
        # Markers of reasoning and tool calls are no text: a string of the output must not hold one.
        for token in stored.get("added_tokens", ()):
            token["special"] = True
        stored["truncation"] = stored["padding"] = None
        return llguidance.LLTokenizer(json.dumps(stored), n_vocab=vocab_size, eos_token=eos_token_ids)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{file} cannot guide output: {error}") from error


_stack_lock = threading.Lock()


def _on_deep_stack(work: Callable[[], T]) -> T:
    """`work()` in a thread whose stack does not end before its input does."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # raised where the result is asked for
            done.set_exception(error)

    with _stack_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="compile-grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return done.result()


class Guide:
    """Where one request is in its output: in the reasoning, which is free, or in the text, which its grammar binds.

    error: why the grammar cannot go on, None while it can.
    """

    def __init__(self, grammars: Grammars, spec: GuidedSpec, outputs: Sequence[int] = ()) -> None:
        """outputs: tokens of the output so far, taken in when the first mask is asked for."""
        self._grammars, self._spec = grammars, spec
        self._opening = spec.reasoning_start_id is not None
        self._reasoning = spec.reasoning_end_id is not None and not self._opening
        self._replay = list(outputs)
        self._matcher: llguidance.LLMatcher | None = None
        self.error: str | None = None

    def consume(self, token_id: int) -> None:
        """Take in the next token of the output; a negative one (there was none) ends it elsewhere."""
        if token_id < 0:
            return
        self._catch_up()
        self._consume(token_id)

    def _catch_up(self) -> None:
        replay, self._replay = self._replay, []
        for token_id in replay:
            self._consume(token_id)

    def _consume(self, token_id: int) -> None:
        spec = self._spec
        if self._reasoning:
            self._reasoning = token_id != spec.reasoning_end_id
            return
        if self._opening:
            self._opening = False
            if token_id in (spec.reasoning_start_id, spec.reasoning_end_id):
                self._reasoning = token_id == spec.reasoning_start_id
                return
        matcher = self._ready()
        if matcher is not None and not matcher.consume_token(token_id):
            self.error = self.error or f"token {token_id} does not fit: {_reason(matcher)}"

    def fill(self, mask: Mask) -> None:
        """Set the bits of the tokens that may come next. mask: int32 [words], bit i of word w is token 32 * w + i.

        All bits where the grammar cannot go on: the request ends, and something has to be drawn.
        """
        self._catch_up()
        if self._reasoning:
            _set_all(mask, self._grammars.vocab_size)
            for token_id in self._grammars.eos_token_ids:
                mask[token_id >> 5] &= ~_BITS[token_id & 31]
            return
        matcher = self._ready()
        if matcher is not None:
            fill_next_token_bitmask(matcher, mask[None])
            if matcher.is_error():
                self.error = self.error or _reason(matcher)
            elif self._opening:
                for marker in (self._spec.reasoning_start_id, self._spec.reasoning_end_id):
                    assert marker is not None
                    mask[marker >> 5] |= _BITS[marker & 31]
        if self.error is not None:
            _set_all(mask, self._grammars.vocab_size)

    def _ready(self) -> llguidance.LLMatcher | None:
        if self.error is not None:
            return None
        if self._matcher is None:
            try:
                self._matcher = self._grammars.matcher(self._spec)
            except (RequestError, CheckpointError) as error:  # who sent the request had it checked, or should have
                self.error = str(error)
        return self._matcher


_BITS = (np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.int32)


def _set_all(mask: Mask, vocab_size: int) -> None:
    mask.fill(-1)
    if vocab_size % 32:
        mask[-1] = np.int64(1 << vocab_size % 32) - 1


class Awaited(Protocol):
    """Something that the device has yet to reach, see engine/probes.py."""

    def wait(self) -> None: ...


class HostTokens(Protocol):
    """Sampled tokens on their way to the host."""

    def tolist(self) -> list[int]: ...


class GuidedSlots:
    """The guides of a rank's slots.

    A step may be launched before the tokens of the one before are on the host. A guide waits for them only where its
    next mask is asked for, behind the launch of the model, whose time on the device hides that of the masks.
    """

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._guides: dict[int, Guide] = {}
        self._pending: deque[tuple[list[tuple[int, Guide]], HostTokens, Awaited]] = deque()
        self._seconds = 0.0

    def add(self, new: NewRequest) -> None:
        """Take in a request, guided or not; the output it re-enters with is replayed."""
        if new.sampling.guided is not None:
            outputs = new.token_ids[new.prompt_len :]
            self._guides[new.slot] = Guide(self._grammars, new.sampling.guided, outputs)

    def remove(self, slot: int) -> None:
        """Free a slot, guided or not."""
        self._guides.pop(slot, None)

    def any_of(self, slots: Sequence[int]) -> bool:
        """Whether one of `slots` is guided."""
        return any(slot in self._guides for slot in slots)

    def masks(self, slots: Sequence[int]) -> Mask | None:
        """What may come next in the guided ones of `slots`, in their order: int32 [num_guided, words], see Guide.fill.
        None when none is guided. Waits for the tokens that they have sampled."""
        guides = [guide for slot in slots if (guide := self._guides.get(slot)) is not None]
        if not guides:
            return None
        pending, self._pending = self._pending, deque()
        for _, _, done in pending:
            done.wait()
        started_s = time.perf_counter()
        for owners, tokens, _ in pending:
            known = tokens.tolist()
            for index, guide in owners:
                guide.consume(known[index])
        masks = np.zeros((len(guides), -(-self._grammars.vocab_size // 32)), np.int32)
        for guide, mask in zip(guides, masks, strict=True):
            guide.fill(mask)
        self._seconds += time.perf_counter() - started_s
        return masks

    def sampled(self, slots: Sequence[int], tokens: HostTokens, done: Awaited) -> int:
        """What the newest step samples for `slots`, [len(slots)], will be there at `done`. How many are guided."""
        owners = [(index, guide) for index, slot in enumerate(slots) if (guide := self._guides.get(slot)) is not None]
        if owners:
            self._pending.append((owners, tokens, done))
        return len(owners)

    def error(self, slot: int) -> str | None:
        """Why the slot's last mask could not be made; None when it was, or none was needed."""
        guide = self._guides.get(slot)
        return None if guide is None else guide.error

    def take_seconds(self) -> float:
        """Host time since the last call that masks took, with the compilation of grammars that were not known."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
