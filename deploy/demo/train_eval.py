"""A quick look at the model while it trains: accuracy by distance, and held-out loss with and without its indexers."""

from __future__ import annotations

import itertools
import json
import lzma
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from deploy.demo.corpus import encode
from deploy.demo.train_attention import BLOCK, Chosen, chosen_from, select
from deploy.demo.train_data import TASK_SHARES, Batch, load_words
from deploy.demo.train_model import NanoModel
from service.evaluation.tasks import evaluation_rng, example

DISTANCES = (0, 128, 512, 1024, 2048, 4096, 8192)
POSITIONS = (0, 512, 1024, 2048, 4096, 8192)
_EVAL_SEED = 1


def accuracy_by_distance(model: NanoModel, hidden: Tensor, batch: Batch) -> dict[str, str]:
    """Share of answer tokens that are the likeliest one, with their number, by their distance from what they repeat.

    hidden: [batch, length, hidden] of a forward pass over `batch`.
    """
    rows = np.nonzero(batch.answers.reshape(-1))[0]
    if not len(rows):
        return {}
    index = torch.from_numpy(rows).to(hidden.device)
    guesses = model.predict(hidden.detach().view(-1, hidden.shape[-1])[index]).cpu().numpy()
    right = guesses == batch.targets.reshape(-1)[rows]
    return _by_bucket(right, batch.distance.reshape(-1)[rows])


def _by_bucket(right: NDArray[np.bool_], distance: NDArray[np.int32]) -> dict[str, str]:
    found = {}
    for low, high in itertools.pairwise(DISTANCES):
        inside = (distance >= low) & (distance < high)
        if inside.any():
            found[f"<{high}"] = f"{100 * right[inside].mean():.1f}% of {inside.sum()}"
    return found


def random_blocks(index_q: Tensor, index_k: Tensor, topk: int) -> Chosen:
    """Each query's own block and others at random: what an indexer must beat."""
    batch, length, heads, _ = index_q.shape
    generator = torch.Generator(device=index_q.device).manual_seed(_EVAL_SEED)
    scores = torch.rand(batch, heads, length, length // BLOCK, generator=generator, device=index_q.device)
    return chosen_from(scores, topk)


def last_blocks(index_q: Tensor, index_k: Tensor, topk: int) -> Chosen:
    """Each query's own block and the ones just before it."""
    batch, length, heads, _ = index_q.shape
    scores = torch.arange(length // BLOCK, device=index_q.device).float()
    return chosen_from(scores.expand(batch, heads, length, length // BLOCK).clone(), topk)


def variants(sizes_sparse: list[int]) -> dict[str, tuple[str, Any]]:
    """Name -> (plan, how blocks are chosen)."""

    def plan(pattern: str) -> str:
        sparse = iter(range(len(sizes_sparse)))
        return "".join(pattern[next(sparse) % len(pattern)] if flag else "D" for flag in sizes_sparse)

    return {
        "dense": (plan("D"), select),
        "own": (plan("F"), select),
        "freq 2": (plan("FS"), select),
        "freq 4": (plan("FSSS"), select),
        "last blocks": (plan("F"), last_blocks),
        "random blocks": (plan("F"), random_blocks),
    }


def documents(path: Path, tokenizer: Tokenizer, length: int) -> NDArray[np.int32]:
    """The first `length` + 1 tokens of every held-out document that has them, int32 [documents, length + 1]."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        texts = [row["text"] for row in map(json.loads, file) if row["tokens"] > length + 1]
    rows = [tokens[: length + 1] for tokens in encode(tokenizer, texts) if len(tokens) > length + 1]
    return np.stack(rows).astype(np.int32)


def _tasks(
    data: Path, length: int, rows: int, filler: Any
) -> Iterator[tuple[str, NDArray[np.int32], NDArray[np.int32]]]:
    """(task, token ids [rows, length + 1], distance [rows, length], 0 where no answer)."""
    words = load_words(data / "tokenizer.json")
    words.filler = filler
    for number, task in enumerate(TASK_SHARES):
        rng = evaluation_rng(_EVAL_SEED, number)
        made = [example(task, length + 1, rng, words, held_out=True) for _ in range(rows)]
        distance = np.stack([np.where(each.answer, np.maximum(each.distance, 1), 0)[1:] for each in made])
        yield task, np.stack([each.token_ids for each in made]), distance


def evaluate(model: NanoModel, tokenizer: Tokenizer, data: Path, rows: int, deadline: float) -> dict[str, Any]:
    """Loss by position on held-out documents and accuracy by distance, for each variant; stops at the deadline.

    rows: of a batch; four batches of documents, and one of each task.
    """
    sizes = model.sizes
    length = sizes.max_positions
    texts = documents(data / "test.jsonl.xz", tokenizer, length)[: 4 * rows]
    background = np.concatenate(documents(data / "calibration.jsonl.xz", tokenizer, length))

    def filler(rng: np.random.Generator, count: int) -> NDArray[np.int32]:
        start = int(rng.integers(len(background) - count))
        return background[start : start + count]

    tasks = list(_tasks(data, length, rows, filler))
    results: dict[str, Any] = {}
    for name, (plan, chooser) in variants(sizes.is_sparse).items():
        if time.monotonic() > deadline - 5:
            results["cut"] = "the time was up"
            break
        nats = np.concatenate([_run(model, part, plan, chooser)[0] for part in _parts(texts, rows)])
        results[name] = {
            f"[{low}, {high})": round(float(nats[:, low:high].mean()), 4)
            for low, high in itertools.pairwise(POSITIONS)
            if high <= length
        }
        for task, ids, distance in tasks:
            _, guesses = _run(model, ids, plan, chooser)
            asked = distance > 0
            right = guesses[asked] == ids[:, 1:][asked]
            results[name][task] = _by_bucket(right, distance[asked])
    return results


def _parts(rows: NDArray[np.int32], size: int) -> Iterator[NDArray[np.int32]]:
    """Whole parts of `size` rows: compiled graphs have one shape."""
    for start in range(0, len(rows) - size + 1, size):
        yield rows[start : start + size]


def _run(model: NanoModel, ids: NDArray[np.int32], plan: str, chooser: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """(nats, likeliest tokens) at every position. ids: int32 [rows, length + 1]."""
    device = model.embedding.device
    tokens = torch.from_numpy(np.ascontiguousarray(ids)).long().to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    # With gradients, although none are taken: without them everything would be compiled once more.
    done = model(
        inputs,
        targets,
        torch.zeros_like(inputs, dtype=torch.float32),
        plan=plan,
        topk=model.sizes.topk_blocks,
        choose=chooser,
    )
    hidden = done.hidden.detach()
    guesses = torch.stack([model.predict(row) for row in hidden])
    return done.nats.view(inputs.shape).cpu().numpy(), guesses.cpu().numpy()
