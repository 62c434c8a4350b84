"""Sweeps and studies: which runs are made, that finished ones are not made again, the numbers."""

import json

import numpy as np
import pytest

from bench.__main__ import main
from bench.experiments.study import STUDIES, load_study, show, study_runs
from bench.experiments.sweep import by_setting, parse_grid, runs_of, table, with_warnings
from bench.experiments.train_and_evaluate import train_and_evaluate
from bench.settings.evaluation import Evaluation
from bench.training.train import train

TINY = {"width": 4, "epochs": 1, "batch_size": 64, "threads": 1, "val": 0.5}
COMMAND = ["sweep", "--methods", "sgd", "sam", "--seeds", "0", "1", "--grid", "rho=0.3",
           "--data", "digits", "--width", "4", "--epochs", "1", "--threads", "1",
           "--eval-samples", "20", "--eval-steps", "1", "--eval-linf", "8/255",
           "--eval-l2", "32/255"]  # fmt: skip


def error(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


# ---- which runs


def test_a_grid_holds_values_of_the_options_kinds():
    grid = parse_grid(["rho=0.05,1", "batch-size=64,128", "eps=8/255", "augment=none"], {})
    assert grid == {"rho": [0.05, 1.0], "batch_size": [64, 128], "eps": ["8/255"],
                    "augment": ["none"]}  # fmt: skip
    assert [type(v) for v in grid["rho"] + grid["batch_size"]] == [float, float, int, int]


def test_a_value_multiplies_the_runs_of_methods_that_use_it_alone():
    grid = {"rho": [0.1, 0.3], "label_noise": [0.0, 0.4], "lmbda": [0.9]}
    runs = runs_of(["sgd", "sam", "fsam"], [0, 1], grid, "digits", TINY)
    counts = {m: sum(c.method == m for c in runs.values()) for m in ("sgd", "sam", "fsam")}
    assert counts == {"sgd": 4, "sam": 8, "fsam": 8}
    assert len(set(runs.values())) == len(runs)  # no run twice
    config = runs["fsam-rho0.3-label_noise0.4-lmbda0.9-seed1"]
    assert (config.rho, config.label_noise, config.lmbda, config.seed) == (0.3, 0.4, 0.9, 1)
    assert runs["sgd-label_noise0.4-seed0"].rho is None


# ---- errors


def test_refusals_name_the_way_out(capsys, tmp_path):
    def refusal(*grid, methods=("sam",)):
        return error(capsys, "sweep", "--methods", *methods, "--out", str(tmp_path / "out"),
                     "--grid", *grid)  # fmt: skip

    message = refusal("radius=0.1")
    assert "'radius' is not an option" in message and "choose from" in message
    assert " rho," in message and "batch-size" in message
    assert "options of their own" in refusal("seed=1,2")
    assert "'channels-last' is not an option with values" in refusal("channels-last=yes")
    assert "write it as rho=0.05,0.1" in refusal("rho")
    assert "write it as rho=0.05,0.1" in refusal("rho=")
    assert "needs values of float" in refusal("rho=big")
    assert "needs values of int" in refusal("batch-size=64.5")
    assert "given twice" in refusal("rho=0.1", "rho=0.2")
    assert "no effect on sgd" in refusal("rho=0.1", methods=("sgd",))
    assert "label_noise must be in [0, 1]" in refusal("label-noise=0.2,2")
    assert "given twice" in error(capsys, "sweep", "--methods", "sam", "--rho", "0.1",
                                  "--grid", "rho=0.2")  # fmt: skip
    assert "jobs must be at least 1" in error(
        capsys, "sweep", "--methods", "sgd", "--jobs", "0", "--out", str(tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


# ---- numbers


def test_the_table_holds_numpys_means_and_deviations():
    rng = np.random.default_rng(0)
    values = {}
    summaries = []
    for rho in (0.3, 0.1):
        values[rho] = rng.random((3, 2))
        summaries += [
            {
                "method": "sam", "natural": natural, "robust": {"linf": {"8/255": robust}},
                "images_per_second": 1.0, "config": {"seed": seed, "rho": rho}, "evaluation": {},
                "attacks": [], "test_images": 10, "versions": {}, "git": "", "device": "",
            }
            for seed, (natural, robust) in enumerate(values[rho].tolist())
        ]  # fmt: skip
    rows = by_setting(summaries, ["rho"])
    assert [row["setting"] for row in rows] == [{"rho": 0.1}, {"rho": 0.3}]
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in table(rows).splitlines()[2:]]  # fmt: skip
    for rho, line in zip((0.1, 0.3), lines, strict=True):
        mean, std = 100 * values[rho].mean(0), 100 * values[rho].std(0, ddof=1)
        cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(mean, std, strict=True)]
        assert line == ["SAM", str(rho), "3", *cells]
    flat = "the gradient is exactly 0 for 9 of 10 images"
    summaries = [s | {"warnings": [flat] * (s["config"]["rho"] == 0.1)} for s in summaries]
    told = with_warnings(by_setting(summaries, ["rho"])).removeprefix(table(rows))
    assert told == f"\n\nWarning: SAM, rho 0.1, seeds 0, 1, 2: {flat}."


def test_a_sweep_makes_what_is_left_and_nothing_again(tmp_path, capsys):
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    evaluation = Evaluation((8 / 255,), (32 / 255,), steps=1, samples=20)
    options = {k: v for k, v in TINY.items() if k != "val"}
    runs = runs_of(["sgd", "sam"], [0, 1], {"rho": [0.3]}, "digits", options)
    train_and_evaluate(runs["sgd-seed0"], evaluation, out / "sgd-seed0")  # finished
    train(runs["sam-rho0.3-seed1"], out / "sam-rho0.3-seed1")  # killed before its evaluation
    made = {p: p.stat().st_mtime_ns for p in [*out.rglob("*.pt"), out / "sgd-seed0/summary.json"]}
    assert main([*COMMAND, "--out", str(out), "--rows", str(rows)]) == 0
    assert {p.name for p in out.iterdir() if p.is_dir()} == set(runs)
    assert made == {p: p.stat().st_mtime_ns for p in made}
    summaries = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [s["config"]["method"] for s in summaries] == ["sgd", "sam", "sgd", "sam"]
    everything = {p: p.stat().st_mtime_ns for folder in runs for p in (out / folder).iterdir()}
    capsys.readouterr()
    assert main([*COMMAND, "--out", str(out), "--rows", str(rows)]) == 0
    assert everything == {p: p.stat().st_mtime_ns for p in everything}
    assert len(rows.read_text().splitlines()) == 4  # no row twice
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("| SGD"))
    natural = [s["natural"] for s in summaries if s["method"] == "sgd"]
    assert f"{100 * np.mean(natural):.1f} ± {100 * np.std(natural, ddof=1):.1f}" in line


