"""Where everything lies now, and the reading of a pass.

`param_groups`, `state` and the parameters' memory are the truth. A `Layout` remembers what it was
made for as the very objects and addresses it saw, so that one comparison of lists tells whether
anything may have changed; only then is it looked at closely, followed, or refused by name.
"""

from collections.abc import Collection, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import distributed
from .checks import check_groups, names_of, refuse_shared, refuse_twice, refuse_unusable
from .choose import choose
from .gradients import PLAIN, in_one_dtype, only, out_of, readable
from .hyper import Hyper, hyper_row, scaling_of
from .memory import Memory, addresses, forms, is_part, lies_as, same, table_of
from .passes import Climb, Pass
from .shown import Shown, adopt, buffers, merged
from .space import NOWHERE, Kind, Space, Tables, local, upload

Group = dict[str, Any]
BASE_KEYS = {None: (),
             "sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize",
                     "differentiable"),
             "adam": ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize",
                      "differentiable", "decoupled_weight_decay")}
COLUMN_OF = {True: "g1", False: "g2"}  # a first pass's gradients, and a second's, in `Tables`
CONSTANTS = (int, float, bool, str, type(None))


class Method(NamedTuple):
    """What a class climbs along, under the names of `Traits`: no arguments of its users'."""

    mode: str | None = None
    projection: str | None = None
    scales_with: str = "weights"
    along_v: bool = False


class Traits(NamedTuple):
    """What an optimizer is, from its construction on.

    Attributes:
        mode: as `Kind.mode`.
        projection: what sigma is multiplied with, "cosine" or "orthogonal"; None: nothing.
        base: the fused base optimizer, "sgd" or "adam", or None.
        masters: whether 16-bit parameters get float32 masters.
        scales_with: what an adaptive group's T depends on, "weights" or "gradient".
        backend: the one that was asked for, or None.
        own: the names of its own group keys.
        along_v: the climb is along -v, the base's momentum, and comes before the pass.
        shared: those of `own` that the base has too, as Adadelta has "rho"; its values are kept
            under "base_" and the name.
    """

    mode: str | None
    projection: str | None
    base: str | None
    masters: bool
    scales_with: str
    backend: str | None
    own: tuple[str, ...]
    along_v: bool = False
    shared: tuple[str, ...] = ()


class Values(NamedTuple):
    """The groups' values as they were read: the objects themselves, and what follows from them.

    Attributes:
        seen: the values of every group's keys, as objects.
        volatile: one of them may change in place, such as a tensor.
        rows: each group's hyper-parameters.
        perturb: for each space and slot, whether it climbs.
        ab, scaling: for each space, as in `Pass`.
    """

    seen: list[Any]
    volatile: bool
    rows: list[Hyper]
    perturb: list[list[bool]]
    ab: list[list[tuple[float, float]]]
    scaling: list[str | None]

    def numbers(self) -> list:
        """What the backends branch on, without waiting for a device: of tensors where they lie."""
        return [[[x.data_ptr() if isinstance(x, Tensor) else x for x in row] for row in self.rows],
                self.perturb, self.ab]


class Last(NamedTuple):
    """A pass that was read, and what it was read from: while that is as it was, so is the pass.

    Attributes:
        memory: where parameters and gradients lay.
        values, tables: the very objects.
        w: the column of the weights' addresses, the very list.
        read: the pass, without its gradients.
    """

    memory: Memory
    values: Values
    tables: Tables
    w: list[int] | None
    read: Pass


