"""The mathematics of the SAM family over SGD and Adam, in plain PyTorch.

Letters follow the papers: weights w, gradient g, its moving average m, direction d, radius rho,
projection constant sigma, averaging factor lmbda, scaling T. One step on a minibatch is

    m  = lmbda m + (1 - lmbda) g(w)                     F-SAM eq. 14 (Friendly-SAM only)
    d  = g(w) - sigma m                                 F-SAM eq. 12 (SAM, ASAM: d = g(w))
    w' = w + rho T^2 d / ||T d||                        T = 1; ASAM: a |w| + b;
                                                        FisherSAM: 1 / sqrt(1 + a g^2)
    w  = base(w, g(w'))                                 SGD, Adam or AdamW, at the saved w

`dots`, `norm`, `climb` and `step` do this over a `fastsam.flat.Space`, on any device and dtype,
with the signatures of `fastsam.kernels`. They load, compute in float32 (float64 for float64
weights), and cast at the store. Nothing here reads a device value on the host.
"""

import torch
from torch import Tensor

from .flat import GUARD, Hyper, Slot, Space
from .runs import parts


def ema(m: Tensor, g: Tensor, h: Hyper, first: Tensor | None = None) -> Tensor:
    """The estimate of the full gradient (F-SAM eq. 14). Where `first`, m becomes g."""
    new = h.lmbda * m + h.ema_share * g
    return new if first is None else torch.where(first, g, new)


def direction(g: Tensor, m: Tensor, sigma: float) -> Tensor:
    """The batch gradient without sigma times its full-gradient part (F-SAM eq. 12)."""
    return g - sigma * m


def projection(dots: Tensor, kind: str) -> Tensor:
    """What sigma is multiplied with, from (<g, m>, <g, g>, <m, m>), shape (3,): the cosine
    (F-SAM eq. 11), or <g, m> / <m, m>, which leaves d orthogonal to m. 0 where m or g is 0, not
    finite where g is not."""
    gm, gg, mm = dots
    size = mm if kind == "orthogonal" else gg.sqrt() * mm.sqrt()
    return torch.where(size == 0, 0 * gm, gm / size)


def scaling(w: Tensor, g: Tensor, a: float, b: float, kind: str | None) -> Tensor | float:
    """T. ASAM: a |w| + b, where |w| is (1, 0), |w| + eta is (1, eta) and SAM's 1 is (0, 1).
    FisherSAM: the root of the inverse Fisher diagonal, f = g^2, with a = eta."""
    if not is_on(a):
        return 1.0
    return a * w.abs() + b if kind == "weights" else 1 / (1 + a * g * g).sqrt()


def times(T: Tensor | float, d: Tensor) -> Tensor:
    """T d, without an operation where T is 1."""
    return T * d if isinstance(T, Tensor) else d


def sgd(w: Tensor, g: Tensor, v: Tensor | None, first: Tensor | None, h: Hyper,
        ) -> tuple[Tensor, Tensor | None]:
    """torch.optim.SGD's update: the new w and v. At the first step v becomes g, which needs to be
    said only where there is dampening: before it v is 0."""
    if is_on(h.weight_decay):
        g = g + h.weight_decay * w
    if is_on(h.momentum):
        if is_on(h.dampening):
            v = torch.where(first, g, h.momentum * v + h.momentum_share * g)
        else:
            v = h.momentum * v + g
        g = g + h.momentum * v if h.nesterov else v
    return w - h.lr * g, v


def adam(w: Tensor, g: Tensor, v: Tensor, u: Tensor, t: Tensor, h: Hyper,
         ) -> tuple[Tensor, Tensor, Tensor]:
    """torch.optim.Adam's update, AdamW's where `decoupled`: the new w, v and u at step t >= 1."""
    if h.decoupled:
        w = w * (1 - h.lr * h.weight_decay)
    elif is_on(h.weight_decay):
        g = g + h.weight_decay * w
    v = h.beta1 * v + h.beta1_share * g
    u = h.beta2 * u + h.beta2_share * g * g
    c1, c2 = h.corrections(t)
    return w - h.lr / c1 * v / ((u / c2).sqrt() + h.eps), v, u


def is_on(x: float | Tensor) -> bool:
    """Whether a hyper-parameter can matter: a number that is not 0, or any tensor."""
    return isinstance(x, Tensor) or x != 0


def read(space: Space, g: Tensor, scale_name: str) -> Tensor:
    """A gradient in the precision of the arithmetic, with the loss scale (if any) divided out."""
    g = g.to(space.acc)
    return g * getattr(space.control, scale_name) if space.is_set(scale_name) else g


def weights(space: Space, slot: Slot) -> Tensor:
    """w in the precision of the arithmetic: the float32 master where the space has masters,
    unless someone else has written another w since."""
    w = slot.w.to(space.acc)
    if not space.masters:
        return w
    return torch.where(slot.backup.to(space.dtype) == slot.w, slot.backup, w)


def ascent(space: Space, slot: Slot) -> tuple[Tensor, Tensor, Tensor | None]:
    """g, d and the new m (None: m stays) of one slot, before T.

    Algorithm 1 updates m first and starts from m = 0; the official code projects with the m of
    the step before and starts from m = g. With a given full gradient m, d is the batch gradient's
    part along it ("full") or the rest ("noise").
    """
    h = space.rows[slot.group]
    g = read(space, slot.g1, "inv_scale1")
    if space.mode is None:
        return g, g, None
    if space.mode == "algorithm1":
        m = ema(slot.m, g, h)
        return g, direction(g, m, h.sigma), m
    if space.mode == "official":
        return g, direction(g, slot.m, h.sigma), ema(slot.m, g, h, slot.m_steps == 0)
    return g, h.sigma * slot.m if space.mode == "full" else direction(g, slot.m, h.sigma), None


