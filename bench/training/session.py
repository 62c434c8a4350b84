"""One sitting of a run: how often it saves, when it stops before its end, what it shows."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.settings.setting import check_settings
from bench.settings.sitting import SittingSettings
from bench.training import processes
from bench.training.tracking import refuse_missing

SAVE, STOP = 1, 2
ASKED_EVERY = 10  # steps, where several processes must agree


@dataclass
class Sitting(SittingSettings):
    """Nothing here changes the trained weights.

    heeds_sigterm: save and stop on SIGTERM too. asked: whether someone else wants the run to save
    and stop. bar: show each epoch's steps and its validation, see bench.evaluation.progress.
    must_track: a tracker that cannot be started refuses the run; else the run goes on without.
    Raises ValueError for negative minutes, and for a tracker that must be and is not installed.
    """

    bar: bool = False
    must_track: bool = True
    heeds_sigterm: bool = False
    asked: Callable[[], bool] = lambda: False
    began: float = field(default_factory=time.monotonic)
    terminated: bool = False

    def __post_init__(self) -> None:
        self.saved = self.began
        check_settings(self)
        if self.track is not None and self.must_track:
            refuse_missing(self.track)

    def wish(self) -> int:
        """Return 0, SAVE or STOP, by this process's clock and signals."""
        now, budget = time.monotonic(), self.time_budget
        over = budget is not None and now - self.began >= 60 * budget
        if over or self.terminated or self.asked():
            return STOP
        return SAVE if now - self.saved >= 60 * self.save_every else 0

    def demand(self, device: torch.device, step: int) -> int:
        """Return what all processes agree to do after a step, the most that one of them wishes."""
        if processes.processes() > 1 and step % ASKED_EVERY:
            return 0
        return processes.highest(self.wish(), device)

    def why(self) -> str:
        if self.terminated:
            return "SIGTERM"
        if self.time_budget is not None:
            return f"the time budget of {self.time_budget:g} minutes is used up"
        return "SIGTERM in another process"

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, SIGTERM stops the run at its next step, with a checkpoint; a second one, at once.

        Outside there is nothing to save, and SIGTERM does what it always does.
        """
        if not self.heeds_sigterm:
            yield
            return

        def heed(*_) -> None:
            self.terminated = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        before = signal.signal(signal.SIGTERM, heed)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
