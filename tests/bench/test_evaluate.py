"""What the evaluation reports: intervals, worst cases, restarts, warnings; whom it can serve."""

import copy
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from types import ModuleType

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
from bench.data.datasets import Data, Split, load_data
from bench.evaluation import masked_gradients
from bench.evaluation.evaluate import (
    correct,
    evaluate,
    generator_of,
    interval,
    report,
    robust,
    withstand,
)
from bench.evaluation.robustbench import model_info
from bench.models import build_model
from bench.settings.config import resolve
from bench.settings.evaluation import resolve_evaluation
from bench.training.checkpoint import load_model, save_checkpoint

from ..helpers.trained import digits, model

EPS = 16 / 255


def evaluation(**options):
    return resolve_evaluation("digits", {"linf": (EPS,), "l2": (), **options})


@pytest.fixture
def split():
    x, y = digits()
    return Split((x[1500:] * 16).to(torch.uint8), y[1500:], 16)


def right(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) == y


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
    texts = [attempt(name, "l2", 0.5, 10, 10).text for name in ATTACKS if name != "clean"]
    assert len(set(texts)) == len(ATTACKS) - 1


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


# ---- AutoAttack, which only the authors' code is called


@pytest.fixture(params=["autoattack", "pyautoattack"])
def stub(monkeypatch, request):
    """The authors' module, from source or as a package, that inverts every other image."""
    calls, name = [], request.param

    class AutoAttack:
        def __init__(self, net, **options):
            self.call = {"net": net, **options}

        def run_standard_evaluation(self, x, y, /):
            calls.append(self.call | {"images": len(x)})
            print("its progress")
            x = x.clone()
            x[::2] = 1 - x[::2]
            return x if name == "autoattack" else (x, y)

    monkeypatch.setitem(sys.modules, "autoattack", None)
    module = ModuleType(name)
    module.AutoAttack = AutoAttack
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_autoattack_gets_the_model_the_images_and_the_radius(split, stub, request, capsys):
    options = {"l2": (0.5,), "attacks": ("autoattack", "pgd-2"), "batch_size": 200}
    found = evaluate(model(), split, evaluation(**options))
    x, y = split.batch(slice(None))
    clean = right(model(), x, y)
    n = clean.sum().item()
    assert [call["images"] for call in stub] == [200, n - 200] * 2
    for call, (norm, eps) in zip(stub[::2], [("Linf", EPS), ("L2", 0.5)], strict=True):
        assert call["net"] is model() and (call["norm"], call["eps"]) == (norm, eps)
        assert call["version"] == "standard" and call["seed"] == 0
        assert torch.device(call["device"]).type == "cpu"
    x, y = x[clean], y[clean]
    flipped = x.clone()
    for start in (0, 200):
        flipped[start : start + 200][::2] = 1 - flipped[start : start + 200][::2]
    stands = right(model(), flipped, y)
    assert found["each"]["linf"]["16/255"]["autoattack"] == stands.sum().item() / 297
    part = split.take(clean.nonzero().squeeze(1))
    by_pgd = robust(model(), part, evaluation_attack("linf", EPS, 2), 200)
    assert found["robust"]["linf"]["16/255"] == (stands & by_pgd).sum().item() / 297
    assert (stands & by_pgd).sum() < min(stands.sum(), by_pgd.sum()), "one attack alone decides"
    text = found["configurations"]["linf"]["16/255"]["autoattack"]
    assert text.startswith("AutoAttack standard, linf, eps 16/255 = 0.06275, seed 0, ")
    assert request.node.callspec.params["stub"] in text
    assert capsys.readouterr().out == ""


def test_autoattack_needs_its_nine_targets(split, stub):
    few = nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
    with pytest.raises(ValueError, match="9 target classes, and the model has 8"):
        evaluate(few, split, evaluation(attacks=("autoattack",)))


