"""Fixtures of all tests: one Ray cluster per session, and a tiny checkpoint.

Loads no Ray by itself: the tests of the engine also run where there is none.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.checkpoints import make_checkpoint

# Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from tests.cluster import Cluster


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Operations of tiny models are shorter than it takes to wake a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell starts what is put in the background with SIGINT ignored, and commands under test would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One Ray cluster with Serve for all tests that need one: starting it takes seconds."""
    from tests.cluster import Cluster

    # A cluster that the caller's shell points at is not ours to use.
    os.environ.pop("RAY_ADDRESS", None)
    started = Cluster()
    yield started
    started.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with dense and sparse layers, and fewer KV heads than tensor-parallel ranks."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
