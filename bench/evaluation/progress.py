"""A bar on stderr that moves with every pass of an attack, where stderr is a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from tqdm import tqdm

LOOK = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} images [{elapsed}<{remaining}]"


class Progress:
    """Counts images, once for each attack on them.

    Within a batch it grows with the passes, each as a part of those that an image takes at most.
    shown: False for none at all.
    """

    def __init__(self, total: int, shown: bool) -> None:
        self.bar = tqdm(total=total, bar_format=LOOK, leave=False, disable=None if shown else True)
        self.finished, self.most, self.left, self.passes = 0, 0, 0, 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def begin(self, text: str, images: int, batch_size: int, passes: int) -> None:
        """An attack begins. passes: that an image takes at most."""
        self.left, self.most, self.passes = images, min(images, batch_size), passes
        self.bar.set_description(text)

    def passed(self, images: int) -> None:
        """A pass of so many images of the batch that is under way has been made."""
        if self.passes:
            self.show(min(self.bar.n + images / self.passes, self.finished + self.most))

    def end_batch(self, images: int) -> None:
        self.finished += images
        self.left -= images
        self.most = min(self.most, self.left)
        self.show(self.finished)

    def show(self, n: float) -> None:
        self.bar.n = n  # to the bit; a difference would be added with rounding
        self.bar.update(0)

    @contextmanager
    def counting(self, *models: nn.Module) -> Iterator[None]:
        """Inside, every pass of the models is counted, whoever makes it."""
        hooks = [model.register_forward_hook(lambda _, given, out: self.passed(len(given[0])))
                 for model in dict.fromkeys(models)]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
