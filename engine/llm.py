"""The offline API: generate from a list of prompts, in this process, without Ray when one rank is enough."""

from __future__ import annotations

import dataclasses
import importlib
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine import guided
from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.errors import CheckpointError, RequestError
from engine.executor import Executor, InlineExecutor
from engine.msa.cache import IndexCache
from engine.msa.plan import IndexPlan, Role
from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.types import EngineInfo, EngineRequest, FinishReason, Logprobs, Output, RequestEvent, SamplingParams

Prompt = str | list[int]


class LLM:
    """MiniMax-M3 from a checkpoint directory.

    >>> llm = LLM("checkpoints/demo")
    >>> llm.generate(["def add(a, b):"], SamplingParams(max_tokens=16))[0].text

    Args:
        model_dir: config.json, *.safetensors, tokenizer.json.
        settings: any field of EngineConfig; an unknown name is a ConfigError that lists the known ones.
    """

    def __init__(self, model_dir: str | Path, **settings: Any) -> None:
        config = EngineConfig.from_kwargs(model_dir, **settings)
        self._leave_ray: Callable[[], None] | None = None
        self._executor = self._make_executor(config)
        self._core = EngineCore(config, self._executor)
        try:
            self._tokenizer: Tokenizer | None = Tokenizer.from_dir(model_dir, vocab_size=self._core.info.vocab_size)
        except CheckpointError:
            # A checkpoint of weights alone still serves token ids.
            if (Path(model_dir) / "tokenizer.json").exists():
                self.close()
                raise
            self._tokenizer = None
        self._next_id = 0

    @property
    def info(self) -> EngineInfo:
        """What start-up resolved: pages, dtype, plan."""
        return self._core.info

    @property
    def plan(self) -> IndexPlan:
        """The role of every layer; `str(llm.plan)` gives its letters."""
        return IndexPlan.parse(self._core.plan)

    def set_plan(self, pattern: str) -> None:
        """Generate by another index plan from now on. No weights are loaded again.

        pattern: F or S per sparse layer. ConfigError for an illegal one, and unless index_reuse is audited, in which
        every sparse layer owns its indexer.
        """
        is_sparse = [role is not Role.DENSE for role in self.plan.roles]
        self._core.set_plan(str(IndexPlan.build(is_sparse, pattern=pattern)))

    @property
    def index_cache(self) -> IndexCache:
        """The shared selection of the rank in this process, for tests and analysis."""
        assert isinstance(self._executor, InlineExecutor), "the ranks of a group live in other processes"
        return self._executor.index_cache

    @property
    def stats(self) -> Any:
        """Counters of the engine, see engine/metrics.py."""
        return self._core.stats

    def generate(
        self,
        prompts: Sequence[Prompt] | str,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """Complete every prompt; outputs come in the order of the prompts.

        prompts: texts or lists of token ids.  sampling: one for all, or one per prompt.
        Raises RequestError for a bad prompt or parameter before anything runs.
        """
        given: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        params = self._params(sampling, len(given))
        jobs = [_Job(self._tokenize(prompt), each, self._tokenizer) for prompt, each in zip(given, params, strict=True)]
        requests = {f"llm-{self._next_id + i}": job for i, job in enumerate(jobs)}
        self._next_id += len(jobs)
        try:
            for request_id, job in requests.items():
                self._core.add_request(EngineRequest(request_id, job.prompt_token_ids, job.sampling))
            while self._core.has_work():
                for event in self._core.step():
                    # Events of an earlier, interrupted call may still come.
                    owner = requests.get(event.request_id)
                    if owner is not None and owner.take(event):
                        self._core.abort(event.request_id)
        except BaseException:
            for request_id in requests:
                self._core.abort(request_id)
            raise
        return [job.output() for job in jobs]

    def _params(self, sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if sampling is None:
            sampling = SamplingParams()
        params = [sampling] * count if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != count:
            raise RequestError(f"{count} prompts need as many sampling params, got {len(params)}", param="sampling")
        for spec in {each.guided for each in params if each.guided is not None}:
            guided.check(spec)
        return [
            each if each.seed is not None else dataclasses.replace(each, seed=secrets.randbits(63)) for each in params
        ]

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self._tokenizer is None:
            raise RequestError("the checkpoint has no tokenizer.json: give token ids", param="prompt")
        return self._tokenizer.encode(prompt, add_special_tokens=True)

    def _make_executor(self, config: EngineConfig) -> Executor:
        if config.tensor_parallel_size == 1:
            return InlineExecutor(config)
        # By name: a single rank must work on a machine without Ray.
        ray_executor = importlib.import_module("engine.ray_executor")
        self._leave_ray = ray_executor.ensure_ray(num_cpus=config.tensor_parallel_size)
        executor: Executor = ray_executor.RayExecutor(config)
        return executor

    def close(self) -> None:
        """Free weights, pages and worker processes, and the Ray that was started for them. Safe to call twice."""
        self._core.close()
        if self._leave_ray is not None:
            self._leave_ray()
            self._leave_ray = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Job:
    """One request of a `generate` call, as its events come in."""

    def __init__(self, prompt_token_ids: list[int], sampling: SamplingParams, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None and sampling.stop_strings:
            raise RequestError("stop strings need a tokenizer, and the checkpoint has none", param="stop")
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self._detokenizer = IncrementalDetokenizer(tokenizer, sampling) if tokenizer else None
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] | None = None if sampling.logprobs is None else []
        self._prompt_logprobs: list[Logprobs | None] | None = None
        self._num_cached_tokens = 0
        self._finish_reason: FinishReason | None = None
        self._error: str | None = None

    def take(self, event: RequestEvent) -> bool:
        """Add an event; returns whether a stop string just ended the request, so that it must be aborted."""
        if self._finish_reason is not None:
            return False
        self._token_ids += event.token_ids
        if self._logprobs is not None and event.logprobs:
            self._logprobs += event.logprobs
        if event.prompt_logprobs is not None:
            self._prompt_logprobs = event.prompt_logprobs
        self._num_cached_tokens = max(self._num_cached_tokens, event.num_cached_tokens)
        self._finish_reason, self._error = event.finish_reason, event.error
        if self._detokenizer is None:
            return False
        self._detokenizer.push(event.token_ids, last_is_stop=event.stop_token_id is not None)
        running = self._finish_reason is None
        return self._cut_at_stop(self._detokenizer) and running

    def _cut_at_stop(self, detokenizer: IncrementalDetokenizer) -> bool:
        """End at the stop string, if there was one: tokens past it were never asked for."""
        if detokenizer.stopped is None:
            return False
        used = detokenizer.num_tokens_used
        del self._token_ids[used:]
        if self._logprobs is not None:
            del self._logprobs[used:]
        self._finish_reason = FinishReason.STOP
        return True

    def output(self) -> Output:
        if self._finish_reason is FinishReason.ERROR:
            raise RuntimeError(self._error)
        assert self._finish_reason is not None, "the engine ran out of work with a request unfinished"
        text = ""
        if self._detokenizer is not None:
            self._detokenizer.finish()
            # Bytes that never became a character can still complete a stop string, as U+FFFD.
            self._cut_at_stop(self._detokenizer)
            text = self._detokenizer.text
        return Output(
            token_ids=self._token_ids,
            text=text,
            finish_reason=self._finish_reason.value,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            prompt_token_ids=self.prompt_token_ids,
        )
