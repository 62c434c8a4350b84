"""Image data sets as uint8 tensors on the device, and augmentation of whole batches."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.pipeline import Augmentation, decide, gather

# SAM_AT utils.py (Zhang, He, Zhu, Chen, Wang, Wei 2024); other data: computed from the training set
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
}


@dataclass
class Split:
    """images: (N, C, H, W) uint8 from 0 to `levels`; labels: (N,) int64."""

    images: Tensor
    labels: Tensor
    levels: int

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
    """A data set split in three; mean and std hold one value per channel in [0, 1] units."""

    train: Split
    val: Split
    test: Split
    classes: list[str]
    mean: list[float]
    std: list[float]
    fingerprint: str

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
) -> Data:
    """Load "digits", "cifar10", "cifar100", or a directory of images in one folder per class.

    A directory holds train/<class>/* and test/<class>/*, or <class>/* alone, of which a fixed
    stratified fifth becomes the test set. val: the fraction of the training images held out,
    stratified, chosen by `seed`; the test set never takes part. data_dir: where torchvision keeps
    CIFAR. image_size: resize a directory's images to this many pixels square; without it, all must
    have the size of the first. Raises ValueError when the data is missing, unreadable, or has
    fewer than two classes.
    """
    if not 0 < val < 1:
        raise ValueError(f"val must be between 0 and 1, got {val}; 0.1 holds out a tenth")
    train, test, classes, fingerprint = read_data(name, data_dir, download, image_size)
    kept, held_out = stratified(train.labels, val, seed)
    train, val_split = train.take(kept), train.take(held_out)
    mean, std = NORMALISATION.get(name) or channel_statistics(train)
    return Data(train, val_split, test, classes, list(mean), list(std), fingerprint)


@lru_cache(maxsize=1)  # a comparison asks for the same images once a run
def read_data(
    name: str, data_dir: str, download: bool, image_size: int | None
) -> tuple[Split, Split, list[str], str]:
    """Return training images, test images, class names, and the training set's SHA-256."""
    if name == "digits":
        train, test, classes = digits()
    elif name in NORMALISATION:
        train, test, classes = cifar(name, data_dir, download)
    else:
        train, test, classes = folder(Path(name), image_size)
    digest = hashlib.sha256(train.images.numpy().tobytes() + train.labels.numpy().tobytes())
    return train, test, classes, digest.hexdigest()


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return sorted index tensors of the rest and of a stratified `fraction` of the labels."""
    from sklearn.model_selection import train_test_split

    try:
        rest, part = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed
        )
    except ValueError as e:
        raise ValueError(
            f"cannot hold out {fraction:g} of {len(labels)} images class by class ({e}); "
            "add images or change --val"
        ) from e
    return torch.from_numpy(np.sort(rest)), torch.from_numpy(np.sort(part))


def channel_statistics(split: Split) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, in [0, 1] units."""
    by_channel = split.images.transpose(0, 1).flatten(1).double() / split.levels
    return by_channel.mean(1).tolist(), by_channel.std(1).clamp_min(1e-3).tolist()


def digits() -> tuple[Split, Split, list[str]]:
    """1797 real handwritten digits, 8x8, 17 grey levels; a fixed fifth is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    everything = Split(images, torch.from_numpy(bunch.target).long(), levels=16)
    train, test = stratified(everything.labels, 0.2, seed=0)
    return everything.take(train), everything.take(test), [str(c) for c in bunch.target_names]


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


def folder(root: Path, image_size: int | None) -> tuple[Split, Split, list[str]]:
    if not root.is_dir():
        raise ValueError(
            f"data {str(root)!r} is neither digits, cifar10, cifar100 nor a directory; give the "
            "path of a directory with train/<class>/ and test/<class>/"
        )
    if not (root / "train").is_dir():
        everything, classes = read_images(root, image_size)
        train, test = stratified(everything.labels, 0.2, seed=0)
        return everything.take(train), everything.take(test), classes
    if not (root / "test").is_dir():
        raise ValueError(f"{str(root)!r} has train/ but no test/; add test/<class>/ with images")
    train, classes = read_images(root / "train", image_size)
    test, test_classes = read_images(root / "test", image_size)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise ValueError(f"train/ and test/ of {str(root)!r} differ in the classes {odd}")
    if train.images.shape[2:] != test.images.shape[2:]:
        raise ValueError(
            f"train/ and test/ of {str(root)!r} hold images of different sizes; pass --image-size"
        )
    return train, test, classes


def read_images(root: Path, image_size: int | None) -> tuple[Split, list[str]]:
    """Read <class>/* under root as RGB, all of one size."""
    from PIL import Image, UnidentifiedImageError
    from torchvision.datasets import ImageFolder
    from tqdm import tqdm

    try:
        listing = ImageFolder(str(root))
    except FileNotFoundError as e:
        raise ValueError(f"no images in folders by class under {str(root)!r}: {e}") from e
    if len(listing.classes) < 2:
        raise ValueError(
            f"{str(root)!r} has one class, {listing.classes[0]!r}; a classifier needs at least two "
            "folders of images"
        )
    pixels, size = [], (image_size, image_size) if image_size else None
    for path, _ in tqdm(listing.samples, desc=f"reading {root.name}", disable=None, leave=False):
        try:
            image = Image.open(path).convert("RGB")
        except (UnidentifiedImageError, OSError) as e:
            raise ValueError(f"cannot read the image {path!r} ({e}); replace or remove it") from e
        size = size or image.size
        if image.size != size and image_size is None:
            raise ValueError(
                f"{path!r} is {image.size[0]}x{image.size[1]} but the first image is "
                f"{size[0]}x{size[1]}; pass --image-size to resize them all"
            )
        pixels.append(np.asarray(image if image.size == size else image.resize(size)))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(listing.targets), 255), listing.classes


def augment(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop each image at a random place of its reflection-padded self, and mirror half of them.

    images: (B, C, H, W).
    """
    b, _, h, w = images.shape
    moved = decide(b, h, w, Augmentation(pad, flip=flip), generator)
    every = torch.arange(b, device=images.device)
    cropped = gather(images.permute(0, 2, 3, 1), every, moved, "reflect")
    return cropped.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
