"""The mathematics of the SAM family over SGD and Adam, in plain PyTorch: a loop over parameters.

Letters follow the papers: weights w, gradient g, its moving average m, direction d, radius rho,
projection constant sigma, averaging factor lmbda, scaling T. One step on a minibatch is

    m  = lmbda m + (1 - lmbda) g(w)                     F-SAM eq. 10 (Friendly-SAM only)
    d  = g(w) - sigma m                                 F-SAM eq. 12 (SAM, ASAM: d = g(w))
    w' = w + rho T^2 d / ||T d||                        F-SAM eq. 14; T = 1; ASAM: a |w| + b;
                                                        FisherSAM: 1 / sqrt(1 + a g^2)
    w  = base(w, g(w'))                                 SGD, Adam or AdamW, at the saved w

The papers: SAM (Foret et al. 2021), ASAM (Kwon et al. 2021), FisherSAM (Kim et al. 2022), GSAM
(Zhuang et al. 2022), LookSAM (Liu et al. 2022), F-SAM (Li et al. 2024), Momentum-SAM (Becker et al.
2024).

Momentum-SAM climbs before its only pass, along -v, the base's momentum, in g(w)'s place. GSAM and
LookSAM keep g(w), and the base gets, with c taken over all parameters,

    g(w') - alpha (g(w) - c g(w'))                      GSAM; c = <g(w'), g(w)> / ||g(w')||^2
    g(w'),  and m = g(w') - c g(w)                      LookSAM, every k-th step;
                                                        c = <g(w'), g(w)> / ||g(w)||^2
    g(w) + alpha c m                                    LookSAM, the steps between;
                                                        c = ||g(w)|| / ||m||

`dots`, `norm`, `climb` and `step` do this over one space, on any device and dtype, with the
signatures of the kernels. They load, compute in float32 (float64 for float64 weights), and cast
at the store. Nothing here reads a device value on the host.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .hyper import FRIENDLY, KEEPING, WITH_M, Hyper
from .passes import Climb, Pass
from .space import GUARD, MaybeTensor, Slot, noise_share


def ema(m: Tensor, g: Tensor, h: Hyper) -> Tensor:
    """The estimate of the full gradient (F-SAM eq. 10)."""
    return h.lmbda * m + h.ema_share * g


def direction(g: Tensor, m: Tensor, sigma: float | Tensor) -> Tensor:
    """The batch gradient without sigma times its full-gradient part (F-SAM eq. 12)."""
    return g - sigma * m


def projection(dots: Tensor, kind: str) -> Tensor:
    """What sigma is multiplied with, from (<g, m>, <g, g>, <m, m>), shape (3,): the cosine
    (F-SAM eq. 11), or <g, m> / <m, m>, which leaves d orthogonal to m. 0 where m or g is 0, not
    finite where g is not."""
    gm, gg, mm = dots
    size = mm if kind == "orthogonal" else gg.sqrt() * mm.sqrt()
    return torch.where(size == 0, 0 * gm, gm / size)


def share(dots: Tensor, mix: str) -> Tensor:
    """c of `Pass.mix`, from (<g, x>, <g, g>, <x, x>), shape (3,), where x is the kept gradient or
    m. c is 0 where its divisor is 0, and not finite where g is not. It is 0, too, for an m that is
    what rounding left of parallel gradients: that would be a step in no direction."""
    gx, gg, xx = dots
    if mix == "reuse":
        return torch.where(is_noise(torch.stack([xx, gg])), 0 * gg, gg.sqrt() / xx.sqrt())
    size = gg if mix == "gsam" else xx
    return torch.where(size == 0, 0 * gx, gx / size)


def mixed(g: Tensor, x: Tensor, c: Tensor, alpha: float, mix: str) -> Tensor:
    """What the base optimizer steps with; x is the kept gradient, or m."""
    if mix == "gsam":
        return g - alpha * (x - c * g)
    return g + alpha * (c * x) if mix == "reuse" else g


def scaling(w: Tensor, g: Tensor, a: float, b: float, kind: str | None) -> Tensor | float:
    """T. ASAM: a |w| + b, where |w| is (1, 0), |w| + eta is (1, eta) and SAM's 1 is (0, 1).
    FisherSAM: the root of the inverse Fisher diagonal, f = g^2, with a = eta."""
    if a == 0:
        return 1.0
    return a * w.abs() + b if kind == "weights" else 1 / (1 + a * g * g).sqrt()


def is_noise(sums: Tensor) -> Tensor:
    """Whether d is what rounding leaves of a difference that is 0: ||T d|| is at most 64 unit
    roundoffs of ||T g||, from the squares of both. Scaled up to rho it would be a step in no
    direction."""
    return sums[0] <= noise_share(sums.dtype) * sums[1]


def sgd(w: Tensor, g: Tensor, v: MaybeTensor, first: Any, h: Hyper) -> tuple[Tensor, MaybeTensor]:
    """torch.optim.SGD's update: the new w and v. At the first step (`first`, a bool tensor) the new
    v is g; without dampening the formula gives that by itself, from a v of 0."""
    if is_on(h.weight_decay):
        g = g + h.weight_decay * w
    if h.momentum != 0:
        if h.dampening != 0:
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


def gradient(p: Pass, i: int) -> Tensor:
    """g in the precision of the arithmetic, with the loss scale (if any) divided out."""
    g: Any = p.g[i]  # not None: the slot takes part
    g = g.to(p.space.kind.acc)
    return g if p.inv_scale is None else g * p.inv_scale


def weights(p: Pass, i: int) -> Tensor:
    """w in the precision of the arithmetic: the float32 master where there are masters, unless
    someone else has written another w since."""
    w = p.w[i].to(p.space.kind.acc)
    if not p.space.kind.masters:
        return w
    master = p.space.slots[i].saved
    return torch.where(master.to(p.w[i].dtype) == p.w[i], master, w)


def taking_part(p: Pass) -> Iterator[tuple[int, Slot, Hyper]]:
    """The slots that have a gradient in this pass, with their numbers and their groups'
    hyper-parameters."""
    for i, slot in enumerate(p.space.slots):
        if p.g[i] is not None:
            yield i, slot, p.rows[slot.group]


def ascent(p: Pass, i: int, slot: Slot, h: Hyper) -> tuple[Tensor, Tensor, MaybeTensor]:
    """g, d and the new m (None: m stays) of one slot, before T.

    Algorithm 1 updates m first and starts from m = 0; the official code projects with the m of
    the step before and starts from m = g. With a given full gradient m, d is the batch gradient's
    part along it ("full") or the rest ("noise").
    """
    g, mode = gradient(p, i), p.space.kind.mode
    if mode is None or mode in KEEPING:
        return g, g, None
    if mode == "algorithm1":
        m = ema(slot.m, g, h)
        return g, direction(g, m, h.sigma), m
    if mode == "official":
        m = torch.where(slot.m_steps == 0, g, ema(slot.m, g, h))
        return g, direction(g, slot.m, h.sigma), m
    return g, h.sigma * slot.m if mode == "full" else direction(g, slot.m, h.sigma), None


def dots(p: Pass) -> None:
    """space.dots = the parts of <g, m>, <g, g> and <m, m>, over the slots that take part. m is
    that of the projection; in a second pass with a `mix`, the x of `share`."""
    p.space.dots.zero_()
    for i, slot, h in taking_part(p):
        g, _, new_m = ascent(p, i, slot, h)
        m: MaybeTensor = new_m if p.space.kind.mode == "algorithm1" else other(p, slot)
        p.space.dots[:, 0] += torch.stack([(x * y).sum() for x, y in ((g, m), (g, g), (m, m))])


def other(p: Pass, slot: Slot) -> MaybeTensor:
    """The x of `share` and `mixed`: the kept gradient, or m."""
    return slot.kept if p.mix in ("gsam", "renew") else slot.m


def norm(p: Pass) -> None:
    """space.partials = the parts of ||T d||^2 and, where d is made with m, of ||T g||^2, over
    the slots that climb."""
    p.space.partials.zero_()
    for i, slot, h in taking_part(p):
        g, d, _ = ascent(p, i, slot, h)
        T = scaling(weights(p, i), g, *p.ab[i], p.scaling)
        p.space.partials[0, 0] += (T * d).square().sum()
        if p.space.kind.mode in WITH_M:
            p.space.partials[1, 0] += (T * g).square().sum()


def climb(p: Pass, sums: Tensor) -> Climb:
    """w -> w + rho T^2 d / ||T d||, with w saved and m updated.

    A zero norm, or a d that is rounding noise beside g, moves nothing. A norm that is not finite
    moves nothing, leaves m as it was and clears the cell `ok`, which makes the next `step` a
    counted skip. The norm goes into the cell `norm`, and the parts of the squared radii into
    `space.radii`: as stored, and as wanted, where rounding to 16 bits can part them.

    Args:
        sums: (2, k), what `norm` left of every space of the optimizer, so the norm is global.
    """
    kind, cells = p.space.kind, p.space.cells
    sums = sums.sum(1)
    total = sums[0].sqrt()
    ok = total.isfinite()
    moves = ok & ~is_noise(sums) if kind.mode in WITH_M else ok
    p.space.radii.zero_()
    for i, slot, _ in taking_part(p):
        slot.saved.copy_(weights(p, i))
    try:
        for i, slot, h in taking_part(p):
            p.space.radii[:, 0] += move(p, i, slot, h, total, moves, ok)
        cells.norm.copy_(total)
        cells.ok.copy_(ok)
        return Climb.of(p)
    except BaseException:
        for i, slot, _ in taking_part(p):
            p.w[i].copy_(slot.saved)
        raise


def move(p: Pass, i: int, slot: Slot, h: Hyper, total: Tensor, moves: Tensor, ok: Tensor,
         ) -> Tensor:
    """One slot's part of `climb`, after w is saved. Returns its squared radii, as stored and as
    wanted, shape (2,)."""
    kind, w = p.space.kind, slot.saved.to(p.space.kind.acc)
    g, d, m = ascent(p, i, slot, h)
    T = scaling(w, g, *p.ab[i], p.scaling)
    e = torch.where(moves, h.rho / (total + GUARD) * (T * (T * d)), 0)
    p.w[i].copy_(w + e)
    if m is not None:
        slot.m.copy_(torch.where(ok, m, slot.m))
    if kind.mode in FRIENDLY:
        slot.m_steps.add_(ok)
    if kind.mode in KEEPING:
        slot.kept.copy_(g)
    old, new = slot.saved.to(kind.dtype).to(kind.acc), p.w[i].to(kind.acc)
    moved = torch.where(ok & (new != old), new - old, 0)  # inf - inf is NaN
    return torch.stack([moved.square().sum(), e.square().sum()])


def step(p: Pass, climb: Climb | None) -> None:
    """The base optimizer from the saved w (from w itself where nothing was saved) with the
    second-pass gradient.

    A slot with no second-pass gradient only returns. After a climb that was not ok, or with the
    cell `found_inf` set, every slot only returns, and the skip is counted. With `along_v`,
    ||v||^2 is left for the next climb.

    Args:
        climb: what `climb` returned; None: a plain step, from w itself.
    """
    kind, cells = p.space.kind, p.space.cells
    ok = cells.found_inf == 0
    if climb is not None:
        ok = ok & (cells.ok != 0)
    for i, slot in enumerate(p.space.slots):
        moved = climb is not None and climb.moved[i]
        if p.g[i] is None:
            if moved:
                p.w[i].copy_(slot.saved)
            continue
        old = slot.saved.to(kind.acc) if moved else weights(p, i)
        w = update(p, i, slot, old, ok, p.mix if moved or p.mix == "reuse" else None)
        p.w[i].copy_(w)
        if kind.masters:
            slot.saved.copy_(w)
    cells.skipped.add_(~ok)
    if p.along_v and climb is not None:
        norm(p._replace(g=[slot.v if moved else None for slot, moved in zip(
            p.space.slots, climb.moved, strict=True)], inv_scale=None))


def update(p: Pass, i: int, slot: Slot, old: Tensor, ok: Tensor, mix: str | None) -> Tensor:
    """The new w of one slot, from the old one; stores v and u, and m. The old w where not ok."""
    h, g = p.rows[slot.group], gradient(p, i)
    if mix is not None:
        c = p.space.cells.share
        if mix == "renew":
            slot.m.copy_(torch.where(ok, g - c * slot.kept, slot.m))
        g = mixed(g, other(p, slot), c, h.alpha, mix)
    steps = slot.v_steps + 1
    if p.space.kind.base == "adam":
        w, v, u = adam(old, g, slot.v, slot.u, steps.to(g.dtype), h)
        kept = [(slot.v, v), (slot.u, u), (slot.v_steps, steps)]
    else:
        w, v = sgd(old, g, slot.v, slot.v_steps == 0, h)
        kept = [(slot.v, v), (slot.v_steps, steps)] if h.momentum != 0 else []
    if kept:  # in one call, into which no Ctrl-C comes
        torch._foreach_copy_([x for x, _ in kept], [torch.where(ok, new, x) for x, new in kept])
    return torch.where(ok, w, old)
