"""A step's values: what a pass reads, and what a climb leaves for the return.

    first = read(groups, gradients);   climb = backend.climb(first, sums)
    second = read(groups, gradients);  backend.step(second, climb)

Neither a `Pass` nor a `Climb` changes once it is made.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .hyper import Hyper
from .space import Space


class Pass(NamedTuple):
    """What one pass knows of one space.

    Attributes:
        space: its layout and buffers.
        w: each slot's weights, where their owner has them.
        g: each slot's gradient, laid out like w; None: the slot takes no part. A first pass's
            are read for the climb, a second's for the base optimizer.
        g_dtype: the one dtype of these gradients.
        rows: each group's hyper-parameters, as in `space.hyper`; after a projection sigma is a
            tensor.
        scaling: T of the space: None (1 everywhere), "weights" (a |w| + b) or "gradient"
            (1 / sqrt(1 + a g^2)).
        ab: each slot's (a, b), as in `space.scalings`.
        inv_scale: 1 / the loss scale of these gradients, on the device; None: not scaled.
        w_table, g_table: the addresses of w and g, 0 for None; int64 (slots,) on the device.
        mix: what the base optimizer steps with, from g, the gradient `kept` of the first pass,
            m, alpha and the control cell `share`, c:
            None: g. "gsam": g - alpha (kept - c g), where the slot climbed.
            "renew": g, and m becomes g - c kept, where the slot climbed. "reuse": g + alpha c m.
        along_v: the climb is along -v. A first pass has the v for g, and -1 for inv_scale; a
            second leaves ||v||^2, over what climbed, in `space.partials`, as `norm` would for the
            climb to come, bit for bit.
    """

    space: Space
    w: Sequence[Tensor]
    g: Sequence[Tensor | None]
    g_dtype: torch.dtype
    rows: Sequence[Hyper]
    scaling: str | None
    ab: Sequence[tuple[float, float]]
    inv_scale: Tensor | None
    w_table: Tensor
    g_table: Tensor
    mix: str | None = None
    along_v: bool = False


class Climb(NamedTuple):
    """What a climb leaves for the return: whose weights are moved and saved.

    Attributes:
        space: whose `saved` holds the weights.
        moved: for each slot, whether it climbed.
        table: the same on the device: not 0 where it did, int64 (slots,). No addresses to read at:
            in a layout that was made after the climb they are none.
    """

    space: Space
    moved: Sequence[bool]
    table: Tensor

    @staticmethod
    def of(p: Pass) -> "Climb":
        return Climb(p.space, [g is not None for g in p.g], p.g_table)
