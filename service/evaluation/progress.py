"""Progress for the person who waits: stdout carries the results alone."""

from __future__ import annotations

import sys
import time

_PERIOD_S = 5.0
_BAR_WIDTH = 20


def say(text: str, command: str = "eval") -> None:
    """A line on stderr."""
    print(f"m3serve {command}: {text}", file=sys.stderr, flush=True)


class Progress:
    """Share, rate and time left of a number of tokens; a line every few seconds, on a terminal always the same one."""

    def __init__(self, what: str, total_tokens: int, command: str = "eval") -> None:
        """what: is being done; may be changed."""
        self.what = what
        self._command = command
        self._total = total_tokens
        self._done = 0
        self._started_s = self._told_s = time.monotonic()
        self._open = False

    def add(self, tokens: int) -> None:
        """So many more tokens are done."""
        self._done += tokens
        now_s = time.monotonic()
        if now_s - self._told_s < _PERIOD_S and self._done < self._total:
            return
        self._told_s = now_s
        elapsed_s = max(now_s - self._started_s, 1e-9)
        left_s = elapsed_s * (self._total - self._done) / max(self._done, 1)
        text = (
            f"{self.what}: {100 * self._done // max(self._total, 1)} % of {self._total} tokens, "
            f"{self._done / elapsed_s:.0f} tokens/s, {_clock(left_s)} left"
        )
        if not sys.stderr.isatty():
            say(text, self._command)
            return
        filled = _BAR_WIDTH * self._done // max(self._total, 1)
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        print(f"\r\x1b[Km3serve {self._command}: [{bar}] {text}", end="", file=sys.stderr, flush=True)
        self._open = True
        if self._done >= self._total:
            self.close()

    def close(self) -> None:
        """End the line that was begun."""
        if self._open:
            print(file=sys.stderr, flush=True)
        self._open = False


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    return f"{whole // 60}:{whole % 60:02d}"
