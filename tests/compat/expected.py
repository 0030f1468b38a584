"""What the clients must be given: the offline engine's own words and numbers for the same requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams
from engine.tokenizer import Tokenizer

TASKS = Path(__file__).parent / "tasks"
PROMPT = "def add(a, b):\n    return"
MESSAGES = [{"role": "user", "content": "Write a function that adds two numbers."}]
MAX_TOKENS = 16
# The service's engine and the offline one: fp32, so that batches of different shapes agree to the last digits.
DTYPE = "float32"


def make(model: str) -> dict[str, Any]:
    """What clients read: prompt, text and token ids of a greedy completion, and of each (context, continuation) of the
    loglikelihood task the sum of the continuation's log-probabilities, and whether each of its tokens is the likeliest;
    generations: of that task's contexts, up to an empty line.
    """
    choices = json.loads((TASKS / "choices.json").read_text())
    pairs = [(row["context"], f" {choice}") for row in choices for choice in row["choices"]]
    tokenizer = Tokenizer.from_dir(model)
    with LLM(model, dtype=DTYPE, num_threads=1) as llm:
        [greedy] = llm.generate([PROMPT], SamplingParams(max_tokens=MAX_TOKENS, temperature=0))
        stopped = llm.generate(
            [row["context"] for row in choices], SamplingParams(max_tokens=MAX_TOKENS, temperature=0, stop=["\n\n"])
        )
        wholes = [tokenizer.encode(context + continuation) for context, continuation in pairs]
        # lm-eval counts white space at the end of a context to the continuation.
        num_context = [len(tokenizer.encode(context.rstrip())) for context, _ in pairs]
        scored = llm.generate(wholes, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
        loglikelihoods = []
        for (context, continuation), whole, start, output in zip(pairs, wholes, num_context, scored, strict=True):
            entries = (output.prompt_logprobs or [])[start:]
            actual = [entry[token] for token, entry in zip(whole[start:], entries, strict=True) if entry is not None]
            is_greedy = all(value == max(entry.values()) for value, entry in zip(actual, entries, strict=True) if entry)
            loglikelihoods.append([context, continuation, sum(actual), is_greedy])
    return {
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "text": greedy.text,
        "token_ids": greedy.token_ids,
        "messages": MESSAGES,
        "generations": [output.text for output in stopped],
        "loglikelihoods": loglikelihoods,
    }
