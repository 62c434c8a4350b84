"""What is not finite is never right, is warned of by name, and is null in every file."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from bench.__main__ import main
from bench.attacks.apgd import apgd, apgd_targeted
from bench.attacks.pgd import Attack, fgsm, n_fgsm, pgd, trades
from bench.data.datasets import Split, load_data
from bench.evaluation.evaluate import correct, evaluate, report, robust
from bench.evaluation.robustbench import model_info
from bench.files import append_jsonl, strict_json, write_json, write_jsonl
from bench.settings.config import resolve
from bench.settings.evaluation import resolve_evaluation
from bench.training.adversarial import watch_single_step
from bench.training.checkpoint import load_checkpoint, save_checkpoint
from bench.training.diverged import DIVERGED, Diverged
from bench.training.session import Sitting
from bench.training.stopped import Stopped
from bench.training.train import set_up, train

from ..helpers.trained import digits, held_out, model

ATTACKS = ("fgsm", "pgd-3", "apgd-ce-4", "apgd-t-3")


def rng():
    return torch.Generator().manual_seed(0)


class Broken(nn.Module):
    """The trained model, and what becomes of its logits; change: (images, logits) -> logits."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = model(), change

    def forward(self, x):
        return self.change(x, self.net(x))


def with_class_3(value):
    def change(x, z):
        z = z.clone()
        z[:, 3] = value
        return z

    return change


def bright(x):
    return (x.flatten(1).mean(1) > 0.3).view(-1, 1)


def without_gradient(x, chosen):
    """The logits of x, those of the chosen images with 0 added, whose gradient is 0 * inf = NaN."""
    z = model()(x)
    nothing = (0 * x[chosen]).sum((1, 2, 3)).sqrt()
    return z + torch.zeros(len(x)).index_put((chosen,), nothing)[:, None]


ALL = {
    "nan": lambda x, z: z * math.nan,
    "inf": lambda x, z: z.abs() * math.inf,
    "one-inf": with_class_3(math.inf),
    "one-nan": with_class_3(math.nan),
    "one-minus-inf": with_class_3(-math.inf),
    "overflow": lambda x, z: 1e38 * z * 1e5,
}


@pytest.fixture
def split():
    x, y = digits()
    return Split((x[1697:] * 16).to(torch.uint8), y[1697:], 16)


def evaluation(**options):
    radii = {"linf": (4 / 255,), "l2": (0.1,), "attacks": ATTACKS}
    return resolve_evaluation("digits", radii | options)


@pytest.mark.parametrize("change", ALL.values(), ids=ALL)
def test_a_network_without_finite_logits_is_right_nowhere(change, split):
    found = evaluate(Broken(change), split, evaluation())
    assert found["natural"] == 0
    assert all(r == 0 for by_eps in found["robust"].values() for r in by_eps.values())
    said = "the model's outputs are NaN or inf for 100 of 100 images, which count as wrong"
    assert said in found["warnings"] and said in report(found)


def test_the_part_that_is_not_finite_is_wrong_and_counted(split):
    def change(x, z):
        return torch.where(bright(x), math.nan, z)

    x, y = split.batch(slice(None))
    dark, net = ~bright(x).squeeze(1), Broken(change).eval()
    with torch.no_grad():
        right = (model()(x).argmax(1) == y) & dark
    assert torch.equal(correct(net, split, 30), right) and 10 < right.sum() < 90
    found = evaluate(net, split, evaluation())
    assert found["natural"] == right.sum() / 100
    assert f"NaN or inf for {100 - dark.sum()} of 100 images" in report(found)


def test_an_answer_that_is_lost_on_the_way_is_not_robust(split):
    """The model is finite at the images, and NaN wherever an attack goes."""
    x, _ = split.batch(slice(None))

    def change(z, logits):
        clean = (z.detach()[:, None] == x).flatten(2).all(2).any(1, keepdim=True)
        return torch.where(clean, logits, math.nan)

    found = evaluate(Broken(change), split, evaluation(attacks=("pgd-3", "apgd-ce-4", "fgsm")))
    assert found["natural"] > 0.9
    for by_eps in found["each"].values():
        for own in by_eps.values():
            assert own == {"pgd-3": 0, "apgd-ce-4": 0, "fgsm": 0}
    n = round(100 * found["natural"])
    said = ("l_inf 4/255 pgd-3: the gradient, or the model's output for the attacked image, is NaN "
            f"or inf for {n} of {n} images, which count as not robust")  # fmt: skip
    assert said in found["warnings"]


