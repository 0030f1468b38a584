"""Runs the engine and the oracle on the same tokens and says where they differ."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import LLM, SamplingParams
from engine.kernels.batch import StepBatch
from engine.kernels.params import Selection
from engine.types import Output
from tests.golden.oracle import Oracle, OracleRun

MAX_LOGPROB_ERROR = 1e-4
# Two block scores closer than this, relative to their size, are a tie: fp32 rounding may order them either way.
TIE = 1e-5
MAX_TIES = 8


@dataclass(frozen=True)
class Observed:
    """One request as the engine ran it.

    selections: per sparse layer, int32 [num_index_heads, num_tokens, topk_blocks], by position; the tokens are
    the prompt and all generated ones but the last, which never was an input.
    """

    output: Output
    selections: dict[int, Tensor]

    @property
    def input_ids(self) -> list[int]:
        return self.output.prompt_token_ids + self.output.token_ids[:-1]


def open_llm(path: Path, *, chunk: int = 4096, num_pages: int = 64, **settings: Any) -> LLM:
    """The engine as the golden tests run it: fp32, no prefix cache, `chunk` tokens per step."""
    fixed = {"dtype": "float32", "backend": "torch", "enable_prefix_caching": False, "max_num_seqs": 8}
    return LLM(str(path), **{**fixed, "max_num_batched_tokens": chunk, "num_pages": num_pages, **settings})


def greedy(max_tokens: int) -> SamplingParams:
    """The best token each time, never ended early, with the log-probability of every token."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)


def observe(llm: LLM, prompt: Sequence[int], max_tokens: int) -> Observed:
    """Generate greedily from one prompt, alone, and keep every layer's selection."""
    [observed] = observe_batch(llm, [prompt], max_tokens)
    return observed


def observe_batch(llm: LLM, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Observed]:
    """As `observe`, all prompts in one call; their lengths must differ, since they tell the requests apart."""
    # Per layer, one list of (positions, blocks) for every row that started at position 0.
    traces: dict[int, list[list[tuple[Tensor, Tensor]]]] = {}
    # While a request runs, its first page is its own.
    running: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def keep(layer_id: int, batch: StepBatch, selection: Selection) -> None:
        for row, (start, end) in enumerate(pairwise(batch.query_starts)):
            key = (layer_id, int(batch.block_table[row, 0]))
            positions = batch.positions[start:end].clone()
            if positions[0] == 0:
                running[key] = []
                traces.setdefault(layer_id, []).append(running[key])
            running[key].append((positions, selection.blocks[:, start:end].clone()))

    llm.index_cache.observer = keep
    try:
        outputs = llm.generate([list(prompt) for prompt in prompts], greedy(max_tokens))
    finally:
        llm.index_cache.observer = None
    selections = {layer_id: [_join(trace) for trace in found] for layer_id, found in traces.items()}
    lengths = [len(prompt) + max_tokens - 1 for prompt in prompts]
    for layer_id, found in selections.items():
        assert sorted(blocks.shape[1] for blocks in found) == sorted(set(lengths)), f"layer {layer_id}"
    return [
        Observed(output, {layer_id: _of_length(found, length) for layer_id, found in selections.items()})
        for output, length in zip(outputs, lengths, strict=True)
    ]


def _join(trace: list[tuple[Tensor, Tensor]]) -> Tensor:
    positions = torch.cat([where for where, _ in trace])
    # Each position once, in order: nothing was left out or run twice.
    assert torch.equal(positions, torch.arange(len(positions)))
    return torch.cat([blocks for _, blocks in trace], dim=1)


def _of_length(found: list[Tensor], num_tokens: int) -> Tensor:
    [blocks] = [each for each in found if each.shape[1] == num_tokens]
    return blocks


