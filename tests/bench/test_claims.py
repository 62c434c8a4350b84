"""Claims judged by paired differences, on made rows: intervals, verdicts, what is missing; and a
study with several evaluations, which makes what its rows do not hold."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy import stats

from bench.__main__ import main
from bench.experiments import study as studies
from bench.experiments.study import costs_of, evaluations_of, load_study, show, study_runs
from bench.models import build_model
from bench.provenance import ROOT
from bench.reports.claims import CANNOT, NOT, SHOWS, Claim, cost, differences_of, judged, verdict_of
from bench.settings.config import resolve
from bench.training import train as training


def row(method, seed, natural, linf=None):
    radii = {} if linf is None else {"linf": {"1/255": linf}}
    return {"method": method, "config": {"seed": seed}, "natural": natural, "robust": radii}


def rows(more, less):
    pairs = [("sam", more), ("sgd", less)]
    return [row(m, seed, a) for m, values in pairs for seed, a in enumerate(values)]


def natural(margin=0.0):
    return Claim("SAM", "sam", "sgd", ("natural",), margin)


def verdict(made, claim):
    return verdict_of(claim, differences_of(made, claim))


def test_the_interval_is_that_of_a_paired_t_test():
    more, less = [0.91, 0.935, 0.922, 0.93], [0.90, 0.92, 0.925, 0.91]
    (found,) = differences_of(rows(more, less), natural())
    exact = stats.ttest_rel(np.multiply(more, 100), np.multiply(less, 100)).confidence_interval()
    assert found.mean - found.half_width == pytest.approx(exact.low)
    assert found.mean + found.half_width == pytest.approx(exact.high)


@pytest.mark.parametrize("differences, margin, said", [
    ([1.0, 1.1, 0.9], 0.0, SHOWS),
    ([-1.0, -1.1, -0.9], 0.0, NOT),
    ([-1.0, 0.1, 1.2], 0.0, CANNOT),
    ([3.0, 0.1, 0.2], 0.0, CANNOT),  # the mean alone is no evidence
    ([-0.3, -0.31, -0.29], 0.5, SHOWS),  # not below by more than half a point
    ([-0.3, -0.31, -0.29], 0.0, NOT),
    ([-0.6, -0.61, -0.59], 0.5, NOT),
    ([2.0], 0.0, CANNOT),  # one seed has no interval
    ([1.0, 1.0, 1.0], 0.0, SHOWS),
    ([0.0, 0.0, 0.0], 0.0, CANNOT),  # equal is not above
])  # fmt: skip
def test_a_verdict_needs_the_whole_interval(differences, margin, said):
    made = rows([0.5 + d / 100 for d in differences], [0.5 for _ in differences])
    assert verdict(made, natural(margin)) == said


def test_seeds_are_paired_by_number_whatever_their_order_and_their_own_level():
    made = rows([0.61, 0.71, 0.812], [0.60, 0.70, 0.80])  # seeds differ by far more than methods
    assert verdict(made, natural()) == verdict(made[::-1], natural()) == SHOWS
    shuffled = rows([0.71, 0.812, 0.61], [0.60, 0.70, 0.80])
    assert verdict(shuffled, natural()) == CANNOT


def test_runs_without_a_partner_and_places_that_were_not_measured_do_not_count():
    made = rows([0.91, 0.92, 0.93], [0.90, 0.91])
    (found,) = differences_of(made, natural())
    assert list(found.by_seed) == [0, 1]
    both = Claim("SAM", "sam", "sgd", ("natural", "linf 1/255"))
    assert verdict(rows([0.9, 0.91, 0.92], [0.8, 0.81, 0.82]), both) == CANNOT
    assert "linf 1/255" in judged(made, [both]) and "not run" in judged(made, [both])
    assert verdict([], natural()) == CANNOT


@pytest.mark.parametrize("value", [float("nan"), None])
def test_what_is_not_a_number_is_not_a_measurement(value):
    made = rows([0.9, 0.91, value], [0.8, 0.81, 0.82])
    assert list(differences_of(made, natural())[0].by_seed) == [0, 1]


def test_a_claim_over_several_radii_needs_them_all():
    claim = Claim("SAM", "sam", "sgd", ("natural", "linf 1/255"))
    made = [row(m, s, n + s / 100, r + s / 100) for s in range(3)
            for m, n, r in (("sam", 0.9, 0.2), ("sgd", 0.8, 0.3))]  # fmt: skip
    assert verdict(made, claim) == NOT
    assert judged(made, [claim]).count("| shows") == 1


def test_the_cost_counts_passes():
    def of(method, **options):
        return cost(resolve(method, "cifar-fast", {"epochs": 24} | options))

    assert of("sgd") == 24 and of("sam") == of("fsam") == 48
    assert of("sam-late") == 30 == 1.25 * of("sgd")
    assert of("sam-interval", interval=4) == of("looksam", interval=4) == 30
    assert of("msam") == of("sgd") and of("gsam") == 48
    assert of("at-linf", epochs=12) == 12 * (1 + 5) and of("trades", epochs=1, alpha="1") == 2 + 5
    assert of("sam-batches", ascent_batches=3) == 24 * (3 + 1) and of("sam-db") == 48
    assert of("sam-part", ascent_part=0.25) == 30 and of("sam-micro", micro=4) == 48
    assert of("sgd", awp_gamma=0.01, awp_warmup=4) == 24 + 20 and of("sam", awp_gamma=0.01) == 72
    assert of("trades", epochs=1, alpha="1", awp_gamma=0.01) == 2 * 2 + 5


@pytest.mark.parametrize("method", [
    "sam-late", "sam-interval", "sam-part", "sam-micro", "sam-full", "sam-db", "sam-batches",
    "msam", "looksam", "gsam", "at-linf", "trades", "trades+sam",
])  # fmt: skip
def test_the_cost_is_what_a_training_takes(method, tmp_path, monkeypatch):
    """Counted: the images whose loss has a gradient."""
    options = {"epochs": 4, "width": 1, "batch_size": 100, "val": 0.0, "threads": 1}
    awp = {"awp_gamma": 1e-3, "awp_warmup": 1} if "-" not in method else {}
    config = resolve(method, "digits", options | awp)
    passed = 0

    def count(module, args):
        nonlocal passed
        passed += len(args[0]) * torch.is_grad_enabled()

    def counted(*args):
        model = build_model(*args)
        model[0].register_forward_pre_hook(count)
        return model

    monkeypatch.setattr(training, "build_model", counted)
    run = training.train(config, tmp_path)
    assert cost(config) == pytest.approx(passed / len(run.data.train), rel=0.01)


def test_a_cost_that_hangs_on_the_number_of_images_of_a_directory_is_not_said():
    study = json.loads(json.dumps(TINY)) | {"methods": ["sgd", "sam-full"]}
    study["options"] |= {"data": "somewhere"}
    assert math.isnan(cost(study_runs(study)["sam-full-seed0"]))
    assert costs_of(study).endswith("SGD 1.00, SAM-full unknown")


# ---- a study with several evaluations

TINY = {
    "question": "?", "preset": "digits", "seeds": [0, 1], "methods": ["sgd", "sam"], "grid": {},
    "options": {"width": 4, "epochs": 1, "threads": 1, "val": 0.5},
    "evaluations": {
        "first": {"linf": [8], "l2": [], "samples": 20, "steps": 1},
        "second": {"linf": [8], "l2": [32], "samples": 10, "steps": 1},
    },
    "claims": [{"text": "SAM's is above", "more": "sam", "less": "sgd", "at": ["natural"]}],
    "figure": "trade-off",
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "STUDIES", tmp_path)
    monkeypatch.setattr(studies, "names_in", lambda folder: ["tiny"])
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return tmp_path


def test_a_study_trains_then_evaluates_and_makes_only_what_its_rows_do_not_hold(tiny, capsys):
    out, path = tiny / "out", tiny / "rows.jsonl"
    path.touch()
    command = ["study", "tiny", "--out", str(out), "--rows", str(path), "--jobs", "1"]
    assert main([*command, "--train-only"]) == 0
    weights = {p: p.stat().st_mtime_ns for p in out.rglob("last.pt")}
    assert len(weights) == 4 and not path.read_text() and not list(out.rglob("summary*"))
    assert main(command) == 0
    assert weights == {p: p.stat().st_mtime_ns for p in weights}
    lines = path.read_text().splitlines()
    assert len(lines) == 8
    assert "**SAM's is above**" in capsys.readouterr().out
    assert "**SAM's is above**" in (out / "table.md").read_text()

    refuse_rows_of_another_setting(path, capsys)

    # another machine has the rows of all but one run, and no checkpoint
    kept = [line for line in lines if json.loads(line)["config"]["seed"] == 0
            or json.loads(line)["method"] == "sgd"]  # fmt: skip
    path.write_text("".join(f"{line}\n" for line in kept))
    assert show("tiny", path, None) and "not run under first: sam-seed1" in capsys.readouterr().out
    command = ["study", "tiny", "--out", str(tiny / "elsewhere"), "--rows", str(path)]
    assert main([*command, "--jobs", "2"]) == 0
    assert [p.name for p in (tiny / "elsewhere").iterdir() if p.is_dir()] == ["sam-seed1"]
    accuracies = [{(r["method"], r["config"]["seed"], len(r["robust"])): r["natural"]
                   for r in map(json.loads, text)}
                  for text in (lines, path.read_text().splitlines())]  # fmt: skip
    assert accuracies[0] == accuracies[1]
    nothing = ["study", "tiny", "--out", str(tiny / "nothing left"), "--rows", str(path)]
    assert main(nothing) == 0 and "0 of 4 runs" in capsys.readouterr().out
    assert not list((tiny / "nothing left").rglob("*.pt"))


@pytest.mark.parametrize("methods, grid, refused", [
    (["sgd", "sam"], {"rho": [0.05, 0.1]}, "sam rho 0.05 and sam rho 0.1"),
    (["sgd", "sam-interval"], {"interval": [1, 4], "lr": [0.1]}, "sam-interval interval 1, lr 0.1"),
    (["sgd", "sam"], {"rho": [0.1]}, ""),
])  # fmt: skip
def test_claims_are_of_one_setting_a_method(tiny, capsys, methods, grid, refused):
    """They, and the costs below them, were of a grid's last values, without a word."""
    (tiny / "tiny.json").write_text(json.dumps(TINY | {"methods": methods, "grid": grid}))
    if not refused:
        assert load_study("tiny")["grid"] == grid
        return
    (tiny / "rows.jsonl").touch()
    for words in (["--out", str(tiny / "out")], ["--show", str(tiny / "rows.jsonl")]):
        assert main(["study", "tiny", *words]) == 2
        assert refused in (said := capsys.readouterr().err) and "claims" in said
    assert not (tiny / "out").exists()
    (tiny / "tiny.json").write_text(json.dumps(TINY | {"methods": methods, "grid": grid,
                                                       "claims": []}))  # fmt: skip
    assert load_study("tiny")["methods"] == methods


