"""What of a slot is saved, under which name, and how a saved state comes back."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .distributed import is_sharded, like
from .flat import Slot, Space, local

OWN = ("ema", "ema_steps", "full_gradient")  # names of what no base optimizer saves
PUBLISHED = ("old_p", "momentum")  # what the public SAM and F-SAM classes save, and no base


def entry(space: Space, slot: Slot) -> dict[str, Tensor]:
    """The slot's own tensors under the names that torch's optimizers use: m, v, u, the float32
    master, and how often each was updated."""
    state = {}
    if space.mode in ("algorithm1", "official"):
        state.update(ema=like(slot.param, slot.m), ema_steps=slot.m_steps)
    elif space.mode is not None:
        state.update(full_gradient=like(slot.param, slot.m))
    if space.base == "sgd" and slot.v is not None:
        state.update(momentum_buffer=like(slot.param, slot.v), momentum_steps=slot.v_steps)
    if space.base == "adam":
        state.update(step=slot.v_steps, exp_avg=like(slot.param, slot.v),
                     exp_avg_sq=like(slot.param, slot.u))
    if space.masters:
        state.update(master=like(slot.param, slot.backup))
    return state


def bases_part(state: dict) -> dict:
    """One parameter's saved state without what is not the base optimizer's."""
    others = OWN + PUBLISHED if "old_p" in state else OWN
    return {k: x for k, x in state.items() if k not in others}


def saved_m(state: dict) -> Tensor | None:
    """m in a saved state: of this class, or of the published F-SAM code ("momentum")."""
    published = state.get("momentum") if "old_p" in state else None
    return state.get("ema", state.get("full_gradient", published))


def check_entry(p: Tensor, state: dict) -> None:
    """Refuse a saved tensor that belongs to another parameter.

    Raises:
        ValueError: its shape differs, or it is whole where the parameter is sharded.
    """
    for name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "master"):
        check_tensor(p, state.get(name))
    check_tensor(p, saved_m(state))


def check_tensor(p: Tensor, value: Tensor | None) -> None:
    if not isinstance(value, Tensor):
        return
    if value.shape != p.shape:
        raise ValueError(f"a saved state of shape {tuple(value.shape)} does not fit the "
                         f"parameter of shape {tuple(p.shape)}: load the state of this model")
    if is_sharded(p) and not is_sharded(value):
        raise ValueError(f"a saved state of shape {tuple(value.shape)} is not sharded, its "
                         "parameter is: load it through torch.distributed.checkpoint.state_dict")


def merged_groups(mine: list[dict], theirs: list[dict]) -> list[dict]:
    """The saved groups, with this optimizer's value for every key that they lack. Another number
    of groups stays as it is, for torch to refuse in its own words."""
    if len(mine) != len(theirs):
        return theirs
    return [{**{k: x for k, x in group.items() if k != "params"}, **saved}
            for group, saved in zip(mine, theirs, strict=True)]


def load_slot(space: Space, slot: Slot, state: dict) -> None:
    """Copy a saved state into the slot; what is not in `state` starts anew."""
    v_name, v_steps = (("exp_avg", "step") if space.base == "adam"
                       else ("momentum_buffer", "momentum_steps"))
    v = state.get(v_name) if space.base else None
    if v is not None and space.v is None:
        space.allocate_base()
    fill(slot.m, saved_m(state))
    fill(slot.v, v)
    fill(slot.u, state.get("exp_avg_sq"))
    for steps, value, key in ((slot.m_steps, saved_m(state), "ema_steps"),
                              (slot.v_steps, v, v_steps)):
        steps.copy_(torch.as_tensor(0 if value is None else state.get(key, 1)))
    if space.masters:
        slot.backup.copy_(local(state["master"]) if "master" in state else slot.w)


def fill(own: Tensor | None, value: Tensor | None) -> None:
    if own is not None:
        own.zero_() if value is None else own.copy_(local(value))


def as_torch_saves(state: dict) -> dict:
    """One parameter's state with Adam's step counter as torch's Adam wants it: on the CPU, in
    float32."""
    step = {"step": state["step"].float().cpu()} if "exp_avg" in state else {}
    return {**state, **step}


@contextmanager
def without_hooks(optimizer, *names: str) -> Iterator[list]:
    """Give the optimizer's hooks of these names, and let none of them run inside."""
    hooks = [getattr(optimizer, name) for name in names]
    for name in names:
        setattr(optimizer, name, OrderedDict())
    try:
        yield hooks
    finally:
        for name, those in zip(names, hooks, strict=True):
            setattr(optimizer, name, those)


@contextmanager
def hooks_around(optimizer, state_dict: dict) -> Iterator[dict]:
    """Run the hooks of load_state_dict on the whole state, before the block and after it, and
    none of them inside."""
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict
    with without_hooks(optimizer, "_optimizer_load_state_dict_pre_hooks",
                       "_optimizer_load_state_dict_post_hooks") as (_, after):
        yield state_dict
    for hook in after.values():
        hook(optimizer)
