"""The adapters bound to the references, for tests."""

from __future__ import annotations

from engine.kernels import aiter, api
from engine.kernels.api import KernelSet
from tests.kernels.aiter.reference import Aiter
from tests.kernels.aiter.signatures import Source, load
from tests.kernels.devices import TARGET

HEAD = load()["e4048607"]


def bound(source: Source = HEAD) -> tuple[KernelSet, Aiter]:
    """The adapters over AITER as `source` has it, with the torch backend in Triton's place."""
    library = Aiter(source)
    return aiter.bind(library.lookup, api.resolve("torch"), TARGET), library