# ---- studies


def test_studies_have_at_least_three_seeds_and_configs_that_can_be_used():
    names = sorted(p.stem for p in STUDIES.glob("*.json"))
    assert names == ["batch", "cifar", "noise", "parts", "relatives", "rho", "trade-off"]
    for name in names:
        study = load_study(name)
        runs = study_runs(study)
        seeds = {0} if name == "relatives" else {0, 1, 2}  # beside seed 0 of `cifar`
        assert {config.seed for config in runs.values()} >= seeds
        assert {config.method for config in runs.values()} == set(study["methods"])


@pytest.mark.parametrize("name", ["batch", "noise", "parts", "relatives", "rho", "trade-off"])
def test_committed_rows_are_the_studys(name, tmp_path, capsys):
    path = STUDIES.parents[1] / "results" / f"study-{name}.jsonl"
    show(name, path, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    printed = capsys.readouterr().out.splitlines()
    page = (STUDIES.parents[2] / "docs" / "studies.md").read_text()
    assert all(line in page for line in printed if line.startswith("|"))
    held = {name: json.loads(line)["config"] for name, line in enumerate(path.open())}
    wanted = {(c.method, c.seed, c.rho, c.label_noise, c.batch_size, c.val, c.full_every)
              for c in study_runs(load_study(name)).values()}  # fmt: skip
    keys = ("method", "seed", "rho", "label_noise", "batch_size", "val", "full_every")
    assert {tuple(c[k] for k in keys) for c in held.values()} == wanted


@pytest.mark.parametrize("words, option", [
    (["--rows", "x"], "rows"), (["--out", "x"], "out"), (["--train-only"], "train-only"),
    (["--jobs", "2"], "jobs"), (["--retries", "0"], "retries"), (["--no-wait"], "no-wait"),
])  # fmt: skip
def test_what_trains_has_no_effect_where_rows_are_shown(words, option, capsys):
    """It was ignored, and the rows that were to be made were not."""
    said = error(capsys, "study", "rho", "--show", "bench/results/study-rho.jsonl", *words)
    assert f"--{option} has no effect with --show" in said


def test_unknown_studies_and_rows_that_are_not_the_studys_are_refused(tmp_path, capsys):
    known = "choose from batch, cifar, noise, parts, relatives, rho, trade-off"
    assert known in error(capsys, "study", "sharpness")
    assert "add --show ROWS" in error(capsys, "study", "rho", "--figure", "x.png")
    rows = STUDIES.parents[1] / "results" / "study-rho.jsonl"
    part = tmp_path / "rows.jsonl"
    part.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    assert "does not hold each of the study's 45 runs once" in error(
        capsys, "study", "rho", "--show", str(part))  # fmt: skip
