"""One parameter's entry in a state, kept or saved: the names and forms in it, and what is refused.
"""

from typing import Any, cast

import torch
from torch import Tensor

from .checks import is_number
from .distributed import is_sharded
from .hyper import FRIENDLY
from .memory import has_storage
from .space import local

Entry = dict[str, Any]  # of one parameter
M = ("ema", "full_gradient", "g_v")  # m's names: each is another thing
OWN = (*M, "ema_steps")  # SAM's own names
FOREIGN = "sam_"  # begins them beside a base that is not fused, which may use any name itself
ADAMS = ("step", "exp_avg", "exp_avg_sq")
PUBLISHED = ("old_p", "momentum")  # what the public SAM and F-SAM classes save, and no base


def bases_part(state: Any) -> Any:
    """One parameter's saved state without what is not the base optimizer's. An entry of no
    parameter's, such as MADGRAD's counter, may be of any type."""
    if not isinstance(state, dict):
        return state
    others = {FOREIGN + name for name in OWN} | (set(PUBLISHED) if "old_p" in state else set())
    if is_old_form(state):
        others |= set(OWN)
    return {k: x for k, x in state.items() if k not in others}


def is_old_form(state: Entry) -> bool:
    """Whether SAM's own names stand without their prefix: saved by a fused optimizer, or by a
    version of fastsam up to 0.1."""
    return "ema_steps" in state or "full_gradient" in state or "g_v" in state


def without_published(state: Entry) -> Entry:
    """One parameter's saved state without what the public classes keep for a step's time."""
    return {k: x for k, x in state.items() if k not in PUBLISHED or "old_p" not in state}


def as_torch_saves(state: Entry) -> Entry:
    """One parameter's state with Adam's step counter as torch's Adam wants it: on the CPU, in
    float32."""
    if not isinstance(state, dict):
        return state
    step = {"step": state["step"].float().cpu()} if "exp_avg" in state else {}
    return {**state, **step}


def name_of_m(mode: str | None) -> str | None:
    """m's public name; None where there is no m."""
    if mode in (None, "gsam"):
        return None
    return "ema" if mode in FRIENDLY else "g_v" if mode == "looksam" else "full_gradient"


def kept_names(mode: str | None) -> set[str]:
    """m's public name and that of its count, where there are any."""
    return {name for name in (name_of_m(mode), "ema_steps" * (mode in FRIENDLY)) if name}


def saved_ms(state: Entry, fused: bool) -> dict[str, tuple[str, Tensor]]:
    """The m of every class in a saved state, by m's name, with the key that it has there: ours, or
    that of the published F-SAM code ("momentum"). Beside a base that is not fused, a key without
    our prefix may be the base's own."""
    keys = [("ema", "momentum")] if "old_p" in state else []
    if fused or is_old_form(state):
        keys += [(name, name) for name in M]
    keys += [(name, FOREIGN + name) for name in M]
    return {name: (key, state[key]) for name, key in keys if isinstance(state.get(key), Tensor)}


def saved_m(state: Entry, fused: bool, mode: str | None) -> Tensor | None:
    """This class's m in a saved state."""
    return saved_ms(state, fused).get(cast(str, name_of_m(mode)), (None, None))[1]


def check_m(p: Tensor, state: Entry, base: str | None, mode: str | None) -> None:
    """Refuse an m that does not fit, or that is another class's alone."""
    mine, found = name_of_m(mode), saved_ms(state, bool(base))
    if mine is None:
        return
    if found and mine not in found:
        key = next(iter(found.values()))[0]
        raise ValueError(f"a state has {key!r}, which is another class's, where this one keeps "
                         f"{mine!r}: delete it from the state to begin {mine!r} anew")
    check_tensor(p, mine, found.get(mine, (None, None))[1], base)


def check_entry(p: Tensor, state: Entry, base: str | None, mode: str | None) -> None:
    """Refuse the state of another parameter or class, and what no state can be.

    Args:
        base: the fused base optimizer, as in `Kind`; None: the base's part is its own affair.
        mode: as `Kind.mode`.

    Raises:
        ValueError: no dict; a tensor whose shape differs, or that is whole where the parameter is
            sharded; something else where a tensor or a count belongs; a part of Adam's state;
            what another class keeps in m's place.
    """
    if not isinstance(state, dict):
        if base:
            raise ValueError(f"the state of a parameter of shape {tuple(p.shape)} is a "
                             f"{type(state).__name__}: use a dict")
        return
    check_m(p, state, base, mode)
    check_count(FOREIGN + "ema_steps", state.get(FOREIGN + "ema_steps"))
    if base:
        for name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "master"):
            check_tensor(p, name, state.get(name), base)
        for name in ("step", "momentum_steps", "ema_steps"):
            check_count(name, state.get(name, 0))
    if base == "adam":
        missing = [name for name in ADAMS if state.get(name) is None]
        if 0 < len(missing) < len(ADAMS):
            raise ValueError(f"the state of a parameter of shape {tuple(p.shape)} lacks "
                             f"{missing[0]!r}: Adam needs all of {', '.join(ADAMS)}, or none to "
                             "begin anew")


def check_count(name: str, count: Any) -> None:
    """Refuse what is no number of steps; a count on a GPU is not read."""
    if isinstance(count, Tensor) and (count.numel() != 1 or count.is_complex()):
        raise ValueError(f"{name} in a state is a tensor of shape {tuple(count.shape)}, "
                         f"{count.dtype}: use a number of steps")
    if isinstance(count, Tensor) and count.device.type == "cpu":
        count = count.item()
    if not isinstance(count, Tensor) and not (
            is_number(count) and 0 <= count < 2**31 and int(count) == count):
        if count is not None or name == "step":
            raise ValueError(f"{name}={count!r} in a state: use a number of steps, at least 0")


def check_tensor(p: Tensor, name: str, value: object, base: str | None) -> None:
    """Refuse what cannot be a state tensor of p."""
    if not isinstance(value, Tensor):
        if base and value is not None:
            raise ValueError(f"{name} in a state is a {type(value).__name__}: use a tensor of "
                             f"shape {tuple(p.shape)}")
        return
    if value.layout is not torch.strided or value.is_complex() or value.device.type == "meta":
        raise ValueError(f"{name} in a state has {value.dtype}, {value.layout}, on {value.device}: "
                         "use a real, dense tensor")
    if not has_storage(local(value)):
        raise ValueError(f"{name} in a state has lost its memory, whose storage was freed: delete "
                         "it from the state to begin it anew")
    if value.shape != p.shape:
        raise ValueError(f"a saved state of shape {tuple(value.shape)} does not fit the "
                         f"parameter of shape {tuple(p.shape)}: load the state of this model")
    if is_sharded(p) and not is_sharded(value):
        raise ValueError(f"a saved state of shape {tuple(value.shape)} is not sharded, its "
                         "parameter is: load it through torch.distributed.checkpoint.state_dict")
