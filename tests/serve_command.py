"""`m3serve serve` as a process of its own, with everything that it starts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.cluster import wait_until

START_TIMEOUT_S = 120.0
ANY_PORTS = ("--port", "0", "--metrics-port", "0", "--ray-metrics-port", "0")


class Command:
    """`m3serve serve` in a session of its own, so that what it leaves behind can be found."""

    def __init__(self, *flags: str, **variables: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | variables
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve", *ANY_PORTS, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.errors: list[str] = []
        self.lines: list[str] = []
        for stream, lines in ((self.process.stderr, self.errors), (self.process.stdout, self.lines)):
            threading.Thread(target=lambda s, out: out.extend(s), args=(stream, lines), daemon=True).start()

    def descendants(self) -> list[int]:
        """Pids of everything that this command started, itself included; Ray's daemons keep its session."""
        pids = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                session = int(stat.read_text().rpartition(")")[2].split()[3])
                if session == self.process.pid:
                    pids.append(int(stat.parent.name))
        return pids

    def end(self) -> None:
        for pid in [self.process.pid, *self.descendants()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=10.0)

    def wait_until_ready(self) -> tuple[str, str, str]:
        """Base URL of the API, the rest of the ready line up to the metrics, and their URL."""
        wait_until(
            lambda: bool(self.lines) or self.process.poll() is not None,
            timeout_s=START_TIMEOUT_S,
            what="the ready line",
        )
        [ready] = self.lines
        found = re.fullmatch(r"m3serve ready: (http://\S+/v1) (.*) metrics=(\S+)\n", ready)
        assert found, (ready, self.errors)
        base, said, metrics = found.groups()
        return base, said, metrics
