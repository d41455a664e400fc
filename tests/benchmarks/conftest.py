"""Fixtures of the tests of the benchmarks."""

import functools

import pytest

from benchmarks import unets


@pytest.fixture(scope="session", autouse=True)
def _layers_are_traced_once():
    """Traces each UNet once in a process: even on the meta device, a forward pass of SDXL takes seconds."""
    traced = functools.cache(unets.layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unets, "layers", lambda name, batch: list(traced(name, batch)))
        yield
