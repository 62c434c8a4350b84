"""Whether rounding eats the climb."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .space import Space, capturing


class RoundingWatch:
    """Notices where 16-bit weights realise less than half of the radius that was asked for.

    It looks at the climbs number 1, 2, 4, 8, ... and never waits for the device: what one climb
    measured is copied to the host beside the work and read when a later one finds it arrived.
    """

    def __init__(self) -> None:
        self.climbs = 0
        self.pending: tuple[Tensor, torch.cuda.Event | None, torch.device] | None = None

    def note(self, spaces: Sequence[Space]) -> None:
        """Note the radii of the climb that has just been launched."""
        spaces = [s for s in spaces if s.kind.dtype.itemsize == 2 and not s.kind.masters]
        if not spaces or capturing(spaces[0].kind.device):
            return
        self.climbs += 1
        if self.pending is None and self.climbs & (self.climbs - 1) == 0:
            squares = torch.stack([s.radii.sum(1).to(spaces[0].kind.device) for s in spaces]).sum(0)
            event = None
            host = squares.to("cpu", non_blocking=True)
            if squares.is_cuda:
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(squares.device))
            self.pending = (host, event, squares.device)

    def read(self) -> str | None:
        """Return what there is to say of the climb that was noted; None if that is nothing yet."""
        if self.pending is None:
            return None
        radii, event, device = self.pending
        if capturing(device) or not (event is None or event.query()):
            return None
        self.pending = None
        realised, wanted = radii.numpy() ** 0.5
        if not realised < 0.5 * wanted:
            return None
        return (f"the weights are 16-bit and moved by {realised:.3g} where a radius of "
                f"{wanted:.3g} was wanted: the climb is rounded away; use float32 weights with "
                "autocast, or a larger rho")
