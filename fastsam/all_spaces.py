"""What a step does with all spaces of an optimizer: one norm, one projection, one climb. What is
done to each by itself is the backends'."""

from collections.abc import Collection, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from .layout import Layout
from .memory import has_storage
from .passes import Climb, Pass
from .reference import projection, share
from .space import Space, local, sent


def climb(layout: Layout, passes: Sequence[Pass]) -> list[Climb]:
    """Move all weights; where that fails, none."""
    climbs: list[Climb] = []
    try:
        passes = projected(layout, passes)
        if not layout.has_norm():
            norm(layout.backend, passes)
        show_modes(passes, [None] * len(passes))
        for p in passes:
            climbs.append(layout.backend.climb(p, global_sums(passes, p.space)))
        return climbs
    except BaseException:
        go_back(climbs)
        raise


def norm(backend: ModuleType, passes: Sequence[Pass]) -> None:
    """Leave each space's parts of ||T d||^2 in its `partials`, over all its shards."""
    for p in passes:
        backend.norm(p)
        p.space.sum_over_shards(p.space.partials)


def global_sums(passes: Sequence[Pass], space: Space) -> Tensor:
    """The partial sums of every space, side by side, (2, k), on the device and in the dtype of this
    one: the norm is global. Of float64 they are inf where they are in the float32 of another space:
    a step is skipped in all of them, or in none."""
    if len(passes) == 1:
        return space.partials
    sums = torch.cat([to(p.space.partials, space) for p in passes], 1)
    if space.kind.acc is torch.float64 and any(p.space.kind.acc is torch.float32 for p in passes):
        there = sums.float().sum(1, keepdim=True)
        sums = torch.where(there.isfinite(), sums, torch.inf)
    return sums


def dots(backend: ModuleType, passes: Sequence[Pass]) -> Tensor:
    """<g, m>, <g, g> and <m, m> over all parameters, shape (3,) (see `reference.dots`)."""
    for p in passes:
        backend.dots(p)
    first = passes[0].space
    return torch.stack([to(p.space.sum_over_shards(p.space.dots).sum(1), first)
                        for p in passes]).sum(0)


def projected(layout: Layout, passes: Sequence[Pass]) -> Sequence[Pass]:
    """The passes with sigma multiplied by `reference.projection`, where the projection is no
    constant."""
    kind = layout.traits.projection
    if kind is None:
        return passes
    c = projection(dots(layout.backend, passes), kind)
    for p in passes:
        p.space.multiply_sigma(to(c, p.space))
    return [p._replace(rows=[row._replace(sigma=row.sigma * to(c, p.space)) for row in p.rows])
            for p in passes]


def step(layout: Layout, passes: Sequence[Pass], climbs: Sequence[Climb | None],
         found_inf: Tensor | None) -> None:
    """Return to w and let the fused base optimizer update it.

    Args:
        climbs: of each space; all None where the weights are not moved.
        found_inf: not 0: a skip; on the device. None: it is not known to be one.
    """
    perturbed = climbs[0] is not None
    mix = mix_of(layout.traits.mode, perturbed)
    if mix is not None:
        passes, bad = mixed(layout, passes, climbs, mix)
        found_inf = bad if found_inf is None else bad + found_inf.to(bad)
    along_v = perturbed and leaves_norm(layout)
    layout.keep_norm(None)
    show_modes(passes, climbs)
    for i, (p, climb) in enumerate(zip(passes, climbs, strict=True)):
        layout.set_cell(i, "found_inf", found_inf, 0)
        layout.backend.step(p._replace(along_v=True) if along_v else p, climb)
    if along_v:
        layout.keep_norm([climb.moved for climb in climbs if climb])