def test_an_image_whose_gradient_is_not_finite_is_not_robust(split):
    """Its logits are, even those of an image of NaN."""

    def sturdy(x, z):
        x = x.nan_to_num(0.5)
        return without_gradient(x, bright(x).squeeze(1).nonzero().squeeze(1))

    x, _ = split.batch(slice(None))
    with torch.no_grad():
        assert Broken(sturdy)(x * math.nan).isfinite().all()
    found = evaluate(Broken(sturdy), split, evaluation())
    assert found["natural"] > 0.9
    dark = (~bright(x)).sum().item()
    for norm, name in (("linf", "4/255"), ("l2", "25.5/255")):
        for attack, accuracy in found["each"][norm][name].items():
            assert dark / 200 < accuracy <= dark / 100, (norm, attack)
            assert any(f"{name} {attack}: the gradient" in text for text in found["warnings"])


def test_every_attack_hands_back_nan_for_a_gradient_that_is_none():
    x, y = held_out(6)

    def forward(x):
        return without_gradient(x, torch.tensor([2] if len(x) == 6 else [0]))

    for norm, eps in (("linf", 0.02), ("l2", 0.1)):
        attack = Attack(norm, eps, eps / 2, 2)
        found = [pgd(forward, x, y, attack, rng()), fgsm(forward, x, y, Attack(norm, eps, eps, 1))]
        if norm == "linf":
            found += [n_fgsm(forward, x, y, attack, rng()), trades(forward, x, attack, rng())]
        for x_adv in found:
            assert x_adv[2].isnan().all() and x_adv[[0, 1, 3, 4, 5]].isfinite().all()
    for attack in (apgd, apgd_targeted):
        x_adv, fooled = attack(forward, x[2:3], y[2:3], "linf", 0.02, 3, generator=rng())
        assert fooled.all() and x_adv.isnan().all()


def test_robust_during_training_and_robustbench_count_none(split):
    assert not robust(Broken(ALL["nan"]).eval(), split, Attack("linf", 0.03, 0.01, 2), 50).any()
    config = {"data": "cifar10", "model": "preactresnet18", "width": 64}
    found = evaluate(Broken(ALL["one-nan"]), split, evaluation())
    found["each"]["linf"]["8/255"] = {"autoattack": found["robust"]["linf"]["4/255"]}
    info = model_info(config, found, "linf", "8/255")
    assert (info["clean_acc"], info["autoattack_acc"]) == ("0.0", "0.0")


def test_the_watch_on_single_step_training_counts_none():
    run = set_up(resolve("fgsm-rs", "digits", {"width": 4, "epochs": 1, "threads": 1}))
    with torch.no_grad():
        next(run.model.parameters()).fill_(math.nan)
    assert watch_single_step(run) == {"single_step_acc": 0.0, "pgd_acc": 0.0}


# ---- files


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_files_hold_null_for_what_is_not_finite(tmp_path):
    row = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "NaN", "e": True}
    clean = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": True}
    write_json(tmp_path / "one.json", row)
    write_jsonl(tmp_path / "many.jsonl", [row, row])
    append_jsonl(tmp_path / "more.jsonl", [row])
    append_jsonl(tmp_path / "more.jsonl", [row, {"f": math.nan}])
    assert strict((tmp_path / "one.json").read_text()) == clean
    many, more = ((tmp_path / f"{n}.jsonl").read_text().splitlines() for n in ("many", "more"))
    assert [strict(line) for line in many] == [clean, clean]
    assert [strict(line) for line in more] == [clean, {"f": None}]
    assert strict(strict_json(asdict(evaluation())))["attacks"] == list(ATTACKS)


# ---- training


