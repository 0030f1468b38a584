"""lm-eval: local-completions scores continuations as the offline engine does; both kinds of endpoint generate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from reporting import EXPECTED, MODEL, URL, run, same

TASKS = Path(__file__).parents[1] / "tasks"
# The service computes in fp32, but in batches of other shapes than the offline engine.
TOLERANCE = 1e-4
ARGUMENTS = {
    "model": MODEL,
    "tokenizer": os.environ["M3_CHECKPOINT"],
    "tokenizer_backend": "huggingface",
    "num_concurrent": 2,
    "max_retries": 1,
    "max_length": 2048,
}


def evaluate(kind: str, route: str, task: str, **options: Any) -> list[dict[str, Any]]:
    """The samples of one task."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=kind,
        model_args=ARGUMENTS | {"base_url": URL + route},
        tasks=[task],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    samples: list[dict[str, Any]] = results["samples"][task]
    return samples


def loglikelihood() -> None:
    samples = evaluate("local-completions", "/completions", "m3_choices")
    wanted = {
        (context, continuation): (value, greedy) for context, continuation, value, greedy in EXPECTED["loglikelihoods"]
    }
    found = {
        (request[0], request[1]): response
        for sample in samples
        for request, response in zip(sample["arguments"], (r[0] for r in sample["resps"]), strict=True)
    }
    same(found.keys(), wanted.keys())
    for pair, (value, greedy) in wanted.items():
        assert abs(float(found[pair][0]) - value) < TOLERANCE, (pair, found[pair], value)
        same(str(found[pair][1]), str(greedy))


def generate() -> None:
    samples = evaluate("local-completions", "/completions", "m3_generate")
    by_document = sorted(samples, key=lambda sample: sample["doc_id"])
    same([sample["resps"][0][0] for sample in by_document], EXPECTED["generations"])


def chat_generate() -> None:
    samples = evaluate("local-chat-completions", "/chat/completions", "m3_generate", apply_chat_template=True)
    same(len(samples), 5)


# The tasks name their file as it is called there.
os.chdir(TASKS)
run(
    "lm_eval",
    [
        ("local-completions: loglikelihood", loglikelihood),
        ("local-completions: generate_until", generate),
        ("local-chat-completions: generate_until", chat_generate),
    ],
)
