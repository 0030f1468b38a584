"""What one client may ask of an HTTP front: how much at once, and for how long."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers

from engine.errors import Overloaded, RequestError

# Prompts of one body, whatever `max_prompts` says: they are counted before they are looked at.
MAX_PROMPTS = 4096
# Prompt tokens over all choices of one HTTP request. They travel to the engine as one message, each choice with its own
# copy: 4 Mi take 12 to 20 MB.
MAX_REQUEST_TOKENS = 4 * 2**20
# Log-probabilities of prompt tokens in one answer: each takes about 50 bytes of JSON, and is made on the event loop.
MAX_PROMPT_LOGPROBS = 2**20
# Of all bodies that are being read at the same time, in bodies of the largest size.
MAX_BODIES_IN_FLIGHT = 8

TIMEOUT_HEADER = "x-request-timeout-seconds"
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.5, 86400.0
# Ray Serve reads the same header and cuts the connection at that time: our answer has to be out before.
_EARLY_SHARE, _MAX_EARLY_S = 0.2, 1.0
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
# Ray Serve's too: it would let a request run on after its client has left.
_DISCONNECT_HEADER = "x-request-disconnect-disabled"


def read_timeout(headers: Headers, limit_s: float | None) -> float | None:
    """Seconds until a request must be answered, None: no limit. Raises RequestError for a header that is not taken.

    The header asks for less than `limit_s`, which is for all requests. What it asks for is shortened by a fifth, by a
    second at most, so that the answer is there in time.
    """
    given = headers.getlist(TIMEOUT_HEADER)
    if not given:
        return limit_s
    highest_s = MAX_TIMEOUT_S if limit_s is None else limit_s
    text = given[0]
    seconds = float(text) if len(given) == 1 and _SECONDS.fullmatch(text) else 0.0
    if not MIN_TIMEOUT_S <= seconds <= highest_s:
        shown = repr(text[:40]) if len(given) == 1 else f"{len(given)} values"
        raise RequestError(
            f"{TIMEOUT_HEADER} must be a decimal number in [{MIN_TIMEOUT_S:g}, {highest_s:g}], got {shown}",
            param=TIMEOUT_HEADER,
        )
    return seconds - min(seconds * _EARLY_SHARE, _MAX_EARLY_S)


def check_disconnect(headers: Headers) -> None:
    """RequestError for a request that asks to go on without its client."""
    if any(value.strip() != "?0" for value in headers.getlist(_DISCONNECT_HEADER)):
        raise RequestError(
            f"{_DISCONNECT_HEADER} is not supported: a request ends when its client leaves",
            param=_DISCONNECT_HEADER,
            code="unsupported_parameter",
        )


def check_request_tokens(num_tokens: int, num_choices_per_prompt: int) -> None:
    """RequestError when the prompts of a request are too long together. num_tokens: of each prompt once."""
    total = num_tokens * num_choices_per_prompt
    if total > MAX_REQUEST_TOKENS:
        raise RequestError(
            f"prompts of {num_tokens} tokens times n={num_choices_per_prompt} are {total} tokens, "
            f"at most {MAX_REQUEST_TOKENS} are allowed in one request",
            param="n" if num_tokens <= MAX_REQUEST_TOKENS else "prompt",
        )


def check_prompt_logprobs(num_tokens: int, num_choices_per_prompt: int, per_token: int | None, *, param: str) -> None:
    """RequestError when an answer would hold too many. per_token: the best ones asked for; None: not asked for.

    param: the field that asked.
    """
    if per_token is None:
        return
    total = num_tokens * num_choices_per_prompt * (per_token + 1)
    if total > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"{param}={per_token} of prompts of {num_tokens} tokens times n={num_choices_per_prompt} are {total} "
            f"log-probabilities, at most {MAX_PROMPT_LOGPROBS} are allowed in one answer",
            param=param,
        )


class BodyBudget:
    """Memory for bodies that are being read: clients that send slowly must not fill it together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.used = 0

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """One body. What is yielded takes bytes, and raises Overloaded when there are none left."""
        taken = 0

        def take(num_bytes: int) -> None:
            nonlocal taken
            if self.used + num_bytes > self._max_bytes:
                raise Overloaded(
                    f"bodies that are being read take more than {self._max_bytes} bytes together", retry_after_s=1.0
                )
            self.used += num_bytes
            taken += num_bytes

        try:
            yield take
        finally:
            self.used -= taken
