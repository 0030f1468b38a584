"""Trains m3-nano on one or two GPUs within a given time; a later call goes on where one stopped.

    python -m deploy.demo.train --data DATA --out OUT --gpus 2 --seconds 540 --total-seconds 840
    python -m deploy.demo.train --data DATA --out OUT --gpus 2 --seconds 420 --total-seconds 840 --resume OUT

Learning rates and phases follow the wall clock, so that training ends in time on any machine; the log has the progress
of every step, and `--replay LOG` runs the same steps again. A step is two micro-batches whatever the number of GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from deploy.demo import schedule
from deploy.demo.export import read_model, write_model
from deploy.demo.nano import SIZES
from deploy.demo.optimizer import Optimizer
from deploy.demo.schedule import DENSE_STEP, MICRO_BATCHES, Phase, Schedule
from deploy.demo.train_attention import captured
from deploy.demo.train_data import Batch, Feeder, load_words
from deploy.demo.train_eval import accuracy_by_distance, evaluate
from deploy.demo.train_model import NanoModel, Pass
from deploy.demo.writer import Sizes

BATCH_TOKENS = 65_536
SEED = 20
LOG_EVERY, SAVE_SECONDS = 50, 150
# What writing the checkpoint takes of the time of a call.
_SAVE_MARGIN = 15


@dataclass
class Progress:
    """Where training stands; the only thing beside weights and optimiser that a later call needs.

    seconds: of training.  step: steps done.  phase_steps: by phase.  since_start: steps of this optimiser.
    """

    seconds: float = 0.0
    step: int = 0
    since_start: int = 0
    phase_steps: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One call. rank, world: of this process.  deadline: monotonic seconds.  replay: progress of each step, or None."""

    data: Path
    out: Path
    resume: Path | None
    total_seconds: float
    max_steps: int | None
    replay: list[float] | None
    workers: int
    rank: int
    world: int
    deadline: float
    device: torch.device
    batch_tokens: int = BATCH_TOKENS
    sizes: Sizes = SIZES
    schedule: Schedule = field(default_factory=Schedule)
    log_every: int = LOG_EVERY
    evaluate: bool = True


