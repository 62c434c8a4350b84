"""`train --graph`: the same training, its steps made by fastsam.GraphedStep."""

from dataclasses import replace

import pytest
import torch

from bench.settings.config import resolve
from bench.training.train import train

# in batches of 143 and 144
TINY = {"data": "digits", "width": 2, "epochs": 2, "batch_size": 144, "threads": 1}


@pytest.mark.parametrize("method, more", [
    ("sgd", {"nesterov": True}), ("sam", {"amp": "bf16", "channels_last": True}), ("fsam", {}),
    ("sam-late", {"late": 0.5}), ("msam", {"rho": 0.3}), ("looksam", {"interval": 3}),
    ("gsam", {}), ("at-linf+asam", {"attack_steps": 2}),
])
def test_it_trains_the_same_weights(method, more, tmp_path):
    """On a CPU, where GraphedStep makes its steps one by one."""
    config = resolve(method, None, TINY | {"backend": "reference"} | more)
    plain = train(config, tmp_path / "plain")
    graphed = train(replace(config, graph=True), tmp_path / "graphed")
    assert set(graphed.graphs) == {143, 144} and not plain.graphs
    for name, expected in plain.model.state_dict().items():
        # SGD without a graph is torch's own, which rounds otherwise
        same = {"rtol": 1e-4, "atol": 1e-6} if method == "sgd" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(graphed.model.state_dict()[name], expected, **same, msg=name)
    assert [row["train_acc"] for row in graphed.history] == pytest.approx(
        [row["train_acc"] for row in plain.history], abs=2e-3 if method == "sgd" else 0)


@pytest.mark.parametrize("method, options, match", [
    ("sam", {}, "graph is for CUDA devices"),
    ("sam-part", {"device": "cuda"}, "nothing of ascent_part"),
    ("sam-micro", {"device": "cuda"}, "nothing of micro"),
    ("sam-batches", {"device": "cuda"}, "nothing of ascent_batches"),
    ("sam-full", {"device": "cuda"}, "nothing of sam-full"),
    ("trades", {"device": "cuda"}, "nothing of trades"),
    ("sam", {"device": "cuda", "awp_gamma": 0.01}, "nothing of awp_gamma"),
    ("sam", {"device": "cuda", "second_bn": "moving"}, "nothing of second_bn 'moving'"),
    ("sam", {"device": "cuda", "amp": "fp16"}, "nothing of amp 'fp16'"),
    ("sam", {"device": "cuda", "processes": 2}, "nothing of processes"),
])
def test_what_no_graph_holds_is_refused(method, options, match):
    with pytest.raises(ValueError, match=match):
        resolve(method, None, TINY | options | {"graph": True})
