"""What of a slot is public, under which name, and how a state that others changed comes back.

`optimizer.state` is the truth: `public` are the tensors that a layout puts there, and `adopt` takes
over whatever else is found in their place. Loading, copying, editing by hand and laying out anew
all go this way.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from sys import getrefcount
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from .checks import is_number
from .distributed import is_sharded, like
from .hyper import FRIENDLY, GIVEN, KEEPING
from .memory import has_storage
from .space import Slot, Space, local

State = dict[str, Any]  # of one parameter
M = ("ema", "full_gradient", "g_v")  # m's names: each is another thing
OWN = (*M, "ema_steps")  # SAM's own names
FOREIGN = "sam_"  # begins them beside a base that is not fused, which may use any name itself
# averages and momenta, and the counts of their updates
COUNTED = (("ema", "ema_steps"), ("sam_ema", "sam_ema_steps"),
           ("momentum_buffer", "momentum_steps"))
ADAMS = ("step", "exp_avg", "exp_avg_sq")
PUBLISHED = ("old_p", "momentum")  # what the public SAM and F-SAM classes save, and no base


def public(space: Space, slot: Slot, with_m: bool) -> dict[str, Tensor]:
    """The slot's own tensors as `optimizer.state` has them: v and u under the names that torch's
    optimizers use, m if there is one, the float32 master, and how often m and v were updated."""
    kind, state = space.kind, dict[str, Tensor]()
    prefix = "" if kind.base else FOREIGN
    if slot.m is not None and with_m:
        state[f"{prefix}{name_of_m(kind.mode)}"] = like(slot.param, slot.m)
    if kind.mode in FRIENDLY:
        state[prefix + "ema_steps"] = slot.m_steps
    if kind.base == "sgd-momentum":
        state.update(momentum_buffer=like(slot.param, slot.v), momentum_steps=slot.v_steps)
    if kind.base == "adam":
        state.update(step=slot.v_steps, exp_avg=like(slot.param, slot.v),
                     exp_avg_sq=like(slot.param, slot.u))
    if kind.masters:
        state["master"] = like(slot.param, slot.saved)
    return state


def places(space: Space, slot: Slot, i: int) -> list[tuple[Tensor, Tensor, int]]:
    """Those of the tensors of space.slots[i] that `public` names and a pass reads, with the buffer
    that each is a part of and the element at which it begins there. Of the counts it is Adam's and
    that of the official Friendly-SAM: to ask where the others are would cost every step host time,
    and no other code knows them by name."""
    kind, n = space.kind, len(space.slots)
    parts = [(slot.m, space.m, slot.offset), (slot.v, space.v, slot.offset),
             (slot.u, space.u, slot.offset),
             (slot.saved, space.saved if kind.masters else None, slot.offset),
             (slot.m_steps, space.steps if kind.mode == "official" else None, i),
             (slot.v_steps, space.steps if kind.base == "adam" else None, n + i)]
    return [(view, flat, at) for view, flat, at in parts if view is not None and flat is not None]


def bases_part(state: Any) -> Any:
    """One parameter's saved state without what is not the base optimizer's. An entry of no
    parameter's, such as MADGRAD's counter, may be of any type."""
    if not isinstance(state, dict):
        return state
    others = {FOREIGN + name for name in OWN} | (set(PUBLISHED) if "old_p" in state else set())
    if is_old_form(state):
        others |= set(OWN)
    return {k: x for k, x in state.items() if k not in others}


def is_old_form(state: State) -> bool:
    """Whether SAM's own names stand without their prefix: saved by a fused optimizer, or by a
    version of fastsam up to 0.1."""
    return "ema_steps" in state or "full_gradient" in state or "g_v" in state


def without_published(state: State) -> State:
    """One parameter's saved state without what the public classes keep for a step's time."""
    return {k: x for k, x in state.items() if k not in PUBLISHED or "old_p" not in state}


def keep_decoupled(groups: list[State], base: Optimizer) -> None:
    """AdamW stays AdamW, also with the groups of an Adam, as in torch."""
    if type(base) is AdamW:
        for group in groups:
            group["decoupled_weight_decay"] = True


def name_of_m(mode: str | None) -> str | None:
    """m's public name; None where there is no m."""
    if mode in (None, "gsam"):
        return None
    return "ema" if mode in FRIENDLY else "g_v" if mode == "looksam" else "full_gradient"


