"""One rank: loads its shard, keeps what it knows of each running request, turns StepPlans into tokens."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine import collectives, devices, self_test
from engine.batches import Resident, SlotTables
from engine.capacity import Footprint, stored_formats, useful_pages
from engine.config import PAGE_SIZE, EngineConfig, ModelConfig, read_json, resolve_model
from engine.errors import CheckpointError, ConfigError
from engine.graphs import DecodeGraphs
from engine.guard import fallback_plan
from engine.guided import Grammars, GuidedSlots
from engine.kernels.api import KernelSet, resolve
from engine.kernels.batch import StepBatch
from engine.memory import free_bytes, pool_bytes
from engine.model.loading import load_model
from engine.model.minimax_m3 import MiniMaxM3
from engine.model.weights import DummyWeights, WeightSource
from engine.msa.audit import PendingOverlap
from engine.next_tokens import NextTokens
from engine.parallel import TensorParallel
from engine.probes import LayerProbe, Mark, hold, mark
from engine.sampler import PendingLogprobs, SamplerState, pending_logprobs
from engine.transfer import to_device, to_host
from engine.types import NOT_FINITE, NOT_GUIDED, NOT_SAMPLED, EngineInfo, RankTimes, StepPlan, StepResult, StepRow
from engine.warm_up import warm_up

log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float32}
# Logits of prompt tokens are made for so many rows at a time: vocab_size floats each.
_PROMPT_LOGIT_ROWS = 256
# A probed step holds the device until its launches are queued, at most this long.
MAX_HOLD_S = 0.1


@dataclass(frozen=True, slots=True)
class RankProposal:
    """What one rank's memory allows; the group takes the smallest."""

    num_pages: int


@dataclass(slots=True)
class _Launched:
    """A step that runs, and where its answer will be.

    sampling: the rows that sample.  tokens: int64 [len(sampling)] in host memory, to be
    read after `done`.  logprobs: (indices into sampling, their log-probabilities).  prompt_logprobs: (row, actual
    tokens, their log-probabilities).  launch_s: host time that launching took.  guided_errors, num_guided, mask_s: see
    StepResult.
    """

    plan: StepPlan
    sampling: list[int]
    tokens: Tensor
    logprobs: tuple[list[int], PendingLogprobs] | None
    prompt_logprobs: list[tuple[int, list[int], PendingLogprobs]]
    probe: LayerProbe | None
    overlaps: list[PendingOverlap]
    computed: dict[int, int]
    reused: dict[int, int]
    started: Mark
    done: Mark
    launch_s: float
    guided_errors: dict[int, str]
    num_guided: int
    mask_s: float