def show_modes(passes: Sequence[Pass], climbs: Sequence[Climb | None]) -> None:
    """Let torch's dispatch modes, if there are any, see which weights are about to be written, as
    kernels write past them: that of `allow_mutation_on_saved_tensors` copies what autograd still
    needs."""
    if _len_torch_dispatch_stack():
        for p, climb in zip(passes, climbs, strict=True):
            for i, w in enumerate(p.w):
                if p.g[i] is not None or (climb and climb.moved[i]):
                    w.copy_(w)


def leaves_norm(layout: Layout) -> bool:
    """Whether the return from a climb leaves the norm of v for the next one. Not of sharded
    parameters: whether to take it anew, with a sum over processes, has to be the same on all."""
    return layout.traits.along_v and not any(space.kind.shards for space in layout.spaces)


def mix_of(mode: str | None, perturbed: bool) -> str | None:
    """`Pass.mix` of a base step."""
    if mode == "looksam":
        return "renew" if perturbed else "reuse"
    return "gsam" if mode == "gsam" and perturbed else None


def mixed(layout: Layout, passes: Sequence[Pass], climbs: Sequence[Climb | None], mix: str,
          ) -> tuple[list[Pass], Tensor]:
    """The passes as the base is to step with them; and what makes that step a skip: 0, or NaN where
    c is not finite, through which one bad gradient would spread to all weights."""
    passes = [p._replace(mix=mix) for p in passes]
    c = share(dots(layout.backend, [
        layout.part(i, p, climb.moved if climb else layout.values.perturb[i])
        for i, (p, climb) in enumerate(zip(passes, climbs, strict=True))]), mix)
    for p in passes:
        p.space.cells.share.copy_(to(c, p.space))
    return passes, c - c  # NaN for inf and NaN


def to(t: Tensor, space: Space) -> Tensor:
    """A device value on a space's device, in the dtype of its arithmetic."""
    return sent(t, space.kind.device).to(space.kind.acc)


@torch.no_grad()
def go_back(climbs: Sequence[Climb]) -> None:
    """Bring what climbed back to its saved weights; a master is rounded as it was rounded.

    Raises:
        RuntimeError: a parameter has another shape, or no memory, by now; the others are back.
    """
    lost = []
    for climb in climbs:
        for slot, moved in zip(climb.space.slots, climb.moved, strict=True):
            w = local(slot.param)
            if moved and (w.shape != slot.shape or not has_storage(w)):
                memory = "" if has_storage(w) else ", freed"
                lost.append(f"{tuple(slot.shape)} -> {tuple(w.shape)}{memory}")
            elif moved:
                w.copy_(slot.saved)
    if lost:
        raise RuntimeError("parameters changed their shape or lost their memory while the weights "
                           f"were perturbed and cannot go back ({', '.join(lost)}); all others "
                           "are at w")


def announce(changed: Collection[Tensor]) -> None:
    """Tell autograd and autocast, which do not see all writes, of new weights."""
    torch.autograd.graph.increment_version(changed)
    torch.clear_autocast_cache()


def moved_weights(climbs: Sequence[Climb]) -> list[Tensor]:
    """The weights that climbed."""
    return [w for climb in climbs for w in with_memory(climb.space, [
        slot.param for slot, moved in zip(climb.space.slots, climb.moved, strict=True) if moved])]


def written_weights(passes: Sequence[Pass], climbs: Sequence[Climb | None]) -> list[Tensor]:
    """The weights that a step writes: those with a gradient, and those that climbed."""
    changed: list[Tensor] = []
    for p, climb in zip(passes, climbs, strict=True):
        climbed = climb.moved if climb else [False] * len(p.w)
        params = p.space.params
        changed += with_memory(p.space, params if all(climbed) else [
            w for w, g, moved in zip(params, p.g, climbed, strict=True) if moved or g is not None])
    return changed


def with_memory(space: Space, params: list[Tensor]) -> list[Tensor]:
    """Parameters of a space, and their memory here where that is another tensor: a DTensor's
    version is its own, and it is the one that autograd has saved."""
    return params if space.plain else [*params, *map(local, params)]
