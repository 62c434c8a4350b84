"""Photographs read when needed, and transfer: made images, small networks, no download."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from bench.__main__ import main
from bench.data.datasets import judges_of, load_data
from bench.data.photographs import central
from bench.models import build_model
from bench.settings.config import resolve
from bench.training.checkpoint import load_model, save_checkpoint
from bench.training.pretrained import start_from
from bench.training.session import Sitting
from bench.training.stopped import Stopped
from bench.training.train import set_up, train

SIZE = 32


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Red and blue noise of various sizes, in ImageNet's directories."""
    root, draws = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for part, number in (("train", 12), ("val", 4)):
        for channel, name in ((0, "red"), (2, "blue")):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                h, w = draws.integers(40, 90, 2)
                pixels = draws.integers(0, 128, (h, w, 3), dtype=np.uint8)
                pixels[:, :, channel] += 120
                Image.fromarray(pixels).save(root / part / name / f"{i:03}.png")
    return root


def lazily(root, workers=0, **options):
    return load_data(str(root), 0.25, 0, image_size=SIZE, lazily=True, workers=workers, **options)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_splits_have_the_central_crops(photographs):
    data = lazily(photographs)
    assert [len(s) for s in (data.train, data.val, data.test)] == [18, 6, 8]
    assert data.classes == ["blue", "red"] and data.channels == 3
    x, y = data.test.batch(slice(2, 7))
    assert x.shape == (5, 3, SIZE, SIZE) and y.tolist() == [0, 0, 1, 1, 1]
    for image, path in zip(x, data.test.paths[2:7], strict=True):
        whole = Image.open(path)
        side = round(SIZE * 256 / 224)
        expected = TF.center_crop(TF.resize(whole, side), SIZE)
        assert torch.equal(image, TF.to_tensor(expected))
    some = data.test.take(torch.tensor([7, 0]))
    assert torch.equal(some.batch(slice(None))[0][0], data.test.batch(slice(7, 8))[0][0])
    assert data.test.take(torch.arange(0)).batch(slice(None))[0].shape == (0, 3, SIZE, SIZE)


def test_other_test_photographs_are_cut_like_ones_own(photographs, recwarn):
    data = lazily(photographs)
    for size in (None, SIZE):
        judges, _ = judges_of(data, str(photographs), "test", size)
        assert torch.equal(judges.batch(slice(None))[0], data.test.batch(slice(None))[0])
    assert not recwarn.list


def test_training_crops_are_random_repeat_and_do_not_depend_on_the_workers(photographs):
    batches = torch.randperm(18, generator=rng()).split(5)
    one, two, other = (
        list(lazily(photographs, workers).train.augmented(batches, rng(seed)))
        for workers, seed in ((0, 1), (2, 1), (0, 2))
    )
    labels = lazily(photographs).train.labels
    for (x, y), (x2, y2), index in zip(one, two, batches, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2) and torch.equal(y, labels[index])
        assert x.shape[1:] == (3, SIZE, SIZE) and 0 <= x.min() and x.max() <= 1
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))
    rest = list(lazily(photographs).train.augmented(batches[2:], rng(1)))
    assert torch.equal(rest[0][0], one[2][0]), "an image's crop depends on the batches before it"