class Reference:
    """The oracle of one checkpoint and plan; remembers its runs."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self._runs: dict[tuple[int, ...], OracleRun] = {}

    def run(self, token_ids: Sequence[int]) -> OracleRun:
        key = tuple(token_ids)
        if key not in self._runs:
            self._runs[key] = self.oracle.run(token_ids)
        return self._runs[key]

    def check(self, observed: Observed) -> OracleRun:
        """Assert that selections, log-probabilities and greedy tokens agree; returns the oracle's run."""
        run = self._agreed_run(observed)
        check_logprobs(observed.output, run)
        return run

    def _agreed_run(self, observed: Observed) -> OracleRun:
        """The oracle's run with the engine's selections: its own, but for near-ties, which are reported."""
        token_ids = observed.input_ids
        run, forced = self.run(token_ids), dict[tuple[int, int, int], list[int]]()
        assert observed.selections.keys() == run.attended.keys()
        while (where := _first_difference(observed.selections, run)) is not None:
            gap = self._gap(run, where, observed.selections)
            assert gap < TIE and len(forced) < MAX_TIES, (
                f"layer, head, token {where}: engine {_valid(observed.selections, where)}, "
                f"oracle {_valid(run.attended, where)}, relative score gap {gap:.2e}"
            )
            warnings.warn(f"near-tie at layer, head, token {where}: relative gap {gap:.1e}", stacklevel=3)
            forced[where] = _valid(observed.selections, where)
            run = self.oracle.run(token_ids, forced)
        return run

    def _gap(self, run: OracleRun, where: tuple[int, int, int], selections: dict[int, Tensor]) -> float:
        """How far apart, relatively, the oracle scores the blocks that only one side picked."""
        layer_id, head, token = where
        ours, theirs = set(_valid(selections, where)), set(_valid(run.attended, where))
        scores = self.oracle.block_scores(run, layer_id, head, token)
        reuses = self.oracle.plan.source(layer_id) != layer_id
        if reuses or len(ours) != len(theirs) or max(ours) >= len(scores):
            return float("inf")
        mine, other = scores[sorted(ours - theirs)], scores[sorted(theirs - ours)]
        gap = (other.max() - mine.min()).abs() / torch.maximum(other.max().abs(), mine.min().abs())
        return float(gap)


def check_logprobs(output: Output, run: OracleRun) -> None:
    """Assert that every token has the oracle's log-probability, and that greedy took its best token."""
    prompt, generated = output.prompt_token_ids, output.token_ids
    assert output.prompt_logprobs is not None and output.logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt) and len(output.logprobs) == len(generated)
    given = [*output.prompt_logprobs[1:], *output.logprobs]
    tokens = prompt[1:] + generated
    pairs = zip(given, tokens, strict=True)
    ours = torch.tensor([entry[token] for entry, token in pairs if entry is not None])
    theirs = run.logprobs[torch.arange(len(tokens)), torch.tensor(tokens)]
    error = (ours - theirs).abs()
    worst = int(error.argmax())
    assert error[worst] < MAX_LOGPROB_ERROR, (
        f"position {worst + 1}: log-probability {ours[worst]:.6f}, the oracle has {theirs[worst]:.6f}"
    )
    best = run.logprobs[len(prompt) - 1 :].max(-1).values
    assert (best - theirs[len(prompt) - 1 :]).max() < MAX_LOGPROB_ERROR, "a greedy token is not the best one"


def _valid(selections: dict[int, Tensor], where: tuple[int, int, int]) -> list[int]:
    layer_id, head, token = where
    return [block for block in selections[layer_id][head, token].tolist() if block >= 0]


def _first_difference(selections: dict[int, Tensor], run: OracleRun) -> tuple[int, int, int] | None:
    """The earliest (layer, head, token), by layer, then token, whose blocks are not the oracle's."""
    for layer_id in sorted(run.attended):
        ours, theirs = selections[layer_id], run.attended[layer_id]
        assert ours.shape == theirs.shape, f"layer {layer_id}"
        differs = (ours != theirs).any(-1)
        if differs.any():
            token = int(differs.any(0).nonzero()[0])
            return layer_id, int(differs[:, token].nonzero()[0]), token
    return None
