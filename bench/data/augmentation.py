"""Training images that stay on the device as uint8 and leave it as augmented batches.

What happens to each image is decided by a few random numbers (`decide`); one gather then reads the
whole batch, index, crop and mirror included, out of the data set (`gather`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PADDINGS = ("reflect", "zero")


@dataclass(frozen=True)
class Augmentation:
    """A random crop of the padded image, a mirror image half of the time, and cutout.

    pad: pixels added on each side. padding: "reflect" (SAM_AT) or "zero" (F-SAM's code), black.
    Mirrored before the crop (F-SAM's code) or after it (SAM_AT's), the distribution is the same.
    cutout: side in pixels of a square that half of the images lose (DeVries and Taylor 2017; half
    as in F-SAM's code), around a uniformly random pixel and cut at the border; 0 for none.

    Raises ValueError for a negative number or an unknown padding.
    """

    pad: int = 4
    padding: str = "reflect"
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("pad", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.padding not in PADDINGS:
            raise ValueError(f"unknown padding {self.padding!r}; choose from {', '.join(PADDINGS)}")


class Decisions(NamedTuple):
    """What happens to each of B images; None: not part of the augmentation.

    down, right: (B, 1) int64, how far the crop lies from the image, in [-pad, pad].
    mirrored: (B, 1) bool. cut: (B, 1) bool; cut_row, cut_col: (B, 1) int64, the square's centre.
    """

    down: Tensor
    right: Tensor
    mirrored: Tensor | None = None
    cut: Tensor | None = None
    cut_row: Tensor | None = None
    cut_col: Tensor | None = None


def decide(
    b: int, h: int, w: int, augmentation: Augmentation, generator: torch.Generator
) -> Decisions:
    """Return random decisions for b images of h x w pixels, on the generator's device."""

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (b, 1), device=generator.device, generator=generator)

    def half() -> Tensor:
        return torch.rand(b, 1, device=generator.device, generator=generator) < 0.5

    pad = augmentation.pad
    moved = Decisions(integers(-pad, pad + 1), integers(-pad, pad + 1))
    if augmentation.flip:
        moved = moved._replace(mirrored=half())
    if augmentation.cutout:
        moved = moved._replace(cut=half(), cut_row=integers(0, h), cut_col=integers(0, w))
    return moved


def source(n: int, shift: Tensor, padding: str) -> Tensor:
    """Return (B, n) int64: which of n pixels each pixel of a crop is, -1 where it is black."""
    i = torch.arange(n, device=shift.device) + shift
    if padding == "reflect":
        return (n - 1) - ((n - 1) - i.abs()).abs()
    return torch.where((i >= 0) & (i < n), i, -1)


def gather(images: Tensor, index: Tensor, moved: Decisions, padding: str) -> Tensor:
    """Return images[index], cropped and mirrored: (B, H, W, C) of (N, H, W, C), as its dtype."""
    _, h, w, c = images.shape
    rows, cols = source(h, moved.down, padding), source(w, moved.right, padding)
    if moved.mirrored is not None:
        cols = torch.where(moved.mirrored, cols.flip(1), cols)
    rows, cols = rows.unsqueeze(2), cols.unsqueeze(1)
    pixels = (index.view(-1, 1, 1) * h + rows.clamp_min(0)) * w + cols.clamp_min(0)
    out = images.reshape(-1, c).index_select(0, pixels.flatten()).view(*pixels.shape, c)
    if padding == "reflect":
        return out
    return out * ((rows >= 0) & (cols >= 0)).unsqueeze(3)


def cut_out(moved: Decisions, h: int, w: int, side: int) -> Tensor:
    """Return (B, 1, h, w) bool: the pixels that cutout takes away."""

    def hidden(n: int, centre: Tensor) -> Tensor:
        first = centre - side // 2
        i = torch.arange(n, device=centre.device)
        return (i >= first) & (i < first + side)

    square = hidden(h, moved.cut_row).unsqueeze(2) & hidden(w, moved.cut_col).unsqueeze(1)
    return (square & moved.cut.unsqueeze(2)).unsqueeze(1)


class Pipeline:
    """A training set on its device.

    Args:
        images: (N, C, H, W) uint8 from 0 to `levels`, on the device where they shall stay.
        labels: (N,) int64, there too.
        levels: the pixel value that becomes 1.0.
        augmentation: None hands the images out as they are.
        fill: one value per channel in [0, 1] units, what cutout leaves: the training set's mean,
            which is 0 after normalisation.

    Raises ValueError when reflection needs more pixels than the images have.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        levels: int,
        augmentation: Augmentation | None,
        fill: Sequence[float],
    ) -> None:
        h, w = images.shape[2:]
        reflects = augmentation is not None and augmentation.padding == "reflect"
        if reflects and augmentation.pad >= min(h, w):
            raise ValueError(
                f"pad {augmentation.pad} is too much for reflecting images of {h}x{w}; "
                f"use at most {min(h, w) - 1}"
            )
        self.images = images.permute(0, 2, 3, 1).contiguous()
        self.labels, self.levels, self.augmentation = labels, levels, augmentation
        self.fill = torch.tensor(fill, device=images.device).view(1, -1, 1, 1)

    def batch(
        self,
        index: Tensor,
        generator: torch.Generator,
        part: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> tuple[Tensor, Tensor]:
        """Return augmented images in [0, 1], (B, C, H, W) float32 channels_last, and labels.

        index: (B,) int64. generator: of the same device; three draws, and three more for cutout.
        part: takes some of the images; what happens to each does not depend on it.
        """
        h, w = self.images.shape[1:3]
        augmentation = self.augmentation
        if augmentation is None:
            index = part(index)
            pixels = self.images[index]
        else:
            moved = decide(len(index), h, w, augmentation, generator)
            moved = Decisions(*(None if t is None else part(t) for t in moved))
            index = part(index)
            pixels = gather(self.images, index, moved, augmentation.padding)
        x = pixels.permute(0, 3, 1, 2).float() / self.levels
        if augmentation is not None and augmentation.cutout:
            x = torch.where(cut_out(moved, h, w, augmentation.cutout), self.fill, x)
        return x, self.labels[index]

    def augmented(
        self,
        batches: Sequence[Tensor],
        generator: torch.Generator,
        part: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch for each index tensor, or the part of it."""
        for index in batches:
            yield self.batch(index, generator, part)

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of one epoch, each image at most once; every batch is full, so that
        shapes never change."""
        order = torch.randperm(len(self.labels), device=generator.device, generator=generator)
        for i in range(len(order) // batch_size):
            yield self.batch(order[i * batch_size : (i + 1) * batch_size], generator)
