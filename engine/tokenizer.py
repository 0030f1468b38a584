"""Text to token ids and back: encode, decode, incremental decode with stop strings.

Shared by the ingress and the offline LLM; imports neither torch nor transformers.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from engine.config import read_json
from engine.errors import CheckpointError, RequestError
from engine.types import SamplingParams

# A decoder that is not byte-level is asked again about this many undecided tokens at most, so that a stream
# of broken bytes costs a constant per token.
MAX_UNDECIDED_TOKENS = 16


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary (GPT-2's reversible byte encoding)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


class Tokenizer:
    """A checkpoint's tokenizer.json, with what its other files say about special tokens.

    vocab_size: one more than the highest token id.  eos_token_ids: from generation_config.json and
    tokenizer_config.json.  is_byte_level: each token stands for the same bytes wherever it is.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: tuple[int, ...] = (),
        bos_token_id: int | None = None,
    ) -> None:
        self._backend = backend
        self._special = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_token_ids = eos_token_ids
        self.bos_token_id = bos_token_id
        self.is_byte_level = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_dir(cls, path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
        """Read a checkpoint directory; CheckpointError names the file at fault.

        vocab_size: of the model; every token of tokenizer.json must have an id below it.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint needs its tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise CheckpointError(f"{file} is not a valid tokenizer: {error}") from error
        # Whatever the file says: a prompt is never cut or padded behind the caller's back.
        backend.no_truncation()
        backend.no_padding()
        generation = _optional_json(directory / "generation_config.json")
        settings = _optional_json(directory / "tokenizer_config.json")
        eos = _ids(generation, "eos_token_id", "generation_config.json")
        named = {key: _named_token(backend, settings, key) for key in ("eos_token", "bos_token")}
        if named["eos_token"] is not None:
            eos.append(named["eos_token"])
        bos = named["bos_token"]
        if bos is None:
            bos = next(iter(_ids(generation, "bos_token_id", "generation_config.json")), None)
        tokenizer = cls(backend, eos_token_ids=tuple(dict.fromkeys(eos)), bos_token_id=bos)
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            highest = tokenizer.vocab_size - 1
            raise CheckpointError(
                f"{file} has token {backend.id_to_token(highest)!r} with id {highest}: "
                f"the model's vocab_size is {vocab_size}"
            )
        return tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The token ids of one text."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """The token ids of each text; RequestError when one is not valid Unicode."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"the text has a lone surrogate at character {error.start}: not valid Unicode",
                    param="prompt",
                ) from error
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Ids that the tokenizer does not know give no text."""
        for token_id in token_ids:
            if not 0 <= token_id < 2**32:
                raise RequestError(f"token ids must be in [0, {self.vocab_size}), got {token_id}", param="tokens")
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out of the text."""
        return token_id in self._special

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact text, None when the vocabulary has no such token."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    @property
    def added_tokens(self) -> list[str]:
        """Texts that are one token wherever they stand."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values()]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; empty for an id that the tokenizer does not know."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._read_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        r"""One token for OpenAI logprobs: its text, or `bytes:\xNN...` when alone it is not valid UTF-8."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _read_bytes(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        if self.is_byte_level:
            # A token with a character outside the alphabet (an added token with a space) stands for itself.
            alphabet = [_BYTE_OF_CHAR.get(char) for char in token]
            data = [byte for byte in alphabet if byte is not None]
            return bytes(data) if len(data) == len(alphabet) else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return self.decode([token_id], skip_special_tokens=False).encode()