def saved_ms(state: State, fused: bool) -> dict[str, tuple[str, Tensor]]:
    """The m of every class in a saved state, by m's name, with the key that it has there: ours, or
    that of the published F-SAM code ("momentum"). Beside a base that is not fused, a key without
    our prefix may be the base's own."""
    keys = [("ema", "momentum")] if "old_p" in state else []
    if fused or is_old_form(state):
        keys += [(name, name) for name in M]
    keys += [(name, FOREIGN + name) for name in M]
    return {name: (key, state[key]) for name, key in keys if isinstance(state.get(key), Tensor)}


def saved_m(state: State, fused: bool, mode: str | None) -> Tensor | None:
    """This class's m in a saved state."""
    return saved_ms(state, fused).get(cast(str, name_of_m(mode)), (None, None))[1]


def check_m(p: Tensor, state: State, base: str | None, mode: str | None) -> None:
    """Refuse an m that does not fit, or that is another class's alone."""
    mine, found = name_of_m(mode), saved_ms(state, bool(base))
    if mine is None:
        return
    if found and mine not in found:
        key = next(iter(found.values()))[0]
        raise ValueError(f"a state has {key!r}, which is another class's, where this one keeps "
                         f"{mine!r}: delete it from the state to begin {mine!r} anew")
    check_tensor(p, mine, found.get(mine, (None, None))[1], base)


def check_entry(p: Tensor, state: State, base: str | None, mode: str | None) -> None:
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


def merged_groups(mine: list[State], theirs: list[State]) -> list[State]:
    """The saved groups, with this optimizer's value for every key that they lack. Another number
    of groups stays as it is, for torch to refuse in its own words."""
    if len(mine) != len(theirs):
        return theirs
    return [{**{k: x for k, x in group.items() if k != "params"}, **saved}
            for group, saved in zip(mine, theirs, strict=True)]


def refuse_others_keys(mine: list[State], theirs: list[State], states: Collection[State],
                       mode: str | None) -> None:
    """Refuse a group key that another class has under a name of this one's: `eta` is ASAM's, which
    has a `scale` too, or FisherSAM's; `alpha` is LookSAM's, whose states have a g_v, or GSAM's.

    Args:
        states: the saved states of the parameters.
        mode: as `Kind.mode`.
    """
    entries = [x for x in states if isinstance(x, dict) and x]
    looks = any(FOREIGN + "g_v" in x or "g_v" in x for x in entries)
    for own, saved in zip(mine, theirs, strict=False):
        others = ["eta"] if ("scale" in own) != ("scale" in saved) else []
        others += ["alpha"] if mode in KEEPING and entries and looks != (mode == "looksam") else []
        for key in others:
            if key in own and key in saved:
                raise ValueError(f"{key}={saved[key]!r} in a state is another class's {key}: "
                                 f"delete it from the groups to keep {own[key]!r}")


def fitting(state_dict: State, groups: list[State], params: Sequence[Tensor], base: str | None,
            mode: str | None) -> tuple[list[State], list[State]]:
    """The groups and the parameters' states that a saved state gives.

    Raises:
        ValueError: it is another class's, or another model's.
    """
    theirs, saved = state_dict["param_groups"], state_dict["state"]
    refuse_others_keys(groups, theirs, saved.values(), mode)
    groups = merged_groups(groups, theirs)
    states = [saved.get(i, {}) for group in groups for i in group["params"]]
    for p, state in zip(params, states, strict=False):
        check_entry(p, state, base, mode)
    return groups, states


