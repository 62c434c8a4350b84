"""The warning that rounding ate the climb."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .space import Space


class RoundingWatch:
    """Warns once when 16-bit weights realise less than half of the radius that was asked for.

    It looks at the climbs number 1, 2, 4, 8, ... and never waits for the device: what one climb
    measured is copied to the host beside the work and read when a later one finds it arrived.
    """

    def __init__(self) -> None:
        self.climbs, self.warned = 0, False
        self.pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def look(self, spaces: Sequence[Space]) -> None:
        """Note the radii of the climb that has just been launched, and read an earlier one's."""
        if self.warned:
            return
        spaces = [s for s in spaces if s.kind.dtype.itemsize == 2 and not s.kind.masters]
        if not spaces:
            return
        if spaces[0].kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        self._read()
        self.climbs += 1
        if self.pending is None and self.climbs & (self.climbs - 1) == 0:
            squares = torch.stack([s.radii.sum(1).to(spaces[0].kind.device) for s in spaces]).sum(0)
            event = None
            host = squares.to("cpu", non_blocking=True)
            if squares.is_cuda:
                event = torch.cuda.Event()
                event.record()
            self.pending = (host, event)

    def _read(self) -> None:
        if self.pending is None or not (self.pending[1] is None or self.pending[1].query()):
            return
        realised, wanted = self.pending[0].numpy() ** 0.5
        self.pending = None
        if realised < 0.5 * wanted:
            self.warned = True
            warnings.warn(
                f"the weights are 16-bit and moved by {realised:.3g} where a radius of "
                f"{wanted:.3g} was wanted: the climb is rounded away; use float32 weights with "
                "autocast, or a larger rho", stacklevel=5)
