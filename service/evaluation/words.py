"""Which token ids stand for words, names and punctuation in the synthetic tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from numpy.typing import NDArray

Filler = Callable[[np.random.Generator, int], NDArray[np.int32]]
# What stands in the lines of the tasks, beside words.
_PIECES = ("# key", "# set", "# get", " =", "\n")
_MIN_WORDS = 48
_HELD_OUT_SHARE = 0.05
_NUM_COMPOUNDS = 1536


@dataclass
class Words:
    """The vocabulary of the tasks.

    lists: the tokens of each word, one to three.  plain: int32 [n], the training words of one token, as ids.
    training, held_out: int64 [n], indices into `lists`: words of training, and those that only name things in
    evaluation, whose first tokens no training task uses.  key, set, get, equals, newline: the tokens of `# key`,
    `# set`, `# get`, ` =` and a line break.  breaks_line: bool [vocab], whether a token is
    a line break, with the indentation after it or without.  filler:
    (generator, n) -> int32 [n], real text for tasks that are set in text; whoever has text sets it.
    """

    lists: list[list[int]]
    plain: NDArray[np.int32]
    training: NDArray[np.int64]
    held_out: NDArray[np.int64]
    key: list[int]
    set: list[int]
    get: list[int]
    equals: list[int]
    newline: list[int]
    breaks_line: NDArray[np.bool_]
    filler: Filler | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: tokenizers.Tokenizer, filler: Filler | None = None) -> Words:
        """The same words for the same tokenizer.

        A word is a space and lower-case letters, one to three tokens, so that it can be typed; a vocabulary without
        enough of them (one of bytes) gives any ordinary tokens instead. ValueError for fewer than 48 of these.
        """
        key, set_, get, equals, newline = (tokenizer.encode(piece, add_special_tokens=False).ids for piece in _PIECES)
        texts = _ordinary_texts(tokenizer)
        breaks = [token for token, text in texts.items() if not text.strip() and "\n" in text]
        vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        breaks_line = np.zeros(vocab_size, dtype=bool)
        breaks_line[breaks] = True

        starts = [token for token, text in texts.items() if text[:1] == " " and _is_word(text[1:])]
        ends = [token for token, text in texts.items() if _is_word(text)]
        singles = _that_round_trip(tokenizer, [[token] for token in starts if len(texts[token]) > 2])
        compounds: list[list[int]] = []
        rng = np.random.default_rng(0)
        if len(singles) >= _MIN_WORDS:
            for num_ends in (1, 2) if ends else ():
                drawn = np.column_stack(
                    [rng.choice(starts, _NUM_COMPOUNDS), rng.choice(ends, (_NUM_COMPOUNDS, num_ends))]
                )
                compounds += _that_round_trip(tokenizer, np.unique(drawn, axis=0).tolist())
        else:
            used = {*key, *set_, *get, *equals, *newline, *breaks}
            singles = [[token] for token in texts if token not in used]
            if len(singles) < _MIN_WORDS:
                raise ValueError(f"the tokenizer has {len(singles)} ordinary tokens, the tasks need {_MIN_WORDS}")
        hidden = rng.permutation(len(singles))[: max(8, int(_HELD_OUT_SHARE * len(singles)))]
        hidden_tokens = {singles[int(i)][0] for i in hidden}
        lists = singles + compounds
        is_held_out = np.array([word[0] in hidden_tokens for word in lists])
        plain = [word[0] for word in singles if word[0] not in hidden_tokens]
        return cls(
            lists=lists,
            plain=np.array(plain, dtype=np.int32),
            training=np.flatnonzero(~is_held_out),
            held_out=np.flatnonzero(is_held_out),
            key=key,
            set=set_,
            get=get,
            equals=equals,
            newline=newline,
            breaks_line=breaks_line,
            filler=filler,
        )


def _ordinary_texts(tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    """The text of every token that is neither special nor added."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True).values()
    added = tokenizer.get_added_tokens_decoder().keys()
    ids = sorted(set(vocabulary) - set(added))
    return dict(zip(ids, tokenizer.decode_batch([[token] for token in ids]), strict=True))


def _is_word(text: str) -> bool:
    return text.isascii() and text.isalpha() and text.islower()


def _that_round_trip(tokenizer: tokenizers.Tokenizer, words: Sequence[list[int]]) -> list[list[int]]:
    """The words that a tokenizer cuts in just these tokens when somebody types them."""
    texts = tokenizer.decode_batch(words)
    found = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [word for word, encoding in zip(words, found, strict=True) if encoding.ids == word]
