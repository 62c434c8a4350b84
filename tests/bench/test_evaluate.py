"""What the evaluation reports: intervals, worst cases, restarts; its command, and checkpoints."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.__main__ import main
from bench.attacks.apgd import apgd
from bench.attacks.by_name import attempt
from bench.attacks.notation import ATTACKS, split_name
from bench.attacks.objectives import LAST, spread
from bench.attacks.pgd import evaluation_attack, pgd
from bench.data.datasets import Split
from bench.evaluation.evaluate import (
    correct,
    evaluate,
    generator_of,
    interval,
    report,
    withstand,
)
from bench.training.checkpoint import load_model

from ..helpers.trained import EPS, digits, evaluation, model, right

# ---- numbers


def test_default_is_pgd_on_what_is_right_clean(split):
    """As three lines of one's own count it."""
    found = evaluate(model(), split, evaluation())
    x, y = split.batch(slice(None))
    clean = right(model(), x, y)
    x_adv = pgd(model(), x[clean], y[clean], evaluation_attack("linf", EPS, 10),
                [generator_of(0, i) for i in range(int(clean.sum()))])  # fmt: skip
    kept = right(model(), x_adv, y[clean]).sum().item()
    assert found["natural"] == clean.double().mean().item()
    assert found["robust"] == {"linf": {"16/255": kept / len(x)}}
    assert found["attacks"]["linf"]["16/255"].startswith("PGD-10, linf, eps 16/255 = 0.06275")
    assert found["images"] == found["of"] == 297 and found["warnings"] == []
    assert 0.1 < kept / len(x) < 0.9


def test_it_is_in_float32_inside_an_autocast_region_too(split):
    """A model was attacked and judged in bf16 there."""
    part, seen = split.take(torch.arange(40)), set()

    class Looking(nn.Module):
        def forward(self, x):
            logits = model()(x)
            seen.add((torch.is_autocast_enabled("cpu"), logits.dtype))
            return logits

    for precision in ("fp32", "bf16"):
        options = evaluation(attacks=("fgsm", "apgd-ce-2"), precision=precision)
        expected = evaluate(model(), part, options)
        with torch.autocast("cpu", torch.bfloat16):
            assert evaluate(Looking(), part, options) == expected
            assert torch.is_autocast_enabled("cpu")
        if precision == "fp32":
            assert seen == {(False, torch.float32)}


def test_worst_case_is_image_by_image_and_each_attack_its_own(split):
    names = ("fgsm", "pgd-5-2", "apgd-ce-20", "apgd-t-10")
    options = {"linf": (20 / 255,), "attacks": ("clean", *names), "batch_size": 100}
    found = evaluate(model(), split, evaluation(**options))
    clean = right(model(), *split.batch(slice(None)))
    part = split.take(clean.nonzero().squeeze(1))
    stands = {}
    for name in names:
        a = attempt(name, "linf", 20 / 255, 10, 10)
        stands[name] = withstand(model(), part, a.perturb, a.restarts, 100)[0]
    each = {name: kept.sum().item() / 297 for name, kept in stands.items()}
    worst = torch.stack(list(stands.values())).all(0).sum().item() / 297
    assert found["each"] == {"linf": {"20/255": each}}
    assert found["robust"]["linf"]["20/255"] == worst <= min(each.values())
    assert len(set(each.values())) >= 3, "attacks that cannot be told apart show nothing"
    said = found["attacks"]["linf"]["20/255"]
    assert said == "worst case over fgsm, pgd-5-2, apgd-ce-20, apgd-t-10"


def test_an_image_withstands_when_no_restart_fools_it_and_the_fallen_are_not_tried():
    """A model that reads the class off the pixel; the n-th call spoils image n of the rest."""
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    split, calls = Split(images, torch.arange(10), 10), []

    def net(x):
        return F.one_hot((x.flatten(1)[:, 0] * 10).round().long(), 11).float()

    def perturb(forward, x, y, generators, net):
        calls.append((x.flatten() * 10).round().int().tolist())
        x = x.clone()
        x[(len(calls) - 1) % len(x)] = 1.0
        return x

    stands, lost = withstand(net, split, perturb, 3, batch_size=6)
    assert lost == 0
    assert calls == [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 3, 4, 5],
                     [6, 7, 8, 9], [6, 7, 8], [6, 8]]  # fmt: skip
    assert stands.nonzero().flatten().tolist() == [1, 3, 5, 6]


