"""What is trained when: a function of the progress alone, which runs from 0 to 1 in wall-clock time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training that ends when the progress reaches `until`.

    lengths: of sequences, in tokens; steps take turns.  synthetic: share of the sequences that are tasks.
    index: whether the indexers are trained.  sparse: whether layers attend to what their indexers select.
    topks: blocks per query; steps take turns.  last: trained just as the model is served, and the router stays.
    """

    name: str
    until: float
    lengths: tuple[int, ...]
    synthetic: float
    index: bool = False
    sparse: bool = False
    topks: tuple[int, ...] = (8,)
    last: bool = False

    def length(self, step: int) -> int:
        return self.lengths[step % len(self.lengths)]

    def topk(self, step: int) -> int:
        return self.topks[step % len(self.topks)]


PHASES = (
    Phase("dense-1k", 0.20, (1024,), 0.5),
    Phase("dense-2k", 0.34, (2048,), 0.5, index=True),
    # The indexers' warm-up: they learn from dense attention, which does not depend on them yet.
    Phase("dense-4k", 0.49, (4096,), 0.4, index=True),
    Phase("sparse-4k", 0.66, (4096,), 0.4, index=True, sparse=True),
    Phase("sparse-8k", 0.88, (8192,), 0.4, index=True, sparse=True, topks=(8, 6, 8, 4)),
    Phase("decay", 1.01, (8192, 4096, 8192, 2048), 0.25, index=True, sparse=True, last=True),
)
# In the sparse phases before the last, one step in this many attends densely, so that the keys that are not selected
# do not drift where nothing holds them.
DENSE_STEP = 10
# Per step, over all ranks: one or two GPUs compute the same.
MICRO_BATCHES = 2


@dataclass(frozen=True, slots=True)
class Schedule:
    """Phases and learning rates. warm_up_steps: after every start of the optimiser.  decay_from: a progress."""

    phases: tuple[Phase, ...] = PHASES
    warm_up_steps: int = 100
    decay_from: float = 0.6

    def phase_at(self, progress: float) -> Phase:
        return next(phase for phase in self.phases if progress < phase.until)

    def learning_rate(self, progress: float, steps_since_start: int) -> float:
        """Factor of all learning rates: a warm-up, then constant, then falling to 0."""
        warm_up = min(1.0, (steps_since_start + 1) / self.warm_up_steps)
        return warm_up * min(1.0, max(0.0, (1 - progress) / (1 - self.decay_from)))


def index_learning_rate(phase: Phase) -> float:
    """A factor for the indexers, on top: they learn fast until attention depends on them."""
    return 0.3 if phase.sparse else 1.0


def momentum(steps_since_start: int) -> float:
    """Muon's."""
    return 0.85 + 0.10 * min(1.0, steps_since_start / 300)


def bias_rate(phase: Phase, step: int) -> float:
    """By how much a step moves the routing bias of an expert."""
    if phase.last:
        return 0.0
    return 0.005 if step < 500 else 0.001