class Layout:
    """The spaces of an optimizer's parameters, the backend that serves them, and what was last
    seen of groups, state and memory.

    Args:
        traits: of the optimizer.
        groups: its param_groups.

    Raises:
        ValueError: a parameter or a group that is refused, or a backend that cannot run.
    """

    def __init__(self, traits: Traits, groups: Sequence[Group]):
        self.traits = traits
        self.members = [list(group["params"]) for group in groups]
        self.by_names = "scale" in traits.own  # ASAM's T may depend on them
        self.names = self._names(groups)
        if not self.params:
            raise ValueError("the groups have no parameters: an optimizer needs one at least")
        self.keys = itemgetter(*traits.own, *("base_" + key for key in traits.shared),
                               *BASE_KEYS[traits.base])
        self.seen(groups)
        self.spaces = self._make_spaces(groups)
        self.backend, self.report = choose(traits.backend, self.spaces)
        self.shown = Shown(self.spaces)
        self.tables = [Tables(space) for space in self.spaces]
        if traits.along_v:
            for space in self.spaces:
                space.cells.inv_scale1.fill_(-1)  # a first pass reads v: this makes it -v
        self.values: Values = cast(Values, None)  # until they are read
        self._brought: list[list | None] = [None] * len(self.spaces)  # see Space.bring_hyper
        self._set = dict[tuple[int, str], float]()  # cells that may not be at this neutral value
        self._last: dict[tuple[int, bool], Last] = {}  # by space, and whether a first pass
        self._state: tuple = (None, [])  # the state, and all in it, as last shown
        self.containers: tuple = (groups, None)  # of groups and state, as they were last seen
        self.groups = list(groups)  # the same, also where the list was emptied since
        self._normed: list | None = None  # the v and the slots whose norm is in the partials
        self._dampened = False  # whether a pass reads how often v was updated, beside Adam's
        self._watch()
        self._on_gpus = self._buffers_on_gpus()
        self._plain = [PLAIN.issuperset(map(type, space.params))
                       for space in self.spaces]

    def _make_spaces(self, groups: Sequence[Group]) -> tuple[Space, ...]:
        """One space for all parameters of one device, dtype and sharding."""
        refuse_twice(self.params)
        alike: dict[tuple, list] = {}
        for i, group in enumerate(groups):
            for p, name in zip(group["params"], names_of(group), strict=True):
                refuse_unusable(p)
                key = p.device, p.dtype, distributed.shards_of(p)
                alike.setdefault(key, []).append((p, name, i))
        refuse_shared(self.params)
        base, masters = self.traits.base, self.traits.masters
        if base == "sgd" and any(group["momentum"] for group in groups):
            base = "sgd-momentum"
        return tuple(
            Space.of(Kind(device, dtype, shards, self.traits.mode, base,
                          masters and dtype.itemsize == 2), members, len(groups))
            for (device, dtype, shards), members in alike.items())

    def _watch(self) -> None:
        """Remember where the views that are in the state lie, and in which buffer."""
        self._buffers = [(*place, place[0].stride())
                         for place in self.shown.watched(self._dampened)]
        self._views = [view for view, *_ in self._buffers]
        self._addresses, self._have_same_forms = addresses(self._views), forms(self._views)
        self.shown.renewed = False

    @property
    def params(self) -> list[Tensor]:
        return [p for params in self.members for p in params]

    def has(self, groups: Sequence[Group]) -> bool:
        """Whether the groups have the parameters that this is a layout of, in the same places and
        by the same names."""
        return (same([[*group["params"]] for group in groups], self.members)
                and self.names == self._names(groups))

    def _names(self, groups: Sequence[Group]) -> list | None:
        """The parameters' names, where they matter."""
        return [[*names_of(group)] for group in groups] if self.by_names else None

    # ---- the groups' values

    def follow_values(self, groups: Sequence[Group]) -> bool:
        """Bring the groups' current values (a scheduler may have changed them) to the device.

        Returns:
            Whether this layout has room for them: False where a group of an SGD that had no
            momentum, and so no v, has one now. Nothing is brought then.

        Raises:
            ValueError: a value that is refused; nothing has changed then.
        """
        seen = self.seen(groups)
        old = self.values
        same = old is not None and len(seen) == len(old.seen) and all(map(is_, seen, old.seen))
        if same and not old.volatile:
            return True
        check_groups(groups, self.traits.own, self.traits.base, self.traits.along_v,
                     self.traits.mode)
        if self.traits.base == "sgd" and self.spaces[0].kind.base == "sgd" and any(
                group["momentum"] for group in groups):
            return False
        values = self._read_values(groups, seen)
        self._bring(values.rows)
        if same and values.numbers() == old.numbers():
            return True  # at most tensors changed, in place: what was read (`Last`) stays true
        for i, space in enumerate(self.spaces):
            if old is None or values.ab[i] != old.ab[i]:
                upload(values.ab[i], space.scalings)
        self.values = values
        if self._dampened != any(row.dampening for row in values.rows):
            self._dampened = not self._dampened
            self._watch()
            self._addresses = []  # some may have been elsewhere before they were watched
        return True

    def seen(self, groups: Sequence[Group]) -> list[Any]:
        """The values of every group's keys. ValueError: a group lacks one."""
        try:
            return [*chain.from_iterable(map(self.keys, groups))]
        except KeyError as error:
            raise ValueError(f"a parameter group lacks {error}: add groups with "
                             "add_param_group, and load a state of the base's alone with "
                             "load_state_dict of this optimizer, which fill it in") from None

    def _read_values(self, groups: Sequence[Group], seen: list) -> Values:
        traits = self.traits
        own = [{key: group[key] for key in traits.own} for group in groups]
        ab = [[scaling_of(own[s.group], traits.scales_with, s.name, len(s.shape))
               for s in space.slots] for space in self.spaces]
        return Values(
            seen, not all(map(is_constant, seen)),
            [hyper_row(group, traits.mode, traits.base) for group in groups],
            [[bool(groups[s.group]["perturb"]) for s in space.slots] for space in self.spaces],
            ab, [traits.scales_with if any(a for a, _ in pairs) else None for pairs in ab])

    def _bring(self, rows: list[Hyper]) -> None:
        if any(tables.late for tables in self.tables):
            return  # a graph is captured, whose every replay comes after a bringing of its own
        for i, space in enumerate(self.spaces):
            self._brought[i] = space.bring_hyper(rows, self._brought[i])

    def set_cell(self, i: int, name: str, value: Tensor | None, neutral: float) -> None:
        """Copy a device value into a cell of space i's control; None puts it back to neutral."""
        if value is not None:
            self._set[i, name] = neutral
            getattr(self.spaces[i].cells, name).copy_(value, non_blocking=True)
        elif (i, name) in self._set:
            getattr(self.spaces[i].cells, name).fill_(neutral)
            del self._set[i, name]

    def clear_cells(self) -> None:
        """Put all cells back to neutral before a graph. They still count as set, as it may set them
        again."""
        for (i, name), neutral in self._set.items():
            getattr(self.spaces[i].cells, name).fill_(neutral)

    # ---- the state

    def follow_state(self, state: dict[Tensor, Any]) -> None:
        """Take over what others changed in the optimizer's state.

        Raises:
            ValueError: a tensor that does not fit its parameter; nothing has changed then.
        """
        if not isinstance(state, dict):
            raise ValueError(f"the state is a {type(state).__name__}: use a dict of parameters")
        if not self._is_as_seen(state):
            changed = self.shown.missing(state)
            if changed:
                adopt(self.shown, changed, state)
            self.show(state)

    def is_untouched(self, state: dict[Tensor, Any]) -> bool:
        """Whether the state has what is shown there, where it was."""
        return self.has_its_memory() and (
            self._is_as_seen(state) or not self.shown.missing(state))

    def has_its_memory(self, in_order: bool = True) -> bool:
        """Whether averages, momenta, masters and counts are still in the buffers: `.data = ...`
        takes one out. A whole buffer may move, as by `share_memory_()`, but not on a GPU, where
        prepared launches and graphs have its address.

        Args:
            in_order: look also whether one was turned where it lies.
        """
        now = addresses(self._views)
        if now == self._addresses and (not in_order or self._have_same_forms(*self._views)):
            return True
        if not all(is_part(*place) for place in self._buffers) or (
                self._buffers_on_gpus() != self._on_gpus):
            return False
        self._addresses, self._have_same_forms = now, forms(self._views)
        return True

    def _buffers_on_gpus(self) -> list[int]:
        return addresses([flat for space in self.spaces if space.kind.device.type != "cpu"
                          for flat in buffers(space)])

    def show(self, state: dict[Tensor, Any], stepped: Collection[Tensor] = ()) -> None:
        """Put the slots' tensors into the state (see `Shown.put`), and remember it."""
        self.shown.put(state, stepped)
        if self.shown.renewed:
            self._watch()
        try:
            self._state = (state, [[*state], [*map(dict.copy, state.values())]])
        except TypeError:  # an entry that is no dict: look closely every time
            self._state = (None, [])

    def _is_as_seen(self, state: dict[Tensor, Any]) -> bool:
        seen, entries = self._state
        return state is seen and same([[*state], [*state.values()]], entries)

    def inherit(self, old: "Layout", state: dict[Tensor, Any], climbs: Sequence[Climb],
                ) -> list[Climb]:
        """Go on where another layout of these parameters, or some of them, was.

        Args:
            old: the other layout.
            state: the optimizer's.
            climbs: what climbed in `old`, whose saved weights come along.

        Returns:
            The climbs in this layout.
        """
        adopt(self.shown, self.params, merged(state, old.shown.hidden()))
        first, was = self.spaces[0], old.spaces[0]
        first.cells.skipped.copy_(was.cells.skipped)
        first.radii[0, 0] = sum(space.radii[0].sum().to(first.radii) for space in old.spaces)
        for space in self.spaces:
            space.cells.norm.copy_(was.cells.norm)
            space.cells.ok.copy_(was.cells.ok)
        climbed = {id(slot.param): slot for climb in climbs
                   for slot, moved in zip(climb.space.slots, climb.moved, strict=True) if moved}
        for space in self.spaces:
            for slot in space.slots:
                old_slot = climbed.get(id(slot.param))
                if old_slot is not None:
                    slot.saved.copy_(old_slot.saved)
                    if slot.kept is not None:
                        slot.kept.copy_(old_slot.kept)
        moved = [[id(slot.param) in climbed for slot in space.slots] for space in self.spaces]
        # their gradients are gone: any address tells that they climbed (see Climb.table)
        return [Climb(space, m, tables.bring("g1", [NOWHERE * x for x in m])) for space, m, tables
                in zip(self.spaces, moved, self.tables, strict=True)] if climbs else []

    # ---- the norm of v, which a step leaves to the next climb

    def climbing_along_v(self) -> list[list[bool]]:
        """For each space and slot, whether it climbs along -v: frozen ones do not."""
        return [[taken and slot.param.requires_grad
                 for slot, taken in zip(space.slots, perturb, strict=True)]
                for space, perturb in zip(self.spaces, self.values.perturb, strict=True)]

    def keep_norm(self, climbing: Sequence[Sequence[bool]] | None) -> None:
        """Remember that the partials are those of v as it is now, over these slots of each space;
        for None, that they are not."""
        self._normed = None if climbing is None else self._to_norm(climbing)

    def has_norm(self) -> bool:
        """Whether the partials are what `norm` would make of v, over what climbs now."""
        return (self._normed is not None
                and self._normed == self._to_norm(self.climbing_along_v()))

    def _to_norm(self, climbing: Sequence[Sequence[bool]]) -> list:
        return [(version(space.v), list(moved))
                for space, moved in zip(self.spaces, climbing, strict=True)]

    # ---- the memory

    def read(self, i: int, first: bool, tables: Tables) -> Pass | None:
        """What a pass reads of space i. Where all but the gradients' addresses is as it was at the
        last such pass, that one is used again; else memory and gradients are looked at closely.

        Args:
            first: it is a first pass, in which groups with perturb=False take no part.
            tables: where the addresses go.

        Returns:
            The pass; None where a parameter's memory is laid out in another order: make a new
            layout.

        Raises:
            ValueError: a gradient that is refused, or parameters that share memory.
            RuntimeError: a parameter changed its device, dtype or shape.
        """
        space, values = self.spaces[i], self.values
        along_v = first and self.traits.along_v
        grads: list[Tensor | None] = (
            [slot.v if slot.param.requires_grad else None for slot in space.slots] if along_v
            else [p.grad for p in space.params])
        last = self._last.get((i, first))
        now = None
        if last is not None and last.values is values and last.tables is tables and (
                last.w is tables.held("w")):
            now = last.memory.gradients_now(space.params, grads)
        if last is not None and now is not None:
            taken = only(values.perturb[i] if first else None, grads)
            if now != last.memory.g:
                whole = taken is grads and len(now) == len(grads) and 0 not in now
                tables.bring(COLUMN_OF[first], now if whole else table_of(taken))
                last.memory.g = now
            return last.read._replace(g=taken)
        return self._read_closely(i, first, grads, tables)

    def _read_closely(self, i: int, first: bool, grads: list[Tensor | None], tables: Tables,
                      ) -> Pass | None:
        """`read`, with a look at the memory of everything."""
        space, values = self.spaces[i], self.values
        along_v = first and self.traits.along_v
        with torch.no_grad():
            w = [local(p) for p in space.params]
            if not all(map(lies_as, w, space.slots)):
                return None
            w_at = table_of(w)
            if tables.held("w") != w_at or not space.dense:
                refuse_shared(self.params)
            usable = grads if along_v else out_of(
                self.params, [None if g is None else readable(slot, g)
                              for slot, g in zip(space.slots, grads, strict=True)])
            usable, dtype = in_one_dtype(usable, space.kind.acc)
        self._last.pop((i, first), None)
        taken = only(values.perturb[i] if first else None, usable)
        p = Pass(space, w, taken, dtype, values.rows, values.scaling[i], values.ab[i],
                 space.cells.inv_scale1 if along_v else None, tables.bring("w", w_at),
                 tables.bring(COLUMN_OF[first], table_of(taken)), along_v=along_v)
        if self._plain[i] and all(map(is_, usable, grads)):
            self._last[i, first] = Last(Memory(space.params, grads), values, tables,
                                        tables.held("w"), p._replace(g=[]))
        return p

    def part(self, i: int, p: Pass, takes_part: Sequence[bool]) -> Pass:
        """A second pass over space i, of these slots alone."""
        g = only(takes_part, p.g)
        if g is p.g:
            return p
        return p._replace(g=g, g_table=self.tables[i].bring("part", table_of(g)))


def version(t: Tensor | None) -> object:
    """What changes when a tensor is changed in place; where nobody counts, never twice the same."""
    return None if t is None else object() if t.is_inference() else t._version


def is_constant(x: Any) -> bool:
    """Whether x cannot change in place: a number, say, or a pair of them, as Adam's betas."""
    return type(x) in CONSTANTS or type(x) is tuple and all(type(y) in CONSTANTS for y in x)
