"""The digits that the small network has not seen, and a file of it; a quick step benchmark."""

import pytest
import torch

from bench.data.datasets import Split, load_data
from bench.settings.config import resolve
from bench.speed.bandwidth import bandwidth
from bench.training.checkpoint import save_checkpoint

from ..helpers.trained import digits, model


@pytest.fixture
def split():
    x, y = digits()
    return Split((x[1500:] * 16).to(torch.uint8), y[1500:], 16)


@pytest.fixture
def checkpoint(tmp_path):
    config = resolve("sgd", "digits", {"width": 8})
    save_checkpoint(tmp_path / "last.pt", config, load_data("digits", 0.1, 0), model())
    return tmp_path / "last.pt"


@pytest.fixture
def quick(monkeypatch):
    """Bandwidth from small buffers: what is tested is not the machine's speed."""
    monkeypatch.setattr("bench.speed.step.bandwidth", lambda device: bandwidth(device, 2**20, 2))
