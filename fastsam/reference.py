"""The mathematics of SAM, ASAM and Friendly-SAM over SGD, in plain PyTorch.

Letters follow the papers: weights w, gradient g, its moving average m, direction d, radius rho,
projection constant sigma, averaging factor lmbda. One step on a minibatch is

    m  = lmbda m + (1 - lmbda) g(w)                     F-SAM eq. 14 (Friendly-SAM only)
    d  = g(w) - sigma m                                 F-SAM eq. 12 (SAM, ASAM: d = g(w))
    w' = w + rho T^2 d / ||T d||                        T = 1, or ASAM's scaling T = a |w| + b
    w  = SGD(w, g(w'))                                  the base optimizer, at the saved w

`norm`, `climb` and `step` do this over a `fastsam.flat.Space`, on any device and dtype, with the
signatures of `fastsam.kernels`. They load, compute in float32 (float64 for float64 weights), and
cast at the store. Nothing here reads a device value on the host.
"""

import torch
from torch import Tensor

from .flat import GUARD, Hyper, Slot, Space


def ema(m: Tensor, g: Tensor, lmbda: float, first: Tensor | None = None) -> Tensor:
    """The estimate of the full gradient (F-SAM eq. 14). Where `first`, m, still 0, becomes g."""
    share = 1 - lmbda if first is None else 1 - lmbda * (~first).to(g)
    return lmbda * m + share * g


def direction(g: Tensor, m: Tensor, sigma: float) -> Tensor:
    """The batch gradient without sigma times its full-gradient part (F-SAM eq. 12)."""
    return g - sigma * m


def scale(x: Tensor, w: Tensor, a: float, b: float) -> Tensor:
    """T x with ASAM's T = a |w| + b: |w| is (1, 0), |w| + eta is (1, eta), SAM's 1 is (0, 1)."""
    return (a * w.abs() + b) * x if a else x


def sgd(w: Tensor, g: Tensor, v: Tensor | None, first: Tensor, h: Hyper,
        ) -> tuple[Tensor, Tensor | None]:
    """torch.optim.SGD's update: the new w and v. At the first step v, still 0, becomes g."""
    if h.weight_decay:
        g = g + h.weight_decay * w
    if h.momentum:
        share = 1 - h.dampening * (~first).to(g) if h.dampening else 1
        v = h.momentum * v + share * g
        g = g + h.momentum * v if h.nesterov else v
    return w - h.lr * g, v


def read(space: Space, g: Tensor, scale_name: str) -> Tensor:
    """A gradient in the precision of the arithmetic, with the loss scale (if any) divided out."""
    g = g.to(space.acc)
    return g * getattr(space.control, scale_name) if space.is_set(scale_name) else g


def climb_direction(space: Space, slot: Slot) -> tuple[Tensor, Tensor | None]:
    """d and the new m of one slot. The official code projects with the m of the step before and
    starts from m = g; Algorithm 1 updates m first and starts from m = 0."""
    h = space.rows[slot.group]
    g = read(space, slot.g1, "inv_scale1")
    if space.ema is None:
        return g, None
    if space.ema == "algorithm1":
        m = ema(slot.m, g, h.lmbda)
        return direction(g, m, h.sigma), m
    return direction(g, slot.m, h.sigma), ema(slot.m, g, h.lmbda, slot.m_steps == 0)


def norm(space: Space) -> None:
    """space.partials = the parts of ||T d||^2 over the slots that have a first-pass gradient."""
    space.partials.zero_()
    for slot in space.climbing():
        d, _ = climb_direction(space, slot)
        d = scale(d, slot.w.to(space.acc), slot.a, slot.b)
        space.partials[0] += torch.linalg.vector_norm(d).square()


def climb(space: Space, partials: Tensor) -> None:
    """w -> w + rho T^2 d / ||T d||, with w saved and m updated.

    A zero norm moves nothing. A norm that is not finite moves nothing, leaves m as it was and
    clears `control.ok`, which makes the next `step` a counted skip. `partials` holds the sums of
    `norm` over every space of the optimizer, so the norm is global.
    """
    total = partials.sum().sqrt()
    ok = total.isfinite()
    space.radii.zero_()
    for slot in space.climbing():
        w = slot.backup.copy_(slot.w).to(space.acc)
        slot.climbed = True
        d, m = climb_direction(space, slot)
        d = scale(scale(d, w, slot.a, slot.b), w, slot.a, slot.b)
        moved = w + space.rows[slot.group].rho / (total + GUARD) * d
        slot.w.copy_(torch.where(ok, moved, w))
        space.radii[0] += torch.linalg.vector_norm(slot.w.to(space.acc) - w).square()
        if m is not None:
            slot.m.copy_(torch.where(ok, m, slot.m))
            slot.m_steps += ok
    space.control.norm.copy_(total)
    space.control.ok.copy_(ok)


def step(space: Space, perturbed: bool) -> None:
    """SGD from the saved w (from w itself where nothing was saved) with the second-pass gradient.

    A slot with no second-pass gradient only returns. After a climb that was not ok, or with
    `control.found_inf` set, every slot only returns, and the skip is counted.
    """
    c = space.control
    ok = (c.found_inf == 0) & (c.ok != 0) if perturbed else c.found_inf == 0
    for slot in space.slots:
        saved = slot.backup if perturbed and slot.climbed else slot.w
        if slot.g2 is None:
            slot.w.copy_(saved)
            continue
        h = space.rows[slot.group]
        g = read(space, slot.g2, "inv_scale2")
        w, v = sgd(saved.to(space.acc), g, slot.v, slot.v_steps == 0, h)
        slot.w.copy_(torch.where(ok, w.to(saved.dtype), saved))
        if h.momentum:
            slot.v.copy_(torch.where(ok, v, slot.v))
            slot.v_steps += ok
    c.skipped += ~ok
