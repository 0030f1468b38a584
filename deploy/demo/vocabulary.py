"""Byte-level BPE vocabularies with M3's special tokens, trained on Python code.

Training is deterministic for one Python version: the same sources, in the same order, give the same merges.
Another Python version has other sources, hence other merges.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN_OF_DOCUMENT = "]~!b["
TURN_START = "]~b]"
END_OF_TURN = "[e~["
IMAGE = "]<]image[>["
VIDEO = "]<]video[>["
SPECIAL_TOKENS = (BEGIN_OF_DOCUMENT, TURN_START, END_OF_TURN, IMAGE, VIDEO)
# Added, but not special: they survive decoding, since tool calls and reasoning are parsed from the text.
MARKER_TOKENS = ("]<]minimax[>[", "<mm:think>", "</mm:think>")
NUM_ADDED_TOKENS = len(SPECIAL_TOKENS) + len(MARKER_TOKENS)
NUM_BYTES = 256

# Words with the space before them, runs of at most three digits, runs of symbols, white space (after GPT-2).
_SPLIT = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CODE_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
# Plain modules that every CPython ships.
SMALL_MODULES = ("textwrap", "heapq", "shutil", "argparse")


def _sources(modules: Sequence[str]) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in modules:
        stem = root.joinpath(*name.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                yield path.read_text(encoding="utf-8")


@cache
def train_tokenizer(vocab_size: int, modules: tuple[str, ...] = SMALL_MODULES) -> Tokenizer:
    """A tokenizer with ids below `vocab_size`, the added tokens last.

    The smallest vocabulary is the 256 bytes and the added tokens.  When the text has fewer merges than asked
    for, the highest ids have no token, as in the released M3.
    """
    return _train(vocab_size, _SPLIT, _sources(modules))


def train_code_tokenizer(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of the trained checkpoint: its words may begin with one symbol (`.append`), line breaks come with
    their indentation, digits stand alone."""
    return _train(vocab_size, _CODE_SPLIT, texts)


def _train(vocab_size: int, split: str, texts: Iterable[str]) -> Tokenizer:
    if vocab_size < NUM_BYTES + NUM_ADDED_TOKENS:
        raise ValueError(f"vocab_size must be at least {NUM_BYTES + NUM_ADDED_TOKENS}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_ADDED_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for special, texts in ((True, SPECIAL_TOKENS), (False, MARKER_TOKENS)):
        tokens = [AddedToken(text, special=special, normalized=False) for text in texts]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add(tokens)
    return tokenizer
