"""AutoAttack by its authors' code, and the file that RobustBench asks for."""

import json
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from bench.__main__ import main
from bench.attacks.pgd import evaluation_attack
from bench.data.datasets import Data, Split
from bench.evaluation.evaluate import evaluate, report, robust
from bench.evaluation.robustbench import model_info
from bench.models import build_model
from bench.settings.config import resolve
from bench.training.checkpoint import save_checkpoint

from ..helpers.trained import EPS, evaluation, model, right

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
    split = Split(split.images, split.labels.clamp(max=8), split.levels)
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
    ("cifar10", ("--attacks", "autoattack", *CIFAR, "--eval-on", "held-out"),
     "on cifar10's own test images; leave out --eval-on held-out"),
    ("cifar10", ("--attacks", "autoattack", *CIFAR, "--eval-data", "photos"),
     "on cifar10's own test images; leave out --eval-data photos"),
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
