"""A network that leaves: its weights, its source and its card, and no need of this repository."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from bench.__main__ import main
from bench.models import MODELS, build_model
from bench.models.standalone import standalone
from bench.settings.config import resolve
from bench.training.checkpoint import load_checkpoint, load_model

from ..helpers.survive import SMALL

# a process that finds neither bench nor fastsam, wherever it looks
ALONE = """
import sys
sys.modules["bench"] = sys.modules["fastsam"] = None
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    command = ["train", *SMALL, "--method", "at-linf+fsam", "--attack-steps", "1", "--epochs", "2"]
    assert main([*command, "--out", str(out)]) == 0
    return out


def alone(code, folder):
    done = subprocess.run([sys.executable, "-c", ALONE + code], cwd=folder, capture_output=True,
                          text=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    return code


def test_the_cards_lines_load_the_network_without_bench(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert {p.name for p in out.iterdir() if p.name[0] != "."} == {
        "model.safetensors", "model.py", "README.md"
    }  # fmt: skip
    assert capsys.readouterr().out.count("wrote ") == 3
    torch.manual_seed(0)
    x = torch.rand(3, 1, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    code = lines_of((out / "README.md").read_text())
    assert len(code.splitlines()) <= 12
    code += "with torch.no_grad():\n    torch.save(model(torch.load('../x.pt')), '../y.pt')\n"
    assert alone(code, out).strip() in map(str, range(10))
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), load_model(run / "last.pt")(x))


def test_the_best_checkpoint_has_its_own_weights_and_accuracies(run, tmp_path):
    from safetensors.torch import load_file

    assert main(["export", str(run), str(tmp_path), "--checkpoint", "best"]) == 0
    best, summary = load_checkpoint(run / "best.pt"), json.loads((run / "summary.json").read_text())
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == best["model"].keys()
    assert all(torch.equal(found[k], v) for k, v in best["model"].items())
    card = (tmp_path / "README.md").read_text()
    assert f"| natural | {100 * summary['best']['natural']:.1f} |" in card
    assert f"best checkpoint, after epoch {best['epoch'] + 1} of 2" in card


def test_the_card_says_what_was_measured_and_of_what(run, tmp_path):
    assert main(["export", str(run), str(tmp_path)]) == 0
    card = (tmp_path / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    for text in (
        "# smallconv trained with AT (PGD, l_inf) + Friendly-SAM on digits",
        summary["fingerprint"], summary["test_fingerprint"], summary["git"],
        f"| rho | {summary['config']['rho']} |",
        f"| natural | {100 * summary['natural']:.1f} |",
        f"| l_inf 8/255 | {100 * summary['robust']['linf']['8/255']:.1f} |",
        summary["attacks"]["l2"]["128/255"], "does not know the licence of the training images",
        f"On {summary['test_images']} test images", *summary["warnings"],
    ):  # fmt: skip
        assert text in card, text
    assert " | None |" not in card


def test_the_card_names_the_images_that_judged(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    summary = json.loads((copy / "summary.json").read_text())
    summary["evaluation"]["data"], summary["judged_fingerprint"] = "others", "0123"
    summary["warnings"], summary["best"]["warnings"] = ["of last"], ["of best"]
    (copy / "summary.json").write_text(json.dumps(summary))
    assert main(["export", str(copy), str(tmp_path / "last")]) == 0
    card = (tmp_path / "last/README.md").read_text()
    n = summary["test_images"]
    assert f"On {n} test images of `others` (fingerprint of the whole set `0123`)" in card
    assert '"dataset": {"name": "others", "type": "others", "split": "test"}' in card
    assert "Warning: of last" in card and "of best" not in card
    assert main(["export", str(copy), str(tmp_path / "best"), "--checkpoint", "best"]) == 0
    assert "Warning: of best" in (tmp_path / "best/README.md").read_text()


def test_the_hub_reads_the_cards_head(run, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: .[recipes]")
    assert main(["export", str(run), str(tmp_path)]) == 0
    data = hub.ModelCard.load(tmp_path / "README.md").data
    summary = json.loads((run / "summary.json").read_text())
    assert data.license == "unknown" and data.pipeline_tag == "image-classification"
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found["accuracy, natural"] == summary["natural"]
    assert found["accuracy, l2 128/255"] == summary["robust"]["l2"]["128/255"]
    assert {r.dataset_name for r in data.eval_results} == {"digits"}


def test_every_networks_source_stands_alone(tmp_path):
    classes, x, outputs = ["a\"'\\", "ä", "c"], torch.rand(2, 3, 32, 32), {}
    for name in MODELS:
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(standalone(name, 8, 3, classes))
        own = build_model(name, 8, 3, 3, [0.5] * 3, [0.25] * 3).eval()
        torch.save((own.state_dict(), x), tmp_path / f"{name.replace('-', '_')}.pt")
        with torch.no_grad():
            outputs[name.replace("-", "_")] = own(x)
    code = """
import torch
from importlib import import_module
from pathlib import Path
for path in Path(".").glob("*.py"):
    model = import_module(path.stem)
    weights, x = torch.load(path.with_suffix(".pt"))
    net = model.build().eval()
    net.load_state_dict(weights)
    with torch.no_grad():
        torch.save(net(x), path.with_suffix(".out"))
    print(ascii(model.CLASSES))
"""
    assert set(alone(code, tmp_path).splitlines()) == {ascii(classes)}
    for name, wanted in outputs.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.out"), wanted), name


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_a_librarys_network_needs_that_library_alone(name, tmp_path):
    pytest.importorskip(name.partition(":")[0], reason="needs torchvision, timm: .[recipes]")
    (tmp_path / "model.py").write_text(standalone(name, 64, 1, ["0", "1"]))
    code = """
import model
print(model.build()[1].net.fc.out_features)
try:
    model.library_model("torchvision:resnet19", 3, 2)
except ValueError as error:
    print(error)
"""
    features, said = alone(code, tmp_path).splitlines()
    assert features == "2" and "did you mean" in said


@pytest.mark.parametrize("spoil, said", [
    (lambda run, out: (run / "summary.json").unlink(), "no summary.json"),
    (lambda run, out: (run / "last.pt").unlink(), "last.pt"),
    (lambda run, out: out.mkdir() or (out / "README.md").write_text("mine"), "README.md"),
    (lambda run, out: changed(run / "summary.json"), "epochs 7 -> 2"),
    (lambda run, out: shutil.rmtree(run), "no summary.json"),
])  # fmt: skip
def test_refuses_what_it_cannot_export_honestly(spoil, said, run, tmp_path, capsys):
    copy, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, copy)
    spoil(copy, out)
    before = sorted(out.iterdir()) if out.exists() else None
    assert main(["export", str(copy), str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (sorted(out.iterdir()) if out.exists() else None) == before


def changed(path):
    summary = json.loads(path.read_text())
    config = asdict(resolve("sgd", "digits", {})) | summary["config"] | {"epochs": 7}
    path.write_text(json.dumps(summary | {"config": config}))


def test_safetensors_that_is_missing_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "pip install safetensors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