def test_equal_photographs_are_cropped_differently(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    train = lazily(tmp_path).train
    x, _ = next(train.augmented([torch.arange(len(train))], rng()))
    assert len(x.flatten(1).unique(dim=0)) == len(train)


def test_reading_leaves_the_global_generator_alone(photographs):
    data = lazily(photographs)
    torch.manual_seed(5)
    data.train.batch(slice(0, 3))
    batch = next(data.train.augmented([torch.arange(3)], rng()))[0]
    torch.manual_seed(6)
    assert torch.equal(batch, next(data.train.augmented([torch.arange(3)], rng()))[0])


def test_the_fingerprint_knows_places_and_labels(photographs, tmp_path):
    copies = [tmp_path / "same", tmp_path / "moved"]
    for copy in copies:
        shutil.copytree(photographs, copy)
    (copies[1] / "train/red/000.png").rename(copies[1] / "train/blue/012.png")
    same, moved = (lazily(copy).fingerprint for copy in copies)
    noise = lazily(photographs, label_noise=0.5).fingerprint
    assert same == lazily(photographs).fingerprint and len({same, moved, noise}) == 3


def test_an_unreadable_photograph_is_named(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (40, 50)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "y" / "2.png").write_bytes(b"no image")
    for workers in (0, 2):
        data = load_data(str(tmp_path), 0.2, 0, image_size=SIZE, lazily=True, workers=workers)
        with pytest.raises(ValueError, match=r"2\.png") as error:
            for split in (data.train, data.val, data.test):
                list(split.read([torch.arange(len(split))] * 2, central(SIZE), 0))
        assert "\n" not in str(error.value) and str(error.value).startswith("cannot read")


def test_a_reading_process_that_is_killed_is_said(photographs, monkeypatch):
    def killed(self, i):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("bench.data.photographs.Reader.__getitem__", killed)
    with pytest.raises(OSError, match="repeat the command"):
        lazily(photographs, workers=1).test.batch(slice(None))


def test_photographs_are_of_directories():
    with pytest.raises(ValueError, match="directories"):
        load_data("digits", 0.1, 0, lazily=True)


@pytest.mark.parametrize("recipe, model", [
    ("fsam/imagenet/resnet50-fsam", "torchvision:shufflenet_v2_x0_5"),
    ("fsam/transfer/oxford-pets/sam", "timm:test_vit2"),
])  # fmt: skip
def test_recipes_of_photographs_train_here(recipe, model, photographs, tmp_path, capsys):
    weights = []
    if "transfer" in recipe:
        network = build_model(model, 64, 3, 5, [0.5] * 3, [0.5] * 3)[1].net
        torch.save({"model": network.state_dict()}, tmp_path / "five-classes.pt")
        weights = ["--weights", str(tmp_path / "five-classes.pt")]
    command = [
        "train", "--recipe", recipe, "--data", str(photographs), "--model", model, "--epochs", "2",
        "--image-size", str(SIZE), "--batch-size", "12", "--workers", "0", "--threads", "1",
        "--eval-linf", "1", "--eval-l2", "16", "--eval-steps", "1", *weights,
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    if model.startswith("timm:"):
        command[command.index(str(SIZE))] = "160"  # what the network demands
    assert main(command) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["test_images"] == 8 and summary["train_images"] == 24
    assert summary["config"]["rho"] == 0.075 and 0 <= summary["natural"] <= 1
    assert load_model(tmp_path / "run/last.pt")(torch.rand(2, 3, SIZE, SIZE)).shape == (2, 2)


def test_photographs_and_dropout_resume_to_the_same_bits(photographs, tmp_path):
    options = {"data": str(photographs), "augment": "resized-crop", "image_size": SIZE, "width": 4,
               "workers": 0, "model": "vgg16bn", "epochs": 2, "batch_size": 8}  # fmt: skip
    config = resolve("fsam", "digits", options)

    whole, cut = train(config, tmp_path / "whole"), None
    more = replace(config, workers=1)  # a run may go on with any number of them
    while cut is None:  # step by step
        config, more = more, config
        try:
            cut = train(config, tmp_path / "cut", sitting=Sitting(time_budget=0))
        except Stopped:
            torch.manual_seed(0)
    a, b = whole.model.state_dict(), cut.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["sam-db", "sam-noise", "sam-batches"])
def test_methods_that_climb_by_other_images_take_photographs(method, photographs, tmp_path):
    options = {"data": str(photographs), "augment": "resized-crop", "image_size": 16, "width": 4,
               "workers": 0, "model": "smallconv", "epochs": 1, "batch_size": 16}  # fmt: skip
    config = resolve(method, "digits", options)
    runs = [train(config, tmp_path / name) for name in ("one", "two")]
    a, b = (run.model.state_dict() for run in runs)
    assert all(torch.equal(a[k], b[k]) and a[k].isfinite().all() for k in a)
    assert runs[0].opt.last_radius > 0


# ---- weights to start from


@pytest.mark.parametrize("classes", [10, 7])
@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w}, lambda w: {"state_dict": w}])
def test_transfer_starts_from_the_weights_and_keeps_a_head_of_its_own(classes, wrap, tmp_path):
    torch.manual_seed(99)
    pretrained = build_model("smallconv", 4, 1, classes, [0.1], [0.2])
    torch.save(wrap(pretrained[1].state_dict()), tmp_path / "weights.pt")
    config = resolve("sgd", "digits", {"width": 4, "weights": str(tmp_path / "weights.pt")})
    fresh, run = set_up(resolve("sgd", "digits", {"width": 4})), set_up(config)
    for name, value in run.model.state_dict().items():
        head_or_norm = name.startswith(("0.", "1.head"))
        source = fresh if head_or_norm and (classes != 10 or name.startswith("0.")) else None
        expected = source.model.state_dict()[name] if source else pretrained.state_dict()[name]
        assert torch.equal(value, expected), name


def prefixed(*prefixes):
    return lambda w: {"".join(prefixes) + k: v for k, v in w.items()}


@pytest.mark.parametrize("wrap", [
    prefixed("module."), prefixed("_orig_mod."), prefixed("model."),
    prefixed("module.", "_orig_mod."), prefixed("_orig_mod.", "module.", "model."),
    lambda w: {"state_dict": prefixed("model.")(w), "epoch": 3, "lr_schedulers": []},
    lambda w: {"model_state_dict": prefixed("module.")(w), "optimizer_state_dict": {}},
    lambda w: {"model": {"state_dict": w}, "args": {"lr": 0.1}},
    lambda w: {k: v.half() for k, v in w.items()},
    lambda w: {k: v for k, v in w.items() if "num_batches_tracked" not in k},
    lambda w: {"net": prefixed("module.")(w), "acc": 93.1, "epoch": 199},
    lambda w: {"state_dict_ema": w}, lambda w: {"ema": {"module": w}},
])  # fmt: skip
def test_weights_of_the_usual_wrappers(wrap, tmp_path):
    torch.manual_seed(99)
    theirs = build_model("vgg16bn", 4, 3, 10, [0.1] * 3, [0.2] * 3)
    ours = build_model("vgg16bn", 4, 3, 10, [0.5] * 3, [0.5] * 3)
    torch.save(wrap(theirs[1].state_dict()), tmp_path / "weights.pt")
    start_from(ours, tmp_path / "weights.pt")
    for (name, a), b in zip(theirs[1].state_dict().items(), ours[1].state_dict().values(),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)
    assert ours[0].state_dict().keys() and not torch.equal(theirs[0].mean, ours[0].mean)


