"""Grammars and their masks: what may come next, against a check of every token; what no grammar can be made of."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import RequestError
from engine.guided import Grammars, Guide, GuidedSlots, Mask, check
from engine.sampler import SamplerState, unpack_bits
from engine.tokenizer import Tokenizer
from engine.types import MAX_GUIDED_CHARS, GuidedSpec, NewRequest, SamplingParams

VOCAB = 530  # the tokenizer has 512, and 530 fills no whole word of bits
MARKER, END = 7, 9  # stand in for the tokens around the reasoning


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_dir(checkpoint)


@pytest.fixture(scope="module")
def grammars(checkpoint: Path, tokenizer: Tokenizer) -> Grammars:
    return Grammars(checkpoint, vocab_size=VOCAB, eos_token_ids=tokenizer.eos_token_ids)


def allowed(guide: Guide) -> set[int]:
    mask: Mask = np.zeros(-(-VOCAB // 32), np.int32)
    guide.fill(mask)
    bits = unpack_bits(torch.from_numpy(mask[None]), 32 * len(mask))[0].nonzero().flatten().tolist()
    assert all(token < VOCAB for token in bits), "a bit past the vocabulary"
    return set(bits)


def test_masks_hold_exactly_the_tokens_after_which_a_match_is_left(grammars: Grammars, tokenizer: Tokenizer) -> None:
    texts = {"".join(each) + " in" for n in (1, 2, 3) for each in product(("a", "re", "\u00e9"), repeat=n)}
    matches = {text.encode() for text in texts}
    [eos] = tokenizer.eos_token_ids
    token_bytes = {token: data for token in range(512) if (data := tokenizer.token_bytes(token)) and token != eos}
    rng = random.Random(0)
    for spec in (GuidedSpec("regex", "(a|re|\u00e9){1,3} in"), GuidedSpec("choice", json.dumps(sorted(texts)))):
        for _ in range(20):
            guide, prefix = Guide(grammars, spec), b""
            while True:
                expected = {
                    token
                    for token, data in token_bytes.items()
                    if any(each.startswith(prefix + data) for each in matches)
                }
                expected |= {eos} if prefix in matches else set()
                found = allowed(guide)
                next_bytes = {each[len(prefix) : len(prefix) + 1] for each in matches if each.startswith(prefix)}
                # Where only one text is left, it comes in the tokens that the tokenizer makes of it.
                assert found == expected or (found < expected and len(next_bytes) == 1), prefix
                token = rng.choice(sorted(found))
                guide.consume(token)
                if token == eos:
                    break
                prefix += token_bytes[token]
            assert prefix in matches and guide.error is None
            assert allowed(guide) == {eos}, "a row planned before its end was known"


def test_reasoning_comes_first_and_is_free_but_for_its_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    [eos] = tokenizer.eos_token_ids
    text = GuidedSpec("choice", '["yes"]')
    bound = allowed(Guide(grammars, text))
    free = set(range(VOCAB)) - {eos}
    inside = Guide(grammars, GuidedSpec("choice", '["yes"]', reasoning_end_id=END))
    for token in (5, MARKER, 300):
        assert allowed(inside) == free
        inside.consume(token)
    inside.consume(END)
    assert allowed(inside) == bound != free

    def may_think() -> Guide:
        return Guide(grammars, GuidedSpec("choice", '["yes"]', reasoning_end_id=END, reasoning_start_id=MARKER))

    assert allowed(may_think()) == bound | {MARKER, END}
    thinks, ends, answers = may_think(), may_think(), may_think()
    thinks.consume(MARKER)
    assert allowed(thinks) == free
    thinks.consume(END)
    ends.consume(END)
    assert allowed(thinks) == allowed(ends) == bound
    first = tokenizer.encode("yes")
    answers.consume(first[0])
    direct = Guide(grammars, text)
    direct.consume(first[0])
    assert allowed(answers) == allowed(direct)


def test_outputs_of_an_earlier_life_are_replayed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    spec = GuidedSpec("json_schema", '{"type": "array", "items": {"type": "integer"}}', reasoning_end_id=END)
    tokens = [3, 4, END, *tokenizer.encode("[12, 3")]
    stepwise = Guide(grammars, spec)
    for i, token in enumerate(tokens):
        assert allowed(Guide(grammars, spec, tokens[:i])) == allowed(stepwise)
        stepwise.consume(token)


def test_a_token_that_does_not_fit_is_an_error_and_not_a_crash(grammars: Grammars) -> None:
    guide = Guide(grammars, GuidedSpec("choice", '["yes"]'), outputs=[MARKER])
    assert allowed(guide) == set(range(VOCAB)), "something has to be drawn"
    assert guide.error is not None and str(MARKER) in guide.error
    guide.consume(3)
    bad = Guide(grammars, GuidedSpec("regex", "("))
    assert allowed(bad) == set(range(VOCAB)) and "regex" in (bad.error or "")


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", "{", "JSON"),
        ("json_schema", "[]", "JSON schema"),
        ("json_schema", '{"type": "integers"}', "integers"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        ("json_schema", '{"allOf": [{"type": "string"}, {"type": "integer"}]}', "Unsatisfiable"),
        ("json_schema", '{"type": "object", "properties": {"a": false}, "required": ["a"]}', "Unsatisfiable"),
        ("json_schema", '{"$ref": "http://127.0.0.1/schema"}', "http"),
        ("json_schema", '{"items":' * 1000 + "{}" + "}" * 1000, "recursion"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ("regex", "(", "unclosed"),
        ("regex", "(" * 2000 + ")" * 2000, "regex"),
        ("choice", "[]", "at least one"),
        ("choice", '["a", ""]', "empty"),
        ("choice", '["a", 1]', "string"),
        ("choice", json.dumps(["a"] * 1025), "at most 1024"),
        ("grammar", "start: other", "other"),
        ("grammar", "start: " + "(" * 1000 + '"a"' + ")" * 1000, "nested"),
        ("grammar", "", "root"),
    ],
)
def test_what_is_no_grammar_is_refused_in_a_few_words(grammars: Grammars, kind: str, text: str, reason: str) -> None:
    for refuse in (grammars.matcher, check):
        with pytest.raises(RequestError, match=reason) as caught:
            refuse(GuidedSpec(kind, text))
        assert caught.value.message.startswith(f"{kind}: ") and len(caught.value.message) < 600
    assert not grammars.knows(GuidedSpec(kind, text))


@pytest.mark.parametrize(("kind", "text"), [("regex", r"[^\s\S]"), ("grammar", 'start: x\nx: x "a"')])
def test_what_no_text_matches_is_refused(grammars: Grammars, kind: str, text: str) -> None:
    with pytest.raises(RequestError, match="no text matches"):
        grammars.matcher(GuidedSpec(kind, text))


def test_what_takes_long_to_compile_is_refused_where_a_limit_is_set(checkpoint: Path, grammars: Grammars) -> None:
    members = {f"member{i}": {"type": "string"} for i in range(200)}
    spec = GuidedSpec("json_schema", json.dumps({"type": "object", "properties": members}))
    grammars.matcher(spec)
    eos_token_ids = grammars.eos_token_ids
    hasty = Grammars(checkpoint, vocab_size=VOCAB, eos_token_ids=eos_token_ids, max_compile_s=1e-6)
    with pytest.raises(RequestError, match=r"to compile, at most 1e-06 s"):
        hasty.matcher(spec)


def test_a_chain_of_rules_does_not_end_the_process(grammars: Grammars) -> None:
    """The compiler recurses along it, past what the stack of a usual thread holds."""
    rules = [f"r{i}: r{i + 1}\n" for i in range(4500)]
    grammars.matcher(GuidedSpec("grammar", "start: r0\n" + "".join(rules) + 'r4500: "b"'))


def test_limits_of_a_spec() -> None:
    assert GuidedSpec("regex", "a" * MAX_GUIDED_CHARS).kind == "regex"
    for fields in (
        {"kind": "xml"},
        {"kind": "regex", "text": "a" * (MAX_GUIDED_CHARS + 1)},
        {"kind": "regex", "text": 5},
        {"kind": "json_object", "reasoning_start_id": 3},
    ):
        with pytest.raises(RequestError):
            GuidedSpec(**fields)  # type: ignore[arg-type]
    for conflict in ({"ignore_eos": True}, {"min_tokens": 2}):
        with pytest.raises(RequestError, match=next(iter(conflict))):
            SamplingParams(guided=GuidedSpec("regex", "a"), **conflict)


class At:
    """When the device comes there."""

    def __init__(self) -> None:
        self.waited = 0

    def wait(self) -> None:
        self.waited += 1


def test_slots_wait_for_sampled_tokens_only_where_a_mask_needs_them(grammars: Grammars, tokenizer: Tokenizer) -> None:
    slots = GuidedSlots(grammars)
    bound = SamplingParams(guided=GuidedSpec("choice", '["are", "in"]'))
    slots.add(NewRequest(0, [1, 2], 2, SamplingParams()))
    slots.add(NewRequest(3, [1, 2], 2, bound))
    assert slots.masks([0]) is None
    first = slots.masks([0, 3])
    assert first is not None and first.shape == (1, -(-VOCAB // 32))
    done = At()
    token = tokenizer.encode("in")[0]
    assert slots.sampled([0, 3], torch.tensor([5, token]), done) == 1
    assert slots.sampled([0], torch.tensor([5]), done) == 0
    assert slots.masks([0]) is None and done.waited == 0, "a free row waits for nothing"
    second = slots.masks([3])
    assert second is not None and done.waited == 1 and not np.array_equal(first, second)
    assert slots.error(3) is None and slots.error(0) is None and slots.take_seconds() > 0 == slots.take_seconds()
    slots.remove(3)
    slots.remove(0)
    assert slots.masks([3]) is None


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 200, "min_p": 0.02},
        {"temperature": 0.0, "repetition_penalty": 1.4, "logit_bias": {3: 5.0, 8: -100.0}},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    ],
)
def test_sampling_under_a_mask_is_sampling_without_the_other_tokens(params: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab = 300
    logits = 4 * torch.randn(6, vocab, generator=generator)
    allow = torch.rand(3, vocab, generator=generator) < torch.tensor([[0.5], [0.1], [0.01]])
    padded = torch.zeros(3, 320, dtype=torch.bool)
    padded[:, :vocab] = allow
    weights = 2 ** torch.arange(32, dtype=torch.int64)
    masks = (padded.view(3, 10, 32) * weights).sum(2).to(torch.int32)
    assert torch.equal(unpack_bits(masks, vocab), allow)

    def state(guided: GuidedSpec | None) -> SamplerState:
        made = SamplerState(6, vocab)
        for slot in range(6):
            spec = guided if slot % 2 else None
            made.add(NewRequest(slot, [1, 2, 3, 3, 8], 3, SamplingParams(seed=slot, guided=spec, **params)), [0])
        return made

    positions = [5] * 6
    reference = logits.clone()
    reference[1::2] = torch.where(allow, logits[1::2], -1e30)
    slots = list(range(6))
    expected = state(None).sample(reference, slots, positions)
    found = state(GuidedSpec("json_object")).sample(logits, slots, positions, masks)
    assert torch.equal(found, expected)
    assert allow.gather(1, found[1::2, None]).all()
