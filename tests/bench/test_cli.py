"""The command line: what compare and evaluate leave, and bad input's one sentence and code 2."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.__main__ import COMMANDS, main
from bench.cli.experiments import combined
from bench.experiments.compare import settings
from bench.files import append_jsonl, replacing
from bench.settings.config import check_used, resolve

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--width", "4", "--threads", "1", "--eval-linf", "8", "--eval-l2", "128",
        "--eval-steps", "1"]  # fmt: skip
TINY = ["--epochs", "1", *FAST]


def test_compare_leaves_summary_table_plots_and_rows(tmp_path, capsys):
    out, rows_path = tmp_path / "out", tmp_path / "results" / "rows.jsonl"
    command = [
        "compare", *TINY, "--methods", "sgd", "sam", "at-linf", "--attack-steps", "1",
        "--seeds", "0", "1", "--jobs", "2", "--out", str(out), "--rows", str(rows_path),
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    rows = json.loads((out / "summary.json").read_text())
    assert [row["method"] for row in rows] == ["sgd", "sam", "at-linf"]
    for row in rows:
        assert row.keys() >= {"method", "natural", "robust", "images_per_second", "config",
                              "natural_std", "robust_std", "seeds", "relative_cost"}  # fmt: skip
        assert list(row["robust"]) == ["linf", "l2"]
        assert list(row["robust"]["linf"]) == ["8/255"] and list(row["robust"]["l2"]) == ["128/255"]
        runs = [json.loads((out / run / "summary.json").read_text()) for run in row["runs"]]
        assert [run["config"]["seed"] for run in runs] == row["seeds"] == [0, 1]
        assert row["natural"] == pytest.approx(sum(run["natural"] for run in runs) / 2)
        gap = abs(runs[0]["natural"] - runs[1]["natural"])
        assert row["natural_std"] == pytest.approx(gap / 2**0.5)
        assert f"{100 * row['natural']:.1f} ± {100 * row['natural_std']:.1f}" in printed
    assert min(row["relative_cost"] for row in rows) == 1
    for name in ("accuracy-eps.png", "accuracy-cost.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG") and str(out / name) in printed
    assert (out / "table.md").read_text().split("\n\n")[0] in printed
    committed = [json.loads(line) for line in rows_path.read_text().splitlines()]
    assert len(committed) == 6
    for row in committed:
        assert row.keys() >= {"config", "versions", "git", "device", "natural"}

    trained = {p: p.stat().st_mtime_ns for p in out.glob("*/last.pt")}
    assert main(command) == 0
    assert trained == {p: p.stat().st_mtime_ns for p in out.glob("*/last.pt")}, "trained again"
    assert json.loads((out / "summary.json").read_text()) == rows
    assert len(rows_path.read_text().splitlines()) == 6, "the same rows again"


def test_the_demo_leaves_what_is_given_and_a_method_named_twice_is_one(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--methods", "sgd", "sgd", "--seeds", "3", "--jobs", "1", "--eval-on", "held-out"]
    demo = ["compare", "--demo", "--preset", "digits"]
    assert main([*demo, *TINY, *words, "--out", str(out)]) == 0
    (row,) = json.loads((out / "summary.json").read_text())
    assert row["seeds"] == [3] and row["config"]["threads"] == 1
    assert sorted(p.name for p in out.glob("*seed*")) == ["sgd-seed3"]
    on = "on 144 images held out of the training images of digits"
    assert f"Accuracy in % {on}" in capsys.readouterr().out
    for words in (["--preset", "cifar-fast"], ["--recipe", "sam-at/cifar10/st"],
                  ["--recipes", "sam-at/cifar10/st"]):  # fmt: skip
        assert main(["compare", "--demo", *words]) == 2
        assert f"--demo is --preset digits, and {words[0]} asks" in capsys.readouterr().err


def test_a_combination_of_everything(tmp_path):
    command = ["--method", "at-linf", "--optimizer", "sam", "--attack-steps", "1", "--awp-gamma",
               "0.01", "--label-noise", "0.3", "--noise-kind", "true", "--val", "0", "--padding",
               "zero", "--cutout", "3"]  # fmt: skip
    assert main(["train", *TINY, *command, "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["method"] == "at-linf+sam" and summary["config"]["rho"] == 0.1
    assert summary["wrong_labels"] == round(0.3 * 1437) and summary["train_images"] == 1437
    assert summary["best"]["epoch"] == 0 and summary["best"]["natural"] == summary["natural"]


def test_comparison_of_combinations():
    methods = combined(["fgsm-rs", "at-linf", "at-linf+sam", "standard", "sgd"], "fsam")
    assert methods == ["fgsm-rs+fsam", "at-linf+fsam", "at-linf+sam", "fsam", "sgd"]
    assert combined(["trades", "sam"], None) == ["trades", "sam"]
    with pytest.raises(ValueError, match="no effect"):
        combined(["sam", "at-linf+sam"], "fsam")
    shown = {m: settings(asdict(resolve(m, "cifar6k", {"awp_gamma": 0.01}))) for m in methods}
    assert shown["fgsm-rs+fsam"] == "rho 0.2, sigma 1.0, lmbda 0.6, eps 4/255, awp_gamma 0.01"
    assert shown["at-linf+sam"].startswith("rho 0.2, eps 4/255, alpha 1/255, attack_steps 10")


def test_evaluate_repeats_the_summary(tmp_path, capsys):
    assert main(["train", *TINY, "--epochs", "8", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    trained = capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "last.pt"), *FAST[4:]]) == 0
    evaluated = capsys.readouterr().out
    assert evaluated.splitlines() == trained.splitlines()[:3]
    for accuracy in (summary["natural"], summary["robust"]["linf"]["8/255"]):
        assert f"{accuracy:7.2%}" in evaluated
    assert "PGD-1, linf, eps 8/255 = 0.03137, alpha 2/255 = 0.007843, random start" in evaluated


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--method", "sam", "--rho", "-0.1"], "-0.1"),
        (["--method", "sam", "--rho", "nan"], "nan"),
        (["--method", "sam", "--backend", "tpu"], "tpu"),
        (["--method", "fsam", "--lmbda", "2"], "2"),
        (["--method", "adam"], "adam"),
        (["--method", "sgd", "--rho", "0.1"], "rho"),
        (["--device", "abacus"], "abacus"),
        (["--data", "nowhere/at/all"], "nowhere/at/all"),
        (["--method", "at-linf", "--eps", "lots"], "lots"),
        (["--method", "at-linf", "--eps", "-8"], "-8"),
        (["--method", "at-linf", "--eps", "100"], "100"),
        (["--method", "at-l2", "--alpha", "0"], "0"),
        (["--eval-linf", "8", "0.3"], "0.3"),
        (["--model", "transformer"], "transformer"),
        (["--schedule", "never"], "never"),
        (["--method", "sam", "--optimizer", "fsam"], "fsam"),
        (["--method", "at-linf", "--optimizer", "adam"], "adam"),
        (["--method", "sam", "--base", "rmsprop"], "rmsprop"),
        (["--method", "trades", "--beta", "-1"], "-1"),
        (["--method", "at-linf", "--attack-bn", "sometimes"], "sometimes"),
        (["--awp-gamma", "nan"], "nan"),
        (["--label-noise", "1.5"], "1.5"),
        (["--padding", "mirror"], "mirror"),
        (["--normalisation", "f-sam"], "f-sam"),
        (["--weights", "nowhere.pt"], "nowhere.pt"),
        (["--augment", "resized-crop"], "digits"),
        (["--recipe", "sam-at/none"], "sam-at/none"),
        (["--preset", "best"], "best"),
        (["--epochs", "0"], "0"),
        (["--lr", "-1"], "-1"),
        (["--lr", "nan"], "nan"),
        (["--batch-size", "0"], "0"),
        (["--pad", "8"], "8"),
        (["--method", "sam-micro", "--micro", "62"], "micro 62 parts are more than the 61 images"),
        (["--val", "1.5"], "1.5"),
        (["--val", "0.0001"], "give another --val"),
        (["--seed", "-1"], "-1"),
        (["--seed", "4294967296"], "seed must be in [0, 4294967296), got 4294967296"),
        (["--seed", "1" + "0" * 20, "--val", "0"], "seed must be in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_bad_input_is_one_sentence_and_no_files(command, arguments, said, tmp_path, capsys):
    if command == "compare":
        renamed = {"--method": "--methods", "--seed": "--seeds"}
        arguments = [renamed.get(a, a) for a in arguments]
        arguments += [] if "--methods" in arguments else ["--methods", "sgd"]
    out = tmp_path / "runs" / "one"
    code = main([command, *arguments, "--out", str(out)])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is to be missing")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--device", "cuda"], marks=pytest.mark.long),
        ["--method", "sam", "--backend", "triton"],
    ],
)
def test_what_cannot_run_here_is_refused_from_a_shell(arguments, tmp_path):
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "train", *arguments, "--out", tmp_path / "run"]
    result = subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert arguments[-1] in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["matplotlib", "jinja2", "scipy.stats"])
def test_a_package_that_is_not_there_is_named_with_the_remedy(package, capsys, monkeypatch):
    own = replace(COMMANDS["report"], run=lambda options: importlib.import_module(package))
    monkeypatch.setitem(COMMANDS, "report", own)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["report", "runs"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and package in error and "pip install '.[demo]'" in error


def test_ctrl_c_is_one_sentence(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.experiments.train_and_evaluate.train", interrupted)
    assert main(["train", *TINY, "--out", str(tmp_path)]) == 130
    error = capsys.readouterr().err
    assert error.startswith("interrupted; repeat the command") and error.count("\n") == 1


def test_an_out_that_is_a_file_is_refused_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    for command in (["compare"], ["sweep"], ["compare", "--recipes", "sam-at/cifar10/st"]):
        words = [] if "--recipes" in command else ["--methods", "sgd"]
        assert main([*command, *words, "--out", str(tmp_path / "taken"), *TINY]) == 2
        error = capsys.readouterr().err
        assert "taken" in error and "choose another place" in error and error.count("\n") == 1


def test_out_with_another_config_is_refused(tmp_path, capsys):
    assert main(["train", *TINY, "--out", str(tmp_path)]) == 0
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert main(["train", *TINY, "--lr", "0.5", "--out", str(tmp_path)]) == 2
    assert "lr 0.05 -> 0.5" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def not_there(path):
    pass


def some_text(path):
    path.write_text("hello")


def other_program(path):
    torch.save({"weights": torch.zeros(3)}, path)


def cut_short(path):
    torch.save({"weights": torch.zeros(3000)}, path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("make", [not_there, os.mkdir, some_text, other_program, cut_short])
def test_evaluate_refuses(make, tmp_path, capsys):
    path = tmp_path / "model.pt"
    make(path)
    assert main(["evaluate", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1


def test_evaluate_refuses_other_data(tmp_path, capsys):
    assert main(["train", *TINY, "--out", str(tmp_path / "run")]) == 0
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / f"{i}.png")
    last = str(tmp_path / "run" / "last.pt")
    assert main(["evaluate", last, "--data", str(tmp_path / "images")]) == 2
    assert "['a', 'b']" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}])
    append_jsonl(path, [{"b": 2}])
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'
    with pytest.raises(RuntimeError), replacing(path) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n' and os.listdir(tmp_path) == ["rows.jsonl"]


def test_options_beat_methods_beat_presets():
    assert resolve("sam", "fsam-cifar100", {}).rho == 0.2
    assert resolve("sgd", "fsam-cifar100", {}).weight_decay == 5e-4
    assert resolve("sam", "fsam-cifar100", {}).weight_decay == 1e-3
    assert resolve("sam", "fsam-cifar100", {"rho": 0.4, "weight_decay": 0.0}).rho == 0.4
    assert resolve("sgd", "sam-at-cifar10", {"rho": 0.4}).rho is None
    assert resolve("at-linf", "sam-at-cifar10", {"eps": "4"}).attack.eps == 4 / 255
    with pytest.raises(ValueError, match="sigma"):
        check_used(["sgd", "sam"], {"sigma": 1.0})
    check_used(["sgd", "fsam"], {"sigma": 1.0})
