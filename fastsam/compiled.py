"""The reference's own functions through torch.compile: one loop over memory each, also on a CPU.

What runs is `fastsam.reference`'s `dots_of`, `norm_of`, `climb_slot` and `step_slot`, on a stretch
of the flat space: a large parameter, or a run of small neighbours, whose gradients are gathered
first, so that a network's many small parameters cost one call. To the functions a stretch is a
space of one slot. Its hyper-parameters come from the space's table, so a schedule changes data and
compiles nothing; what is compiled anew is another structure (`Plan`).
"""

import functools
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .flat import PAD, SHARES, Hyper, Slot, Space

LARGE = 2**16  # elements: from here on a call of its own costs less than gathering the gradient
# Every value that is used twice becomes a buffer, which the fused loop then keeps in registers.
# Otherwise the climb's radius reads w once more, and Inductor, which moves w in place, makes a
# second loop over memory for it.
OPTIONS = {"realize_reads_threshold": 0, "emulate_precision_casts": True}
BUFFERS = {"g1": ("backup", "m"), "g2": ("backup", "v", "u")}
TABLES = ("hyper", "scalings", "steps")
FEATURES = ("momentum", "dampening", "weight_decay", "nesterov", "decoupled")


class Plan(NamedTuple):
    """What is compiled in: all that a function branches on. scale: the control that holds the loss
    scale's inverse, if there is one; features: the base's FEATURES that are on; many: a run."""

    dtype: torch.dtype
    device: torch.device
    masters: bool
    mode: str | None
    scaling: str | None
    base: str | None
    features: tuple[str, ...]
    climbed: bool
    scale: str | None
    many: bool


class Row:
    """A group's hyper-parameters as the reference reads them (see `flat.Hyper`), from the table."""

    corrections = Hyper.corrections

    def __init__(self, columns: tuple[Tensor, ...], features: tuple[str, ...]):
        for name, value in zip((*Hyper._fields, *SHARES), columns, strict=True):
            setattr(self, name, value)
        for name in FEATURES:
            if name not in features:
                setattr(self, name, 0.0)
        self.nesterov, self.decoupled = "nesterov" in features, "decoupled" in features


class StandIn:
    """A stretch as the reference sees it: a space of one slot, and that slot. A run's tables are
    looked up by `groups` and `numbers`, both (chunks, 1)."""

    group = 0

    def __init__(self, plan: Plan, hyper: Tensor, scalings: Tensor, steps: Tensor,
                 inv_scale: Tensor, groups: Tensor | None = None, numbers: Tensor | None = None,
                 **tensors: Tensor):
        if plan.many:
            hyper, scalings, steps = hyper[groups], scalings[numbers], steps[numbers]
        self.rows = [Row(hyper.unbind(-1), plan.features)]
        self.a, self.b = scalings.unbind(-1) if plan.scaling else (0.0, 1.0)
        self.m_steps = self.v_steps = steps  # the one that the phase reads
        self.control = types.SimpleNamespace(inv_scale1=inv_scale, inv_scale2=inv_scale)
        self.acc = torch.float64 if plan.dtype == torch.float64 else torch.float32
        # a CPU's loop for float32 sums, which cascades, costs more than reading the memory
        self.sums = torch.float64 if plan.device.type == "cpu" else self.acc
        self.dtype, self.masters, self.scale = plan.dtype, plan.masters, plan.scale
        self.mode, self.scaling, self.base = plan.mode, plan.scaling, plan.base
        self.climbed = plan.climbed
        for name in ("w", "backup", "m", "v", "u", "g1", "g2"):
            setattr(self, name, tensors.get(name))

    def is_set(self, name: str) -> bool:
        return name == self.scale


def on_stand_in(function: Callable, plan: Plan, tensors: dict[str, Tensor], more: dict):
    s = StandIn(plan, **tensors)
    return function(s, s, **more)


class Compiled:
    """A function of the reference, compiled at its first call for one plan and tensors of any
    length."""

    def __init__(self, function: Callable, plan: Plan):
        # code of its own: torch.compile counts recompilations, and gives up after a few, per code
        own = types.FunctionType(on_stand_in.__code__.replace(), globals(), function.__name__)
        self.arguments, self.called = (function, plan), False
        self.run = torch.compile(own, fullgraph=True, options=OPTIONS)

    def __call__(self, tensors: dict[str, Tensor], more: dict) -> Tensor | None:
        if not self.called:
            many = self.arguments[1].many
            for name, t in tensors.items():
                if (many or name not in TABLES) and t.ndim and len(t) > 1:
                    torch._dynamo.mark_dynamic(t, 0)
            self.called = True
        return self.run(*self.arguments, tensors, more)