class Shown:
    """The tensors that a layout shows in `optimizer.state`, by parameter, and the whole of the
    state as it was when they were last put there.

    Args:
        spaces: of the layout.
    """

    def __init__(self, spaces: Sequence[Space]):
        self.places = {slot.param: (space, slot) for space in spaces for slot in space.slots}
        self.fused = all(space.kind.base for space in spaces)
        self.mode = spaces[0].kind.mode
        self.show_m(self.mode not in GIVEN)
        self.visible = set[Tensor]()  # the parameters whose tensors are in the state (see `put`)

    def show_m(self, has_m: bool) -> None:
        """m is among the tensors, of every parameter, if there is one: all of it or none, since
        what is given for one parameter is 0 for the others."""
        self.has_m = has_m
        self.tensors = {p: public(*place, has_m) for p, place in self.places.items()}

    def keep_m(self, taken: dict[Tensor, State]) -> None:
        """See whether there is an m after the state of these parameters was taken over."""
        has_m = self.mode not in GIVEN or any(
            self._m_in(entry) for entry in taken.values()) or (
            self.has_m and any(p not in taken for p in self.places))
        if has_m != self.has_m:
            self.show_m(has_m)

    def _m_in(self, entry: object) -> bool:
        return isinstance(entry, dict) and saved_m(entry, self.fused, self.mode) is not None

    def put(self, state: dict[Tensor, State], stepped: Collection[Tensor] = ()) -> None:
        """Put every slot's tensors into the state. A base that is not fused takes a parameter's
        state for set up where there is any, so beside such a base they wait until it has set its
        own up, or has written these parameters, `stepped`, without one. A base may skip steps."""
        for p, tensors in self.tensors.items():
            if self.fused or state.get(p) or p in stepped:
                state.setdefault(p, {}).update(tensors)
                self.visible.add(p)
            else:
                self.visible.discard(p)

    @contextmanager
    def aside(self, state: dict[Tensor, State]) -> Iterator[None]:
        """Around a step of a base that is not fused: where our tensors are all that a parameter's
        state has, the base sees none, and sets its own up if it keeps any."""
        ours = {p: state.pop(p) for p, tensors in self.tensors.items()
                if (entry := state.get(p)) and entry.keys() <= tensors.keys()}
        try:
            yield
        finally:
            for p, entry in ours.items():
                state.setdefault(p, entry).update(entry)

    def hidden(self) -> dict[Tensor, State]:
        """What is not in the state yet."""
        return {p: tensors for p, tensors in self.tensors.items()
                if tensors and p not in self.visible}

    def marks(self, params: Sequence[Tensor]) -> list[tuple[int, float]]:
        """What changes when a base writes these parameters, also through `.data`, whose writes
        torch does not count. Waits for the device."""
        return [(p._version, float(local(p).sum(dtype=self.places[p][0].kind.acc)))
                for p in params]

    def missing(self, state: dict[Tensor, State]) -> list[Tensor]:
        """The parameters in whose state something else is found, or nothing; or an m where there
        was none. Where ours is not shown yet, the base may have loaded a state with it."""
        return [p for p, tensors in self.tensors.items()
                if (p in self.visible or tensors.keys() & (state.get(p) or {}))
                and not is_shown(tensors, state.get(p))
                or not self.has_m and self._m_in(state.get(p))]


    def count_references(self) -> None:
        """Note what refers to our tensors while nobody else has them: before they are shown."""
        self.references = {id(t): n for tensors in self.tensors.values()
                           for t, n in zip(tensors.values(), references(tensors), strict=True)}

    def is_held(self, p: Tensor, entry: object) -> bool:
        """Whether somebody else refers to a tensor of ours that is not in p's entry any more."""
        tensors, there = self.tensors[p], entry if isinstance(entry, dict) else {}
        return any(there.get(name) is not t and n > self.references.get(id(t), 0)
                   for (name, t), n in zip(tensors.items(), references(tensors), strict=True))


def references(tensors: dict[str, Tensor]) -> list[int]:
    return [getrefcount(t) for t in tensors.values()]


def is_shown(tensors: dict[str, Tensor], entry: object) -> bool:
    """Whether a parameter's state has these very tensors."""
    return isinstance(entry, dict) and all(entry.get(name) is t for name, t in tensors.items())


