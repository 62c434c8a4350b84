"""A bar during every attack and evaluation, which moves within a batch and never runs backwards."""

import io
import multiprocessing
import re
import sys

import pytest
import torch
from torch import nn

from bench.__main__ import main
from bench.attacks import by_name
from bench.data.datasets import load_data
from bench.evaluation import evaluate as module
from bench.evaluation import progress
from bench.evaluation.evaluate import evaluate
from bench.evaluation.progress import Progress
from bench.experiments import pool
from bench.experiments.places import Here, Line
from bench.settings.config import resolve
from bench.settings.evaluation import resolve_evaluation
from bench.settings.pool import Pool

from ..helpers.survive import SMALL

ATTACKS = ("fgsm", "pgd", "pgd-3-2", "apgd-ce-5", "apgd-t-5", "autoattack")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def split():
    return load_data("digits", 0.1, 0).test.take(torch.arange(60))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class Fake:
    """AutoAttack, as far as a bar is concerned: many passes, and it prints."""

    __name__ = "autoattack"

    def AutoAttack(self, model, **_):
        self.model = model
        return self

    def run_standard_evaluation(self, x, y):
        for _ in range(40):
            print("a line of its own")
            self.model(x)
        return x


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_bar_moves_within_a_batch_and_ends_full(name, precision, net, split, monkeypatch):
    monkeypatch.setattr(by_name, "authors_module", Fake)
    places, made = [], []

    class Watched(Progress):
        def __init__(self, total, shown):
            super().__init__(total, shown)
            made.append(self)

        def passed(self, images):
            super().passed(images)
            places.append(self.bar.n)

        def __exit__(self, *given):
            self.reached = self.bar.n, self.bar.total
            super().__exit__(*given)

    monkeypatch.setattr(module, "Progress", Watched)
    monkeypatch.setattr(sys, "stderr", Terminal())
    given = {"linf": (8 / 255,), "l2": (), "attacks": (name,), "steps": 8, "precision": precision}
    evaluation = resolve_evaluation("digits", given)
    evaluate(net, split, evaluation, bar=True)
    clean, attacks = made
    assert clean.reached == (60, 60) and attacks.reached[0] == attacks.reached[1]
    assert places == sorted(places) and places[-1] <= attacks.reached[1]
    within = {n for n in places if 0 < n < attacks.reached[1]}
    assert within or name == "fgsm"
    text = sys.stderr.getvalue()
    assert f"l_inf 8/255 {name}:" in text and "natural:" in text and "/60 images" in text


# ---- many runs


class Elsewhere(Here):
    """A place that says what it is at, and makes a run while it is asked three times."""

    def __init__(self):
        super().__init__(lambda row: None)
        self.asked = 0

    def start(self, name, job):
        self.made.append((name, [{"row": name}]))

    def ended(self, seconds):
        self.asked += 1
        if self.asked % 3 == 0:
            yield from super().ended(seconds)

    def doing(self):
        return {name: f"epoch {self.asked}:  40%" for name, _ in self.made}


def of_many(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "place_of", lambda *_: Elsewhere())
    monkeypatch.setattr(pool, "refuse_all_early", lambda *_: None)
    monkeypatch.setattr(pool, "one_line", lambda summary: summary["row"])
    evaluation = {"summary.json": resolve_evaluation("digits", {})}
    runs = {f"{m}-seed0": (resolve(m, "digits", {"epochs": 2}), evaluation) for m in ("sgd", "sam")}
    pool.run_all(runs, tmp_path, Pool())


def test_what_workers_are_at_has_a_line_each(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    of_many(tmp_path, monkeypatch)
    text = sys.stderr.getvalue()
    assert "2 runs:" in text and "sgd-seed0  epoch 1:  40%" in text and "epoch 2:  40%" in text
    assert "sam-seed0  epoch 4:  40%" in text


def test_many_runs_draw_nothing_where_stderr_is_no_terminal(tmp_path, monkeypatch, capsys):
    of_many(tmp_path, monkeypatch)
    said = capsys.readouterr()
    assert said.err == "" and said.out == "sgd-seed0: sgd-seed0\nsam-seed0: sam-seed0\n"


def test_a_worker_draws_its_bars_on_a_line_of_text():
    line = Line(multiprocessing.get_context("spawn").Array("c", 80, lock=False))
    progress.draw_on(line)
    try:
        with progress.bar_of(True, total=4, desc="epoch 1", mininterval=0) as bar:
            bar.update(2)
        assert re.match(r"epoch 1:  50%\|.*\| 2/4 ", line.read())
        progress.bar_of(True, total=4, desc="é" * 90).close()
        assert 35 < len(line.read()) < 40  # cut, and not within a letter
    finally:
        progress.draw_on(None)


@pytest.mark.parametrize("bar", [True, False])
def test_nothing_is_shown_where_stderr_is_no_terminal(bar, net, split, capsys):
    given = {"linf": (8 / 255,), "l2": (), "attacks": ("fgsm",)}
    evaluate(net, split, resolve_evaluation("digits", given), bar=bar)
    assert capsys.readouterr().err == ""


def test_the_bar_leaves_no_hook_and_changes_no_result(net, split, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    evaluation = resolve_evaluation("digits", {"attacks": ("pgd", "apgd-t-5"), "samples": 20})
    shown, quiet = (evaluate(net, split, evaluation, bar=bar) for bar in (True, False))
    assert shown == quiet and not net._forward_hooks


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_scripted_network_which_takes_no_hooks_is_evaluated(net, split):
    evaluation = resolve_evaluation("digits", {"attacks": ("pgd-2", "apgd-ce-2")})
    scripted = torch.jit.script(net.eval())
    assert evaluate(scripted, split, evaluation) == evaluate(net, split, evaluation)


def test_training_shows_its_steps_and_its_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    command = ["train", *SMALL, "--method", "at-linf", "--attack-steps", "2", "--epochs", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    text = sys.stderr.getvalue()
    bars = ("at-linf-seed0:", "epoch 1:", "step", "validation:", "natural:", "l2 128/255 pgd:")
    for shown in bars:
        assert shown in text, shown