def test_fgsm_is_one_step_of_eps_without_random_start(split):
    x, y = split.batch(slice(0, 50))
    z = x.clone().requires_grad_(True)
    logits = model()(z).double()
    (g,) = torch.autograd.grad(F.cross_entropy(LAST * logits / spread(logits), y), z)
    x_adv = attempt("fgsm", "linf", EPS, 10, 10).perturb(model(), x, y, None, model())
    torch.testing.assert_close(x_adv, (x + EPS * g.sign()).clamp(0, 1))
    x_adv = attempt("fgsm", "l2", 0.5, 10, 10).perturb(model(), x, y, None, model())
    norms = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_adv, (x + 0.5 * g / norms).clamp(0, 1))


def test_a_subset_is_fixed_mixed_and_counted(split):
    by_class = split.take(split.labels.argsort())
    once, again = (evaluate(model(), by_class, evaluation(samples=60)) for _ in range(2))
    assert once == again and (once["images"], once["of"]) == (60, 297)
    order = torch.randperm(297, generator=torch.Generator().manual_seed(0))[:60]
    assert len(by_class.labels[order].unique()) == 10
    assert "60 of 297 test images" in report(once)
    assert "297 test images" in report(evaluate(model(), split, evaluation(attacks=("clean",))))


def test_the_subset_is_the_shuffles_first_images(split):
    class Seen(nn.Module):
        images = []

        def forward(self, x):
            self.images.append(x.detach())
            return model()(x)

    net, by_class = Seen(), split.take(split.labels.argsort())
    evaluate(net, by_class, evaluation(samples=60, attacks=("clean",)))
    order = torch.randperm(297, generator=torch.Generator().manual_seed(0))[:60]
    assert torch.equal(net.images[0], by_class.take(order).batch(slice(None))[0])


def test_a_model_in_training_mode_is_evaluated_and_left_in_eval_mode(split):
    net = copy.deepcopy(model()).train()
    found = evaluate(net, split, evaluation(samples=60))
    assert found == evaluate(model(), split, evaluation(samples=60)) and found["warnings"] == []
    assert not any(module.training for module in net.modules())
    for name, value in model().state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


@pytest.mark.parametrize("k, n", [(0, 20), (1, 20), (13, 20), (20, 20), (437, 1000)])
def test_interval_is_clopper_and_pearsons(k, n):
    """Its ends are the accuracies at which k or more, k or fewer, have a chance of 2.5%."""

    def chance(p, counts):
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in counts)

    low, high = interval(k / n, n)
    assert low == 0 if k == 0 else chance(low, range(k, n + 1)) == pytest.approx(0.025, rel=1e-6)
    assert high == 1 if k == n else chance(high, range(k + 1)) == pytest.approx(0.025, rel=1e-6)
    assert low <= k / n <= high


def test_every_line_has_its_interval_and_its_configuration(split):
    names = ("pgd-3-2", "apgd-ce-4")
    found = evaluate(model(), split, evaluation(l2=(0.5,), attacks=names, samples=40))
    lines = report(found).splitlines()
    labels = ["natural", "l_inf 16/255", "pgd-3-2", "apgd-ce-4", "l2 127.5/255", "pgd-3-2",
              "apgd-ce-4"]  # fmt: skip
    assert [line.split("%")[0].rsplit(maxsplit=1)[0].strip() for line in lines] == labels
    for norm, eps, place in (("linf", "16/255", 2), ("l2", "127.5/255", 5)):
        for line, name in zip(lines[place : place + 2], names, strict=True):
            accuracy = found["each"][norm][eps][name]
            low, high = interval(accuracy, 40)
            assert f"{accuracy:7.2%} [{low:7.2%}, {high:7.2%}]" in line
            assert found["configurations"][norm][eps][name] in line
    assert "PGD-3, linf, eps 16/255 = 0.06275, alpha 4/255 = 0.01569, random start, 2 restarts, " \
        "cross-entropy" in lines[2]  # fmt: skip
    assert "APGD-4, l2, eps 127.5/255 = 0.5, step from 2 eps, random start, 1 restart, " \
        "cross-entropy" in lines[6]  # fmt: skip


# ---- names


@pytest.mark.parametrize(
    "name, parts",
    [
        ("clean", ("clean", None, 1)),
        ("fgsm", ("fgsm", None, 1)),
        ("pgd", ("pgd", None, 1)),
        ("pgd-20", ("pgd", 20, 1)),
        ("pgd-50-10", ("pgd", 50, 10)),
        ("apgd-ce", ("apgd-ce", None, 1)),
        ("apgd-t-30-2", ("apgd-t", 30, 2)),
        ("autoattack", ("autoattack", None, 1)),
    ],
)
def test_names(name, parts):
    assert split_name(name) == parts


