"""One rank: loads its shard, keeps what it knows of each running request, turns StepPlans into tokens."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import PAGE_SIZE, EngineConfig, read_json, resolve_model
from engine.errors import CheckpointError, ConfigError
from engine.kernels.api import resolve
from engine.kernels.batch import Segment, StepBatch
from engine.model.minimax_m3 import MiniMaxM3
from engine.model.weights import CheckpointWeights, DummyWeights, WeightSource
from engine.parallel import TensorParallel
from engine.probes import HostProbe
from engine.sampler import SamplerState, logprobs_of
from engine.types import (
    NOT_FINITE,
    NOT_SAMPLED,
    EngineInfo,
    Logprobs,
    NewRequest,
    SamplingParams,
    StepPlan,
    StepResult,
    StepRow,
)

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float32}
# Logits of prompt tokens are made for so many rows at a time: vocab_size floats each.
_PROMPT_LOGIT_ROWS = 256


@dataclass(frozen=True, slots=True)
class RankProposal:
    """What one rank's memory allows; the group takes the smallest."""

    num_pages: int


@dataclass(slots=True)
class _Resident:
    """What the rank keeps of a running request: all its tokens, and its pages in order."""

    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    page_ids: list[int]


class ModelRunner:
    """Runs the steps of one rank of `world_size`, in order.

    For a group, torch.distributed must be initialised before. Every rank computes the same tokens, since the logits
    are gathered and the noise depends on (seed, position) alone; rank 0's answers are used.
    """

    def __init__(self, config: EngineConfig, *, rank: int, world_size: int) -> None:
        self.config = config
        self.parallel = TensorParallel(rank, world_size)
        self.model_config, self._knobs = resolve_model(config)
        self.max_model_len = config.max_model_len or self.model_config.max_position_embeddings
        self._residents: list[_Resident | None] = [None] * config.max_num_seqs
        self._probe = HostProbe()

    def load(self) -> RankProposal:
        """Read this rank's weights. Raises CheckpointError or ConfigError."""
        config = self.config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        path = Path(config.model)
        weights: WeightSource = DummyWeights(config.seed) if config.load_format == "dummy" else CheckpointWeights(path)
        with torch.inference_mode():
            self.model = MiniMaxM3(
                self.model_config,
                self._knobs,
                weights,
                resolve(config.backend),
                self.parallel,
                dtype=self._dtype(),
                max_model_len=self.max_model_len,
                max_num_tokens=config.max_num_batched_tokens,
                audited=config.index_reuse == "audited",
            )
        self._eos_token_ids = self._read_eos(path)
        self._sampler = SamplerState(config.max_num_seqs, self.model_config.vocab_size)
        # More pages than all sequences can fill are of no use but to the prefix cache: leave it as much again.
        useful = 2 * config.max_num_seqs * -(-self.max_model_len // PAGE_SIZE)
        budget_bytes = int(_available_bytes() * config.memory_fraction) // self.parallel.size
        return RankProposal(min(useful, budget_bytes // self.model.page_bytes()))

    def _dtype(self) -> torch.dtype:
        if self.config.dtype != "auto":
            return _DTYPES[self.config.dtype]
        stored = self.model_config.torch_dtype
        if stored not in _DTYPES:
            raise CheckpointError(f"config.json: torch_dtype={stored!r} is not one of {', '.join(_DTYPES)}; set dtype")
        dtype = _DTYPES[stored]
        # Without bf16 instructions a CPU emulates them, slower than fp32.
        has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
        return dtype if has_bf16 else torch.float32

    def _read_eos(self, path: Path) -> tuple[int, ...]:
        ids = list(self.model_config.eos_token_ids)
        generation = path / "generation_config.json"
        if generation.exists():
            more = read_json(generation).get("eos_token_id")
            ids += more if isinstance(more, list) else [] if more is None else [more]
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < self.model_config.vocab_size:
                raise CheckpointError(f"{generation}: eos_token_id={token!r} is not a token id")
        return tuple(dict.fromkeys(ids))

    def allocate(self, num_pages: int) -> EngineInfo:
        """Make the pages; after this, `execute` can run."""
        num_pages = self.config.num_pages or num_pages
        self.model.allocate_pages(num_pages)
        plan, dtype = str(self.model.plan), str(self.model.dtype).removeprefix("torch.")
        # Pages computed under another plan hold other keys and values: they must not be found.
        fingerprint = (self.config.model, plan, dtype, self.config.index_reuse, self.config.hf_overrides)
        return EngineInfo(
            model_name=Path(self.config.model).name,
            plan=plan,
            backend=self.model.kernels.name,
            dtype=dtype,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            page_bytes=self.model.page_bytes(),
            vocab_size=self.model_config.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self._eos_token_ids,
            namespace=hashlib.sha256(repr(fingerprint).encode()).hexdigest(),
            weight_bytes=self.model.weight_bytes,
            tensor_parallel_size=self.parallel.size,
            ledger=self.model.ledger,
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; the same plan on every rank."""
        started = time.perf_counter()
        for slot in plan.released:
            self._residents[slot] = None
            self._sampler.remove(slot)
        for new in plan.new:
            self._add(new)
        token_ids, batch = self._batch(plan)
        launched = time.perf_counter()
        hidden = self.model.forward(token_ids, batch)
        result = StepResult(step_id=plan.step_id, sampled=[NOT_SAMPLED] * len(plan.rows))
        self._sample(plan.rows, hidden, batch, result)
        forward_s = time.perf_counter() - launched
        self._score_prompts(plan.rows, hidden, batch, result)
        result.seconds = self._probe.take()
        result.overlaps = self.model.audit.take()
        result.computed, result.reused = self.model.index_cache.take_counts()
        result.forward_s = forward_s
        result.python_s = time.perf_counter() - started - forward_s
        return result

    def _add(self, new: NewRequest) -> None:
        assert self._residents[new.slot] is None, f"slot {new.slot} is taken"
        self._residents[new.slot] = _Resident(list(new.token_ids), new.prompt_len, new.sampling, [])
        self._sampler.add(new, self._eos_token_ids)

    def _resident(self, slot: int) -> _Resident:
        resident = self._residents[slot]
        assert resident is not None, f"slot {slot} is empty"
        return resident

    def _batch(self, plan: StepPlan) -> tuple[Tensor, StepBatch]:
        """(token ids int64 [num_tokens], the step's tensors)."""
        rows = plan.rows
        token_ids: list[int] = []
        for row in rows:
            resident = self._resident(row.slot)
            resident.page_ids += row.new_page_ids
            start = row.num_computed_tokens
            token_ids += resident.token_ids[start : start + row.num_scheduled_tokens]
        counts = np.array([row.num_scheduled_tokens for row in rows])
        computed = np.array([row.num_computed_tokens for row in rows])
        starts = [0, *accumulate(row.num_scheduled_tokens for row in rows)]
        assert len(token_ids) == starts[-1], "the plan schedules tokens that this rank does not know"
        row_ids = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(starts[-1]) - np.repeat(np.array(starts[:-1]) - computed, counts)
        seq_lens = computed + counts
        table = np.zeros((len(rows), int(-(-seq_lens.max() // PAGE_SIZE))), dtype=np.int32)
        for i, row in enumerate(rows):
            page_ids = self._resident(row.slot).page_ids[: table.shape[1]]
            table[i, : len(page_ids)] = page_ids
        slots = table[row_ids, positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE
        batch = StepBatch(
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(slots),
            row_ids=torch.from_numpy(row_ids),
            block_table=torch.from_numpy(table),
            seq_lens=torch.from_numpy(seq_lens.astype(np.int32)),
            query_starts=starts,
            seq_lens_host=seq_lens.tolist(),
            segments=_segments(plan, starts),
            probe=self._probe if plan.probe else None,
            audit=plan.audit,
        )
        return torch.tensor(token_ids), batch

    def _sample(self, rows: list[StepRow], hidden: Tensor, batch: StepBatch, result: StepResult) -> None:
        sampling = [i for i, row in enumerate(rows) if row.sample]
        if not sampling:
            return
        last = torch.tensor([batch.query_starts[i + 1] - 1 for i in sampling])
        logits = self.model.logits(hidden.index_select(0, last))
        slots = [rows[i].slot for i in sampling]
        tokens = self._sampler.sample(logits, slots, [batch.seq_lens_host[i] for i in sampling])
        self._sampler.append(slots, tokens)
        chosen = tokens.tolist()
        for i, slot, token in zip(sampling, slots, chosen, strict=True):
            result.sampled[i] = token
            if token == NOT_FINITE:
                self._clean_pages(slot)
            else:
                self._resident(slot).token_ids.append(token)
        wanted = [
            (k, i, n)
            for k, i in enumerate(sampling)
            if (n := self._resident(rows[i].slot).sampling.logprobs) is not None
        ]
        if wanted:
            picked = logits[[k for k, _, _ in wanted]]
            found = logprobs_of(picked, [chosen[k] for k, _, _ in wanted], [n for _, _, n in wanted])
            result.logprobs = {i: entry for (_, i, _), entry in zip(wanted, found, strict=True)}

    def _clean_pages(self, slot: int) -> None:
        """A page goes back to the pool with what was written to it. Masked keys have weight 0, and 0 * NaN is NaN:
        whoever gets the page next must find finite numbers."""
        page_ids = torch.tensor(self._resident(slot).page_ids)
        for pages in self.model.pages:
            for pool in (pages.k, pages.v, pages.index_k):
                if pool is not None:
                    pool[page_ids] = torch.nan_to_num(pool[page_ids])

    def _score_prompts(self, rows: list[StepRow], hidden: Tensor, batch: StepBatch, result: StepResult) -> None:
        """Log-probabilities of the known prompt tokens that this step's positions predict."""
        for i, row in enumerate(rows):
            resident = self._resident(row.slot)
            num_top = resident.sampling.prompt_logprobs
            count = min(row.num_scheduled_tokens, resident.prompt_len - 1 - row.num_computed_tokens)
            if num_top is None or count <= 0:
                continue
            first = row.num_computed_tokens + 1
            targets = resident.token_ids[first : first + count]
            found: list[Logprobs] = []
            for start in range(0, count, _PROMPT_LOGIT_ROWS):
                end = min(start + _PROMPT_LOGIT_ROWS, count)
                offset = batch.query_starts[i]
                logits = self.model.logits(hidden[offset + start : offset + end])
                found += logprobs_of(logits, targets[start:end], num_top)
            result.prompt_logprobs[i] = found


def _available_bytes() -> int:
    """Memory that can be taken without swapping, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable: set num_pages")


def _segments(plan: StepPlan, starts: list[int]) -> tuple[Segment, ...]:
    split, end = plan.num_decode_rows, len(plan.rows)
    segments = (
        Segment("decode", 0, split, 0, starts[split]),
        Segment("prefill", split, end, starts[split], starts[end]),
    )
    return tuple(segment for segment in segments if segment.num_rows)
