"""Ends the service without cutting what it has accepted: first nothing new, then what runs, then the application."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ray import serve

log = logging.getLogger(__name__)

POLL_S = 0.25
# For the answers of all HTTP fronts; a busy one takes its time.
ASK_TIMEOUT_S = 10.0
# Without an answer for so long, there is nobody to wait for.
SILENCE_TIMEOUT_S = 30.0
# An answer that has left its HTTP front is still on its way through Serve's proxy.
LAST_BYTES_S = 2.0


class Drain:
    """One drain of one application. cut: set by whoever does not want to wait any longer."""

    def __init__(self, application: str, cut: threading.Event) -> None:
        self._application = application
        self._cut = cut
        self.num_running = 0

    def wait_for_requests(self, timeout_s: float) -> bool:
        """Let every HTTP front refuse what is new, and wait until none runs a request; False when it was cut, or took
        longer. `num_running`: how many ran when it was last seen."""
        heard_s = time.monotonic()
        deadline_s = heard_s + timeout_s
        handle = serve.get_deployment_handle("Ingress", self._application)
        while True:
            try:
                answers = handle.broadcast("drain").results(timeout_s=ASK_TIMEOUT_S)
            except Exception as error:  # a front that is lost takes its connections with it
                log.debug("not all HTTP fronts answer: %r", error)
            else:
                heard_s = time.monotonic()
                self.num_running = sum(answers)
                if not self.num_running:
                    self._cut.wait(LAST_BYTES_S)
                    return not self._cut.is_set()
            limit_s = min(deadline_s, heard_s + SILENCE_TIMEOUT_S)
            if time.monotonic() >= limit_s or self._cut.wait(POLL_S):
                return False


def until_cut(call: Callable[[], object], timeout_s: float, cut: threading.Event) -> None:
    """Make a call to Serve, and wait for it no longer than this, or until somebody does not want to."""
    done = threading.Event()

    def work() -> None:
        try:
            call()
        except Exception as error:  # the process ends anyway
            log.debug("Serve did not stop: %r", error)
        finally:
            done.set()

    threading.Thread(target=work, daemon=True).start()
    deadline_s = time.monotonic() + timeout_s
    while not done.wait(POLL_S) and not cut.is_set() and time.monotonic() < deadline_s:
        pass