class Trainer:
    """One rank's model, optimiser and clock."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.gpu = job.device.type == "cuda"
        tokenizer_file = job.data / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        # Before the first use of the GPU: workers are forked.
        self.feeder = Feeder(
            job.data, load_words(tokenizer_file), batch_tokens=job.batch_tokens, seed=SEED, workers=job.workers
        )
        if job.world > 1:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if self.gpu else "gloo")
        torch.manual_seed(SEED)
        dtype = torch.bfloat16 if self.gpu else torch.float32
        self.model = NanoModel(job.sizes, compiled=self.gpu, dtype=dtype).to(job.device)
        self.moe_layers = [layer for layer in self.model.decoder_layers() if layer.moe]
        self.optimizer = Optimizer(self.model, len(self.moe_layers) * job.sizes.experts)
        self.progress = Progress()
        if job.resume is not None:
            self._resume(job.resume)
        self.log_file = (job.out / "log.jsonl").open("a") if job.rank == 0 else None
        self._totals: dict[str, Tensor] = {}
        self._total_steps = 0
        self._reported_seconds = self.progress.seconds

    def _resume(self, path: Path) -> None:
        state = path / "state.pt"
        if state.is_file():
            loaded = torch.load(state, map_location=self.job.device, weights_only=True)
            self.model.load_state_dict(loaded["model"])
            self.optimizer.load_state_dict(loaded["optimizer"])
            self.progress = Progress(**loaded["progress"])
            return
        read_model(path, self.model)
        self.progress = Progress(**json.loads((path / "progress.json").read_text()))
        self.progress.since_start = 0

    def say(self, **values: Any) -> None:
        if self.log_file is not None:
            line = json.dumps(values)
            print(line, flush=True)
            self.log_file.write(line + "\n")
            self.log_file.flush()

    def run(self) -> None:
        """Train until the end, the deadline or the step limit; save; evaluate at the end of all training."""
        job, progress = self.job, self.progress
        saved = last = time.monotonic()
        phase: Phase | None = None
        batches: Iterator[Batch] = iter(())
        warm: set[tuple[int, bool]] = set()
        done = False
        while True:
            if job.max_steps is not None and progress.step >= job.max_steps:
                break
            share, stop = self._agree(done)
            if share >= 1.0 or stop:
                done = share >= 1.0
                break
            if phase is not job.schedule.phase_at(share):
                phase = job.schedule.phase_at(share)
                batches = self.feeder.batches(phase, self._first_batch(phase), job.world)
                self.say(event="phase", name=phase.name, progress=round(share, 4), seconds=round(progress.seconds, 1))
                for length in sorted(set(phase.lengths)) if self.gpu else ():
                    if (length, phase.sparse) not in warm:
                        self._compile(length, phase)
                        warm.add((length, phase.sparse))
                last = time.monotonic()
            self._step(phase, share, batches)
            now = time.monotonic()
            progress.seconds += now - last
            last = now
            if now - saved > SAVE_SECONDS and job.rank == 0:
                self.save()
                saved = last = time.monotonic()
        if job.rank == 0:
            self.save()
            self.say(event="saved", seconds=round(progress.seconds, 1), step=progress.step, finished=done)
        if done and job.evaluate and job.rank == 0:
            rows = max(1, job.batch_tokens // job.sizes.max_positions)
            self.say(event="evaluation", **evaluate(self.model, self.tokenizer, job.data, rows, job.deadline))
        self.feeder.close()
        if job.world > 1:
            distributed.destroy_process_group()

    def _agree(self, done: bool) -> tuple[float, bool]:
        """(progress, whether to stop): rank 0's clock decides for all."""
        job, progress = self.job, self.progress
        if job.replay is not None:
            return job.replay[progress.step] if progress.step < len(job.replay) else 1.0, False
        share = progress.seconds / job.total_seconds
        facts = torch.tensor([share, float(time.monotonic() > job.deadline - _SAVE_MARGIN)], dtype=torch.float64)
        if job.world > 1:
            distributed.broadcast(facts, 0)
        return float(facts[0]), bool(facts[1])

    def _first_batch(self, phase: Phase) -> int:
        return self.progress.phase_steps.get(phase.name, 0) * MICRO_BATCHES + self.job.rank

    def _compile(self, length: int, phase: Phase) -> None:
        """Run a phase's graphs once on nothing, so that the clock does not count their compilation."""
        job, started = self.job, time.monotonic()
        rows = job.batch_tokens // length
        tokens = torch.zeros(rows, length, dtype=torch.int64, device=job.device)
        queries = torch.full((rows, max(1, length // 32)), length - 1, device=job.device) if phase.index else None
        for sparse in {phase.sparse, False} if not phase.last else {True}:
            weight = torch.zeros(rows, length, device=job.device)
            topk = self.job.sizes.topk_blocks
            done = self.model(tokens, tokens, weight, plan=self._plan(sparse), topk=topk, queries=queries)
            ((done.loss + done.kl) * 0.0).backward()
        self.optimizer.zero()
        torch.cuda.synchronize()
        if job.world > 1:
            distributed.barrier()
        self.say(event="compiled", length=length, sparse=phase.sparse, seconds=round(time.monotonic() - started, 1))

    def _plan(self, sparse: bool) -> str:
        return "".join("F" if sparse and flag else "D" for flag in self.job.sizes.is_sparse)

    def _step(self, phase: Phase, share: float, batches: Iterator[Batch]) -> None:
        job, progress, optimizer = self.job, self.progress, self.optimizer
        number = progress.phase_steps.get(phase.name, 0)
        logs = (progress.step + 1) % job.log_every == 0
        optimizer.zero()
        sparse = phase.sparse and (phase.last or number % DENSE_STEP != DENSE_STEP - 1)
        topk = min(phase.topk(number), job.sizes.topk_blocks)
        for _ in range(MICRO_BATCHES // job.world):
            batch = next(batches)
            tokens, targets, weight, queries = (
                torch.from_numpy(array).to(job.device, non_blocking=True)
                for array in (batch.tokens, batch.targets, batch.weight, batch.queries)
            )
            done: Pass = self.model(
                tokens.long(),
                targets.long(),
                weight,
                plan=self._plan(sparse),
                topk=topk,
                queries=queries if phase.index else None,
            )
            ((done.loss + done.kl) / MICRO_BATCHES).backward()
            optimizer.loads.add_(done.loads.reshape(-1))
            self._count(done, torch.from_numpy(batch.answers).to(job.device), weight)
        if job.world > 1:
            distributed.all_reduce(optimizer.gradients)
        norms = optimizer.clip()
        self._add(norm=norms[0], index_norm=norms[1])
        scale = job.schedule.learning_rate(share, progress.since_start)
        index_scale = scale * schedule.index_learning_rate(phase)
        optimizer.step(scale, index_scale, schedule.momentum(progress.since_start))
        loads = optimizer.loads.view(len(self.moe_layers), -1)
        self._balance(loads, schedule.bias_rate(phase, progress.step))
        self._total_steps += 1
        progress.step += 1
        progress.since_start += 1
        progress.phase_steps[phase.name] = number + 1
        if self.log_file is not None:
            self.log_file.write(json.dumps({"step": progress.step, "p": share}) + "\n")
        if logs:
            self._report(phase, done, batch, loads, topk if sparse else job.sizes.topk_blocks, scale)

    @torch.no_grad()
    def _balance(self, loads: Tensor, rate: float) -> None:
        """Loss-free balancing: a bias moves an expert's place in the choice, not its weight."""
        moves = torch.sign(loads.mean(1, keepdim=True) - loads) * rate
        for layer, move in zip(self.moe_layers, moves, strict=True):
            layer.bias += move
            layer.bias -= layer.bias.mean()

    def _count(self, done: Pass, answers: Tensor, weight: Tensor) -> None:
        answers = answers.view(-1)
        text = (weight.view(-1) > 0) & ~answers
        self._add(
            text_nats=(done.nats * text).sum(),
            text_tokens=text.sum().float(),
            answer_nats=(done.nats * answers).sum(),
            answer_tokens=answers.sum().float(),
            kl=done.kl.detach() / MICRO_BATCHES * self.job.world,
        )

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._totals[name] = self._totals.get(name, torch.zeros((), device=value.device)) + value

    def _report(self, phase: Phase, done: Pass, batch: Batch, loads: Tensor, topk: int, scale: float) -> None:
        if self.log_file is None:
            self._totals.clear()
            self._total_steps = 0
            return
        totals = {name: float(value) for name, value in self._totals.items()}
        steps, self._total_steps = self._total_steps, 0
        self._totals.clear()
        now = time.monotonic()
        seconds = max(1e-9, self.progress.seconds - self._reported_seconds)
        self._reported_seconds = self.progress.seconds
        rate = steps * MICRO_BATCHES * self.job.batch_tokens / seconds
        quality = [captured(sample, topk) for sample in done.samples.values()]
        self.say(
            phase=phase.name,
            at=self.progress.step,
            progress=round(self.progress.seconds / self.job.total_seconds, 4),
            left=round(self.job.deadline - now),
            tokens_per_second=round(rate),
            lr=round(scale, 4),
            text=round(totals["text_nats"] / max(1.0, totals["text_tokens"]), 4),
            answer=round(totals["answer_nats"] / max(1.0, totals["answer_tokens"]), 4),
            kl=round(totals["kl"] / steps, 4),
            norm=round(totals["norm"] / steps, 3),
            index_norm=round(totals["index_norm"] / steps, 3),
            accuracy=accuracy_by_distance(self.model, done.hidden, batch),
            captured=[round(float(score), 3) for score, _ in quality],
            found=[round(float(found), 3) for _, found in quality],
            load=[round(float(row.max() / row.mean()), 2) for row in loads],
            memory_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1) if self.gpu else 0.0,
        )

    def save(self) -> None:
        """Write the checkpoint and the progress into `out`, and beside them the state that does not travel."""
        write_model(self.job.out, self.model, self.tokenizer)
        (self.job.out / "progress.json").write_text(json.dumps(vars(self.progress)) + "\n")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"progress": vars(self.progress)}, self.job.out / "state.pt")


def train(job: Job) -> Trainer:
    """Run one rank of one call."""
    job.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(job)
    trainer.run()
    return trainer


def _rank(rank: int, args: argparse.Namespace, deadline: float) -> None:
    gpu = torch.cuda.is_available()
    if gpu:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(args.gpus), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    replay = None
    if args.replay is not None:
        rows = [json.loads(line) for line in args.replay.read_text().splitlines()]
        replay = [row["p"] for row in rows if "p" in row]
    job = Job(
        data=args.data,
        out=args.out,
        resume=args.resume,
        total_seconds=args.total_seconds,
        max_steps=args.max_steps,
        replay=replay,
        workers=args.workers,
        rank=rank,
        world=args.gpus,
        deadline=deadline,
        device=torch.device("cuda", rank) if gpu else torch.device("cpu"),
    )
    if gpu:
        torch.cuda.set_device(rank)
    train(job)


def main() -> None:
    deadline_from = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory that deploy.demo.corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint, the log and the state")
    parser.add_argument("--resume", type=Path, help="go on from this directory, an earlier call's --out")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seconds", type=float, default=540, help="wall-clock time of this call")
    parser.add_argument("--total-seconds", type=float, default=840, help="training time of all calls together")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps in all")
    parser.add_argument("--replay", type=Path, help="take the progress of each step from this log.jsonl")
    parser.add_argument("--workers", type=int, default=8, help="processes per GPU that make batches")
    parser.add_argument("--port", type=int, default=29531)
    args = parser.parse_args()
    deadline = deadline_from + args.seconds
    if args.gpus == 1:
        _rank(0, args, deadline)
    else:
        spawn(_rank, (args, deadline), nprocs=args.gpus)


if __name__ == "__main__":
    main()
