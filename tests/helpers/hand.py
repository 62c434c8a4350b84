"""Passes made by hand: what the optimizer would give a backend, for tensors and hyper-parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.hyper import Hyper
from fastsam.passes import Climb, Pass
from fastsam.space import NOWHERE, Kind, Space, Tables

NEUTRAL = dict(rho=0.05, sigma=1.0, lmbda=0.9, lr=1e-3, momentum=0.0, dampening=0.0,
               weight_decay=0.0, nesterov=False, beta1=0.9, beta2=0.999, eps=1e-8, decoupled=False)


class Hand:
    """One space, and the two passes of its steps.

    Args:
        weights: tensors, stepped where they lie.
        groups: hyper-parameters that differ from NEUTRAL, one dict per group.
        of: each tensor's group.
        scaling, ab: as `Pass` has them; ab is one pair for all, or one per tensor.
    """

    def __init__(self, weights: Sequence[Tensor], groups: Sequence[dict], of: Sequence[int],
                 mode: str | None = None, base: str = "sgd-momentum", scaling: str | None = None,
                 ab: tuple | list = (0.0, 1.0), masters: bool = False):
        kind = Kind(weights[0].device, weights[0].dtype, (), mode, base, masters)
        members = [(w, None, group) for w, group in zip(weights, of, strict=True)]
        self.weights, self.scaling = list(weights), scaling
        self.space = Space.of(kind, members, len(groups))
        self.tables = Tables(self.space)
        self.rows = [Hyper(**{**NEUTRAL, **group}) for group in groups]
        self.ab = list(ab) if isinstance(ab, list) else [ab] * len(weights)
        self.space.scalings.copy_(torch.tensor(self.ab, dtype=torch.float64))
        self.brought = self.space.bring_hyper(self.rows, None)

    def read(self, grads: Sequence[Tensor | None], which: str, inv_scale: float | None = None,
             ) -> Pass:
        """The pass over these gradients, which lie in memory as the weights do. which: "g1" or
        "g2"."""
        cell = getattr(self.space.cells, "inv_scale" + which[1])
        cell.fill_(1 if inv_scale is None else inv_scale)
        dtype = next((g.dtype for g in grads if g is not None), self.space.kind.dtype)
        return Pass(self.space, self.weights, list(grads), dtype, self.rows, self.scaling, self.ab,
                    None if inv_scale is None else cell,
                    self.tables.bring("w", [address(w) for w in self.weights]),
                    self.tables.bring(which, [address(g) for g in grads]))

    def first_step(self, backend, grads: Sequence[Tensor | None], **more) -> Climb:
        p = self.read(grads, "g1", **more)
        backend.norm(p)
        return backend.climb(p, self.space.partials)

    def second_step(self, backend, climb: Climb | None, grads: Sequence[Tensor | None], **more,
                    ) -> None:
        backend.step(self.read(grads, "g2", **more), climb)

    def state(self) -> dict[str, Tensor]:
        """Everything that a backend writes, but the parts of sums."""
        s = self.space
        found = {f"w{i}": w for i, w in enumerate(self.weights)}
        found |= {name: t for name in ("saved", "m", "v", "u") if (t := getattr(s, name)) is not None}
        found |= {"steps": s.steps, "norm": s.cells.norm, "ok": s.cells.ok,
                  "skipped": s.cells.skipped}
        return {name: t.clone() for name, t in found.items()}


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr() or NOWHERE