@pytest.mark.parametrize("name", ["", "pgd-0", "pgd-", "pgd-5-0", "fgsm-3", "square", "aa", "PGD"])
def test_unknown_names_are_refused_before_training(name):
    with pytest.raises(ValueError, match="choose from clean, fgsm, pgd.-STEPS"):
        evaluation(attacks=(name,))


def test_every_name_is_an_attack_of_its_own():
    texts = [attempt(name, "l2", 0.5, 10, 10).text for name in ATTACKS]
    assert len(set(texts)) == len(ATTACKS)


def test_clean_by_its_name_moves_no_image(split):
    a, (x, y) = attempt("clean", "linf", EPS, 10, 10), split.batch(slice(0, 20))
    assert torch.equal(a.perturb(model(), x, y, None, model()), x)
    stands, not_finite = withstand(model(), split, a.perturb, a.restarts, 100)
    assert torch.equal(stands, correct(model(), split, 100)) and not_finite == 0


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("change, said", [
    (dict(norm="Linf"), "norm='Linf' is unknown: use 'linf' or 'l2'"), (dict(norm="l1"), "norm="),
    (dict(eps=8), r"eps=8 is out of range .* such as 8 / 255"), (dict(eps=-0.1), "eps=-0.1 is out"),
    (dict(eps=math.nan), "eps=nan is out"), (dict(eps="8/255"), "eps='8/255' is not a number"),
    (dict(norm="l2", eps=math.inf), "eps=inf is out"),
])  # fmt: skip
def test_what_would_be_another_attack_is_refused(name, change, said):
    """An unknown norm was taken for l2, and attacked within 8/255 of it."""
    with pytest.raises(ValueError, match=said):
        attempt(name, **{"norm": "linf", "eps": EPS, "steps": 10, "classes": 10, **change})


@pytest.mark.parametrize("steps", [0, -1, 2.5, None, "10"])
def test_steps_are_those_of_a_plain_pgd_alone(split, steps):
    """FGSM, which makes one, was refused where its user said that it makes no steps."""
    with pytest.raises(ValueError, match=f"steps={steps!r} is .*at least 1"):
        attempt("pgd", "linf", EPS, steps, 10)
    x, y = split.batch(slice(0, 20))
    for name in ("clean", "fgsm", "pgd-2", "apgd-ce-2", "apgd-t-2"):
        asked, usual = (attempt(name, "linf", EPS, n, 10) for n in (steps, 10))
        assert asked.text == usual.text
        rng = [[generator_of(0, i) for i in range(20)] for _ in range(2)]
        found = [a.perturb(model(), x, y, own, model())
                 for a, own in zip((asked, usual), rng, strict=True)]  # fmt: skip
        assert torch.equal(*found)


def test_floats_are_not_divided_by_the_levels_of_bytes(split):
    """Images that are in [0, 1] already would be black, and withstand all attacks there."""
    x, y = split.batch(slice(0, 20))
    with pytest.raises(ValueError, match="images are torch.float32, and levels=16: give uint8"):
        Split(x, y, 16)
    assert torch.equal(Split(x, y, 1).batch(slice(None))[0], x)


@pytest.mark.parametrize("option", ["steps", "samples", "batch_size"])
def test_numbers_below_1_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        evaluation(**{option: 0})


def test_targeted_dlr_needs_four_classes(split):
    three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    few = split.take((split.labels < 3).nonzero().squeeze(1))
    with pytest.raises(ValueError, match="needs 4 classes.* 3; use apgd-ce"):
        evaluate(three, few, evaluation(attacks=("apgd-t",)))
    assert "linf" in evaluate(three, few, evaluation(attacks=("apgd-ce-2",)))["robust"]


# ---- the command, and what checkpoints are good for


