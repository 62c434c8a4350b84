"""Image data sets, as uint8 tensors on the device or as files, their splits and their labels."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.data.augmentation import Augmentation, Pipeline
from bench.data.images import listing, read_image, state_of
from bench.data.known import KNOWN
from bench.data.label_noise import noisy
from bench.data.photographs import Photographs, fingerprint, read_listing

# SAM_AT utils.py (Zhang, He, Zhu, Chen, Wang, Wei 2024); other data: computed from the training set
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
}
CONSTANTS = {
    "f-sam": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # its code's, for all data
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's and timm's networks
}


@dataclass
class Split:
    """images: (N, C, H, W) uint8 from 0 to `levels`, or floats with `levels` 1; labels: (N,) int64.

    Raises ValueError for floats with other levels, which would divide them once more, and for
    images that have not one label each.
    """

    images: Tensor
    labels: Tensor
    levels: int

    def __post_init__(self) -> None:
        if self.images.is_floating_point() and self.levels != 1:
            raise ValueError(
                f"images are {self.images.dtype}, and levels={self.levels}: give uint8 from 0 to "
                "levels, or floats in [0, 1] with levels=1"
            )
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"there are {len(self.images)} images and {len(self.labels)} labels; give one each"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        return Split(self.images[index], self.labels[index], self.levels)

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device), self.levels)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return images in [0, 1] as float32 and their labels."""
        return self.images[index].float() / self.levels, self.labels[index]


@dataclass
class Data:
    """A data set split in three; mean and std hold one value per channel in [0, 1] units.

    fingerprint: of the training images (those held out among them) and their labels as given;
    test_fingerprint: of the test images. wrong_labels: how many labels of training and validation
    label noise made wrong.
    """

    train: Split | Photographs
    val: Split | Photographs
    test: Split | Photographs
    classes: list[str]
    mean: list[float]
    std: list[float]
    fingerprint: str
    wrong_labels: int = 0
    test_fingerprint: str = ""

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]


def load_data(
    name: str,
    val: float,
    seed: int,
    data_dir: str = ".data",
    download: bool = False,
    image_size: int | None = None,
    label_noise: float = 0.0,
    noise_kind: str = "published",
    normalisation: str | None = None,
    lazily: bool = False,
    workers: int | None = None,
) -> Data:
    """Load a data set of KNOWN, or a directory of images in one folder per class.

    A directory holds train/<class>/* and test/<class>/* (or val/<class>/*), or <class>/* alone, of
    which a fixed stratified fifth becomes the test set. val: the fraction of the training images
    held out, stratified, chosen by `seed`; 0 for none; the test set never takes part. data_dir:
    where torchvision keeps CIFAR. image_size: resize a directory's images to this many pixels
    square; without it, all must have the size of the first. lazily: read a directory's images when
    they are needed, with `workers` processes.

    label_noise, noise_kind: see bench.data.label_noise. It falls on all training images before some
    are held out: who has only noisy labels has no clean ones to choose a checkpoint by, and under
    symmetric noise the order of accuracies stays. Test labels are clean.

    Raises ValueError when the data is missing, unreadable, or has fewer than two classes.
    """
    if not 0 <= val < 1:
        raise ValueError(
            f"val must be at least 0 and below 1, got {val}; 0.1 holds out a tenth, 0 nothing"
        )
    state = state_of(Path(name))
    if lazily:
        train, test, classes, *digests = read_lazily(name, image_size or 224, workers, state)
    else:
        train, test, classes, *digests = read_data(name, data_dir, download, image_size, state)
    digest, test_digest = digests
    clean, wrong = train.labels, 0
    if label_noise:
        given = noisy(clean, len(classes), label_noise, noise_kind, seed)
        train, wrong = replace(train, labels=given), int((given != clean).sum())
        digest = hashlib.sha256(digest.encode() + given.numpy().tobytes()).hexdigest()
    kept, held_out = stratified(train.labels, val, seed, classes, "give another --val, or 0")
    parts = train.take(kept), train.take(held_out), test
    mean, std = constants(name, normalisation, parts[0])
    return Data(*parts, classes, mean, std, digest, wrong, test_digest)


