"""Byte-level BPE vocabularies with M3's special tokens, trained on Python's standard library.

Training is deterministic for one Python version: the same sources, in the same order, give the same merges.
Another Python version has other sources, hence other merges.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN_OF_DOCUMENT = "]~!b["
TURN_START = "]~b]"
END_OF_TURN = "[e~["
IMAGE = "]<]image[>["
VIDEO = "]<]video[>["
SPECIAL_TOKENS = (BEGIN_OF_DOCUMENT, TURN_START, END_OF_TURN, IMAGE, VIDEO)
# Added, but not special: they have to survive decoding, since tool calls and reasoning are parsed from the text.
MARKER_TOKENS = ("]<]minimax[>[", "<mm:think>", "</mm:think>")
NUM_ADDED_TOKENS = len(SPECIAL_TOKENS) + len(MARKER_TOKENS)
NUM_BYTES = 256

# Words with the space before them, runs of at most three digits, runs of symbols, white space (after GPT-2).
_SPLIT = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Long, plain modules that every CPython ships.
DEMO_MODULES = tuple(
    """argparse ast asyncio.base_events bdb calendar cmd codecs collections configparser csv datetime decimal difflib
    dis doctest email.message enum fractions ftplib functools gettext gzip heapq html.parser http.client
    http.server imaplib inspect ipaddress locale logging logging.handlers mailbox multiprocessing.managers optparse os
    pathlib pdb pickle pickletools platform posixpath pprint pydoc queue random shutil smtplib socket socketserver ssl
    statistics string subprocess tarfile tempfile textwrap threading timeit trace traceback turtle typing
    unittest.case unittest.mock urllib.request uuid warnings weakref xml.dom.minidom zipfile""".split()
)
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

    Fewer merges than asked for leave the highest ids without a token, as released M3 does; the smallest vocabulary
    is the 256 bytes and the added tokens.
    """
    if vocab_size < NUM_BYTES + NUM_ADDED_TOKENS:
        raise ValueError(f"vocab_size must be at least {NUM_BYTES + NUM_ADDED_TOKENS}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_ADDED_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sources(modules), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKER_TOKENS])
    return tokenizer
