"""What starting the engine compiles, and whether a step can launch anything else: compiling it would stall the step."""

from __future__ import annotations

import random

from engine.capacity import decode_buckets
from engine.kernels import triton_set
from engine.warm_up import warm_up_chunks
from tests.kernels.aot.cases import M3_TP4, MAX_PAGES, MAX_ROWS, MAX_TOKENS, META, MXFP8_TP4, PAGE, Rank, Step, drive
from tests.kernels.aot.record import ARCHS, Recorder

MAX_MODEL_LEN = MAX_PAGES * PAGE
NUM_STEPS = 60


def start_up_steps() -> tuple[Step, ...]:
    """The batches of engine/graphs.py and the chunks of engine/warm_up.py."""
    buckets = [Step(f"bucket{size}", ((0, 1),) * size, captured=True) for size in decode_buckets(MAX_ROWS)]
    chunks = warm_up_chunks(MAX_TOKENS, MAX_MODEL_LEN)
    return (*buckets, *(Step(f"chunk{before}+{new}", ((before, new),)) for before, new in chunks))


def random_step(rng: random.Random) -> Step:
    """Decode rows and prompt chunks of any lengths, within the limits of a step."""
    rows = [(rng.randrange(1, MAX_MODEL_LEN - 1), 1) for _ in range(rng.choice((0, 0, 1, 3, 17, 40, MAX_ROWS - 1)))]
    left = min(MAX_TOKENS - len(rows), int(2 ** rng.uniform(1, 13)))
    while left > 1 and len(rows) < MAX_ROWS:
        new = rng.randrange(2, left + 1)
        rows.append((min(int(2 ** rng.uniform(0, 17)) - 1, MAX_MODEL_LEN - new), new))
        left = left - new if rng.random() < 0.5 else 0
    return Step(f"random of {len(rows)} rows", tuple(rows))


def compiled_late(arch: str, rank: Rank) -> list[str]:
    """Launches of random steps that are none of start-up's."""
    recorder = Recorder(arch)
    kernels = triton_set.bind(recorder.target, META)
    rng = random.Random(0)
    errors = drive(kernels, recorder, ((rank, start_up_steps()),))
    num_compiled = len(recorder.launches)
    errors |= drive(kernels, recorder, ((rank, tuple(random_step(rng) for _ in range(NUM_STEPS))),))
    assert not errors, errors
    return [launch.key for launch in list(recorder.launches.values())[num_compiled:]]


if __name__ == "__main__":
    late = [
        f"{key}: not compiled at start"
        for arch in ARCHS
        for rank in (M3_TP4, MXFP8_TP4)
        for key in compiled_late(arch, rank)
    ]
    print("\n".join(late))
    raise SystemExit(1 if late else 0)
