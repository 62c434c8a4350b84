"""Several first passes for one step, and what all of them, on all ranks, agree on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import distributed
from .gradients import refuse_freed
from .phase import Phase, PhaseError


@torch.no_grad()
def stash(phase: Phase, params: Sequence[Tensor], go_back: Callable[[], None]) -> None:
    """Return to w and add the gradients to those set aside (see `SAM.stash_grad`)."""
    refuse_freed([p.grad for p in params])
    if phase.perturbed:
        ok = phase.layout.spaces[0].cells.ok
        phase.stash_ok = ok.clone() if phase.stash_ok is None else phase.stash_ok * ok
    for p in params:  # before the weights go back, in whose memory a gradient may be
        if p.grad is not None:
            aside = phase.stash.get(p)
            if aside is None:  # its memory may be another's too, and is reused by some
                phase.stash[p] = p.grad.clone()
            elif torch.promote_types(aside.dtype, p.grad.dtype) == aside.dtype:
                aside.add_(p.grad)
            else:
                phase.stash[p] = aside + p.grad
            p.grad = None
    scaler, group = phase.scaler, phase.group
    go_back()
    phase.scaler, phase.group = scaler, group  # still true of the gradients set aside


@torch.no_grad()
def unstash(phase: Phase, params: Sequence[Tensor]) -> None:
    """Put the sums of the gradients set aside into `.grad`, also of a parameter that has left the
    groups since, where torch leaves it too.

    Raises:
        PhaseError: nothing is set aside.
        ValueError: a parameter has another shape or device by now; nothing has changed then.
    """
    if not phase.stash:
        raise PhaseError("unstash_grad with nothing set aside: call stash_grad after each "
                         "micro-batch's second backward")
    for p, g in phase.stash.items():
        if (g.shape, g.device) != (p.shape, p.device):
            raise ValueError(f"a gradient of shape {tuple(g.shape)} on {g.device} is set aside for "
                             f"a parameter that is now of shape {tuple(p.shape)} on {p.device}: "
                             "call restore() to give the step up")
    for p in dict.fromkeys([*params, *phase.stash]):
        set_grad(p, phase.stash.get(p))
    phase.stash.clear()


def set_grad(p: Tensor, g: Tensor | None) -> None:
    """p.grad = g. One of another dtype torch 2.9 takes only in the place of one that is there."""
    if g is None or g.dtype == p.dtype or hasattr(torch.Tensor, "grad_dtype"):
        p.grad = g
    else:
        p.grad = torch.empty_like(p)
        p.grad.data = g


def agreed_ok(phase: Phase) -> Tensor | None:
    """Whether the climbs of this step were finite, in every micro-batch and on every rank; None
    where there is only the one that the kernels know of."""
    if phase.stash_ok is None and phase.group is None:
        return None
    last = phase.layout.spaces[0].cells.ok
    ok = last if phase.perturbed else torch.ones_like(last)
    if phase.stash_ok is not None:
        ok = ok * phase.stash_ok
    return ok if phase.group is None else distributed.all_ok(ok, phase.group)
