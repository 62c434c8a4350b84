"""What of a slot is public, under which name, and how a state that others changed comes back.

`optimizer.state` is the truth: `public` are the tensors that a layout puts there, and `adopt` takes
over whatever else is found in their place. Loading, copying, editing by hand and laying out anew
all go this way.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .distributed import is_sharded, like
from .entries import FOREIGN, Entry, check_entry, name_of_m, saved_m
from .hyper import FRIENDLY, GIVEN
from .interrupts import surely
from .memory import has_storage, storage_at
from .space import Slot, Space, local

# averages and momenta, and the counts of their updates
COUNTED = (("ema", "ema_steps"), ("sam_ema", "sam_ema_steps"),
           ("momentum_buffer", "momentum_steps"))
COUNTS = (*(count for _, count in COUNTED), "step")


def named(space: Space, slot: Slot, with_m: bool) -> dict[str, Tensor]:
    """The slot's own tensors by the names that `optimizer.state` has them under: v and u as torch's
    optimizers call them, m if there is one, the float32 master, and how often m and v were
    updated."""
    kind, own = space.kind, dict[str, Tensor]()
    prefix = "" if kind.base else FOREIGN
    if slot.m is not None and with_m:
        own[f"{prefix}{name_of_m(kind.mode)}"] = slot.m
    if kind.mode in FRIENDLY:
        own[prefix + "ema_steps"] = slot.m_steps
    if kind.base == "sgd-momentum":
        own.update(momentum_buffer=cast(Tensor, slot.v), momentum_steps=slot.v_steps)
    if kind.base == "adam":
        own.update(step=slot.v_steps, exp_avg=cast(Tensor, slot.v),
                   exp_avg_sq=cast(Tensor, slot.u))
    if kind.masters:
        own["master"] = slot.saved
    return own


def public(space: Space, slot: Slot, with_m: bool) -> dict[str, Tensor]:
    """The tensors that are put into `optimizer.state`: others over the same memory, or sharded as
    the parameter is."""
    return {name: like(slot.param, t) if is_sharded(slot.param) and name not in COUNTS
            else t.detach() for name, t in named(space, slot, with_m).items()}


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
        self.has_m, self.renewed = has_m, True
        self.tensors = {p: public(*place, has_m) for p, place in self.places.items()}

    def keep_m(self, taken: dict[Tensor, Entry]) -> None:
        """See whether there is an m after the state of these parameters was taken over."""
        has_m = self.mode not in GIVEN or any(
            self._m_in(entry) for entry in taken.values()) or (
            self.has_m and any(p not in taken for p in self.places))
        if has_m != self.has_m:
            self.show_m(has_m)

    def _m_in(self, entry: object) -> bool:
        return isinstance(entry, dict) and saved_m(entry, self.fused, self.mode) is not None

    def put(self, state: dict[Tensor, Entry], stepped: Collection[Tensor] = ()) -> None:
        """Put every slot's tensors into the state. A base that is not fused takes a parameter's
        state for set up where there is any, so beside such a base they wait until it has set its
        own up, or has written these parameters, `stepped`, without one. A base may skip steps."""
        for p, tensors in self.tensors.items():
            if self.fused or state.get(p) or p in stepped:
                state.setdefault(p, {}).update(tensors)
                self.visible.add(p)
            else:
                self.visible.discard(p)

    def aside(self, state: dict[Tensor, Entry], call: Callable[[], object]) -> None:
        """Call a step of a base that is not fused: where our tensors are all that a parameter's
        state has, the base sees none, and sets its own up if it keeps any."""
        ours = dict[Tensor, Entry]()

        def call_without_ours() -> None:
            for p, tensors in self.tensors.items():
                if (entry := state.get(p)) and entry.keys() <= tensors.keys():
                    ours[p] = entry
                    del state[p]
            call()

        def put_back() -> None:
            for p, entry in ours.items():
                state.setdefault(p, entry).update(entry)

        surely(call_without_ours, put_back)

    def hidden(self) -> dict[Tensor, Entry]:
        """What is not in the state yet."""
        return {p: tensors for p, tensors in self.tensors.items()
                if tensors and p not in self.visible}

    def nothing_of_ours(self) -> set[Tensor]:
        """The parameters with a gradient of which nothing is kept: an empty entry is in nobody's
        way, and tells torch.distributed.checkpoint that the optimizer has stepped."""
        return {p for p, tensors in self.tensors.items() if not tensors and p.grad is not None}

    def marks(self, params: Sequence[Tensor]) -> list[tuple[int, float]]:
        """What changes when a base writes these parameters, also through `.data`, whose writes
        torch does not count. Waits for the device."""
        return [(p._version, float(local(p).sum(dtype=self.places[p][0].kind.acc)))
                for p in params]

    def missing(self, state: dict[Tensor, Entry]) -> list[Tensor]:
        """The parameters in whose state something else is found, or nothing; or an m where there
        was none. Where ours is not shown yet, the base may have loaded a state with it."""
        return [p for p, tensors in self.tensors.items()
                if (p in self.visible or tensors.keys() & (state.get(p) or {}))
                and not is_shown(tensors, state.get(p))
                or not self.has_m and self._m_in(state.get(p))]

    def watched(self, dampened: bool) -> list[tuple[Tensor, Tensor, int]]:
        """Those of the tensors that a pass reads, with the buffer that each is a part of and the
        element at which it begins there. Of the counts it is Adam's, that of the official
        Friendly-SAM and that of a momentum that is `dampened`: to ask where the others are would
        cost every step host time, and they are only saved."""
        found = []
        for p, (space, slot) in self.places.items():
            kind, n = space.kind, len(space.slots)
            flats = {id(slot.m): (space.m, slot.offset), id(slot.v): (space.v, slot.offset),
                     id(slot.u): (space.u, slot.offset), id(slot.saved): (space.saved, slot.offset)}
            if kind.mode == "official":
                flats[id(slot.m_steps)] = space.steps, slot.number
            if kind.base == "adam" or (dampened and kind.base == "sgd-momentum"):
                flats[id(slot.v_steps)] = space.steps, n + slot.number
            for name, t in named(space, slot, self.has_m).items():
                flat, at = flats.get(id(t), (None, 0))
                if flat is not None:
                    found.append((t if is_sharded(p) else self.tensors[p][name], flat, at))
        return found

    def let_go(self, params: Sequence[Tensor], state: dict[Tensor, Entry]) -> None:
        """Give tensors of ours that are no longer in these parameters' state memory of their own:
        somebody may hold them, and put them back one day."""
        for p in params:
            there, own = state.get(p), self.tensors[p]
            if p not in self.visible or is_shown(own, there):
                continue
            fresh = public(*self.places[p], self.has_m)
            for name, t in own.items():
                if not (isinstance(there, dict) and there.get(name) is t):
                    memory = local(t)  # of a DTensor what it keeps, and not a view of that
                    memory.data = memory.clone()
                    own[name] = fresh[name]
            self.renewed = True

    def take_away(self, state: dict[Tensor, Entry], params: Collection[Tensor]) -> None:
        """Take the entries of parameters that have left the groups out of the state, where torch's
        optimizers would have none yet: empty, or ours alone and as a new one begins."""
        for p in params:
            own, entry = self.tensors[p], state.get(p)
            if isinstance(entry, dict) and entry.keys() <= own.keys() and all(
                    entry[name] is own[name] and is_as_begun(p, name, local(own[name]))
                    for name in entry):
                del state[p]


def is_as_begun(p: Tensor, name: str, t: Tensor) -> bool:
    """Whether a tensor of p's entry is what it is from construction: 0, or p itself. Waits for the
    device."""
    if name != "master":
        return has_storage(t) and not t.any()
    w = local(p)
    return ((w.shape, w.device) == (t.shape, t.device) and has_storage(w) and has_storage(t)
            and torch.equal(w.to(t.dtype), t))


def is_shown(tensors: dict[str, Tensor], entry: object) -> bool:
    """Whether a parameter's state has these very tensors."""
    return isinstance(entry, dict) and all(entry.get(name) is t for name, t in tensors.items())