class IncrementalDetokenizer:
    """Turns one request's tokens into text as they arrive, and looks for its stop strings.

    Text is given out once it can no longer change: not while a character is incomplete, nor while it may be
    the start of a stop string. The pieces joined are `decode()` of all tokens, up to the stop string.

    The stop string that ends first wins; of several that end at the same character, the longest. One that
    ends within the text of the first `min_tokens` tokens does not count. O(1) amortised per character and
    stop string.

    stopped: the stop string that was found.  num_tokens_used: tokens up to and including the one that
    completed it (or all so far).  offsets: for each token used, how many complete characters came before it
    (OpenAI's text_offset); those at or past `len(text)` at the end belong to the stop string that was cut
    off.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special = sampling.skip_special_tokens
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._decoder: _Decoder = _ByteDecoder(tokenizer) if tokenizer.is_byte_level else _DiffDecoder(tokenizer)
        self._stops = [_StopString(stop) for stop in sampling.stop_strings]
        self._pieces: list[str] = []
        self._held = ""  # decoded, not given out: maybe the start of a stop string
        self._num_chars = 0  # decoded so far, held text included
        self._finished = False
        self.stopped: str | None = None
        self.offsets: list[int] = []

    @property
    def text(self) -> str:
        """Everything given out so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def num_tokens_used(self) -> int:
        return len(self.offsets)

    def push(self, token_ids: Sequence[int], *, last_is_stop: bool = False) -> str:
        """Take the next tokens; returns the text that became safe. Tokens after a stop string are ignored.

        last_is_stop: the last token ended the request (end of sequence or a stop token id): it is counted,
        but has text only with include_stop_str_in_output.
        """
        assert not self._finished, "push after finish"
        out: list[str] = []
        for i, token_id in enumerate(token_ids):
            if self.stopped is not None:
                break
            self.offsets.append(self._num_chars)
            hidden = last_is_stop and i == len(token_ids) - 1 and not self._include_stop
            if hidden or (self._skip_special and self._tokenizer.is_special(token_id)):
                continue
            out.append(self._accept(self._decoder.push(token_id)))
        return self._give("".join(out))

    def finish(self) -> str:
        """The text held back so far, since no more tokens come; broken bytes give U+FFFD."""
        if self._finished or self.stopped is not None:
            self._finished = True
            return ""
        self._finished = True
        out = self._accept(self._decoder.finish())
        if self.stopped is None:
            out += self._held
            self._held = ""
        return self._give(out)

    def _give(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece

    def _accept(self, piece: str) -> str:
        """Run new text through the stop strings; returns what may go out."""
        if not piece:
            return ""
        self._num_chars += len(piece)
        if not self._stops:
            return piece
        counts = self.num_tokens_used > self._min_tokens
        text = self._held + piece
        for i, char in enumerate(piece, start=len(self._held)):
            complete = [stop for stop in self._stops if stop.advance(char)]
            if complete and counts:
                found = max(complete, key=lambda stop: len(stop.text)).text
                self.stopped, self._held = found, ""
                return text[: i + 1 if self._include_stop else i + 1 - len(found)]
        num_held = max(stop.matched for stop in self._stops)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut]


class _StopString:
    """Knuth-Morris-Pratt matcher. matched: how long a start of the stop string the text ends with."""

    __slots__ = ("_borders", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = _borders(text)

    def advance(self, char: str) -> bool:
        """Take one character; True when it completes the stop string."""
        text, matched = self.text, self.matched
        while matched and (matched == len(text) or text[matched] != char):
            matched = self._borders[matched - 1]
        if text[matched] == char:
            matched += 1
        self.matched = matched
        return matched == len(text)


@lru_cache(maxsize=256)
def _borders(text: str) -> tuple[int, ...]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    length = 0
    for char in text[1:]:
        while length and text[length] != char:
            length = borders[length - 1]
        length += text[length] == char
        borders.append(length)
    return tuple(borders)


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteDecoder:
    """Byte-level tokens: their bytes in a row are the text, so only an incomplete character is held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _DiffDecoder:
    """Any other decoder: a token's text is what it adds to the text of the few tokens before it.

    Such a decoder may judge broken bytes by what follows them: there the number of U+FFFD may differ from
    decode's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # given out, but the next token's text depends on them
        self._undecided: list[int] = []

    def push(self, token_id: int) -> str:
        self._undecided.append(token_id)
        return self._take(final=len(self._undecided) >= MAX_UNDECIDED_TOKENS)

    def finish(self) -> str:
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=False)
        after = self._tokenizer.decode(self._context + self._undecided, skip_special_tokens=False)
        # A replacement character at the end may be the first bytes of a character.
        if not final and (after.endswith("\ufffd") or len(after) <= len(before)):
            return ""
        self._context = self._undecided or self._context
        self._undecided = []
        return after[len(before) :]


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _ids(config: dict[str, Any], key: str, file: str) -> list[int]:
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise CheckpointError(f"{file}: {key} must be a token id or a list of them, got {value!r}")
    return list(ids)


def _named_token(backend: tokenizers.Tokenizer, settings: dict[str, Any], key: str) -> int | None:
    """The id of tokenizer_config.json's token `key`, written as text or as an object with `content`."""
    value = settings.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    token_id: int | None = backend.token_to_id(text) if isinstance(text, str) else None
    if token_id is None:
        raise CheckpointError(f"tokenizer_config.json: {key}={value!r} is not a token of tokenizer.json")
    return token_id
