"""Where in a step an optimizer is."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from .layout import Layout
from .passes import Climb
from .rounding_watch import RoundingWatch

PACKAGES = ("fastsam", "torch")
BETWEEN_STEPS = ("state_dict", "load_state_dict", "copying or pickling", "step(closure)",
                 "GraphedStep")  # calls that no step may be in the middle of
NO_CLIMB = 10  # plain steps where a climb was due, after which it is said


class PhaseError(RuntimeError):
    """A call that does not fit the phase: perturbed (after first_step) or not."""


@dataclass(eq=False)
class Phase:
    """Where in a step an optimizer is, and the layout it works with. What changes in a step hangs
    on this one object, which stays: wrappers such as Lightning's share an optimizer's attributes
    by copying them.

    Attributes:
        layout: of the parameters as they were last seen; None before there is one.
        climbs: one per space while the weights are moved, else empty.
        perturbed: whether the weights are moved.
        scaler, group: the GradScaler and the process group of the first pass, if any.
        stash, stash_ok: what `stash_grad` has set aside, and whether its climbs were finite: 1 or
            0, a 0-dim tensor.
        scaled: of a scaled step that was given up, or failed: a parameter, its gradient, that one's
            version, and the GradScaler's state, where it is known, to notice that the gradients are
            the same, still scaled.
        watch: of rounding.
        skipped: the skips that a copied or unpickled optimizer had before.
        plain: how many steps went by without a climb that was due, before the first climb; None
            after it.
        witness: a parameter, its first-pass gradient and that one's version, to notice that no
            second one came.
        warned: what has been warned of (see `warn`).
    """

    layout: Layout = cast(Layout, None)
    climbs: Sequence[Climb] = ()
    perturbed: bool = False
    scaler: Any = None
    group: Any = None
    stash: dict[Tensor, Tensor] = field(default_factory=dict)
    stash_ok: Tensor | None = None
    scaled: tuple[Tensor, Tensor, int, dict[str, Any]] | None = None
    watch: RoundingWatch = field(default_factory=RoundingWatch)
    skipped: int = 0
    plain: int | None = 0
    witness: tuple[Tensor, Tensor, int] | None = None
    warned: set[str] = field(default_factory=set)

    def need(self, perturbed: bool, call: str) -> None:
        """Refuse a call that does not fit.

        Args:
            perturbed: whether the call needs moved weights, or weights that are not.
            call: its name.

        Raises:
            PhaseError: the weights are not moved, or are, or gradients are set aside.
        """
        if self.stash and call in BETWEEN_STEPS:
            raise PhaseError(f"{call} with gradients set aside: finish the step first, or call "
                             "restore() to give it up")
        if self.perturbed == perturbed:
            return
        if perturbed:
            raise PhaseError(f"{call} without a first_step before it: the weights are not "
                             "perturbed; call first_step, then compute the gradients again (where "
                             "a step does not climb, as `climbs_next` tells, call step() alone)")
        raise PhaseError(f"{call} while the weights are perturbed: call second_step (or restore "
                         "to give the step up) first")

    def warn(self, what: str, message: str) -> None:
        """Warn once of each `what`, in the line of the user's that called."""
        if what not in self.warned:
            self.warned.add(what)
            warnings.warn(message, stacklevel=frames_to_the_caller())

    def leave(self) -> None:
        """The weights are back at w."""
        self.climbs, self.perturbed, self.scaler, self.group = (), False, None, None
        self.witness = None

    def finish(self) -> None:
        """The step is taken, or skipped, and what its micro-batches agreed on with it."""
        self.leave()
        self.stash_ok = self.scaled = None

    def give_up(self) -> None:
        """Forget the step, and what was set aside for it."""
        self.stash.clear()
        self.stash_ok = self.scaler = self.group = None

    def count_plain(self, climb_is_due: bool) -> None:
        """Count a step without a climb; say so where none has ever come."""
        if self.plain is not None and climb_is_due:
            self.plain += 1
            if self.plain == NO_CLIMB:
                self.warn("no climb", f"{NO_CLIMB} steps without a climb are plain steps of the "
                          "base optimizer: call first_step, compute the gradients after it, "
                          "then second_step; or step(closure)")

    def keep_witness(self) -> None:
        """Remember a first gradient that stays in `.grad`."""
        p = self.climbs[-1].space.slots[-1].param
        g = p.grad
        self.witness = None if g is None or g.is_inference() else (p, g, g._version)

    def look_for_second_pass(self) -> None:
        """Say so where no gradients were computed after the climb."""
        if self.witness is not None:
            p, g, version = self.witness
            if p.grad is g and g._version == version:
                self.warn("second pass", "second_step with the gradients of the first pass: "
                          "compute the loss and call backward again after first_step")
        elif all(p.grad is None for climb in self.climbs for p in climb.space.params):
            self.warn("second pass", "second_step with no gradients only returns to the weights: "
                      "compute the loss and call backward again after first_step")


@contextmanager
def restoring(restore: Callable[[], None]) -> Iterator[None]:
    """Give the step up, and be back at w, where the block raises."""
    try:
        yield
    except BaseException:
        restore()
        raise


def frames_to_the_caller() -> int:
    """How many frames lie between the function that warns and the first that is neither ours nor
    torch's."""
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and (
            frame.f_globals.get("__name__", "").partition(".")[0] in PACKAGES):
        frame, count = frame.f_back, count + 1
    return count
