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

from .flat import GUARD, Space


def ema(m: Tensor, g: Tensor, lmbda: Tensor) -> Tensor:
    """The estimate of the full gradient (F-SAM eq. 14)."""
    return lmbda * m + (1 - lmbda) * g


def direction(g: Tensor, m: Tensor | None, sigma: Tensor) -> Tensor:
    """The batch gradient without sigma times its full-gradient part (F-SAM eq. 12)."""
    return g if m is None else g - sigma * m


def scaling(w: Tensor, a: float, b: float) -> Tensor | float:
    """ASAM's T: |w| is (a, b) = (1, 0), |w| + eta is (1, eta), and SAM's 1 is (0, 1)."""
    return a * w.abs() + b if a else b


def sgd(w, g, v, first, lr, momentum, dampening, weight_decay, nesterov):
    """torch.optim.SGD's update: the new weights and the new momentum buffer.

    `first` is true where v does not exist yet: v then becomes g, undamped.
    """
    g = g + weight_decay * w
    if v is None:
        return w - lr * g, None
    moved = torch.where(first, g, momentum * v + (1 - dampening) * g)
    ahead = torch.where(nesterov != 0, g + momentum * moved, moved)
    has_momentum = momentum != 0
    return w - lr * torch.where(has_momentum, ahead, g), torch.where(has_momentum, moved, v)


def climb_direction(space: Space, slot) -> tuple[Tensor, Tensor | None]:
    """d and the new m of one slot. The official code projects with the m of the step before and
    starts from m = g; Algorithm 1 updates m first and starts from m = 0."""
    h = space.hyper_rows[slot.group]
    g = slot.g1.to(space.acc) * space.control.inv_scale1
    if space.ema is None:
        return g, None
    m = slot.m.to(space.acc)
    updated = ema(m, g, h.lmbda)
    if space.ema == "algorithm1":
        return direction(g, updated, h.sigma), updated
    return direction(g, m, h.sigma), torch.where(slot.m_steps == 0, g, updated)


def norm(space: Space) -> None:
    """space.partials = the parts of ||T d||^2 over the slots that have a first-pass gradient."""
    space.partials.zero_()
    for slot in space.climbing():
        d, _ = climb_direction(space, slot)
        T = scaling(slot.w.to(space.acc), slot.a, slot.b)
        space.partials[0] += (T * d).square().sum()


def climb(space: Space, partials: Tensor) -> None:
    """w -> w + rho T^2 d / ||T d||, with w saved and m updated.

    A zero norm moves nothing. A norm that is not finite moves nothing, leaves m as it was and
    clears `control.ok`, which makes the next `step` a counted skip. `partials` holds the sums of
    `norm` over every space of the optimizer, so the norm is global.
    """
    total = partials.sum().sqrt()
    ok = total.isfinite()
    moved = torch.zeros_like(total)
    for slot in space.climbing():
        h = space.hyper_rows[slot.group]
        w = slot.w.to(space.acc)
        d, m = climb_direction(space, slot)
        T = scaling(w, slot.a, slot.b)
        e = torch.where(ok, h.rho / (total + GUARD) * (T * T * d), 0)
        slot.backup.copy_(slot.w)
        slot.w.copy_(w + e)
        moved += (slot.w.to(space.acc) - slot.backup.to(space.acc)).square().sum()
        if m is not None:
            slot.m.copy_(torch.where(ok, m, slot.m))
            slot.m_steps += ok
    space.control.norm.copy_(total)
    space.control.ok.copy_(ok)
    space.radii.zero_()
    space.radii[0] = moved


def step(space: Space, perturbed: bool) -> None:
    """SGD from the saved w (from w itself where nothing was saved) with the second-pass gradient.

    A slot with no second-pass gradient only returns. After a climb that was not ok, or with
    `control.found_inf` set, every slot only returns, and the skip is counted.
    """
    c = space.control
    ok = (c.found_inf == 0) & (c.ok != 0) if perturbed else c.found_inf == 0
    for slot in space.slots:
        w = slot.backup if perturbed and slot.climbed else slot.w
        if slot.g2 is None:
            slot.w.copy_(w)
            continue
        h = space.hyper_rows[slot.group]
        g = slot.g2.to(space.acc) * c.inv_scale2
        v = slot.v.to(space.acc) if space.momentum else None
        new_w, new_v = sgd(w.to(space.acc), g, v, slot.v_steps == 0, h.lr, h.momentum,
                           h.dampening, h.weight_decay, h.nesterov)
        slot.w.copy_(torch.where(ok, new_w.to(w.dtype), w))
        if space.momentum:
            slot.v.copy_(torch.where(ok, new_v.to(slot.v.dtype), slot.v))
            slot.v_steps += ok & (h.momentum != 0)
    c.skipped += ~ok
