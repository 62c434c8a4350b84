"""Runs as tasks of a Ray cluster: one of two workers is killed in mid-run, then a node; their runs
are made by the other, and no bit is another."""

import importlib.util
import os
import signal
import time

import pytest

from bench.experiments.places import attempt
from bench.settings.config import resolve

from ..helpers.survive import difference
from .test_pool import EVALUATION, FAST, OPTIONS, error, owner, started, tracked_epochs

METHODS, EPOCHS = ("sgd", "sam", "fsam"), 6
LONG = 900  # seconds; it takes 60 where the machine has nothing else to do


def test_ray_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = error(capsys, "compare", "--methods", "sgd", *FAST, "--ray", "--out", tmp_path / "out")
    assert "pip install ray" in text and not (tmp_path / "out").exists()


def test_a_cluster_that_does_not_answer_is_named(tmp_path, capsys):
    pytest.importorskip("ray", reason="needs Ray: pip install ray")
    for address in ("127.0.0.1:9", "nowhere.invalid:6379"):
        text = error(capsys, "compare", "--methods", "sgd", *FAST, "--ray", address,
                     "--out", tmp_path / "out")  # fmt: skip
        assert f"no Ray cluster answers at '{address}'" in text
        assert not (tmp_path / "out").exists()


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as f:
        return int(f.read().rpartition(")")[2].split()[1])


@pytest.mark.long
def test_of_two_nodes_one_is_killed_and_no_bit_is_another(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs Ray: pip install ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    out = tmp_path / "out"
    cluster = Cluster(initialize_head=True,
                      head_node_args={"num_cpus": 0, "include_dashboard": False})  # fmt: skip
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
        command = ["compare", *FAST, "--methods", *METHODS, "--seeds", "0", "--epochs", EPOCHS,
                   "--ray", cluster.address, "--track", "tensorboard", "--out", out]  # fmt: skip
        with started(*command) as process:
            killed = owner(out / "sgd-seed0")
            raylets_of = {parent(killed)}
            os.kill(killed, signal.SIGKILL)
            lost = parent(owner(out / "fsam-seed0"))
            raylets_of.add(lost)
            cluster.remove_node(raylets[lost], allow_graceful=False)
            printed, said = process.communicate(timeout=LONG)
        assert process.returncode == 0, said
        assert raylets_of <= raylets.keys(), "not made by the cluster's workers"
        assert said.count("is begun again") == 2, said
    finally:
        cluster.shutdown()
    for method in METHODS:
        config = resolve(method, "digits", OPTIONS | {"epochs": EPOCHS})
        alone = tmp_path / config.name
        until = time.time() + LONG
        assert isinstance(attempt(config, {"summary.json": EVALUATION}, alone, until), list)
        assert tracked_epochs(out / config.name) == [*range(EPOCHS)]
        assert difference(out / config.name, alone) == ""