def constants(
    name: str, normalisation: str | None, train: Split | Photographs
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel in [0, 1] units.

    normalisation: a key of CONSTANTS; None: the data's own, which for photographs are ImageNet's.
    Raises ValueError for images of another number of channels.
    """
    if normalisation is None and isinstance(train, Photographs):
        normalisation = "imagenet"
    known = CONSTANTS.get(normalisation) or NORMALISATION.get(name)
    mean, std = known or channel_statistics(train)
    if len(mean) != train.images.shape[1]:
        raise ValueError(
            f"normalisation {normalisation!r} is for {len(mean)} channels and data {name!r} has "
            f"{train.images.shape[1]}; leave it out"
        )
    return list(mean), list(std)


@lru_cache(maxsize=2)  # a comparison asks for the same images once a run; two encodings of them
def read_data(
    name: str, data_dir: str, download: bool, image_size: int | None, state: str
) -> tuple[Split, Split, list[str], str, str]:
    """Return training images, test images, class names, and the SHA-256 of both sets.

    state: of the files, so that changed ones are read again.
    """
    if name in READERS:
        train, test, classes = READERS[name](data_dir, download)
    else:
        train, test, classes = folder(Path(name), lambda root: read_images(root, image_size))
        warn_of_shared(name, pixels_of(train), pixels_of(test))
    return train, test, classes, sha256(train), sha256(test)


def warn_of_shared(name: str, training: Iterable[object], test: Iterable[object]) -> None:
    """Warn of test images that are training images too. Each: what is equal of equal images."""
    known, found = set(training), list(test)
    if shared := sum(image in known for image in found):
        warnings.warn(
            f"{shared} of {len(found)} test images of {name!r} are training images too, so that "
            "the accuracy is not that on new images; take them out of one of the two",
            stacklevel=2,
        )


def pixels_of(split: Split | Photographs) -> Iterator[bytes]:
    for image in split.images.cpu().numpy():
        yield hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def files_of(split: Photographs) -> Iterator[tuple[int, int]]:
    """Yield what is equal of links to one file."""
    for path in split.paths:
        found = os.stat(path)
        yield found.st_dev, found.st_ino


def sha256(split: Split) -> str:
    digest = hashlib.sha256(split.images.numpy().tobytes() + split.labels.numpy().tobytes())
    return digest.hexdigest()


def test_images_of(name: str, data: Data, image_size: int | None) -> tuple[Split, str]:
    """Return the test images of a directory with the same classes as `data`, read and cut as its
    own are, and their fingerprint. Raises ValueError for other classes and for images that `data`'s
    network was not trained for."""
    own, lazily = data.test, isinstance(data.test, Photographs)
    size, workers = (own.size, own.workers) if lazily else (image_size, None)
    other = load_data(name, 0.0, 0, image_size=size, lazily=lazily, workers=workers)
    if (other.channels, other.classes) != (data.channels, data.classes):
        raise ValueError(
            f"{name!r} has {other.channels} channels and the classes {other.classes}, but the "
            f"network was trained on {data.channels} and {data.classes}; give test images of those"
        )
    (h, w), (own_h, own_w) = other.test.images.shape[2:], own.images.shape[2:]
    if (h, w) != (own_h, own_w):
        raise ValueError(
            f"the test images of {name!r} are {w}x{h}, and the network was trained for "
            f"{own_w}x{own_h}; give test images of that size"
        )
    known = files_of if lazily else pixels_of
    trained_on = (image for part in (data.train, data.val) for image in known(part))
    warn_of_shared(name, trained_on, known(other.test))
    return other.test, other.test_fingerprint


def judges_of(
    data: Data, name: str | None, on: str, image_size: int | None
) -> tuple[Split | Photographs, str]:
    """Return the images that an evaluation is on, and the fingerprint of the set that they are of.

    name: another directory's test images; None: `data`'s own, or with on="held-out" those of its
    training images that are held out. Raises ValueError as test_images_of.
    """
    if name is not None:
        return test_images_of(name, data, image_size)
    return (data.val, data.fingerprint) if on == "held-out" else (data.test, data.test_fingerprint)


@lru_cache(maxsize=1)
def read_lazily(
    name: str, size: int, workers: int | None, state: str
) -> tuple[Photographs, Photographs, list[str], str, str]:
    """Return training images, test images, class names, and both sets' fingerprints; state: as
    above."""
    if name in READERS:
        raise ValueError(
            f"augment 'resized-crop' is for directories of photographs, not for {name!r}; use "
            "crop-flip"
        )
    root = Path(name)
    train, test, classes = folder(root, lambda root: read_listing(root, size))
    train, test = (replace(part, workers=workers) for part in (train, test))
    warn_of_shared(name, files_of(train), files_of(test))
    return train, test, classes, fingerprint(train, root), fingerprint(test, root)


def stratified(
    labels: Tensor, fraction: float, seed: int, classes: list[str], otherwise: str
) -> tuple[Tensor, Tensor]:
    """Return sorted index tensors of the rest and of a stratified `fraction` of the labels.

    Raises ValueError for classes of one image, which can be on one side only, and for too few
    images; otherwise: what to do beside adding images.
    """
    from sklearn.model_selection import train_test_split

    if fraction == 0:
        return torch.arange(len(labels)), torch.arange(0)
    single = [classes[c] for c in (labels.bincount() == 1).nonzero().flatten().tolist()]
    if single:
        raise ValueError(
            f"cannot hold out {fraction:g} of {len(labels)} images class by class: only one image "
            f"is in {', '.join(map(repr, single))}; add images of it, or {otherwise}"
        )
    try:
        rest, part = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed
        )
    except ValueError as e:
        raise ValueError(
            f"cannot hold out {fraction:g} of {len(labels)} images class by class ({e}); "
            f"add images, or {otherwise}"
        ) from e
    return torch.from_numpy(np.sort(rest)), torch.from_numpy(np.sort(part))


def channel_statistics(split: Split) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, in [0, 1] units."""
    by_channel = split.images.transpose(0, 1).flatten(1).double() / split.levels
    return by_channel.mean(1).tolist(), by_channel.std(1).clamp_min(1e-3).tolist()


# ---- data sets with names: (data_dir, download) -> training images, test images, classes


def digits(data_dir: str = "", download: bool = False) -> tuple[Split, Split, list[str]]:
    """1797 real handwritten digits, 8x8, 17 grey levels; a fixed fifth is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    everything = Split(images, torch.from_numpy(bunch.target).long(), levels=16)
    names = [str(c) for c in bunch.target_names]
    train, test = stratified(everything.labels, 0.2, 0, names, "")
    return everything.take(train), everything.take(test), names


def cifar(name: str, data_dir: str, download: bool) -> tuple[Split, Split, list[str]]:
    from torchvision.datasets import CIFAR10, CIFAR100

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        parts = [dataset(data_dir, train=train, download=download) for train in (True, False)]
    except RuntimeError as e:
        raise ValueError(
            f"{name} is not in {data_dir!r} ({e}); pass --download to fetch it, --data-dir where "
            "it is, or --data DIRECTORY for a folder of images"
        ) from e
    images = [torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous() for p in parts]
    labels = [torch.tensor(p.targets) for p in parts]
    train, test = Split(images[0], labels[0], 255), Split(images[1], labels[1], 255)
    return train, test, parts[0].classes


READERS: dict[str, Callable[[str, bool], tuple[Split, Split, list[str]]]] = {
    "digits": digits,
    "cifar10": partial(cifar, "cifar10"),
    "cifar100": partial(cifar, "cifar100"),
}
# ---- directories


def folder(root: Path, read: Callable) -> tuple:
    """Return the training images, the test images and the classes of a directory.

    read: directory -> what lies in its <class>/*, as a split, and the classes. Raises ValueError.
    """
    if not root.is_dir():
        raise ValueError(
            f"data {str(root)!r} is neither {', '.join(KNOWN)} nor a directory; give the path of "
            "a directory with train/<class>/ and test/<class>/"
        )
    if not (root / "train").is_dir():
        everything, classes = several(root, *read(root))
        own = f"divide them yourself, into {root.name}/train/<class>/ and {root.name}/test/<class>/"
        train, test = stratified(everything.labels, 0.2, 0, classes, own)
        return everything.take(train), everything.take(test), classes
    held_out = next((root / d for d in ("test", "val") if (root / d).is_dir()), None)
    if held_out is None:
        raise ValueError(f"{str(root)!r} has train/ but no test/; add test/<class>/ with images")
    if held_out.name == "test" and (root / "val").is_dir():
        warnings.warn(
            f"{str(root / 'val')!r} is not read: test/ judges, and what chooses the best "
            "checkpoint is held out of train/ (--val); move its images there to use them",
            stacklevel=2,
        )
    train, classes = several(root / "train", *read(root / "train"))
    test, test_classes = read(held_out)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise ValueError(f"train/ and {held_out.name}/ of {str(root)!r} differ in classes: {odd}")
    if train.images.shape[2:] != test.images.shape[2:]:
        raise ValueError(
            f"train/ and {held_out.name}/ of {str(root)!r} hold images of different sizes; pass "
            "--image-size"
        )
    return train, test, classes


def several(root: Path, split: Split | Photographs, classes: list[str]) -> tuple:
    """Return split and classes, or raise ValueError for a single class."""
    if len(classes) < 2:
        raise ValueError(
            f"{str(root)!r} has one class, {classes[0]!r}; a classifier needs at least two folders "
            "of images"
        )
    return split, classes


def read_images(root: Path, image_size: int | None) -> tuple[Split, list[str]]:
    """Read <class>/* under root as RGB, all of one size."""
    from tqdm import tqdm

    paths, labels, classes = listing(root)
    pixels, size = [], (image_size, image_size) if image_size else None
    for path in tqdm(paths, desc=f"reading {root.name}", disable=None, leave=False):
        image = read_image(path)
        size = size or image.size
        if image.size != size and image_size is None:
            raise ValueError(
                f"{path!r} is {image.size[0]}x{image.size[1]} but the first image is "
                f"{size[0]}x{size[1]}; pass --image-size to resize them all"
            )
        pixels.append(np.asarray(image if image.size == size else image.resize(size)))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(labels), 255), classes


def training_images(split: Split | Photographs, augmentation: Augmentation | None,
                    fill: list[float]) -> Pipeline | Photographs:  # fmt: skip
    """Return what `augmented(batches, generator)` draws the batches of an epoch from."""
    if isinstance(split, Photographs):
        return split
    return Pipeline(split.images, split.labels, split.levels, augmentation, fill)
