"""Tokenizer files, incremental text against whole decode, stop strings against a naive search."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from engine.errors import CheckpointError, RequestError
from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.types import SamplingParams

EOS, BOS = "[e~[", "]~b]"


def byte_level() -> tokenizers.Tokenizer:
    """All 256 bytes, a few merges, added tokens: special, with a space, and "ö", which is also byte 0xF6's letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("he", "l"), ("l", "o"), ("Ġ", "w"), ("Ġ", "Ġ"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ã", "©")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS, BOS])
    backend.add_tokens([AddedToken("<mm:think>"), AddedToken("two words"), AddedToken("ö"), AddedToken("日本")])
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """A SentencePiece-like vocabulary: spaces as U+2581, unknown characters as bytes, first space stripped."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁a", "a", "é", "o", "."]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


TOKENIZER = Tokenizer(byte_level())
SIZE = TOKENIZER.vocab_size
ids = st.lists(st.integers(0, SIZE + 2), max_size=40)
texts = st.text(st.sampled_from("helo w \n é日😀👩‍👩‍👧ß\u0301<m:>"), max_size=40)


def save(directory: Path, backend: tokenizers.Tokenizer, **files: object) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def pieces_of(token_ids: list[int], cuts: list[int], **params) -> tuple[list[str], IncrementalDetokenizer]:
    detokenizer = IncrementalDetokenizer(TOKENIZER, SamplingParams(max_tokens=10**6, **params))
    bounds = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    pieces = [detokenizer.push(token_ids[a:b]) for a, b in pairwise(bounds)]
    return [*pieces, detokenizer.finish()], detokenizer


# --- files ---


def test_from_dir_reads_special_tokens(tmp_path: Path) -> None:
    backend = byte_level()
    eos, bos = backend.token_to_id(EOS), backend.token_to_id(BOS)
    save(
        tmp_path,
        backend,
        tokenizer_config={"eos_token": {"content": EOS, "special": True}, "bos_token": BOS},
        generation_config={"eos_token_id": [3, eos]},
    )
    tokenizer = Tokenizer.from_dir(tmp_path, vocab_size=SIZE)
    assert tokenizer.eos_token_ids == (3, eos)
    assert tokenizer.bos_token_id == bos
    assert tokenizer.vocab_size == SIZE == backend.get_vocab_size()
    assert tokenizer.is_special(eos) and not tokenizer.is_special(backend.token_to_id("<mm:think>"))


def test_only_tokenizer_json_is_needed(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(save(tmp_path, byte_level()))
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((), None)


def test_generation_config_alone_names_bos(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), generation_config={"bos_token_id": 9, "eos_token_id": 4})
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((4,), 9)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "\x00"])
def test_broken_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a valid tokenizer"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<nowhere>"}}, "eos_token='<nowhere>' is not a token"),
        ({"tokenizer_config": {"bos_token": 5}}, "bos_token=5 is not a token"),
        ({"tokenizer_config": []}, "must hold a JSON object"),
        ({"generation_config": {"eos_token_id": "x"}}, "eos_token_id must be a token id"),
        ({"generation_config": {"eos_token_id": [True]}}, "eos_token_id must be a token id"),
        ({"generation_config": {"bos_token_id": -1}}, "bos_token_id must be a token id"),
    ],
)
def test_broken_side_files(tmp_path: Path, files: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_dir(save(tmp_path, byte_level(), **files))


def test_tokens_past_the_vocabulary_of_the_model(tmp_path: Path) -> None:
    save(tmp_path, byte_level())
    with pytest.raises(CheckpointError, match=rf"id {SIZE - 1}: the model's vocab_size is {SIZE - 1}"):
        Tokenizer.from_dir(tmp_path, vocab_size=SIZE - 1)


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_dir(save(tmp_path, backend))
    assert len(tokenizer.encode("abcdefgh")) == 8


def test_imports_no_torch() -> None:
    code = "import sys, engine.tokenizer; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- encode and decode ---


@given(texts)
def test_round_trip(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == text


def test_special_tokens_are_added_only_when_asked_for() -> None:
    backend = byte_level()
    bos = backend.token_to_id(BOS)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("a", add_special_tokens=True) == [bos, *tokenizer.encode("a")]
    assert tokenizer.encode_batch(["a", ""]) == [tokenizer.encode("a"), []]
    assert tokenizer.decode([bos, *tokenizer.encode("a")]) == "a"
    assert tokenizer.decode([bos, *tokenizer.encode("a")], skip_special_tokens=False) == BOS + "a"


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 2"):
        TOKENIZER.encode("ab\ud800")


@pytest.mark.parametrize("token_id", [-1, 2**32, 10**30])
def test_decode_refuses_impossible_ids(token_id: int) -> None:
    with pytest.raises(RequestError, match="token ids must be in"):
        TOKENIZER.decode([token_id])
    assert TOKENIZER.token_bytes(token_id) == b""


def test_ids_without_a_token_give_no_text() -> None:
    assert TOKENIZER.decode([SIZE + 5, 2**32 - 1]) == ""
    assert TOKENIZER.token_text(SIZE + 5) == ""


def test_token_text_shows_broken_bytes() -> None:
    emoji = TOKENIZER.encode("😀")
    assert [TOKENIZER.token_text(i) for i in emoji] == [r"bytes:\xf0\x9f\x98", r"bytes:\x80"]
    assert b"".join(TOKENIZER.token_bytes(i) for i in emoji).decode() == "😀"
    assert [TOKENIZER.token_text(i) for i in TOKENIZER.encode("two words<mm:think> w")] == [
        "two words",
        "<mm:think>",
        " w",
    ]


@given(ids)
def test_token_bytes_in_a_row_are_the_text(token_ids: list[int]) -> None:
    joined = b"".join(TOKENIZER.token_bytes(i) for i in token_ids)
    assert joined.decode(errors="replace") == TOKENIZER.decode(token_ids, skip_special_tokens=False)


# --- incremental text ---


@settings(max_examples=300)
@given(ids, st.lists(st.integers(0, 40), max_size=6), st.booleans())
def test_pieces_are_the_whole_text(token_ids: list[int], cuts: list[int], skip: bool) -> None:
    pieces, detokenizer = pieces_of(token_ids, cuts, skip_special_tokens=skip)
    assert "".join(pieces) == TOKENIZER.decode(token_ids, skip_special_tokens=skip) == detokenizer.text
    assert detokenizer.num_tokens_used == len(token_ids)


@given(texts)
def test_valid_text_never_shows_a_replacement_character(text: str) -> None:
    token_ids = TOKENIZER.encode(text)
    pieces, detokenizer = pieces_of(token_ids, list(range(len(token_ids))), skip_special_tokens=False)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    # Each token of complete characters starts where its text is.
    for token_id, offset in zip(token_ids, detokenizer.offsets, strict=True):
        token = TOKENIZER.token_text(token_id)
        assert token.startswith("bytes:") or text[offset:].startswith(token)


def test_characters_come_out_as_soon_as_they_are_complete() -> None:
    token_ids = TOKENIZER.encode("a😀日b")
    detokenizer = IncrementalDetokenizer(TOKENIZER, SamplingParams())
    assert [detokenizer.push([i]) for i in token_ids] == ["a", "", "😀", "", "", "日", "b"]
    assert detokenizer.offsets == [0, 1, 1, 2, 2, 2, 3]
    assert detokenizer.finish() == ""


def test_finish_shows_what_never_completed() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, SamplingParams())
    assert detokenizer.push(TOKENIZER.encode("a😀")[:2]) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.text == "a\ufffd"
    assert detokenizer.finish() == ""


def test_the_token_that_ended_the_request_has_no_text_unless_included() -> None:
    token_ids = TOKENIZER.encode("hello")
    for include, expected in ((False, "hel"), (True, "hello")):
        sampling = SamplingParams(include_stop_str_in_output=include)
        detokenizer = IncrementalDetokenizer(TOKENIZER, sampling)
        out = detokenizer.push(token_ids, last_is_stop=True) + detokenizer.finish()
        assert (out, detokenizer.num_tokens_used) == (expected, 2)


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(["▁hello", "▁", "a", "é", ".", "日", "😀", "\n"]), max_size=30),
)
def test_other_decoders_stream_by_difference(symbols: list[str]) -> None:
    backend = byte_fallback()
    tokenizer = Tokenizer(backend)
    assert not tokenizer.is_byte_level
    token_ids: list[int] = []
    for symbol in symbols:
        known = backend.token_to_id(symbol)
        token_ids += [1 + byte for byte in symbol.encode()] if known is None else [known]
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams())
    pieces = [detokenizer.push([i]) for i in token_ids] + [detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert "\ufffd" not in "".join(pieces)


def test_other_decoders_cannot_be_stalled_by_broken_bytes() -> None:
    tokenizer = Tokenizer(byte_fallback())
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams())
    out = "".join(detokenizer.push([1 + 0xFF]) for _ in range(1000))
    assert set(out) == {"\ufffd"} and len(out) > 900
    assert len(out + detokenizer.finish()) == 1000


def test_other_decoders_know_the_bytes_of_a_token() -> None:
    tokenizer = Tokenizer(byte_fallback())
    assert tokenizer.token_bytes(1 + 0xE9) == b"\xe9"
    assert tokenizer.token_text(1 + 0xE9) == r"bytes:\xe9"
    assert tokenizer.token_text(tokenizer.encode("é")[0]) == "é"


# --- stop strings ---


def naive_stop(token_ids: list[int], stops: list[str], min_tokens: int, include: bool) -> tuple[str, str | None, int]:
    """Decode every prefix from scratch: (text, stop string, tokens used)."""
    before = 0
    for used in range(1, len(token_ids) + 1):
        text = b"".join(TOKENIZER.token_bytes(i) for i in token_ids[:used]).decode(errors="ignore")
        for end in range(before + 1, len(text) + 1):
            hits = [stop for stop in stops if text[:end].endswith(stop)]
            if hits and used > min_tokens:
                stop = max(hits, key=len)
                return text[: end if include else end - len(stop)], stop, used
        before = len(text)
    return text if token_ids else "", None, len(token_ids)


@settings(max_examples=500, deadline=None)
@given(
    st.text(st.sampled_from("helo w😀"), max_size=30),
    st.lists(st.text(st.sampled_from("helo w😀"), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(0, 6),
    st.booleans(),
    st.lists(st.integers(0, 30), max_size=4),
)
def test_stop_strings(text: str, stops: list[str], min_tokens: int, include: bool, cuts: list[int]) -> None:
    token_ids = TOKENIZER.encode(text)
    expected = naive_stop(token_ids, stops, min_tokens, include)
    pieces, detokenizer = pieces_of(
        token_ids, cuts, stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include
    )
    assert ("".join(pieces), detokenizer.stopped, detokenizer.num_tokens_used) == expected
    assert detokenizer.text == expected[0]


def test_a_possible_start_of_a_stop_string_is_held_back() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, SamplingParams(stop=["END", "ENTER"]))
    assert [detokenizer.push(TOKENIZER.encode(char)) for char in "aEENxENTER"] == [
        "a", "", "E", "", "ENx", "", "", "", "", "",
    ]  # fmt: skip
    assert (detokenizer.stopped, detokenizer.text) == ("ENTER", "aEENx")
    assert detokenizer.push(TOKENIZER.encode("more")) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.num_tokens_used == 10


def test_held_text_comes_out_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, SamplingParams(stop="END"))
    assert detokenizer.push(TOKENIZER.encode("xEN")) == "x"
    assert detokenizer.finish() == "EN"
    assert (detokenizer.stopped, detokenizer.text) == (None, "xEN")


def test_of_stop_strings_that_end_together_the_longest_wins() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, SamplingParams(stop=["lo", "hello", "o"]))
    assert detokenizer.push(TOKENIZER.encode("well hello")) == "well "
    assert detokenizer.stopped == "hello"


def test_a_stop_string_may_be_the_replacement_of_broken_bytes() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, SamplingParams(stop="\ufffd"))
    detokenizer.push(TOKENIZER.encode("a😀")[:2])
    assert detokenizer.finish() == ""
    assert (detokenizer.stopped, detokenizer.text) == ("\ufffd", "a")


def test_skipped_special_tokens_do_not_break_a_stop_string() -> None:
    token_ids = [*TOKENIZER.encode("EN"), *TOKENIZER.encode(EOS), *TOKENIZER.encode("D!")]
    assert pieces_of(token_ids, [2])[1].text == "END!"
    pieces, detokenizer = pieces_of(token_ids, [2], stop="END")
    assert ("".join(pieces), detokenizer.num_tokens_used) == ("", 4)


def test_the_largest_allowed_stop_strings() -> None:
    """16 stop strings of up to 1024 characters against a text that almost matches all the time."""
    stops = ["a" * (1023 - i) + "b" for i in range(16)]
    token_ids = TOKENIZER.encode("a" * 20000)
    detokenizer = IncrementalDetokenizer(TOKENIZER, SamplingParams(stop=stops))
    out = "".join(detokenizer.push([token_id]) for token_id in token_ids)
    assert len(out) == 20000 - 1023
    assert detokenizer.finish() == "a" * 1023