def test_autoattack_that_is_missing_is_said_and_ours_is_not_called_so(split, monkeypatch):
    for name in ("autoattack", "pyautoattack"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="not installed; pip install .*apgd-ce and apgd-t"):
        evaluate(model(), split, evaluation(attacks=("autoattack",)))
    ours = evaluate(model(), split, evaluation(attacks=("apgd-ce-2", "apgd-t-2"), samples=20))
    assert "autoattack" not in report(ours).lower()


# ---- RobustBench's model_info

CIFAR = ("--norms", "linf", "--eval-linf", "8/255")
ENTRY = {  # RobustBench's own example, by field: what it says of the kind and form of a value
    "link": "https://arxiv.org/abs/2002.11569",
    "name": "Overfitting in adversarially robust deep learning",
    "authors": "Leslie Rice, Eric Wong, J. Zico Kolter",
    "additional_data": False,
    "number_forward_passes": 1,
    "dataset": "cifar10",
    "venue": "ICML 2020",
    "architecture": "WideResNet-34-20",
    "eps": "8/255",
    "clean_acc": "85.34",
    "reported": "58",
    "autoattack_acc": "53.42",
}
AUTHORS = {"link", "name", "authors", "venue", "reported"}


@pytest.fixture
def on_cifar(tmp_path, monkeypatch):
    """A function that makes a checkpoint of a small network, as if trained on CIFAR; 12 images."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)

    def make(data="cifar10", network="preactresnet18", width=2, **config):
        classes = {"cifar10": 10, "cifar100": 100}[data]
        net = build_model(network, width, 3, classes, [0.5] * 3, [0.25] * 3).eval()
        with torch.no_grad():  # it is right on 9 of 12 images
            labels = (net(images / 255).argmax(1) + (torch.arange(12) < 3)) % classes
        split = Split(images, labels, 255)
        names = [str(i) for i in range(classes)]
        found = Data(split, split, split, names, [0.5] * 3, [0.25] * 3, "")
        monkeypatch.setattr("bench.data.datasets.load_data", lambda *a, **k: found)
        options = {"data": data, "model": network, "width": width, **config}
        save_checkpoint(tmp_path / "last.pt", resolve("sgd", "sam-at-cifar10", options), found, net)
        return tmp_path / "last.pt"

    return make


def info(path, *options):
    file = path.parent / "new" / "info.json"
    assert main(["evaluate", str(path), *options, "--robustbench", str(file)]) == 0
    return json.loads(file.read_text())


def test_model_info_has_robustbenchs_fields_and_leaves_the_authors_theirs(on_cifar, stub, capsys):
    found = info(on_cifar(), "--attacks", "apgd-ce-2", "autoattack", *CIFAR)
    printed = capsys.readouterr().out
    assert list(found) == list(ENTRY)
    assert {k for k, v in found.items() if v is None} == AUTHORS
    for k in ENTRY.keys() - AUTHORS:
        assert type(found[k]) is type(ENTRY[k]), k
    assert (found["dataset"], found["eps"], found["clean_acc"]) == ("cifar10", "8/255", "75.0")
    assert found["architecture"] == "PreActResNet-18 (width 2 of 64)"
    (own,) = [line for line in printed.splitlines() if line.startswith("  autoattack")]
    assert f" {float(found['autoattack_acc']):.2f}% " in own
    assert "info.json" in printed


def test_model_info_takes_autoattacks_number_whatever_else_was_run():
    """Not the worst case, and least of all our own APGD's."""
    result = {"natural": 0.85345, "each": {"linf": {"8/255": {"apgd-ce": 0.1, "autoattack": 0.5}}},
              "robust": {"linf": {"8/255": 0.05}}}  # fmt: skip
    config = {"data": "cifar10", "model": "wrn28-10-fsam", "width": 64, "weights": "start.pt"}
    found = model_info(config, result, "linf", "8/255")
    assert (found["autoattack_acc"], found["clean_acc"]) == ("50.0", "85.34")
    assert found["architecture"] == "WideResNet-34-10" and found["additional_data"] is None


