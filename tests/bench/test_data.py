"""Digits, image folders, and what is refused of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.data.datasets import READERS, load_data
from bench.data.known import KNOWN, TRAINING_IMAGES

ARCHIVE = Path(__file__).resolve().parents[3] / "shared/data/cifar10-6k-lossless.tar.xz"


def make_images(root, classes, number, size=(8, 8), seed=0):
    rng = np.random.default_rng(seed)
    for c in classes:
        (root / c).mkdir(parents=True)
        for i in range(number):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / c / f"{i:04}.png")


def test_digits_are_split_by_class_without_overlap():
    data = load_data("digits", val=0.1, seed=0)
    assert [len(s) for s in (data.train, data.val, data.test)] == [1293, 144, 360]
    everything = torch.cat([s.images for s in (data.train, data.val, data.test)]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797, "the 1797 digits are all different"
    x, y = data.test.batch(slice(None))
    assert x.shape == (360, 1, 8, 8) and x.min() == 0 and x.max() == 1
    assert torch.bincount(y).min() >= 34
    normal = (data.train.batch(slice(None))[0] - data.mean[0]) / data.std[0]
    assert abs(normal.mean()) < 1e-4 and abs(normal.std() - 1) < 1e-3


def test_the_seed_moves_validation_but_never_the_test_set():
    a, b, again = (load_data("digits", val=0.2, seed=s) for s in (0, 1, 0))
    assert torch.equal(a.test.images, b.test.images)
    assert torch.equal(a.val.images, again.val.images)
    assert not torch.equal(a.val.images, b.val.images)


def test_folder_with_train_and_test(tmp_path):
    make_images(tmp_path / "train", ["cat", "dog"], 10, seed=1)
    make_images(tmp_path / "test", ["cat", "dog"], 3, seed=2)
    data = load_data(str(tmp_path), val=0.2, seed=0)
    assert [len(s) for s in (data.train, data.val, data.test)] == [16, 4, 6]
    assert data.classes == ["cat", "dog"] and data.channels == 3
    first = np.asarray(Image.open(tmp_path / "test/cat/0000.png"))
    assert (data.test.images[0].permute(1, 2, 0).numpy() == first).all()


def test_a_folder_that_is_not_read_is_told(tmp_path):
    for part in ("train", "test", "val"):
        make_images(tmp_path / part, ["cat", "dog"], 4, seed=len(part))
    with pytest.warns(UserWarning, match="val' is not read: test/ judges"):
        data = load_data(str(tmp_path), val=0.25, seed=0)
    assert [len(s) for s in (data.train, data.val, data.test)] == [6, 2, 8]


def test_folder_without_test_is_split_the_same_way_each_time(tmp_path):
    make_images(tmp_path, ["a", "b", "c"], 10)
    data, other_seed = (load_data(str(tmp_path), val=0.25, seed=s) for s in (0, 1))
    assert [len(s) for s in (data.train, data.val, data.test)] == [18, 6, 6]
    assert torch.equal(data.test.images, other_seed.test.images)
    assert torch.bincount(data.test.labels).tolist() == [2, 2, 2]


def test_folder_resized(tmp_path):
    make_images(tmp_path / "a", ["x"], 6, size=(8, 8))
    make_images(tmp_path / "b", ["y"], 6, size=(12, 10))
    with pytest.raises(ValueError, match="--image-size"):
        load_data(str(tmp_path), val=0.2, seed=0)


def test_image_size_resizes(tmp_path):
    make_images(tmp_path, ["x", "y"], 10, size=(12, 10))
    assert load_data(str(tmp_path), 0.2, 0).train.images.shape == (12, 3, 10, 12)
    assert load_data(str(tmp_path), 0.2, 0, image_size=8).train.images.shape == (12, 3, 8, 8)


def corrupt(root):
    make_images(root, ["x", "y"], 5)
    (root / "y" / "0002.png").write_bytes(b"not an image")


def truncated(root):
    make_images(root, ["x", "y"], 5, size=(64, 64))
    path = root / "y" / "0002.png"
    path.write_bytes(path.read_bytes()[:2000])


def other_classes(root):
    make_images(root / "train", ["x", "y"], 5)
    make_images(root / "test", ["x", "z"], 5)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda root: None, "neither digits"),
        (lambda root: root.mkdir(), "no images"),
        (lambda root: (root / "train").mkdir(parents=True), "test/"),
        (lambda root: [(root / c).mkdir(parents=True) for c in "xy"], "no images"),
        (lambda root: make_images(root, ["x"], 5), "one class, 'x'"),
        (lambda root: make_images(root, ["x", "y"], 1), "2 images"),
        (corrupt, "0002.png"),
        (truncated, "0002.png"),
        (other_classes, "'y', 'z'"),
    ],
    ids=["missing", "empty", "no test", "no images", "one class", "too few", "corrupt",
         "truncated", "other classes"],
)  # fmt: skip
def test_refused_folders(make, said, tmp_path):
    make(tmp_path / "images")
    with pytest.raises(ValueError) as error:
        load_data(str(tmp_path / "images"), val=0.2, seed=0)
    assert said in str(error.value)


def test_cifar_is_not_downloaded_unasked(tmp_path):
    with pytest.raises(ValueError, match="--download"):
        load_data("cifar10", 0.1, 0, data_dir=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("val", [1.0, -0.1, float("nan")])
def test_val_must_leave_training_images(val):
    with pytest.raises(ValueError, match=f"{val}"):
        load_data("digits", val, 0)


def test_val_zero_trains_on_everything():
    data = load_data("digits", val=0, seed=0)
    assert [len(s) for s in (data.train, data.val, data.test)] == [1437, 0, 360]


def test_the_published_normalisations(tmp_path):
    make_images(tmp_path, ["x", "y"], 10)
    published = {
        "f-sam": ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
        "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }
    for name, (mean, std) in published.items():
        data = load_data(str(tmp_path), 0.2, 0, normalisation=name)
        assert (data.mean, data.std) == (mean, std)
    own = load_data(str(tmp_path), 0.2, 0)
    x, _ = own.train.batch(slice(None))
    torch.testing.assert_close(torch.tensor(own.mean), x.mean((0, 2, 3)))
    with pytest.raises(ValueError, match="3 channels"):
        load_data("digits", 0.2, 0, normalisation="f-sam")


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"no CIFAR-10 images at ../{ARCHIVE.name}")
def test_cifar_archive(tmp_path):
    import tarfile

    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    data = load_data(str(tmp_path), val=0.1, seed=0)
    assert [len(s) for s in (data.train, data.val, data.test)] == [4576, 509, 1017]
    assert data.train.images.shape[1:] == (3, 32, 32) and len(data.classes) == 10
    published = torch.tensor([0.4914, 0.4822, 0.4465])
    assert (torch.tensor(data.mean) - published).abs().max() < 0.01


def test_every_data_set_with_a_name_has_a_reader_and_its_size():
    assert [*READERS] == [*KNOWN] == [*TRAINING_IMAGES]
    train, test, classes = READERS["digits"]("", False)
    assert train.images.shape[2:] == test.images.shape[2:] == (KNOWN["digits"],) * 2
    assert len(classes) == 10 and len(train) == TRAINING_IMAGES["digits"]


def test_a_channel_that_never_changes_is_normalised_to_numbers(tmp_path):
    make_images(tmp_path, ["x", "y"], 6)
    for path in tmp_path.glob("*/*.png"):
        pixels = np.array(Image.open(path))
        pixels[..., 2] = 0
        Image.fromarray(pixels).save(path)
    data = load_data(str(tmp_path), 0, 0)
    x, _ = data.train.batch(slice(None))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    assert data.std[2] == pytest.approx(1e-3) and ((x - mean) / std).isfinite().all()
