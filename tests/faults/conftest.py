"""Fixtures of the fault tests: the ledger, a checkpoint with one poisoned token, services to break."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint, poison
from tests.faults.ledger import PLUGIN, Ledger
from tests.faults.streams import POISON_TOKEN_ID


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only with `python -m tests.faults`")
    if not config.pluginmanager.has_plugin(PLUGIN):
        config.pluginmanager.register(Ledger(full=False, rounds=1, report=None))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ledger = config.pluginmanager.get_plugin(PLUGIN)
    assert isinstance(ledger, Ledger)
    left_out = [] if ledger.full else [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def ledger(request: pytest.FixtureRequest) -> Ledger:
    found = request.config.pluginmanager.get_plugin(PLUGIN)
    assert isinstance(found, Ledger)
    return found


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose logits are NaN for whoever uses POISON_TOKEN_ID."""
    return poison(make_checkpoint(tmp_path_factory.mktemp("poisoned")), POISON_TOKEN_ID)