def scaled(space: Space, slot: Slot) -> Tensor:
    """T d of one slot, whose norm is taken."""
    g, d, _ = ascent(space, slot)
    return times(scaling(weights(space, slot), g, slot.a, slot.b, space.scaling), d)


def moved(space: Space, slot: Slot) -> Tensor:
    """By how much the climb moved w, after rounding to its dtype."""
    return slot.w.to(space.acc) - slot.backup.to(space.dtype).to(space.acc)


def sum_of(space: Space, x: Tensor) -> Tensor:
    return x.sum(dtype=space.sums)


def dots_of(space: Space, slot: Slot) -> Tensor:
    """One slot's <g, m>, <g, g> and <m, m>, with the m that is projected with."""
    g, _, new_m = ascent(space, slot)
    m = new_m if space.mode == "algorithm1" else slot.m
    return torch.stack([sum_of(space, x) for x in (g * m, g * g, m * m)])


def norm_of(space: Space, slot: Slot) -> Tensor:
    """One slot's ||T d||^2."""
    return sum_of(space, scaled(space, slot).square())


def climb_slot(space: Space, slot: Slot, total: Tensor, ok: Tensor) -> Tensor:
    """One slot's part of `climb`. Returns the squared radii: realised, and wanted where rounding
    to 16 bits can part them."""
    w = weights(space, slot)
    g, d, m = ascent(space, slot)
    T = scaling(w, g, slot.a, slot.b, space.scaling)
    e = torch.where(ok, space.rows[slot.group].rho / (total + GUARD) * times(T, times(T, d)), 0)
    slot.backup.copy_(w)
    slot.w.copy_(w + e)
    if m is not None:
        slot.m.copy_(torch.where(ok, m, slot.m))
    radii = (moved(space, slot), e) if rounds(space) else (moved(space, slot),)
    return torch.stack([sum_of(space, x.square()) for x in radii])


def rounds(space: Space) -> bool:
    """Whether weights are stored in 16 bits alone."""
    return space.dtype.itemsize == 2 and not space.masters


def step_slot(space: Space, slot: Slot, perturbed: bool, ok: Tensor) -> None:
    """One slot's part of `step`."""
    h = space.rows[slot.group]
    saved = perturbed and slot.climbed
    old = slot.backup.to(space.acc) if saved else weights(space, slot)
    g = read(space, slot.g2, "inv_scale2")
    if space.base == "adam":
        w, v, u = adam(old, g, slot.v, slot.u, (slot.v_steps + 1).to(space.acc), h)
        slot.u.copy_(torch.where(ok, u, slot.u))
    else:
        first = slot.v_steps == 0 if is_on(h.dampening) else None
        w, v = sgd(old, g, slot.v, first, h)
    w = torch.where(ok, w, old)
    slot.w.copy_(w)
    if space.masters:
        slot.backup.copy_(w)
    if has_v(space, h):
        slot.v.copy_(torch.where(ok, v, slot.v))


def has_v(space: Space, h: Hyper) -> bool:
    """Whether the base optimizer keeps a v."""
    return space.base == "adam" or is_on(h.momentum)


def dots(space: Space) -> None:
    """space.dots = the parts of <g, m>, <g, g> and <m, m> over the slots that climb."""
    space.dots.zero_()
    for part, _ in parts(space, "g1"):
        space.dots[:, 0] += dots_of(space, part)


def norm(space: Space) -> None:
    """space.partials = the parts of ||T d||^2 over the slots that have a first-pass gradient."""
    space.partials.zero_()
    for part, _ in parts(space, "g1"):
        space.partials[0] += norm_of(space, part)


def climb(space: Space, partials: Tensor) -> None:
    """w -> w + rho T^2 d / ||T d||, with w saved and m updated.

    A zero norm moves nothing. A norm that is not finite moves nothing, leaves m as it was and
    clears `control.ok`, which makes the next `step` a counted skip. `partials` holds the sums of
    `norm`, which has gathered the gradients, over every space of the optimizer, so the norm is
    global. `space.radii` gets the parts of the squared radii.
    """
    total = partials.sum().sqrt()
    ok = total.isfinite()
    space.radii.zero_()
    for part, slots in parts(space, "g1", moves=True, gather=False):
        radii = climb_slot(space, part, total, ok)
        space.radii[:len(radii), 0] += radii
        for slot in slots:
            slot.climbed = True
    if space.mode in ("algorithm1", "official"):
        count(space.steps[0], [slot.climbed for slot in space.slots], ok)
    space.control.norm.copy_(total)
    space.control.ok.copy_(ok)


def step(space: Space, perturbed: bool) -> None:
    """The base optimizer from the saved w (from w itself where nothing was saved) with the
    second-pass gradient.

    A slot with no second-pass gradient only returns. After a climb that was not ok, or with
    `control.found_inf` set, every slot only returns, and the skip is counted.
    """
    c = space.control
    ok = (c.found_inf == 0) & (c.ok != 0) if perturbed else c.found_inf == 0
    for part, _ in parts(space, "g2", moves=True):
        step_slot(space, part, perturbed, ok)
    for slot in space.slots:
        if slot.g2 is None and perturbed and slot.climbed:
            slot.w.copy_(slot.backup)
    stepped = [slot.g2 is not None and has_v(space, space.rows[slot.group])
               for slot in space.slots]
    count(space.steps[1], stepped, ok)
    c.skipped += ~ok


def count(steps: Tensor, which: list[bool], ok: Tensor) -> None:
    """One more step for those of the slots, if ok."""
    if all(which):
        steps += ok
    elif any(which):
        torch._foreach_add_([n for n, one in zip(steps, which, strict=True) if one],
                            ok.to(steps.dtype))
