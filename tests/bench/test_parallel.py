"""torchrun's processes, over gloo on the CPU: they train as one does on the same batches."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.training.train import train

from ..helpers.survive import learning, same, state
from . import parallel_worker as worker

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
LONG = 900  # seconds, of a machine that is at work on other things


def running(text: str) -> list[str]:
    """The processes that have `text` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended
            continue
    return [line for line in found if text in line]


@pytest.fixture(scope="module")
def terminated(tmp_path_factory):
    """What was there after torchrun was told to end, after some steps of a run: its exit code, its
    output, the processes left, the files and last.pt; and the directory."""
    folder = tmp_path_factory.mktemp("processes")
    last = folder / "terminated/last.pt"
    command = [*TORCHRUN, "-m", "bench", *worker.TERMINATED, "--save-every", "0",
               "--out", str(last.parent)]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    while not last.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=LONG)[0]
    left = running(str(last.parent))
    return process.returncode, output, left, os.listdir(last.parent), state(last), folder


def test_sigterm_of_torchrun_saves_and_ends_both(terminated):
    code, output, left, files, last, _ = terminated
    assert "SIGTERM; repeat the command to go on" in output
    assert code != 0 and left == [] and "Error" not in output.replace("SignalException", "")
    assert set(files) <= {".lock", "config.json", "last.pt", "best.pt", "metrics.jsonl"}
    assert last["config"]["processes"] == 2
    assert last["position"] is None or len(last["position"]["processes"]) == 2


def test_a_run_that_torchrun_left_is_finished(terminated, trained):
    summary = json.loads((trained / "terminated/summary.json").read_text())
    assert summary["config"]["processes"] == 2 and summary["natural"] > 0.4, "chance is 0.1"
    assert [row["epoch"] for row in learning(trained / "terminated")] == list(range(12))


def test_one_process_does_not_take_up_what_two_left(terminated, capsys):
    assert main([*worker.TERMINATED, "--out", str(terminated[-1] / "terminated")]) == 2
    assert "processes 2 -> 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(terminated):
    """The directory in which two processes have trained, and finished what was terminated."""
    folder = terminated[-1]
    command = [*TORCHRUN, "-m", "tests.bench.parallel_worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=LONG)  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def ranks(folder):
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]


@pytest.mark.parametrize("name", worker.EQUAL)
def test_two_processes_train_as_one(name, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.training.train.build_model", worker.without_batchnorm)
    alone = {"sam-micro": {"micro": 2}} if name == "local" else {name: worker.EQUAL[name]}
    one = train(worker.config_of(*alone.popitem(), 1), tmp_path)
    two = ranks(trained / name)
    for key, w in one.model.state_dict().items():
        torch.testing.assert_close(two[0]["model"][key], w, rtol=1e-4, atol=1e-5)
    for a, b in zip(one.history, two[0]["history"], strict=True):
        for key in ("train_loss", "train_acc", "val_acc", "lr"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)


@pytest.mark.parametrize("name", [*worker.EQUAL, *[f"whole-{name}" for name in worker.DIVIDED]])
def test_both_processes_end_with_the_same_bits(name, trained):
    a, b = ranks(trained / name)
    weights = [{k: t for k, t in x["model"].items()} for x in (a, b)]
    assert same(*weights)
    assert same(weights[0], dict(state(trained / name / "last.pt")["model"]))
    assert [row["train_loss"] for row in a["history"]] == [r["train_loss"] for r in b["history"]]
    written = {p.name for p in (trained / name).iterdir()}
    assert written == {"best.pt", "config.json", "last.pt", "metrics.jsonl", "rank0.pt", "rank1.pt"}


@pytest.mark.parametrize("name", worker.DIVIDED)
def test_two_processes_continue_to_the_same_bits(name, trained):
    whole, cut = trained / f"whole-{name}", trained / f"cut-{name}"
    for file in ("last.pt", "best.pt"):
        assert same(state(whole / file), state(cut / file))
    assert learning(whole) == learning(cut)
