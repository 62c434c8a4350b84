"""Bars on stderr, where that is a terminal; an attack's moves with every pass.

In a worker, which has no line of the terminal for itself, they are drawn on what it draws on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from tqdm import tqdm

LOOK = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} images [{elapsed}<{remaining}]"

_drawn_on: Any = None  # a file; None: stderr


def draw_on(file: Any) -> None:
    """Draw all bars of this process from now on on a file, which says that it is a terminal."""
    global _drawn_on
    _drawn_on = file


def bar_of(shown: bool, **of: Any) -> tqdm:
    """Return a bar that goes when it is over. shown: False for none at all."""
    return tqdm(**of, leave=False, file=_drawn_on, disable=None if shown else True)


class Progress:
    """Counts images, once for each attack on them.

    Within a batch it grows with the passes, each as a part of those that an image takes at most.
    shown: False for none at all.
    """

    def __init__(self, total: int, shown: bool) -> None:
        self.bar = bar_of(shown, total=total, bar_format=LOOK)
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
        """Inside, every pass of the models is counted, whoever makes it; not of scripted ones,
        which take no hooks: of these the batches are."""
        hooks = [model.register_forward_hook(lambda _, given, out: self.passed(len(given[0])))
                 for model in dict.fromkeys(models)
                 if not isinstance(model, ScriptModule)]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
