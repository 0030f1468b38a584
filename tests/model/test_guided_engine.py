"""Guided output of a model with random weights, whose every token is a surprise: what it says still matches."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine import LLM, SamplingParams
from engine.engine import EngineCore
from engine.errors import RequestError
from engine.executor import InlineExecutor
from engine.tokenizer import Tokenizer
from engine.types import EngineRequest, FinishReason, GuidedSpec, RequestEvent
from tests.checkpoints import small_engine

SIZES: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 16}
MAX_TOKENS = 200
REASONING_END = 400


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, backend="torch", dtype="float32", num_threads=1, **SIZES) as offline:
        yield offline


def guided(kind: str, text: str = "", **sampling: Any) -> SamplingParams:
    defaults = {"max_tokens": MAX_TOKENS, "seed": 0}
    return SamplingParams(**(defaults | sampling), guided=GuidedSpec(kind, text))


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of bounded size: whatever is drawn, the output ends."""
    leaf: list[dict[str, Any]] = [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": rng.randrange(-99, 1), "maximum": rng.randrange(1, 2000)},
        {"type": "string", "maxLength": rng.randrange(1, 9)},
        {"type": "string", "pattern": "^[a-f]{2,6}$"},
        {"type": "string", "format": "date"},
        {"enum": rng.sample(["red", "green", 3, None, True, "\u00fc\u4e2d", 'q"\\'], 3)},
        {"const": {"k": [1, "two"]}},
    ]
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(leaf)
    kind = rng.choice(["object", "array", "anyOf"])
    if kind == "object":
        names = rng.sample(["name", "age", "tags", "a b", "\u00e9"], rng.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": rng.sample(names, rng.randrange(len(names) + 1)),
            "additionalProperties": False,
        }
    if kind == "array":
        low = rng.randrange(3)
        items = random_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randrange(3)}
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}


def test_json_of_random_schemas_is_valid(llm: LLM) -> None:
    rng = random.Random(1)
    schemas = [{"$schema": "http://json-schema.org/draft-07/schema#", **random_schema(rng)} for _ in range(32)]
    draws: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5, "repetition_penalty": 1.2}]
    params = [guided("json_schema", json.dumps(each), seed=i, **draws[i % 4]) for i, each in enumerate(schemas)]
    outputs = llm.generate([[5 + i, 9, 3] for i in range(len(params))], params)
    num_whole = 0
    for schema, output in zip(schemas, outputs, strict=True):
        if output.finish_reason == "length":
            continue
        num_whole += 1
        jsonschema.validate(json.loads(output.text), schema, format_checker=jsonschema.FormatChecker())
    assert num_whole >= 26


def test_every_kind_matches_and_free_rows_beside_them_are_as_alone(llm: LLM) -> None:
    free = [SamplingParams(max_tokens=20, seed=i, temperature=float(i % 2), logprobs=2) for i in range(4)]
    bound = [
        guided("regex", r"[a-z]{2,5}-\d{3}(\.[A-F]+)?", stop_token_ids=[300]),
        guided("choice", '["maybe", "yes", "no"]', temperature=0.0),
        guided("grammar", 'start: item ("," item)~0..3\nitem: /[0-9]{1,3}/ | "(" start ")"', top_k=3),
        guided("grammar", 'root ::= "<" [a-c]{1,4} ">"'),
        guided("json_object", seed=3, max_tokens=30, logit_bias=dict.fromkeys(range(80, 94), 4.0)),
    ]
    alone = llm.generate([[7, 8, 9 + i] for i in range(4)], free)
    mixed = [pair for i in range(4) for pair in ((free[i], [7, 8, 9 + i]), (bound[i], [3, 4, 5]))]
    mixed.append((bound[4], [3, 4, 5]))
    outputs = llm.generate([prompt for _, prompt in mixed], [sampling for sampling, _ in mixed])
    assert [(each.token_ids, each.logprobs) for each in outputs[0:8:2]] == [
        (each.token_ids, each.logprobs) for each in alone
    ]
    regex, choice, lark, gbnf, json_object = *outputs[1:8:2], outputs[8]
    assert re.fullmatch(r"[a-z]{2,5}-\d{3}(\.[A-F]+)?", regex.text), regex.text
    assert choice.text in ("maybe", "yes", "no") and re.fullmatch("<[a-c]{1,4}>", gbnf.text)
    assert lark.text.count("(") == lark.text.count(")") and re.fullmatch(r"[0-9,()]+", lark.text)
    assert {each.finish_reason for each in (regex, choice, lark, gbnf)} == {"stop"}
    assert json_object.text.startswith("{")
    assert llm.stats.guided_tokens > 0 < llm.stats.mask_s and llm.stats.not_guided == 0


