"""torch.amp.GradScaler, whose loss scale and overflow flags stay on the device."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from .calls import seen
from .checks import params_of
from .layout import Group, Traits
from .phase import Phase, PhaseError
from .space import sent

P = ParamSpec("P")
Result = TypeVar("Result")


def hooked(func: Callable[P, Result]) -> Callable[P, Result]:
    """A step with torch's hooks around it. Where it or one of them raises, what GradScaler.step has
    set for it goes too, as after a step: GradScaler would multiply the next scale with it. The
    gradients stay scaled, which is remembered."""
    with_hooks = seen(func)

    @wraps(with_hooks)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return with_hooks(*args, **kwargs)
        except BaseException:
            optimizer: Any = args[0]
            scale, _ = (vars(optimizer).pop(name, None) for name in ("grad_scale", "found_inf"))
            if scale is not None:
                remember_scaled(optimizer._phase, {})
            raise

    return call


def inverse_scale(scaler: Any, optimizer: Optimizer) -> Tensor | None:
    """1 / the loss scale of an enabled GradScaler, on its device; None without one.

    Raises:
        ValueError: the scaler has scaled nothing yet, has unscaled already, or was not updated.
    """
    if scaler is None:
        return None
    if scaler._get_scale_async() is None:
        raise ValueError("the scaler has not scaled a loss yet: call scaler.scale(loss).backward() "
                         "before first_step(scaler=scaler)")
    stage = scaler._per_optimizer_states[id(optimizer)]["stage"]
    if stage is OptState.STEPPED:
        raise ValueError("the scaler has stepped and was not updated since: call scaler.update() "
                         "after scaler.step(optimizer)")
    if stage is not OptState.READY:
        raise ValueError("scaler.unscale_ before first_step would divide the scale out twice: "
                         "leave it out; first_step(scaler=scaler) does it on the device")
    return 1 / scaler._get_scale_async()


def scale_and_flag(optimizer: Any) -> tuple[Tensor | None, Tensor | None]:
    """The loss scale, and the flag of an overflow, that GradScaler.step has set for this step; both
    None without one. The flag is a sum over the gradients: the number 0 where there are none."""
    flag = vars(optimizer).get("found_inf")
    return (vars(optimizer).get("grad_scale"),
            torch.as_tensor(flag) if isinstance(flag, int) else flag)


def keep_scaled(phase: Phase, optimizer: Optimizer) -> None:
    """Remember that the gradients of a step that is given up are scaled, if they are."""
    if phase.scaler is not None:
        remember_scaled(phase, phase.scaler._per_optimizer_states[id(optimizer)])


def remember_scaled(phase: Phase, state: dict[str, Any]) -> None:
    """Remember that the gradients there are scaled.

    Args:
        state: the GradScaler's, which tells whether it unscales them; empty where it is not known.
    """
    phase.scaled = next(((p, p.grad, p.grad._version, state) for p in phase.layout.params
                         if p.grad is not None and not p.grad.is_inference()), None)


def refuse_scaled(phase: Phase) -> None:
    """Refuse, in a step without a scaler, gradients that a scaled one has left as they were.

    Raises:
        PhaseError: the first pass was scaled, and this step is not; or a scaled step was given up,
            or failed.
    """
    if phase.scaler is not None:
        raise PhaseError("the first pass was scaled, so the second is scaled too: call "
                         "scaler.step(optimizer), not second_step()")
    if phase.scaled is not None:
        p, g, version, state = phase.scaled
        unscaled = state.get("stage", OptState.READY) is not OptState.READY
        if p.grad is g and g._version == version and not unscaled:
            raise PhaseError("the gradients are those of a scaled step that was given up, or "
                             "failed: call scaler.step(optimizer), or clear them")


def check_passes(phase: Phase, traits: Traits, scaled: bool, give_up: Callable[[], None]) -> None:
    """Before a step, `scaled` or not: both passes are scaled, or neither, as far as is known.

    Raises:
        PhaseError: as `refuse_scaled`; or this is, and GSAM, which would mix the two gradients, was
            not told that the first was: the step is given up then.
    """
    if not scaled:
        return refuse_scaled(phase)
    climbed = phase.perturbed or phase.stash_ok is not None
    if phase.scaler is not None or not climbed:
        return
    if traits.mode == "gsam":
        give_up()
        raise PhaseError("GSAM's step is made of both gradients, and it was told a GradScaler of "
                         "the second alone: scale the first loss too, and call "
                         "first_step(scaler=scaler)")
    if traits.mode not in (None, "looksam") or traits.scales_with == "gradient":
        phase.warn("scaler", "the step is a GradScaler's and first_step was not told: if the first "
                   "loss was scaled too, this climb depends on the scale; call "
                   "first_step(scaler=scaler)")


def report_overflow(phase: Phase, optimizer: Optimizer, ok: Tensor | None) -> None:
    """Let an overflow of a first pass, too, make its scaler, if any, back off at update().

    Args:
        ok: what all first passes agreed on: 0 where one overflowed; None: there is only the last.
    """
    if phase.scaler is None:
        return
    ok = phase.layout.spaces[0].cells.ok if ok is None else ok
    found = phase.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for device, found_inf in found.items():
        found_inf.logical_or_(sent(ok, device) == 0)


def unscaled(groups: Sequence[Group], scale: Tensor | None, step: Callable[[], Result]) -> Result:
    """Step with the loss scale divided out of the gradients, for a base that knows nothing of it;
    where that raises, they are scaled again, as the GradScaler has them."""
    if scale is None:
        return step()
    grads = [p.grad for p in params_of(groups) if p.grad is not None]
    for g in grads:
        g.div_(scale)
    try:
        return step()
    except BaseException:
        for g in grads:
            g.mul_(scale)
        raise