compiled = functools.cache(Compiled)


def flattened(t: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory."""
    return t.as_strided((t.numel(),), (1,))


def alias(t: Tensor) -> Tensor:
    """The same memory as a tensor that starts where it starts: torch.compile compiles anew for a
    view that begins where its storage does."""
    return torch.from_dlpack(t.detach())


class Stretch:
    """A large slot, or a run of small neighbours, with one gradient each, g1 or g2.

    A large slot's tensors are its parts of the flat buffers, (numel,); a run's are (chunks, PAD),
    so that what differs between its slots is looked up once per PAD elements.
    """

    def __init__(self, space: Space, slots: list[Slot], gradient: str):
        self.space, self.slots, self.gradient, self.scratch = space, slots, gradient, {}
        self.many, first, last = len(slots) > 1, slots[0], slots[-1]
        self.start, self.size = first.offset, last.offset - first.offset + last.w.numel()
        self.size += -self.size % PAD if self.many else 0
        scale = "inv_scale" + gradient[1]
        phase = ((space.mode, space.scaling, None, ()) if gradient == "g1"
                 else (None, None, space.base, features(space.rows[first.group])))
        self.plan = Plan(space.dtype, space.device, space.masters, *phase, first.climbed,
                         scale if space.is_set(scale) else None, self.many)
        self.tensors = {"inv_scale": getattr(space.control, scale), **self.tables(gradient)}
        for name in BUFFERS[gradient]:
            if getattr(space, name) is not None:
                self.tensors[name] = self.view(getattr(space, name), self.start)
        self.packed = space.flat_w is not None and all(
            s.w.data_ptr() == space.flat_w.data_ptr() + s.offset * s.w.itemsize for s in slots)
        if self.packed:
            self.tensors["w"] = self.view(space.flat_w, self.start)
        self.tensors = {name: alias(t) for name, t in self.tensors.items()}

    def tables(self, gradient: str) -> dict[str, Tensor]:
        space, rows = self.space, [(self.space.slots.index(s), s.group) for s in self.slots]
        steps = space.steps[int(gradient == "g2")]
        if not self.many:
            (number, group), = rows
            return dict(hyper=space.hyper[group], scalings=space.scalings()[number],
                        steps=steps[number])
        chunks = torch.tensor([-(-s.w.numel() // PAD) for s in self.slots])
        numbers, groups = (x.repeat_interleave(chunks).unsqueeze(1).to(space.device)
                           for x in torch.tensor(rows).unbind(1))
        return dict(hyper=space.hyper, scalings=space.scalings(), steps=steps, numbers=numbers,
                    groups=groups)

    def view(self, flat: Tensor, start: int) -> Tensor:
        part = flat.narrow(0, start, self.size)
        return part.view(-1, PAD) if self.many else part

    def gathered(self, name: str) -> Tensor:
        """The slots' `name` (w or the gradient) in one tensor; 0 between them."""
        if not self.many:
            return flattened(getattr(self.slots[0], name))
        if name not in self.scratch:
            self.scratch[name] = self.parts(*scratch(self.space, name[0], self.start))
        flat, parts = self.scratch[name]
        torch._foreach_copy_(parts, [getattr(s, name) for s in self.slots])
        return flat

    def parts(self, flat: Tensor, start: int) -> tuple[Tensor, list[Tensor]]:
        """The run's part of a flat buffer, and every slot's in that."""
        return self.view(flat, start), [
            flat.as_strided(s.w.shape, s.w.stride(), start + s.offset - self.start)
            for s in self.slots]

    def call(self, function: Callable, more: dict) -> Tensor | None:
        """Run a function of the reference."""
        tensors = {**self.tensors, self.gradient: self.gathered(self.gradient)}
        if not self.packed:
            tensors["w"] = self.gathered("w")
        result = compiled(function, self.plan)(tensors, more)
        if self.many and not self.packed:
            torch._foreach_copy_([s.w for s in self.slots], self.scratch["w"][1])
        return result


def scratch(space: Space, kind: str, start: int) -> tuple[Tensor, int]:
    """A flat buffer for the small slots' part of the space, and where `start` is in it."""
    tail = min(s.offset for s in space.slots if s.w.numel() < LARGE)
    if kind not in space.scratch:
        space.scratch[kind] = torch.zeros(space.size - tail, dtype=space.dtype,
                                          device=space.device)
    return space.scratch[kind], start - tail


def features(h: Hyper) -> tuple[str, ...]:
    return tuple(name for name in FEATURES if reference.is_on(getattr(h, name)))


def stretches(space: Space, gradient: str) -> list[Stretch | Slot]:
    """The slots that have a gradient: as stretches, or by themselves where they cannot be."""
    state = tuple((getattr(s, gradient) is not None, s.climbed) for s in space.slots)
    kinds = tuple((features(h), h.eps == 0) for h in space.rows)
    objects = space._memory, space.v, space.hyper, space.scalings()
    key = state, kinds, space.scaling, space.is_set("inv_scale" + gradient[1]), *map(id, objects)
    known = space.stretches.get(gradient)
    if known is None or known[0] != key:
        known = space.stretches[gradient] = key, cut(space, gradient, state, kinds), objects
    return known[1]


def cut(space: Space, gradient: str, state: tuple, kinds: tuple) -> list[Stretch | Slot]:
    """Large slots one by one; small ones in runs of neighbours that are alike. Adam without an
    eps would make NaN of the zeros between slots: no runs there."""
    found, last = [], None
    for s, (present, climbed) in sorted(zip(space.slots, state, strict=True),
                                        key=lambda pair: pair[0].offset):
        if not present or s.w.numel() == 0:
            last = None
            continue
        alone = s.w.numel() >= LARGE or not s.dense or (space.base == "adam" and kinds[s.group][1])
        kind = None if alone else (kinds[s.group][0], climbed)
        if kind is not None and kind == last:
            found[-1].append(s)
        else:
            found.append([s])
        last = kind
    return [Stretch(space, slots, gradient)
            if slots[0].dense and sum(s.w.numel() for s in slots) > 1 else slots[0]
            for slots in found]


def each(space: Space, gradient: str, function: Callable, **more) -> Tensor | float:
    """The sum of what the function of the reference gives for every stretch."""
    parts = [x.call(function, more) if isinstance(x, Stretch) else function(space, x, **more)
             for x in stretches(space, gradient)]
    return torch.stack(parts).sum(0) if parts and parts[0] is not None else 0.0


def dots(space: Space) -> None:
    """As `reference.dots`."""
    space.dots.zero_()
    space.dots[:, 0] = each(space, "g1", reference.dots_of)


def norm(space: Space) -> None:
    """As `reference.norm`."""
    space.partials.zero_()
    space.partials[0] = each(space, "g1", reference.norm_of)


def climb(space: Space, partials: Tensor) -> None:
    """As `reference.climb`."""
    total = partials.sum().sqrt()
    ok = total.isfinite()
    space.radii.zero_()
    radii = each(space, "g1", reference.climb_slot, total=total, ok=ok)
    space.radii[:1 + reference.rounds(space), 0] = radii
    for slot in space.climbing():
        slot.climbed = True
    if space.mode in ("algorithm1", "official"):
        count(space.steps[0], [slot.climbed for slot in space.slots], ok)
    space.control.norm.copy_(total)
    space.control.ok.copy_(ok)


def step(space: Space, perturbed: bool) -> None:
    """As `reference.step`."""
    c = space.control
    ok = (c.found_inf == 0) & (c.ok != 0) if perturbed else c.found_inf == 0
    each(space, "g2", reference.step_slot, perturbed=perturbed, ok=ok)
    for slot in space.slots:
        if slot.g2 is None and perturbed and slot.climbed:
            slot.w.copy_(slot.backup)
    stepped = [slot.g2 is not None and reference.has_v(space, space.rows[slot.group])
               for slot in space.slots]
    count(space.steps[1], stepped, ok)
    c.skipped += ~ok


def count(steps: Tensor, which: list[bool], ok: Tensor) -> None:
    """One more step for those of the slots, if ok."""
    if all(which):
        steps += ok
    elif any(which):
        steps += ok & torch.tensor(which, device=steps.device)