@pytest.mark.parametrize("norm, name", [("linf", "l_inf"), ("l2", "l2")])
def test_a_study_has_one_norm_alone(tiny, capsys, norm, name):
    """Without l_inf it ended with a KeyError when its first run was finished."""
    first = {"linf": [], "l2": [], "samples": 20, "steps": 1} | {norm: [8]}
    study = TINY | {"seeds": [0], "evaluations": {"first": first}}
    (tiny / "tiny.json").write_text(json.dumps(study))
    assert main(["study", "tiny", "--out", str(tiny / "out"), "--jobs", "1"]) == 0
    assert f"% at {name} 8/255 (0.0314), " in capsys.readouterr().out
    assert (tiny / "out" / "figure.png").exists()


def refuse_rows_of_another_setting(path, capsys):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path = path.with_name("changed.jsonl")
    for change in ({"config": rows[0]["config"] | {"lr": 0.3}},
                   {"evaluation": rows[0]["evaluation"] | {"steps": 7}}):  # fmt: skip
        path.write_text("".join(json.dumps(r) + "\n" for r in [rows[0] | change, *rows[1:]]))
        assert main(["study", "tiny", "--show", str(path)]) == 2
        assert "a row of another" in (message := capsys.readouterr().err)
        assert ("lr 0.3 -> 0.05" in message) == ("config" in change)


