"""Runs that are interrupted anywhere, and end with the bits of runs that are not."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.files import replacing
from bench.provenance import ROOT
from bench.settings.config import Config, resolve
from bench.training.checkpoint import load_checkpoint
from bench.training.epoch_state import Position
from bench.training.session import Sitting
from bench.training.stopped import Stopped
from bench.training.train import set_up, train

from ..helpers.survive import SMALL, difference, learning, same, state, survive

TINY = {"width": 4, "epochs": 2, "batch_size": 400, "threads": 1}  # four steps an epoch
TRAIN = ["train", *SMALL, "--epochs", "2", "--batch-size", "400"]


def tiny(method: str, **options) -> Config:
    return resolve(method, "digits", TINY | options)


def step_by_step(config: Config, out) -> int:
    """Train in sittings of one step, each from what the last one left on the disk; return how
    many it took."""
    for sittings in range(1, 100):
        try:
            train(config, out, sitting=Sitting(time_budget=0))
        except Stopped:
            torch.manual_seed(sittings)  # nothing in memory shall carry over
            continue
        return sittings
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    "method, options",
    [
        ("sgd", {"amp": "bf16"}),
        ("sgd", {"amp": "fp16"}),
        ("sam-interval", {"base": "adamw", "amp": "fp16", "interval": 3}),
        ("fsam", {"label_noise": 0.3, "cutout": 3, "val": 0}),
        ("at-linf+fasam", {"attack_steps": 2, "attack_bn": "moving", "awp_gamma": 0.01}),
        ("trades+sam-micro", {"attack_steps": 1, "second_bn": "moving"}),
        ("n-fgsm+asam", {}),
        ("sam-full", {"full_every": 3}),
        ("sam-noise", {"full_every": 3}),
        ("sam-db", {}),
        ("msam", {"amp": "fp16"}),
        ("at-linf+looksam", {"attack_steps": 1, "interval": 3}),
        ("sam-late", {"late": 0.5, "model": "vgg16bn"}),  # has dropout
    ],
)
def test_stopping_after_every_step_changes_no_bit(method, options, tmp_path):
    config = tiny(method, **options)
    train(config, tmp_path / "whole")
    assert step_by_step(config, tmp_path / "cut") == 1 + 2 * 4
    for name in ("last.pt", "best.pt"):
        assert same(state(tmp_path / "whole" / name), state(tmp_path / "cut" / name))
    assert learning(tmp_path / "whole") == learning(tmp_path / "cut")


def test_every_stream_is_kept(tmp_path):
    """A position that is taken up draws on as the one that was saved, and not as a new one."""
    run = set_up(tiny("at-linf"))

    def draws(position):
        return [torch.rand(3, generator=g) for g in (position.augmentation, position.attack, None)]

    here = Position(run, 1)
    draws(here)
    here.done, here.sums = 2, torch.tensor([1.5, 7.0], dtype=torch.float64)
    saved = here.state_dict()
    expected, fresh = draws(here), draws(Position(run, 1))
    there = Position(run, 1)
    there.load_state_dict(saved)
    assert there.done == 2 and same(there.sums, here.sums)
    for drawn, wanted, other in zip(draws(there), expected, fresh, strict=True):
        assert torch.equal(drawn, wanted) and not torch.equal(drawn, other)


def test_small_runs_write_no_checkpoint_within_an_epoch(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("bench.training.train.save",
                        lambda run, out, position=None: saved.append(position))
    train(tiny("sgd"), tmp_path)
    assert saved == [None, None]
    saved.clear()
    train(tiny("sgd"), tmp_path / "often", sitting=Sitting(save_every=0))
    assert [p and p["done"] for p in saved] == [1, 2, 3, None] * 2


@pytest.mark.long
def test_killed_at_random_moments_and_terminated(tmp_path):
    """Real processes; `python -m tests.helpers.survive` does it longer and with more methods."""
    hits = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    options = ["--method", "at-linf", "--optimizer", "fsam", "--attack-steps", "1",
               "--epochs", "12"]  # fmt: skip
    codes, found = survive(tmp_path, options, hits)
    assert found == ""
    assert codes == [-9, 143, -9]  # each was still training


def test_a_write_that_is_killed_never_replaces_the_file(tmp_path):
    path = tmp_path / "last.pt"
    with replacing(path) as tmp:
        tmp.write_bytes(b"whole")
    child = os.fork()
    if child == 0:
        with replacing(path) as tmp:
            tmp.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert path.read_bytes() == b"whole"
    assert [p.read_bytes() for p in tmp_path.glob(".*")] == [b"half"]


def test_what_a_killed_write_left_is_removed(tmp_path):
    config = tiny("sgd")
    train(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, tmp_path / "cut", sitting=Sitting(time_budget=0))
    for name in (".last.pt.tmp", ".best.pt.tmp"):
        (tmp_path / "cut" / name).write_bytes(b"half")
    train(config, tmp_path / "cut")
    assert sorted(os.listdir(tmp_path / "cut")) == sorted(os.listdir(tmp_path / "whole"))
    assert same(state(tmp_path / "whole/last.pt"), state(tmp_path / "cut/last.pt"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    config, save = tiny("fsam"), torch.save
    train(config, tmp_path / "whole")
    writes = []

    def full(value, path):
        writes.append(path)
        if len(writes) == 3:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        save(value, path)

    with monkeypatch.context() as m, pytest.raises(OSError, match="No space"):
        m.setattr(torch, "save", full)
        train(config, tmp_path / "cut", sitting=Sitting(save_every=0))
    assert load_checkpoint(tmp_path / "cut/last.pt")["position"]["done"] == 2
    train(config, tmp_path / "cut")
    assert same(state(tmp_path / "whole/last.pt"), state(tmp_path / "cut/last.pt"))


# ---- the command line


def test_time_budget_saves_stops_and_goes_on(tmp_path, capsys):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    assert main([*TRAIN, "--out", whole]) == 0
    capsys.readouterr()
    for where in ("1 of 4 steps of epoch 1", "2 of 4 steps of epoch 1"):
        assert main([*TRAIN, "--time-budget", "0", "--out", cut]) == 0
        printed = capsys.readouterr().out
        assert f"stopped after {where}: the time budget of 0 minutes is used up" in printed
        assert "repeat the command" in printed and not (tmp_path / "cut/summary.json").exists()
    assert main([*TRAIN, "--save-every", "0", "--time-budget", "60", "--out", cut]) == 0
    assert "natural" in capsys.readouterr().out
    assert difference(tmp_path / "whole", tmp_path / "cut") == ""


@pytest.mark.parametrize("arguments, said", [
    (["--save-every", "-1"], "-1"),
    (["--save-every", "nan"], "nan"),
    (["--time-budget", "-5"], "-5"),
    (["--sync-bn"], "torchrun"),
    (["--method", "sam", "--local-ascent"], "torchrun"),
    (["--method", "at-linf", "--amp", "fp16"], "fp16"),
    (["--amp", "fp16", "--awp-gamma", "0.01"], "fp16"),
])  # fmt: skip
def test_refused(arguments, said, tmp_path, capsys):
    assert main([*TRAIN, *arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert list(tmp_path.iterdir()) == []


def test_torchrun_is_for_train(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["compare"]) == 2
    assert "compare" in capsys.readouterr().err


# ---- loss scaling


@pytest.mark.parametrize("method", ["sgd", "sam", "fsam", "sam-micro"])
def test_fp16_trains_as_float32(method, tmp_path):
    config = tiny(method, epochs=4, batch_size=128)
    exact, mixed = (
        train(replace(config, amp=amp), tmp_path / amp) for amp in ("off", "fp16")
    )
    assert exact.scaler.state_dict() == {}
    state = load_checkpoint(tmp_path / "fp16/last.pt")["scaler"]
    assert state["scale"] == 2.0**16 and state["_growth_tracker"] == 4 * 11  # no step skipped
    for a, b in zip(exact.history, mixed.history, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=0.02)


def test_an_overflow_skips_the_step_and_the_smaller_scale_is_kept(tmp_path, monkeypatch):
    config = tiny("sam", amp="fp16", epochs=1)
    start = set_up(config).model.state_dict()
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda device="cpu", **k: scaler(device, init_scale=2.0**40, **k))
    with pytest.raises(Stopped):
        train(config, tmp_path, sitting=Sitting(time_budget=0))
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved["scaler"]["scale"] == 2.0**39
    ws = [k for k in start if k.endswith(("weight", "bias"))]
    assert all(torch.equal(saved["model"][k], start[k]) for k in ws)


# ---- one sitting at a time


def holder(folder):
    """Start a process that is at work in a directory until it is killed."""
    code = "import sys, time; from pathlib import Path; from bench.files import alone_in\n"
    code += "with alone_in(Path(sys.argv[1])): print('in', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "in\n"
    return process


def test_a_second_sitting_is_refused_while_the_first_one_lasts(tmp_path, capsys):
    command, out = [*TRAIN, "--method", "sgd", "--out"], tmp_path / "run"
    train(tiny("sgd"), out)
    before = {p: p.read_bytes() for p in out.iterdir()}
    other = holder(out)
    try:
        assert main([*command, str(out)]) == 2
        error = capsys.readouterr().err
        assert "another process is at work in" in error and "choose another --out" in error
        assert before == {p: p.read_bytes() for p in before}
    finally:
        other.kill()
        other.communicate()
    assert main([*command, str(out)]) == 0