def merged(state: dict[Tensor, Entry], hidden: dict[Tensor, Entry]) -> dict[Tensor, Entry]:
    """The state with what is `hidden`, too; where both have something, the state's."""
    return {**state, **{p: {**own, **(state.get(p) or {})} for p, own in hidden.items()}}


@torch.no_grad()
def adopt(shown: Shown, params: Sequence[Tensor], state: dict[Tensor, Entry]) -> None:
    """Take over the state of these parameters where it is not what is shown; what it lacks starts
    anew, as in torch.

    Raises:
        ValueError: a tensor that does not fit its parameter; nothing has changed then.
    """
    entries = [state.get(p) or {} for p in params]
    for p, entry in zip(params, entries, strict=True):
        kind = shown.places[p][0].kind
        check_entry(p, entry, kind.base and kind.base.partition("-")[0], kind.mode)
    entries = [without_stale_counts(entry, shown.tensors[p])
               for p, entry in zip(params, entries, strict=True)]
    shown.let_go(params, state)
    flats = {flat.untyped_storage().data_ptr() for p in params
             for flat in buffers(shown.places[p][0])}
    entries = [apart(entry, flats) for entry in entries]
    for p, entry in zip(params, entries, strict=True):
        load_slot(*shown.places[p], entry)
    shown.keep_m(dict(zip(params, entries, strict=True)))


