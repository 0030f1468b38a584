"""Every error that m3serve raises on purpose.

M3Error
├── ConfigError          a setting or knob is wrong: found at start-up, exit status 2
├── CheckpointError      config.json, a tensor or the tokenizer is not what M3 needs: start-up, exit status 2
├── RequestError         one request is wrong: HTTP 400, names the field
├── Overloaded           the bounded queue is full: HTTP 429 with Retry-After
└── EngineDead           no replica can answer: HTTP 503
"""

from __future__ import annotations

# A message quotes what is wrong, and a file can hold values of any size.
MAX_MESSAGE_CHARS = 8000


class M3Error(Exception):
    """Base class; the message is written for the person who can fix the cause."""


class _FileError(M3Error):
    def __init__(self, message: object) -> None:
        super().__init__(shortened(str(message), MAX_MESSAGE_CHARS))


class ConfigError(_FileError):
    """A setting has a wrong name, type or value, or two settings contradict each other."""


class CheckpointError(_FileError):
    """The checkpoint directory cannot be served as it is; the message names the key, tensor or file."""


class RequestError(M3Error):
    """One request cannot be honoured.

    Args:
        message: what is wrong, with the limit and the value given.
        param: the request field at fault, `None` when no single field is.
        code: short machine-readable reason, e.g. `context_length_exceeded`.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class Overloaded(M3Error):
    """The engine's bounded queue is full; the client may retry after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDead(M3Error):
    """The worker group (or the whole replica) is gone; what it was running must go elsewhere."""


def shortened(text: str, max_chars: int) -> str:
    """`text`, without its middle where it is longer."""
    half = max_chars // 2
    return text if len(text) <= max_chars else f"{text[:half]} ... {text[-half:]}"