def test_claims_about_rows_of_other_images_say_so(tmp_path, capsys):
    """A pair's difference was that of two sets of images, without a word."""
    path = ROOT / "bench" / "results" / "study-cifar.jsonl"
    assert show("cifar", path, None) and "fingerprints" not in capsys.readouterr().out
    first, *others = path.read_text().splitlines()
    first = json.dumps(json.loads(first) | {"fingerprint": "x", "test_fingerprint": "y"})
    (changed := tmp_path / "rows.jsonl").write_text("\n".join([first, *others]))
    assert show("cifar", changed, None)
    said = [line for line in capsys.readouterr().out.splitlines() if "fingerprints" in line]
    assert len(said) == 2, "of the one evaluation that the row is of"
    assert "the same training images" in said[0] and "the same test images" in said[1]


def test_the_study_of_cifar_is_what_the_claims_are_about():
    study = load_study("cifar")
    runs, methods = study_runs(study), set(study["methods"])
    assert methods == {"sgd", "sam", "fsam", "sam-late", "at-linf"} and len(runs) == 15
    configs = {c.method: c for c in runs.values()}
    shared = {k for k in asdict(configs["sgd"]) if k not in ("method", "seed", "rho", "sigma",
              "lmbda", "late", "eps", "alpha", "attack_steps", "epochs", "backend")}  # fmt: skip
    for config in runs.values():
        assert all(getattr(config, k) == getattr(configs["sgd"], k) for k in shared)
    assert configs["sam-late"].rho == configs["sam"].rho
    for evaluation in evaluations_of(study).values():
        assert {round(255 * e) for e in evaluation.linf} == {1, 2, 8}
        assert {round(255 * e) for e in evaluation.l2} == {16, 32, 128}
    radii = ("linf 1", "linf 2", "linf 8", "l2 16", "l2 32", "l2 128")
    measured = {"natural", *(f"{radius}/255" for radius in radii)}
    for claim in studies.claims_of(study):
        assert {claim.more, claim.less} <= methods and set(claim.at) <= measured