@pytest.mark.parametrize("data, options, eps", [
    ("cifar10", ("--norms", "l2", "--eval-l2", "0.5"), "0.5"),
    ("cifar10", ("--norms", "linf", "--eval-linf", "8"), "8/255"),
    ("cifar100", CIFAR, "8/255"),
    ("cifar10", (*CIFAR, "--n-examples", "12"), "8/255"),
])  # fmt: skip
def test_every_leaderboard_has_its_radius(on_cifar, stub, data, options, eps):
    found = info(on_cifar(data), "--attacks", "autoattack", *options)
    assert (found["dataset"], found["eps"]) == (data, eps)


@pytest.mark.parametrize("data, options, said", [
    ("cifar10", ("--attacks", "apgd-ce-2", "apgd-t-2", *CIFAR), "add autoattack"),
    ("cifar10", CIFAR, "the attacks are pgd; add autoattack"),
    ("cifar10", ("--attacks", "autoattack"),
     "linf 1/255, linf 2/255, linf 8/255, l2 16/255, l2 32/255, l2 128/255; "
     "pass --norms linf --eval-linf 8/255 or --norms l2 --eval-l2 0.5"),
    ("cifar10", ("--attacks", "autoattack", "--norms", "l2", "--eval-l2", "128"), "l2 128/255"),
    ("cifar10", ("--attacks", "autoattack", "--norms", "linf", "--eval-linf", "8", "2"),
     "linf 8/255, linf 2/255"),
    ("cifar10", ("--attacks", "autoattack", "--norms", "linf", "--eval-linf", "0.031"),
     "linf 7.905/255; pass"),
    ("cifar100", ("--attacks", "autoattack", "--norms", "l2", "--eval-l2", "0.5"),
     "pass --norms linf --eval-linf 8/255\n"),
    ("cifar10", ("--attacks", "autoattack", *CIFAR, "--n-examples", "11"),
     "all 12 test images, not on 11; leave out --n-examples"),
])  # fmt: skip
def test_no_file_for_what_no_leaderboard_lists(on_cifar, stub, data, options, said, capsys):
    """And it says so before any attack."""
    path = on_cifar(data)
    file = path.parent / "info.json"
    assert main(["evaluate", str(path), *options, "--robustbench", str(file)]) == 2
    printed, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert printed == "" and stub == [] and not file.exists()


def test_no_file_for_other_data(checkpoint, tmp_path, stub, capsys):
    file = tmp_path / "info.json"
    command = ["evaluate", str(checkpoint), "--attacks", "autoattack", *CIFAR]
    assert main([*command, "--robustbench", str(file)]) == 2
    assert "no leaderboard for data 'digits'" in capsys.readouterr().err
    assert not file.exists() and stub == []


# ---- warnings