@pytest.mark.parametrize("method", ["sgd", "sam", "at-linf"])
def test_a_training_that_diverges_says_so_and_has_a_code_of_its_own(method, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--method", method, "--lr", "1e6", "--width", "4", "--epochs", "3",
               "--threads", "1", "--out", str(out)]  # fmt: skip
    for _ in range(2):  # repeated, it says the same
        assert main(command) == DIVERGED == 3
        error = capsys.readouterr().err
        (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
        assert f"the training diverged in epoch 1 of {method}-seed0" in line and "lower lr" in line
        assert "Traceback" not in error
    (row,) = (strict(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert row["epoch"] == 0 and row["train_acc"] < 0.5
    assert row["train_loss"] is None or (row["train_loss"] > 1e9 and method == "sam")
    assert not (out / "summary.json").exists() and not (out / "best.pt").exists()


def test_what_was_trained_before_it_diverged_stays(tmp_path, monkeypatch):
    config = resolve("sgd", "digits", {"width": 4, "epochs": 3, "threads": 1, "batch_size": 256})
    monkeypatch.setattr("bench.training.train.lr_at",
                        lambda config, epoch, i, steps: 1e9 if epoch else 0.05)
    with pytest.raises(Diverged, match="in epoch 2 of sgd-seed0.*tensors of weights are not fin"):
        train(config, tmp_path)
    kept = load_checkpoint(tmp_path / "last.pt")
    assert kept["epoch"] == 0 and all(t.isfinite().all() for t in kept["model"].values())
    rows = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1] and rows[1]["train_loss"] is None


@pytest.mark.parametrize("budget", [None, 0])
def test_no_checkpoint_within_an_epoch_is_of_weights_that_are_lost(budget, tmp_path, monkeypatch):
    """Saved after every step; the fourth of six loses the weights."""
    monkeypatch.setattr("bench.training.train.lr_at",
                        lambda config, epoch, i, steps: math.inf if i == 3 else 0.05)
    config = resolve("sgd", "digits", {"width": 4, "epochs": 1, "threads": 1, "batch_size": 256})
    for _ in range(4 if budget == 0 else 1):
        with pytest.raises((Diverged, Stopped)) as ended:
            train(config, tmp_path, sitting=Sitting(save_every=0, time_budget=budget))
    assert ended.type is Diverged and "in epoch 1 of sgd-seed0" in str(ended.value)
    kept = load_checkpoint(tmp_path / "last.pt")
    assert kept["position"]["done"] == 3
    assert all(t.isfinite().all() for t in kept["model"].values())
    (row,) = (strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["epoch"] == 0 and 0 <= row["train_acc"] <= 1


def test_a_loss_that_was_lost_on_the_way_is_warned_of(tmp_path, monkeypatch):
    from bench.training import train as subject

    steps, step = [], subject.step

    def first_is_lost(*args):
        loss, logits = step(*args)
        steps.append(1)
        return (loss * math.nan if len(steps) == 1 else loss), logits

    monkeypatch.setattr(subject, "step", first_is_lost)
    config = resolve("sgd", "digits", {"width": 4, "epochs": 1, "threads": 1, "batch_size": 256})
    with pytest.warns(UserWarning, match="epoch 1 of sgd-seed0 the loss of some batches was NaN"):
        train(config, tmp_path)
    (row,) = (strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["train_loss"] is None and 0 <= row["val_acc"] <= 1


@pytest.mark.long
def test_a_comparison_makes_the_others_and_names_what_diverged(tmp_path, capsys):
    command = ["sweep", "--methods", "sgd", "--seeds", "0", "--grid", "lr=1e6,0.05", "--width", "4",
               "--epochs", "1", "--threads", "1", "--eval-linf", "8", "--eval-l2", "0.5",
               "--eval-steps", "1", "--out", str(tmp_path)]  # fmt: skip
    assert main(command) == DIVERGED
    error = capsys.readouterr().err
    assert "1 of 2 runs diverged (sgd-lr1000000.0-seed0)" in error
    assert (tmp_path / "sgd-lr0.05-seed0" / "summary.json").exists()


def test_a_checkpoint_of_nan_is_no_robust_network(tmp_path, capsys):
    config, data = resolve("sgd", "digits", {"width": 8}), load_data("digits", 0.1, 0)
    net = set_up(config).model
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(math.nan)
    save_checkpoint(tmp_path / "last.pt", config, data, net)
    rows = tmp_path / "rows.jsonl"
    command = ["evaluate", str(tmp_path / "last.pt"), "--rows", str(rows), "--eval-steps", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "360 of 360 images, which count as wrong" in printed
    row = strict(rows.read_text())
    assert row["natural"] == 0
    assert all(r == 0 for by_eps in row["robust"].values() for r in by_eps.values())