def without_stale_counts(entry: Entry, own: dict[str, Tensor]) -> Entry:
    """The state without a count of ours beside an average or momentum of somebody else's, which
    was updated once at least."""
    pairs = [(name, count) for name, count in COUNTED if name in own
             and entry.get(name) is not own[name] and entry.get(count) is own[count]]
    return {k: x for k, x in entry.items() if k not in {count for _, count in pairs}}


def buffers(space: Space) -> list[Tensor]:
    """The flat buffers of which parts are in the state."""
    return [t for t in (space.saved, space.m, space.v, space.u, space.steps) if t is not None]


def apart(entry: Entry, flats: set[int]) -> Entry:
    """The same state, with copies of what lies in these buffers, which loading writes: two entries
    may have changed places."""
    return {name: x.clone() if isinstance(x, Tensor) and storage_at(local(x)) in flats else x
            for name, x in entry.items()}


def load_slot(space: Space, slot: Slot, state: Entry) -> None:
    """Copy a state into the slot; what is not in `state` starts anew."""
    v_name, v_count = (("exp_avg", "step") if space.kind.base == "adam"
                       else ("momentum_buffer", "momentum_steps"))
    fused = bool(space.kind.base)
    m, v = saved_m(state, fused, space.kind.mode), state.get(v_name) if fused else None
    fill(slot.m, m)
    fill(slot.v, v)
    fill(slot.u, state.get("exp_avg_sq"))
    m_count = state.get(FOREIGN + "ema_steps", state.get("ema_steps"))
    set_count(slot.m_steps, 0 if m is None else m_count)
    set_count(slot.v_steps, 0 if v is None else state.get(v_count))
    if space.kind.masters:
        slot.saved.copy_(local(state["master"]) if "master" in state else local(slot.param))


def set_count(own: Tensor, count: Any) -> None:
    """Of what is there without one, it was updated once at least."""
    if isinstance(count, Tensor):
        own.copy_(count.reshape(()))
    else:
        own.fill_(1 if count is None else int(count))


def fill(own: Tensor | None, value: Tensor | None) -> None:
    if own is not None:
        own.zero_() if value is None else own.copy_(local(value))
