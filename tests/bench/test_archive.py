"""Archives of images become directories for --data, whole or not at all; other encodings of the
test images, and images held out of training, are what an evaluation says it is on."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from bench.__main__ import main
from bench.data.datasets import judges_of, load_data
from bench.evaluation.evaluate import correct
from bench.experiments.train_and_evaluate import (
    finished,
    refuse_changed_data,
    train_and_evaluate,
)
from bench.settings.config import resolve
from bench.settings.evaluation import Evaluation
from bench.training.train import set_up

CLASSES = ("cat", "dog")
PER_CLASS = {"train": 12, "test": 5}


def images(kind, shift=0):
    """(path in the archive, file) of small images, of which one class is brighter."""
    rng = np.random.default_rng(shift)
    for part, n in PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            for i in range(n):
                pixels = rng.integers(0, 128, (8, 8, 3)) + 120 * label
                file = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(file, kind, quality=75)
                suffix = "jpg" if kind == "JPEG" else "png"
                yield f"{part}/{name}/{i:05}.{suffix}", file.getvalue()


def archive(path, members, mode="w:xz"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind, mode", [("JPEG", "w:xz"), ("PNG", "w:gz"), ("PNG", "w")])
def test_an_archive_becomes_a_directory_to_train_on(kind, mode, tmp_path, capsys):
    members = list(images(kind))
    path, out = archive(tmp_path / "some.tar", members, mode), tmp_path / "new/images"
    assert main(["unpack", str(path), str(out)]) == 0
    assert "24 images in train/, 10 images in test/" in capsys.readouterr().out
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.*")} == {n for n, _ in members}
    data = load_data(str(out), 0, 0)
    assert data.classes == list(CLASSES) and (len(data.train), len(data.test)) == (24, 10)
    first = np.asarray(Image.open(io.BytesIO(dict(members)[f"train/cat/00000.{kind[:3].lower()}"
                       if kind == "PNG" else "train/cat/00000.jpg"])))  # fmt: skip
    assert torch.equal(data.train.images[0], torch.tensor(first).permute(2, 0, 1))


@pytest.mark.parametrize("spoil, said", [
    (lambda content: content[: len(content) // 2], "cannot be unpacked"),
    (lambda content: content[:200] + bytes(40) + content[240:], "cannot be unpacked"),
    (lambda content: b"no archive", "cannot be unpacked"),
])  # fmt: skip
def test_a_broken_archive_leaves_nothing(spoil, said, tmp_path, capsys):
    path = archive(tmp_path / "some.tar.xz", images("PNG"))
    path.write_bytes(spoil(path.read_bytes()))
    assert main(["unpack", str(path), str(tmp_path / "out/images")]) == 2
    message = capsys.readouterr().err
    assert said in message and str(path) in message
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("members, said", [
    ([("train/cat/1.png", b"x"), ("test.png", b"x")], "no train/<class>/ and test/<class>/"),
    ([("../escaped.png", b"x"), *images("PNG")], "cannot be unpacked"),
])  # fmt: skip
def test_other_archives_are_refused(members, said, tmp_path, capsys):
    path = archive(tmp_path / "some.tar.xz", members)
    assert main(["unpack", str(path), str(tmp_path / "out/images")]) == 2
    assert said in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "escaped.png").exists()


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    path = archive(tmp_path / "some.tar.xz", images("PNG"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/mine").write_text("mine")
    assert main(["unpack", str(path), str(tmp_path / "images")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "images/mine").read_text() == "mine"
    assert main(["unpack", str(tmp_path / "none.tar"), str(tmp_path / "new")]) == 2


# ---- on which images


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Directories of two encodings of different pixels."""
    folder = tmp_path_factory.mktemp("encodings")
    for kind, shift in (("JPEG", 0), ("PNG", 1)):
        path = archive(folder / f"{kind}.tar", images(kind, shift), "w")
        assert main(["unpack", str(path), str(folder / kind)]) == 0
    return folder / "JPEG", folder / "PNG"


def options(data, **more):
    return {"data": str(data), "model": "smallconv", "width": 4, "epochs": 1, "val": 0.25,
            "batch_size": 8, "augment": "none", "threads": 1, "seed": 1} | more  # fmt: skip


def clean(**more):
    return Evaluation((), (), attacks=("clean",), **more)


