"""Directories of photographs too large to hold in memory, read when they are needed.

The training crop is torchvision's RandomResizedCrop (8% to 100% of the area) and a mirror image
half of the time; elsewhere the shorter side becomes size 256/224 and the centre is kept. Every
image's randomness has a seed of its own, so that the number of reading processes changes no bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.data.images import listing, read_image

if TYPE_CHECKING:
    from torchvision.transforms import v2

AT_MOST = 16  # reading processes where none are asked for
APIECE = 32  # images that a process reads at a time outside training


def central(size: int) -> v2.Transform:
    from torchvision.transforms import v2  # seconds, and not all read photographs

    shorter = round(size * 256 / 224)
    return v2.Compose([v2.Resize(shorter), v2.CenterCrop(size), v2.PILToTensor()])


def cropped(size: int) -> v2.Transform:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


@dataclass
class Reader(Dataset):
    """One (3, size, size) uint8 image by its path, transformed with the seed of (epoch, image)."""

    paths: Sequence[str]
    transform: v2.Transform
    seed: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = read_image(self.paths[i])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed + i * 0x9E3779B97F4A7C15) % 2**63)
            return self.transform(image), i


@dataclass
class Photographs:
    """A split like bench.data.datasets.Split, without its pixels.

    images: (0, 3, size, size), which tells device and size alone. workers: reading processes; None:
    one per CPU, at most 16.
    """

    paths: list[str]
    labels: Tensor
    images: Tensor
    workers: int | None = None
    levels: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    def take(self, index: Tensor) -> Photographs:
        paths = [self.paths[i] for i in index.tolist()]
        return replace(self, paths=paths, labels=self.labels[index])

    def to(self, device: torch.device) -> Photographs:
        return replace(self, labels=self.labels.to(device), images=self.images.to(device))

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return images in [0, 1] as float32, their central crops, and their labels."""
        every = torch.arange(len(self), device=self.labels.device)[index]
        if not len(every):
            return self.images.float(), self.labels[every]
        parts = self.read(every.split(APIECE), central(self.size), 0)
        return torch.cat([x for x, _ in parts]), self.labels[every]

    def read(
        self, batches: Sequence[Tensor], transform: v2.Transform, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        on_gpu, cpus = self.labels.is_cuda, len(os.sched_getaffinity(0))
        workers = min(cpus, AT_MOST) if self.workers is None else self.workers
        loader = DataLoader(
            Reader(self.paths, transform, seed), batch_sampler=[b.tolist() for b in batches],
            num_workers=min(workers, len(batches)), pin_memory=on_gpu,
            generator=torch.Generator(),  # it would draw from the global one, which is dropout's
        )  # fmt: skip
        for x, i in unwrapped(loader):
            x = x.to(self.images.device, non_blocking=True)
            yield x.float() / self.levels, self.labels[i.to(self.labels.device)]

    def augmented(
        self,
        batches: Sequence[Tensor],
        generator: torch.Generator,
        part: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training crops of each batch, (B, 3, size, size) in [0, 1], and its labels.

        generator: gives one number, from which every image's seed follows, and stays as it is, so
        that an epoch can be taken up in its middle. part: takes some of a batch's images.
        """
        seed = torch.randint(2**62, (), generator=generator.clone_state(), device=generator.device)
        yield from self.read([part(b) for b in batches], cropped(self.size), int(seed))


def unwrapped(loader: DataLoader) -> Iterator[list[Tensor]]:
    """Yield the loader's batches; what a reading process raises comes as its one sentence, without
    that process's traceback. Raises OSError where one was killed."""
    try:
        yield from loader
    except ValueError as e:
        raise ValueError(str(e).strip().splitlines()[-1].removeprefix("ValueError: ")) from e
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        raise ChildProcessError(
            f"a process that reads images ended ({str(e).splitlines()[0]}); repeat the command to "
            "go on, with fewer --workers if memory was short"
        ) from e


def read_listing(root: Path, size: int) -> tuple[Photographs, list[str]]:
    """Return what lies in <class>/* under root, and the classes. Raises ValueError."""
    paths, labels, classes = listing(root)
    nothing = torch.empty(0, 3, size, size, dtype=torch.uint8)
    return Photographs(paths, torch.tensor(labels), nothing), classes


def fingerprint(split: Photographs, root: Path) -> str:
    """Return a SHA-256 of the images' places, sizes in bytes and labels, not of their pixels."""
    digest = hashlib.sha256()
    for path, label in zip(split.paths, split.labels.tolist(), strict=True):
        entry = f"{Path(path).relative_to(root)} {os.path.getsize(path)} {label}\n"
        digest.update(entry.encode(errors="surrogateescape"))  # a name need not be text
    return digest.hexdigest()