@pytest.mark.parametrize("wrap, said", [
    (lambda w: prefixed("module.")(w) | {"n_averaged": torch.tensor(3)}, "'n_averaged'"),
    (lambda w: {"state_dict": prefixed("model.")(w) | {"loss.weight": torch.ones(10)}},
     "'loss.weight'"),
    (lambda w: prefixed("module.", "1.")(w) | {"module.0.mean": torch.ones(1)}, "'0.mean'"),
    (lambda w: {"epoch": 3, "ema": {k: 0 * v for k, v in w.items()}, "model": w},
     "'model', 'ema'; those of 'model' are taken"),
])  # fmt: skip
def test_what_lies_beside_the_weights_is_told(wrap, said, tmp_path):
    torch.manual_seed(99)
    theirs, ours = (build_model("smallconv", 4, 1, 10, [0.1], [0.2]) for _ in range(2))
    torch.save(wrap(theirs[1].state_dict()), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match=said):
        start_from(ours, tmp_path / "weights.pt")
    for a, b in zip(theirs[1].state_dict().values(), ours[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("network", ["smallconv", "torchvision:shufflenet_v2_x0_5"])
def test_checkpoints_of_ones_own_are_weights(network, tmp_path):
    torch.manual_seed(99)
    shape = (4, 1) if network == "smallconv" else (64, 3)
    theirs = build_model(network, *shape, 10, [0.1] * 3, [0.2] * 3)
    config = resolve("sgd", "digits", {"width": shape[0], "model": network})
    save_checkpoint(tmp_path / "last.pt", config, load_data("digits", 0.1, 0), theirs, epoch=1)
    ours = build_model(network, *shape, 7, [0.5] * 3, [0.5] * 3)
    with pytest.warns(UserWarning, match="start anew.*10"):
        start_from(ours, tmp_path / "last.pt")
    a, b = theirs[1].state_dict(), ours[1].state_dict()
    head = set(list(a)[-2:])
    assert all(torch.equal(a[k], b[k]) != (k in head) for k in a)
    data = bytearray((tmp_path / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(data)
    with pytest.raises(ValueError, match="can be read"):
        start_from(ours, tmp_path / "last.pt")


def test_what_does_not_fit_is_told(tmp_path):
    model = build_model("smallconv", 4, 1, 10, [0.1], [0.2])
    weights = model[1].state_dict()
    first = next(iter(weights))
    torch.save({**weights, first: torch.zeros(2, 3), "extra.bias": torch.zeros(1)},
               tmp_path / "weights.pt")  # fmt: skip
    with pytest.raises(ValueError) as error:
        start_from(model, tmp_path / "weights.pt")
    text = str(error.value)
    assert "2 tensors" in text and "'extra.bias' is not the network's" in text
    assert f"{first!r} is (2, 3) and not {tuple(weights[first].shape)}" in text
    torch.save({k: v for k, v in weights.items() if k != first}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"'{first}' is missing"):
        start_from(model, tmp_path / "weights.pt")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = build_model("smallconv", 4, 1, 10, [0.1], [0.2])
    path = tmp_path / "weights.pt"
    with pytest.raises(ValueError, match="--weights"):
        start_from(model, path)
    whole = model[1].state_dict()
    other = build_model("smallconv", 8, 1, 10, [0.1], [0.2])[1].state_dict()
    part = {k: v for k, v in whole.items() if "head" not in k}
    for content in (other, part, whole | {"more": torch.zeros(1)}, prefixed("student.")(whole)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="another network"):
            start_from(model, path)
    for content in ({}, torch.zeros(3), list(whole.values()), {"epoch": 3}, "text", None):
        torch.save(content, path)
        with pytest.raises(ValueError, match="holds no names and tensors"):
            start_from(model, path)
    for value in (torch.nan, torch.inf):
        name = list(whole)[3]
        torch.save(whole | {name: torch.full_like(whole[name], value)}, path)
        with pytest.raises(ValueError, match=f"NaN or inf, in {name!r}"):
            start_from(model, path)
    torch.save(model, path)
    with pytest.raises(ValueError, match="can be read: .* save its state_dict") as error:
        start_from(model, path)
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)
    for content in (b"text", b"", b"text" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="can be read"):
            start_from(model, path)