def test_an_evaluation_is_on_the_images_that_it_names(two, tmp_path):
    jpeg, png = two
    config = resolve("sgd", None, options(jpeg))
    judges = {"test": clean(), "held-out": clean(on="held-out"), "png": clean(data=str(png))}
    found = {name: train_and_evaluate(config, evaluation, tmp_path, file=f"{name}.json")
             for name, evaluation in judges.items()}  # fmt: skip
    run = set_up(config)
    run.model.load_state_dict(torch.load(tmp_path / "last.pt")["model"])
    run.model.eval()
    other, data = load_data(str(png), 0, 0), run.data
    splits = {"test": data.test, "held-out": data.val, "png": other.test}
    prints = [data.test_fingerprint, data.fingerprint, other.test_fingerprint]
    assert [found[name]["judged_fingerprint"] for name in judges] == prints
    for name, split in splits.items():
        assert found[name]["test_images"] == len(split)
        assert found[name]["natural"] == correct(run.model, split, 100).double().mean().item()
        stored = json.loads((tmp_path / f"{name}.json").read_text())
        assert stored["evaluation"]["on"] == judges[name].on
        assert stored["evaluation"]["data"] == judges[name].data
    assert len(splits["held-out"]) == 6
    command = ["evaluate", str(tmp_path / "last.pt"), "--attacks", "clean", "--rows",
               str(tmp_path / "rows.jsonl")]  # fmt: skip
    for words in ([], ["--eval-on", "held-out"], ["--eval-data", str(png)]):
        assert main([*command, *words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["natural"] for r in rows] == [found[name]["natural"] for name in judges]
    assert [r["judged_fingerprint"] for r in rows] == prints
    assert [(r["evaluation"]["on"], r["evaluation"]["data"]) for r in rows] == [
        ("test", None), ("held-out", None), ("test", str(png))
    ]  # fmt: skip


def test_test_images_of_another_size_are_refused(two, tmp_path):
    larger = tmp_path / "larger"
    shutil.copytree(two[0], larger)
    for path in larger.rglob("*.jpg"):
        Image.open(path).resize((12, 10)).save(path)
    with pytest.raises(ValueError, match="are 12x10, and the network was trained for 8x8"):
        judges_of(load_data(str(two[0]), 0, 0), str(larger), "test", None)
    data = load_data(str(two[0]), 0, 0, image_size=9)
    judges, _ = judges_of(data, str(larger), "test", 9)
    assert judges.images.shape == data.test.images.shape


def test_a_summary_from_before_an_evaluation_named_its_images_is_finished(two, tmp_path):
    config, evaluation = resolve("sgd", None, options(two[0])), clean()
    summary = train_and_evaluate(config, evaluation, tmp_path)
    for key in ("on", "data"):
        del summary["evaluation"][key]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert finished(config, evaluation, tmp_path) == json.loads(json.dumps(summary))
    assert finished(config, clean(on="held-out"), tmp_path) is None


def test_images_that_are_not_there_are_refused(two, tmp_path, capsys):
    jpeg, png = two
    base = ["train", "--data", str(jpeg), "--model", "smallconv", "--width", "4", "--epochs", "1",
            "--out", str(tmp_path / "run"), "--threads", "1"]  # fmt: skip
    assert main([*base, "--val", "0", "--eval-on", "held-out"]) == 2
    assert "pass --val 0.1" in capsys.readouterr().err
    assert main([*base, "--eval-on", "training"]) == 2
    assert "choose from test, held-out" in capsys.readouterr().err
    assert main([*base, "--eval-on", "held-out", "--eval-data", str(png)]) == 2
    assert "leave one of the two out" in capsys.readouterr().err
    assert not (tmp_path / "run/last.pt").exists()


def test_a_finished_run_is_refused_where_the_images_that_judged_it_changed(two, tmp_path):
    data, judges = tmp_path / "data", tmp_path / "judges"
    shutil.copytree(two[0], data)
    shutil.copytree(two[1], judges)
    config = resolve("sgd", None, options(data))
    summary = train_and_evaluate(config, clean(data=str(judges)), tmp_path / "run")
    refuse_changed_data(config, summary, tmp_path / "run")
    one, other, *_ = (judges / "test").rglob("*.png")
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="the test images of '.*judges' changed"):
        refuse_changed_data(config, summary, tmp_path / "run")


def test_test_images_of_other_classes_are_refused(two, tmp_path):
    odd = tmp_path / "odd"
    members = [(n.replace("dog", "cow"), content) for n, content in images("PNG")]
    main(["unpack", str(archive(tmp_path / "odd.tar", members, "w")), str(odd)])
    config = resolve("sgd", None, options(two[0]))
    with pytest.raises(ValueError, match="classes"):
        train_and_evaluate(config, clean(data=str(odd)), tmp_path / "run")