class Behind(nn.Module):
    """The trained model, and what happens to its logits."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = model(), change

    def forward(self, x):
        return self.change(self.net(x))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda z: 1e4 * z, "the gradient is exactly 0 for"),
        (lambda z: 6 * z, "cross-entropy's gradient is below 1e-10 for"),
        (lambda z: z + 0.01 * torch.randn_like(z), "the model is random"),
        (lambda z: z.softmax(1), "look like probabilities"),
        (lambda z: 10 * (6 * z).softmax(1) - 3, "look like scaled or shifted probabilities"),
        (lambda z: z.sigmoid(), "all lie in [0, 1], as sigmoids do"),
        (lambda z: 5 * (3 * z).tanh(), "as if it had a bound"),
        (lambda z: z.clamp(max=2), "as if it had a bound"),
        (lambda z: z.log_softmax(1) + 5, "log-probabilities that were shifted or cut off"),
        (lambda z: (z.softmax(1) + 1e-3).log(), "log-probabilities that were shifted or cut off"),
        (lambda z: (3 * z).softmax(1).clamp(1e-6).log(), "that were shifted or cut off"),
        (lambda z: z.round() + 0 * z, "the gradient is exactly 0 for 128 of 128 images"),
        (lambda z: z.detach() + 1e-41 * z, "the gradient is 0 or too small for float32 for 128"),
    ],
    ids=["saturated", "sure", "random", "softmax", "affine", "sigmoid", "tanh", "clamped",
         "shifted", "raised", "floored", "rounded", "denormal"],
)  # fmt: skip
def test_a_model_that_hides_its_gradients_is_noticed(split, change, said):
    torch.manual_seed(0)
    x, y = split.batch(slice(0, 128))
    assert any(said in text for text in masked_gradients.of_model(Behind(change), x, y))
    found = evaluate(Behind(change), split, evaluation(samples=128))
    assert any(line.startswith("warning: ") and said in line for line in report(found).split("\n"))


def test_a_gradient_that_vanishes_on_the_way_is_noticed(split):
    """The network is itself at the images, and flat wherever an attack goes."""
    x, _ = split.batch(slice(0, 60))

    class Flat(nn.Module):
        def forward(self, z):
            clean = (z.detach()[:, None] == x).flatten(2).all(2).any(1, keepdim=True)
            logits = model()(z)
            return torch.where(clean, logits, logits.detach() + 0 * logits)

    part = split.take(torch.arange(60))
    found = evaluate(Flat(), part, evaluation(attacks=("pgd-4", "apgd-ce-4")))
    for name in ("pgd-4", "apgd-ce-4"):
        said = f"l_inf 16/255 {name}: where it ended, the gradient is exactly 0 for "
        assert any(text.startswith(said) for text in found["warnings"]), name
    assert not any("cannot move" in text for text in found["warnings"])
    assert evaluate(model(), part, evaluation(attacks=("pgd-4", "apgd-ce-4")))["warnings"] == []


def test_a_sound_model_is_not_warned_of(split):
    assert masked_gradients.of_model(model(), *split.batch(slice(None))) == []
    for fine in (lambda z: z.log_softmax(1), lambda z: z - z.mean(1, keepdim=True),
                 lambda z: z / 50, lambda z: z + 7, lambda z: z[:, :3], lambda z: z - 1e3):
        x, y = split.batch(slice(None))
        assert masked_gradients.of_model(Behind(fine), x, y.clamp(max=2)) == [], fine


@pytest.mark.parametrize("fine", [
    lambda z: 1e-3 * z, lambda z: 1e-30 * z, lambda z: 1e-3 * (z - z.mean(1, keepdim=True)),
    lambda z: (1e-3 * z).half(), lambda z: z.bfloat16(),
])  # fmt: skip
def test_logits_that_are_small_or_coarse_are_still_logits(split, fine):
    said = masked_gradients.of_model(Behind(fine), *split.batch(slice(None)))
    assert not any("look like" in text or "batch" in text for text in said), said


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_few_images_are_no_sign(split, number):
    for start in range(10):
        x, y = split.batch(slice(start, start + number))
        assert masked_gradients.of_model(model(), x, y) == []


class OfBatches(nn.Module):
    """Normalises by the batch's own statistics, whatever mode it is in."""

    def __init__(self, norm):
        super().__init__()
        self.net, self.norm = model(), norm

    def train(self, mode=True):
        return self

    def forward(self, x):
        return self.net(0.4 * self.norm(x) + 0.3)


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(1),
                                  lambda: nn.BatchNorm2d(1, track_running_stats=False)])
@pytest.mark.parametrize("batch_size", [1, 2, 50, 500])
def test_answers_that_depend_on_the_batch_are_noticed(split, norm, batch_size):
    part = split.take(torch.arange(60))
    found = evaluate(OfBatches(norm()), part, evaluation(attacks=("clean",), batch_size=batch_size))
    assert any("batch that it comes in" in text for text in found["warnings"])
    assert evaluate(model(), part, evaluation(attacks=("clean",), batch_size=batch_size))[
        "warnings"] == []  # fmt: skip