def test_what_is_no_grammar_is_refused_before_anything_runs(llm: LLM) -> None:
    steps = llm.stats.steps
    with pytest.raises(RequestError, match="regex"):
        llm.generate([[3], [4]], [SamplingParams(), guided("regex", "(")])
    for spec in (GuidedSpec("json_object", reasoning_end_id=512), GuidedSpec("json_object", "", 5, -1)):
        with pytest.raises(RequestError, match="guided must hold token ids"):
            llm.generate([[3]], SamplingParams(guided=spec))
    assert llm.stats.steps == steps


def run(core: EngineCore, requests: list[EngineRequest]) -> dict[str, list[RequestEvent]]:
    for request in requests:
        core.add_request(request)
    found: dict[str, list[RequestEvent]] = {request.request_id: [] for request in requests}
    while core.has_work():
        for event in core.step():
            found[event.request_id].append(event)
    return found


def tokens(events: list[RequestEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


# Of its own accord no text of it ends within the tokens that are asked for.
ENDLESS = json.dumps({"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 200})
# From inside the third page into the fourth.
PROMPT_TOKENS, OUTPUT_TOKENS = 250, 140


def requests() -> list[EngineRequest]:
    """Two that are guided, one of them after some reasoning, and one that is free."""
    bound = guided("json_schema", ENDLESS, max_tokens=OUTPUT_TOKENS)
    # Of 512 tokens one comes by itself within a few hundred.
    thinks = SamplingParams(
        max_tokens=OUTPUT_TOKENS, seed=1, guided=GuidedSpec("json_schema", ENDLESS, reasoning_end_id=REASONING_END),
        logit_bias={REASONING_END: 4.0},
    )  # fmt: skip
    free = SamplingParams(max_tokens=OUTPUT_TOKENS, seed=2, ignore_eos=True)
    return [
        EngineRequest(str(i), list(range(3 + i, 3 + i + PROMPT_TOKENS)), each)
        for i, each in enumerate((bound, thinks, free))
    ]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, list[int]]:
    settings = small_engine(checkpoint, **SIZES)
    core = EngineCore(settings, InlineExecutor(settings))
    try:
        events = run(core, requests())
    finally:
        core.close()
    assert [each[-1].finish_reason for each in events.values()] == [FinishReason.LENGTH] * 3
    found = {name: tokens(each) for name, each in events.items()}
    reasoning = found["1"].index(REASONING_END)
    assert 0 < reasoning < OUTPUT_TOKENS - 20
    tokenizer = Tokenizer.from_dir(checkpoint)
    for text in (found["0"], found["1"][reasoning + 1 :]):
        assert re.match(r'\[\s*"', tokenizer.decode(text))
    return found


def test_steps_in_flight_and_preemption_change_nothing(checkpoint: Path, expected: dict[str, list[int]]) -> None:
    config = small_engine(checkpoint, async_scheduling=True, **(SIZES | {"max_model_len": 640, "num_pages": 7}))
    core = EngineCore(config, InlineExecutor(config))
    try:
        assert core.info.max_in_flight == 2
        found = {name: tokens(each) for name, each in run(core, requests()).items()}
        assert core.stats.preemptions > 0
    finally:
        core.close()
    assert found == expected


def test_a_resubmitted_request_goes_on_where_it_was_and_a_broken_one_ends_alone(
    checkpoint: Path, expected: dict[str, list[int]]
) -> None:
    config = small_engine(checkpoint, async_scheduling=True, **SIZES)
    core = EngineCore(config, InlineExecutor(config))
    resumed = [
        dataclasses.replace(request, output_token_ids=expected[request.request_id][:k], resubmitted=True)
        for request, k in zip(requests(), (60, 70, 80), strict=True)
    ]
    # Its first token does not fit its grammar, so another replica cannot have sent it.
    broken = EngineRequest("broken", [5, 6, 7], guided("choice", '["yes"]'), output_token_ids=[300])
    try:
        events = run(core, [*resumed[:2], broken, *resumed[2:]])
        assert core.stats.not_guided == 1
    finally:
        core.close()
    assert (events["broken"][-1].finish_reason, tokens(events["broken"])) == (FinishReason.ERROR, [])
    assert "300" in (events["broken"][-1].error or "")
    for request in resumed:
        assert request.output_token_ids + tokens(events[request.request_id]) == expected[request.request_id]