def merged(state: dict[Tensor, State], hidden: dict[Tensor, State]) -> dict[Tensor, State]:
    """The state with what is `hidden`, too; where both have something, the state's."""
    return {**state, **{p: {**own, **(state.get(p) or {})} for p, own in hidden.items()}}


@torch.no_grad()
def adopt(shown: Shown, params: Sequence[Tensor], state: dict[Tensor, State]) -> None:
    """Take over the state of these parameters where it is not what is shown; what it lacks starts
    anew, as in torch.

    Raises:
        ValueError: a tensor that does not fit its parameter; nothing has changed then.
    """
    entries = [state.get(p) or {} for p in params]
    for p, entry in zip(params, entries, strict=True):
        kind = shown.places[p][0].kind
        check_entry(p, entry, kind.base and kind.base.partition("-")[0], kind.mode)
    flats = {flat.untyped_storage().data_ptr() for p in params
             for flat in buffers(shown.places[p][0])}
    entries = [apart(without_stale_counts(entry, shown.tensors[p]), flats)
               for p, entry in zip(params, entries, strict=True)]
    for p, entry in zip(params, entries, strict=True):
        load(*shown.places[p], entry)
    shown.keep_m(dict(zip(params, entries, strict=True)))


def without_stale_counts(entry: State, own: dict[str, Tensor]) -> State:
    """The state without a count of ours beside an average or momentum of somebody else's, which
    was updated once at least."""
    pairs = [(name, count) for name, count in COUNTED if name in own
             and entry.get(name) is not own[name] and entry.get(count) is own[count]]
    return {k: x for k, x in entry.items() if k not in {count for _, count in pairs}}


def buffers(space: Space) -> list[Tensor]:
    """The flat buffers of which parts are in the state."""
    return [t for t in (space.saved, space.m, space.v, space.u, space.steps) if t is not None]


def apart(entry: State, flats: set[int]) -> State:
    """The same state, with copies of what lies in these buffers, which loading writes: two entries
    may have changed places."""
    return {name: x.clone() if isinstance(x, Tensor) and not is_sharded(x)
            and x.untyped_storage().data_ptr() in flats else x for name, x in entry.items()}


def load(space: Space, slot: Slot, state: State) -> None:
    """Copy a state into the slot; what is not in `state` starts anew."""
    v_name, v_count = (("exp_avg", "step") if space.kind.base == "adam"
                       else ("momentum_buffer", "momentum_steps"))
    fused = bool(space.kind.base)
    m, v = saved_m(state, fused, space.kind.mode), state.get(v_name) if fused else None
    fill(slot.m, m)
    fill(slot.v, v)
    fill(slot.u, state.get("exp_avg_sq"))
    m_count = state.get(FOREIGN + "ema_steps", state.get("ema_steps", 1))
    set_count(slot.m_steps, 0 if m is None else m_count)
    set_count(slot.v_steps, 0 if v is None else state.get(v_count, 1))
    if space.kind.masters:
        slot.saved.copy_(local(state["master"]) if "master" in state else local(slot.param))


def set_count(own: Tensor, count: Any) -> None:
    if isinstance(count, Tensor):
        own.copy_(count.reshape(()))
    else:
        own.fill_(int(count))


def fill(own: Tensor | None, value: Tensor | None) -> None:
    if own is not None:
        own.zero_() if value is None else own.copy_(local(value))


def as_torch_saves(state: State) -> State:
    """One parameter's state with Adam's step counter as torch's Adam wants it: on the CPU, in
    float32."""
    if not isinstance(state, dict):
        return state
    step = {"step": state["step"].float().cpu()} if "exp_avg" in state else {}
    return {**state, **step}


@contextmanager
def without_hooks(optimizer: Any, *names: str) -> Iterator[list[OrderedDict]]:
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
def hooks_around(optimizer: Any, state_dict: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run the hooks of load_state_dict on the whole state, before the block and after it, and
    none of them inside."""
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict
    with without_hooks(optimizer, "_optimizer_load_state_dict_pre_hooks",
                       "_optimizer_load_state_dict_post_hooks") as (_, after):
        yield state_dict
    for hook in after.values():
        hook(optimizer)