def test_the_command(checkpoint, tmp_path, capsys):
    rows = tmp_path / "new" / "rows.jsonl"
    command = [
        "evaluate", str(checkpoint), "--attacks", "clean", "fgsm", "apgd-ce-5", "--norms", "linf",
        "--eval-linf", "16", "8", "--n-examples", "50", "--rows", str(rows),
    ]  # fmt: skip
    assert main(command) == 0
    printed, progress = capsys.readouterr()
    assert "50 of 360 test images" in printed and "\nl2" not in printed
    assert progress.count("fgsm") == printed.count("  fgsm ") == 2
    assert "image/s" not in progress  # a bar, which is for terminals
    (row,) = [json.loads(line) for line in rows.read_text().splitlines()]
    assert printed.strip() == report(row)
    assert row["checkpoint"].endswith("/last.pt") and not row["checkpoint"].startswith("/")
    assert row["evaluation"]["attacks"] == ["clean", "fgsm", "apgd-ce-5"]
    assert row["config"]["model"] == "smallconv" and row.keys() >= {"git", "versions", "device"}

    assert main(["evaluate", str(checkpoint), "--eval-samples", "50", "--attacks", "clean"]) == 0
    assert capsys.readouterr().out.splitlines() == printed.splitlines()[:1]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--attacks", "square"], "'square'"),
        (["--norms", "l1"], "'l1'"),
        (["--n-examples", "0"], "0"),
        (["--eval-batch-size", "-1"], "-1"),
        (["--norms", "linf", "--eval-l2", "64"], "--eval-l2"),
        (["--attacks", "pgd-20", "fgsm", "--eval-steps", "5"], "pgd-5"),
    ],
)
def test_the_command_refuses_in_one_sentence(checkpoint, options, said, capsys):
    assert main(["evaluate", str(checkpoint), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_loaded_model_is_what_robustbench_takes(checkpoint):
    """benchmark(model): not a sequence, in eval mode, movable, [0, 1] images -> logits, and
    gradients for the images."""
    net = load_model(checkpoint)
    assert isinstance(net, nn.Module) and not isinstance(net, Sequence) and not net.training
    assert net.to(torch.device("cpu")) is net
    x, y = digits()
    x, y = x[1500:].requires_grad_(True), y[1500:]
    logits = net(x)
    assert logits.shape == (297, 10) and logits.dtype == torch.float32
    assert logits.min() < 0 and torch.equal(logits, model()(x))
    assert (logits.argmax(1) == y).float().mean() > 0.9
    (g,) = torch.autograd.grad(F.cross_entropy(logits, y), x)
    assert (g != 0).any()
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([net(x[i : i + 1]) for i in range(5)]), logits[:5])
    found, _ = apgd(net, x.detach()[:8], y[:8], "linf", EPS, 3)
    assert found.shape == x[:8].shape


def test_checkpoints_of_earlier_versions_load(tmp_path, capsys):
    """The keys as they were first written, with the config's first fields."""
    state = {"0.mean": torch.full((1, 1, 1, 1), 0.3), "0.std": torch.full((1, 1, 1, 1), 0.38)}
    fresh = model().state_dict()
    layers = [f"1.features.{i}" for i in (0, 1, 3, 4, 6, 7)] + ["1.head"]
    for layer in layers:
        convolution = layer in ("1.features.0", "1.features.3", "1.features.6")
        parts = ["weight"] if convolution else ["weight", "bias"]
        if not convolution and layer != "1.head":
            parts += ["running_mean", "running_var", "num_batches_tracked"]
        state |= {f"{layer}.{part}": fresh[f"{layer}.{part}"] for part in parts}
    config = {
        "method": "sgd", "data": "digits", "data_dir": ".data", "image_size": None, "val": 0.1,
        "augment": "crop", "pad": 1, "model": "smallconv", "width": 8, "epochs": 30,
        "batch_size": 64, "lr": 0.05, "schedule": "cosine", "momentum": 0.9, "weight_decay": 5e-4,
        "rho": None, "sigma": None, "lmbda": None, "eta": None, "scale": None, "eps": None,
        "alpha": None, "attack_steps": None, "attack_bn": "eval", "seed": 0, "device": "cpu",
        "amp": "off", "channels_last": False, "backend": None, "threads": None,
    }  # fmt: skip
    checkpoint = {"format": "fastsam-bench-1", "config": config, "channels": 1, "fingerprint": "",
                  "classes": [str(i) for i in range(10)], "model": state}  # fmt: skip
    torch.save(checkpoint, tmp_path / "old.pt")
    x, _ = digits()
    assert torch.equal(load_model(tmp_path / "old.pt")(x[:9]), model()(x[:9]))
    assert main(["evaluate", str(tmp_path / "old.pt"), "--attacks", "clean"]) == 0
    assert "360 test images" in capsys.readouterr().out


def test_an_evaluation_survives_json():
    plain = json.loads(json.dumps(asdict(evaluation(attacks=("pgd", "fgsm")))))
    assert plain["attacks"] == ["pgd", "fgsm"] and plain["l2"] == []
