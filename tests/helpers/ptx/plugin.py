"""A pytest plugin: the Triton kernels of any test run as compiled PTX, executed on the CPU.

    python -m pytest -p tests.helpers.ptx.plugin --target sm_80 tests/backends/test_kernels.py
"""

import os

os.environ["TRITON_INTERPRET"] = "0"  # before any decorator runs

import pytest
import torch

from .driver import Driver


def pytest_addoption(parser) -> None:
    group = parser.getgroup("executed PTX")
    group.addoption("--target", default="sm_90", help="what Triton compiles for")
    group.addoption("--alone", action="store_true", help="every warp alone, in a random order")


def pytest_configure(config) -> None:
    driver = Driver(config.getoption("target"), together=not config.getoption("alone"))
    config.ptx, config.ptx_active = driver, driver.active()
    config.ptx_active.__enter__()


def pytest_unconfigure(config) -> None:
    config.ptx_active.__exit__(None, None, None)


@pytest.fixture
def executed(request) -> Driver:
    """The driver that executes, as new."""
    driver = request.config.ptx
    driver.traffic.clear()
    yield driver
    driver.gaps.clear()
    driver.rewrite = lambda name, ptx: ptx


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")