class ModelRunner:
    """Runs the steps of one rank of `world_size`, in order: `launch` starts one, `collect` has the oldest's result.

    On a GPU `launch` only queues work, and a second step may be launched before the first is collected.

    For a group, torch.distributed must be initialised before. Every rank computes the same tokens, since all agree on
    the best of the vocabulary and the noise depends on (seed, position) alone; rank 0's answers are used.
    """

    def __init__(self, config: EngineConfig, *, rank: int, world_size: int) -> None:
        self.config = config
        self.parallel = TensorParallel(rank, world_size)
        self.model_config, self._knobs = resolve_model(config)
        self.max_model_len = config.max_model_len or self.model_config.max_positions
        self._residents: list[Resident | None] = [None] * config.max_num_seqs
        self._launched: deque[_Launched] = deque()
        self._graphs: DecodeGraphs | None = None
        self._probed_launch_s = MAX_HOLD_S

    def load(self) -> RankProposal:
        """Read this rank's weights. Raises CheckpointError or ConfigError."""
        config = self.config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        path = Path(config.model)
        if config.backend != "torch":
            devices.check_visibility(os.environ, is_hip=torch.version.hip is not None)
        kernels = resolve(config.backend)
        self.device = kernels.device
        if self.device.type == "cpu":
            # Read at the first product, whatever was imported before.
            for name, value in devices.CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        if kernels.power_of_two_dims:
            _check_dims(self.model_config)
        dtype, quantization = self._dtype(), self.model_config.quantization
        if quantization is not None and (converted := quantization.formats - kernels.mx_formats):
            log.info(
                "backend %s multiplies no %s weights: they become %s as they are loaded",
                kernels.name, " and ".join(sorted(converted)), dtype,
            )  # fmt: skip

        exact_tokens = self.model_config.topk_blocks * PAGE_SIZE
        note = self._knobs.note(config.model, exact_tokens=exact_tokens, max_tokens=self.max_model_len)
        if note is not None and self.parallel.rank == 0:
            log.log(*note)
        if self.device.type == "cuda":
            formats = frozenset[str]() if quantization is None else quantization.formats
            self_test.examine(config, kernels, dtype, formats, rank=self.parallel.rank)

        def build(weights: WeightSource, kernels: KernelSet) -> MiniMaxM3:
            return MiniMaxM3(
                self.model_config,
                self._knobs,
                weights,
                kernels,
                self.parallel,
                dtype=dtype,
                max_model_len=self.max_model_len,
                max_num_tokens=config.max_num_batched_tokens,
                max_num_rows=config.max_num_seqs,
                audited=config.index_reuse == "audited",
                kv_dtype=kernels.fp8_dtype if config.kv_cache_dtype == "fp8" else None,
                index_dtype=kernels.fp8_dtype if config.index_cache_dtype == "fp8" else None,
            )

        with torch.inference_mode():
            self._how_ranks_sum = self._join(kernels, dtype)
            if config.load_format == "dummy":
                self.model = build(DummyWeights(config.seed, self.device, quantization), kernels)
            else:
                cache_dir = None if config.weight_cache_dir is None else Path(config.weight_cache_dir)
                self.model = load_model(
                    path, quantization, kernels, dtype, self.parallel, build, free_bytes=free_bytes(self.device),
                    cache_dir=cache_dir,
                )  # fmt: skip
        self._eos_token_ids = self._read_eos(path)
        self._sampler = SamplerState(config.max_num_seqs, self.model_config.vocab_size, self.device)
        grammars = Grammars(path, vocab_size=self.model_config.vocab_size, eos_token_ids=self._eos_token_ids)
        if self.device.type == "cuda":
            grammars.warm()
        self._guided = GuidedSlots(grammars)
        max_pages = -(-self.max_model_len // PAGE_SIZE)
        self._tables = SlotTables(config.max_num_seqs, max_pages, self.device)
        self._next_tokens = NextTokens(
            self.model_config.vocab_size, self.parallel, self._sampler, self._guided, self._tables, kernels.decode
        )
        useful = useful_pages(config.max_num_seqs, self.max_model_len)
        budget = pool_bytes(self.device, self._footprint(), config.memory_fraction)
        return RankProposal(min(useful, budget // self.model.page_bytes()))

    def _join(self, kernels: KernelSet, dtype: torch.dtype) -> dict[str, str]:
        """Map the other ranks' memory, where that can be done; what sums over the ranks, for the report."""
        if self.parallel.size == 1:
            return {}
        self.parallel.few_rows, how = collectives.few_rows(
            kernels, hidden_size=self.model_config.hidden_size, element=dtype.itemsize,
            max_rows=self.config.max_num_seqs, vocab=self.model_config.vocab_size // self.parallel.size,
        )  # fmt: skip
        log.info("sums over %d ranks: %s", self.parallel.size, how)
        return {"all_reduce": how}

    def _footprint(self) -> Footprint:
        config, model = self.config, self.model
        return Footprint(
            self.model_config, str(model.plan), self.parallel.size, self.max_model_len, config.max_num_seqs,
            config.max_num_batched_tokens, element=model.dtype.itemsize, kv_element=model.kv_dtype.itemsize,
            index_element=model.index_dtype.itemsize, audited=config.index_reuse == "audited",
            format_of=stored_formats(self.model_config),
            captured=model.kernels.decode is not None and not config.enforce_eager,
            guarded=config.audit_overlap_floor is not None,
        )  # fmt: skip

    def _dtype(self) -> torch.dtype:
        if self.config.dtype != "auto":
            return _DTYPES[self.config.dtype]
        stored = self.model_config.torch_dtype
        if stored not in _DTYPES:
            raise CheckpointError(f"config.json: torch_dtype={stored!r} is not one of {', '.join(_DTYPES)}; set dtype")
        dtype = _DTYPES[stored]
        if self.device.type != "cpu":
            return dtype
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
        config = self.config
        num_pages = config.num_pages or num_pages
        plan = str(self.model.plan)
        fallback = fallback_plan(config, plan)
        self._plans = [plan] if fallback is None else [plan, fallback]
        with torch.inference_mode():
            self.model.allocate_pages(num_pages)
            decode = self.model.kernels.decode
            if self.device.type == "cuda":
                warm_up(self.model, config.max_num_batched_tokens, self.max_model_len)
                self._next_tokens.warm_up(self.model.dtype)
                if decode is not None and not config.enforce_eager:
                    self._graphs = DecodeGraphs(self.model, decode, self._tables, self.max_model_len, self._plans)
        is_async = self.device.type == "cuda" if config.async_scheduling is None else config.async_scheduling
        dtype = str(self.model.dtype).removeprefix("torch.")
        # Pages computed under another plan hold other keys and values: they must not be found.
        fingerprint = (
            config.model, plan, dtype, str(self.model.kv_dtype), str(self.model.index_dtype), config.index_reuse,
            config.hf_overrides,
        )  # fmt: skip
        return EngineInfo(
            model_name=Path(config.model).name,
            plan=plan,
            fallback_plan=fallback,
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
            max_in_flight=2 if is_async else 1,
            kernels={**self.model.kernels.report, **self._how_ranks_sum},
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        """Start one step; the same plan on every rank."""
        entered_s = time.perf_counter()
        if plan.cleared:
            self._clear_pages(plan.cleared)
        for slot in plan.released:
            self._residents[slot] = None
            self._sampler.remove(slot)
            self._guided.remove(slot)
        for new in plan.new:
            assert self._residents[new.slot] is None, f"slot {new.slot} is taken"
            self._residents[new.slot] = Resident(list(new.token_ids), new.prompt_len, new.sampling, [])
            self._sampler.add(new, self._eos_token_ids)
            self._guided.add(new)
        self._tables.update(plan, self._residents)
        if (letters := plan.index_plan or self._plans[plan.fallback]) != self.model.active_plan:
            self.model.set_plan(letters)
        captured = self._graphs is not None and self._graphs.has_plan and plan.num_decode_rows == len(plan.rows)
        launched = self._eager(plan) if plan.probe or plan.audit or not captured else self._replay(plan)
        launched.launch_s = time.perf_counter() - entered_s
        self._launched.append(launched)

    def ready(self) -> bool:
        """Whether the oldest launched step is done, so that `collect` would not wait."""
        return bool(self._launched) and self._launched[0].done.reached()

    @torch.inference_mode()
    def collect(self) -> StepResult:
        """The result of the oldest launched step; waits for it."""
        launched = self._launched.popleft()
        launched.done.wait()
        entered_s = time.perf_counter()
        plan = launched.plan
        result = StepResult(step_id=plan.step_id, sampled=[NOT_SAMPLED] * len(plan.rows))
        chosen: list[int] = launched.tokens.tolist()
        for i, token in zip(launched.sampling, chosen, strict=True):
            is_refused = token != NOT_FINITE and i in launched.guided_errors
            result.sampled[i] = NOT_GUIDED if is_refused else token
        result.guided_errors, result.num_guided = launched.guided_errors, launched.num_guided
        result.mask_s = launched.mask_s
        if launched.logprobs is not None:
            wanted, pending = launched.logprobs
            found = pending.read([chosen[k] for k in wanted])
            result.logprobs = {launched.sampling[k]: entry for k, entry in zip(wanted, found, strict=True)}
        for row, targets, pending in launched.prompt_logprobs:
            result.prompt_logprobs.setdefault(row, []).extend(pending.read(targets))
        if launched.probe is not None:
            result.seconds = launched.probe.read()
            collective_s = launched.probe.read_collectives()
            forward_s = launched.done.seconds_since(launched.started)
            result.rank_times = [RankTimes(self.parallel.rank, forward_s, collective_s)]
        result.overlaps = [overlap for each in launched.overlaps if (overlap := each.resolve()) is not None]
        result.computed, result.reused = launched.computed, launched.reused
        result.forward_s = launched.done.seconds_since(launched.started)
        in_launch_s = result.forward_s if self.device.type == "cpu" else 0.0
        result.python_s = launched.launch_s - in_launch_s + time.perf_counter() - entered_s
        return result

    def _replay(self, plan: StepPlan) -> _Launched:
        """A step of decode rows alone, as a captured graph."""
        assert self._graphs is not None
        slots = [row.slot for row in plan.rows]
        positions = [row.num_computed_tokens for row in plan.rows]
        sampled_at = [position + 1 for position in positions]
        temperatures, keys, shaped = self._sampler.free_draws(slots, sampled_at)
        started = mark(self.device)
        logits, computed, reused = self._graphs.replay(slots, positions, temperatures, keys)
        tokens = self._graphs.tokens[: len(slots)]
        if shaped:
            tokens = self._next_tokens.resample(tokens, logits, slots, sampled_at, shaped)
        return self._answer(plan, range(len(slots)), tokens, logits, [], None, (computed, reused), started)

    def _eager(self, plan: StepPlan) -> _Launched:
        """A step of any rows, operation by operation."""
        entered_s = time.perf_counter()
        probe = None
        if plan.probe:
            probe = LayerProbe(self.device)
            # Half as long again as the last one took: launches that fall behind would be measured with their gaps.
            hold(self.device, min(1.5 * self._probed_launch_s, MAX_HOLD_S))
        token_ids, batch, slots = self._tables.batch(plan, self._residents, probe)
        self.parallel.probe = probe
        started = mark(self.device)
        hidden = self.model.forward(token_ids, batch)
        counts = self.model.index_cache.take_counts()
        sampling = [i for i, row in enumerate(plan.rows) if row.sample]
        tokens = logits = hidden.new_empty(0)
        if sampling:
            last = to_device([batch.query_starts[i + 1] - 1 for i in sampling], torch.int64, self.device)
            logits = self.model.logits_share(hidden.index_select(0, last))
            tokens = self._next_tokens.sample(
                logits, [slots[i] for i in sampling], [batch.seq_lens_host[i] for i in sampling]
            )
        scores = self._score_prompts(plan.rows, hidden, batch)
        self.parallel.probe = None
        if plan.probe:
            self._probed_launch_s = time.perf_counter() - entered_s
        return self._answer(plan, sampling, tokens, logits, scores, probe, counts, started)

    def _answer(
        self,
        plan: StepPlan,
        sampling: Sequence[int],
        tokens: Tensor,
        logits: Tensor,
        prompt_logprobs: list[tuple[int, list[int], PendingLogprobs]],
        probe: LayerProbe | None,
        counts: tuple[dict[int, int], dict[int, int]],
        started: Mark,
    ) -> _Launched:
        """Start the answer's way to the host."""
        residents = [self._resident(plan.rows[i].slot) for i in sampling]
        wanted = [k for k, resident in enumerate(residents) if resident.sampling.logprobs is not None]
        logprobs = None
        if wanted:
            picked = to_device(wanted, torch.int64, self.device)
            widths = [residents[k].sampling.logprobs or 0 for k in wanted]
            rows = self.parallel.all_gather_last(logits.index_select(0, picked)).float()
            logprobs = wanted, pending_logprobs(rows, tokens.index_select(0, picked), widths)
        on_host, done = to_host(tokens), mark(self.device)
        slots = [plan.rows[i].slot for i in sampling]
        num_guided = self._guided.sampled(slots, on_host, done)
        return _Launched(
            plan=plan,
            sampling=list(sampling),
            tokens=on_host,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            probe=probe,
            overlaps=self.model.audit.take(),
            computed=counts[0],
            reused=counts[1],
            started=started,
            done=done,
            launch_s=0.0,
            guided_errors={
                i: error for i, slot in zip(sampling, slots, strict=True) if (error := self._guided.error(slot))
            },
            num_guided=num_guided,
            mask_s=self._guided.take_seconds(),
        )

    def _resident(self, slot: int) -> Resident:
        resident = self._residents[slot]
        assert resident is not None, f"slot {slot} is empty"
        return resident

    def _clear_pages(self, page_ids: list[int]) -> None:
        """Zeros, on this step's turn: other ranks may still be at an earlier step."""
        chosen = to_device(page_ids, torch.int64, self.device)
        for pages in self.model.pages:
            for pool in (pages.k, pages.v, pages.index_k, pages.k_scale, pages.v_scale, pages.index_k_scale):
                if pool is not None:
                    pool.view(torch.uint8).index_fill_(0, chosen, 0)

    def _score_prompts(
        self, rows: list[StepRow], hidden: Tensor, batch: StepBatch
    ) -> list[tuple[int, list[int], PendingLogprobs]]:
        """Log-probabilities of the known prompt tokens that this step's positions predict: (row, tokens, values)."""
        found = []
        for i, row in enumerate(rows):
            resident = self._resident(row.slot)
            num_top = resident.sampling.prompt_logprobs
            count = min(row.num_scheduled_tokens, resident.prompt_len - 1 - row.num_computed_tokens)
            if num_top is None or count <= 0:
                continue
            first = row.num_computed_tokens + 1
            targets = resident.token_ids[first : first + count]
            for start in range(0, count, _PROMPT_LOGIT_ROWS):
                chunk = targets[start : start + _PROMPT_LOGIT_ROWS]
                offset = batch.query_starts[i] + start
                logits = self.model.logits(hidden[offset : offset + len(chunk)]).float()
                tokens = to_device(chunk, torch.int64, self.device)
                found.append((i, chunk, pending_logprobs(logits, tokens, [num_top] * len(chunk))))
        return found


def _check_dims(model: ModelConfig) -> None:
    """ConfigError when the triton kernels have no tiles for the model's heads."""
    for name, least in (("head_dim", 16), ("index_dim", 16), ("rotary_dim", 2)):
        value = getattr(model, name)
        if value < least or value & (value - 1):
            raise ConfigError(
                f"{name}={value}: backend=triton needs a power of two from {least} on; backend=torch takes any"
            )
