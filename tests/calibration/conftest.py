"""Fixtures of the tests of distillation."""

import logging

import pytest
from distilling import FEW_BLOCKS, Subject, unet2d

from dq_runtime import DilateQuantConfig


@pytest.fixture(scope="module")
def plain():
    """Only the time embedding and the way down are quantized: six blocks, an attention among them."""
    return Subject(unet2d(), DilateQuantConfig(**FEW_BLOCKS))


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="dq_runtime")
    return caplog