# ---- networks and images that cannot be evaluated


@pytest.mark.parametrize("change", [
    lambda x: model()(x).detach(), lambda x: model()(x.detach()),
    lambda x: model()((x * 255).to(torch.uint8) / 255), lambda x: torch.eye(10)[[0] * len(x)],
], ids=["detached", "images detached", "bytes", "constant"])  # fmt: skip
@pytest.mark.parametrize("name", ["fgsm", "pgd-2", "apgd-ce-2", "apgd-t-2"])
def test_a_network_without_a_gradient_is_refused(split, change, name):
    class Cut(nn.Module):
        def forward(self, x):
            return change(x)

    part = split.take(torch.arange(20))
    for precision in ("fp32", "bf16"):
        with pytest.raises(ValueError, match="no gradient .* images"):
            evaluate(Cut(), part, evaluation(attacks=(name,), precision=precision))
    a = attempt(name, "linf", EPS, 10, 10)
    with pytest.raises(ValueError, match="no gradient .* images"):
        withstand(Cut(), part, a.perturb, 1, 20)
    assert evaluate(Cut(), part, evaluation(attacks=("clean",)))["images"] == 20


@pytest.mark.parametrize("levels", [4, 15])
def test_images_outside_0_and_1_are_refused(split, levels):
    """An attack that starts by clamping them is an attack on other images."""
    part = Split(split.images, split.labels, levels)
    normalised = Split((split.images.float() / 16 - 0.3) / 0.38, split.labels, 1)
    for images in (part, normalised):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            evaluate(model(), images, evaluation())
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            correct(model(), images, 100)


@pytest.mark.parametrize("change, said", [
    (lambda z: (z, z), "tuple"), (lambda z: {"logits": z}, "dict"),
    (lambda z: z[:, :, None, None], r"\(100, 10, 1, 1\)"), (lambda z: z[:, 0], r"\(100,\)"),
    (lambda z: z[:, :1], r"\(100, 1\)"), (lambda z: z[:1], r"\(1, 10\)"),
    (lambda z: z.long(), "int64"),
])  # fmt: skip
def test_outputs_that_are_no_logits_of_every_image_are_refused(split, change, said):
    with pytest.raises(ValueError, match=said):
        correct(Behind(change), split, 100)


def numbers(each=(), by_eps=(), images=1000):
    return {"images": images, "each": {"linf": {"8/255": dict(each)}},
            "robust": {"linf": dict(by_eps)}}  # fmt: skip


def test_numbers_that_contradict_each_other_are_noticed():
    said = masked_gradients.of_numbers(numbers({"fgsm": 0.3, "pgd-20": 0.4, "pgd": 0.5}))
    assert len(said) == 1 and "FGSM (30.00%) fools more images than PGD (40.00%)" in said[0]
    said = masked_gradients.of_numbers(numbers(by_eps={"16/255": 0.4, "8/255": 0.3, "2/255": 0.6}))
    assert len(said) == 1 and "40.00% at 16/255 and 30.00% at the smaller 8/255" in said[0]
    fine = {"fgsm": 0.396, "pgd-20": 0.4}
    assert masked_gradients.of_numbers(numbers(fine, {"8/255": 0.4, "16/255": 0.404})) == []
    one_image = numbers({"fgsm": 0.37, "pgd": 0.4}, images=30)
    assert masked_gradients.of_numbers(one_image) == []
    assert len(masked_gradients.of_numbers(numbers({"fgsm": 0.33, "pgd": 0.4}, images=30))) == 1


# ---- the command, and what checkpoints are good for


@pytest.fixture
def checkpoint(tmp_path):
    config = resolve("sgd", "digits", {"width": 8})
    data = load_data("digits", 0.1, 0)
    save_checkpoint(tmp_path / "last.pt", config, data, model())
    return tmp_path / "last.pt"


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
