"""The reference's own functions through torch.compile: one loop over memory each, also on a CPU.

What runs is `fastsam.reference`'s `dots_of`, `norm_of`, `climb_slot` and `step_slot`, on a stretch
of the flat space: a large parameter, or a run of small neighbours, whose gradients are gathered
first, so that a network's many small parameters cost one call. To the functions a stretch is a
space of one slot. Its hyper-parameters come from the space's table, so a schedule changes data and
compiles nothing; what is compiled anew is another structure (`Plan`).
"""

import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, runs
from .dispatch import first_line
from .flat import PAD, SHARES, Hyper, Slot, Space

# Every value that is used twice becomes a buffer, which the fused loop then keeps in registers.
# Otherwise the climb's radius reads w once more, and Inductor, which moves w in place, makes a
# second loop over memory for it.
OPTIONS = {"realize_reads_threshold": 0, "emulate_precision_casts": True}
TRIED = 2**16  # elements of the tensors that a function is compiled with
BUFFERS = {"g1": ("backup", "m"), "g2": ("backup", "v", "u")}
TABLES = ("hyper", "scalings", "steps")
FEATURES = ("momentum", "dampening", "weight_decay", "nesterov", "decoupled")


class Plan(NamedTuple):
    """What is compiled in: all that a function branches on. scale: the control that holds the loss
    scale's inverse, if there is one; features: the base's FEATURES that are on; many: a run whose
    slots differ in more than their gradients; groups: of several groups."""

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
    groups: bool


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
        self.control, self.inv_scale1, self.inv_scale2 = self, inv_scale, inv_scale
        self.acc = torch.float64 if plan.dtype == torch.float64 else torch.float32
        # a CPU's loop for float32 sums, which cascades, costs more than reading the memory
        self.sums = torch.float64 if plan.device.type == "cpu" else self.acc
        self.dtype, self.masters, self.scale = plan.dtype, plan.masters, plan.scale
        self.mode, self.scaling, self.base = plan.mode, plan.scaling, plan.base
        self.climbed = plan.climbed
        # backup before w: the other way round Inductor of torch 2.9 to 2.11 saves the moved w
        for name in ("backup", "w", "m", "v", "u", "g1", "g2"):
            setattr(self, name, tensors.get(name))

    def is_set(self, name: str) -> bool:
        return name == self.scale


def on_stand_in(function: Callable, plan: Plan, tensors: dict[str, Tensor], more: dict):
    s = StandIn(plan, **tensors)
    return function(s, s, **more)


class Compiled:
    """A function of the reference, compiled for one plan, one setting of torch, and tensors of any
    length."""

    def __init__(self, function: Callable, plan: Plan, setting: tuple):
        # code of its own: torch.compile counts recompilations, and gives up after a few, per code
        own = types.FunctionType(on_stand_in.__code__.replace(), globals(), function.__name__)
        self.arguments, self.tried = (function, plan), False
        self.run = torch.compile(own, fullgraph=True, options=self.options())

    def options(self) -> dict:
        """OPTIONS, and on a CPU no guards for the code of `try_out`: they take longer than many a
        call, and check what is known. The lengths are dynamic there, the function is for one plan
        and setting, and the stretches make its tensors alike. What is compiled later, after
        torch._dynamo.reset(), has guards; on a GPU all has: Inductor counts in 32 bits there where
        one of them says that it may."""
        if self.arguments[1].device.type != "cpu":
            return OPTIONS.copy()
        return {**OPTIONS, "guard_filter_fn": lambda guards: [self.tried] * len(guards)}

    def try_out(self, tensors: dict[str, Tensor], more: dict) -> None:
        """Compile it, before anything is written, on zeros: TRIED elements. No two lengths are
        alike there, nor the real ones: torch.compile takes equal lengths for one.

        Raises:
            RuntimeError: torch.compile failed.
        """
        if self.tried:
            return
        function, plan = self.arguments
        lengths = dict(hyper=3, scalings=7, steps=7) if plan.many else dict.fromkeys(TABLES)
        zeros = {}
        for name, t in tensors.items():
            length = lengths.get(name, TRIED // PAD if plan.many else TRIED)
            grows = length is not None and t.ndim and len(t) > 1
            zeros[name] = t.new_zeros((length, *t.shape[1:]) if grows else t.shape)
            if grows:
                torch._dynamo.mark_dynamic(zeros[name], 0)
        try:
            self.run(function, plan, zeros, more)
        except Exception as error:
            raise RuntimeError(
                f"torch.compile failed on {function.__name__} ({first_line(error)}), before the "
                "weights changed: use backend='reference', which needs no compiler") from error
        self.tried = True

    def __call__(self, tensors: dict[str, Tensor], more: dict) -> Tensor | None:
        return self.run(*self.arguments, tensors, more)


compiled = functools.cache(Compiled)


def setting() -> tuple:
    """What torch compiles anew for, whatever it compiles."""
    return (torch.get_num_threads(), torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"), torch.are_deterministic_algorithms_enabled(),
            torch.is_inference_mode_enabled(), torch.get_default_dtype())


def flattened(t: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory."""
    return t.detach().as_strided((t.numel(),), (1,))


def alias(t: Tensor) -> Tensor:
    """The same memory as a tensor that starts where it starts: torch.compile compiles anew for a
    view that begins where its storage does."""
    return torch.from_dlpack(t.detach())


class Stretch:
    """A large slot, or a run of small neighbours, with one gradient each, g1 or g2.

    Its tensors are its parts of the flat buffers, (numel,). A run's gradients are gathered in
    scratch memory, as are weights that are not packed. A run of `many` has them as (chunks, PAD),
    so that what differs between its slots is looked up once per PAD elements.
    """

    def __init__(self, space: Space, slots: list[Slot], gradient: str):
        self.slots, self.gradient, first = slots, gradient, slots[0]
        self.many = len(slots) > 1 and differ(space, slots, gradient)
        scale = "inv_scale" + gradient[1]
        phase = ((space.mode, space.scaling, None, ()) if gradient == "g1"
                 else (None, None, space.base, features(space.rows[first.group])))
        self.plan = Plan(space.dtype, space.device, space.masters, *phase, first.climbed,
                         scale if space.is_set(scale) else None, self.many,
                         self.many and len(space.rows) > 1)
        self.tensors = {"inv_scale": getattr(space.control, scale), **self.tables(space)}
        for name in BUFFERS[gradient]:
            if getattr(space, name) is not None:
                self.tensors[name] = self.part(getattr(space, name))
        packed = runs.is_packed(space, slots)
        if packed:
            self.tensors["w"] = self.part(space.flat_w)
        self.tensors = {name: alias(t) for name, t in self.tensors.items()}
        self.gathers = (gradient,) if packed else (gradient, "w")
        self.scratch = {}
        for name in self.gathers if len(slots) > 1 else ():
            whole, parts = runs.scratch(space, slots, name[0])
            self.scratch[name] = whole if self.many else flattened(whole), parts

    def tables(self, space: Space) -> dict[str, Tensor]:
        steps = space.steps[int(self.gradient == "g2")]
        if not self.many:
            first = self.slots[0]
            return dict(hyper=space.hyper[first.group], scalings=space.scalings()[first.number],
                        steps=steps[first.number])
        numbers, groups = runs.chunk_of(space, self.slots)
        return dict(hyper=space.hyper, scalings=space.scalings(), steps=steps, numbers=numbers,
                    groups=groups)

    def part(self, flat: Tensor) -> Tensor:
        if len(self.slots) == 1:
            slot, = self.slots
            return flat.narrow(0, slot.offset, slot.w.numel())
        part = runs.chunked(flat, self.slots)
        return part if self.many else flattened(part)

    def gathered(self, anew: bool) -> dict[str, Tensor]:
        """All tensors of this by name, with what other people own copied to where it is read, if
        `anew`: else it still lies there."""
        if len(self.slots) == 1:
            slot, = self.slots
            return {**self.tensors,
                    **{name: flattened(getattr(slot, name)) for name in self.gathers}}
        if anew:
            for name, (_, parts) in self.scratch.items():
                torch._foreach_copy_(parts, [getattr(s, name) for s in self.slots])
        return {**self.tensors, **{name: whole for name, (whole, _) in self.scratch.items()}}

    def call(self, run: "Compiled", more: dict, anew: bool) -> Tensor | None:
        result = run(self.gathered(anew), more)
        if "w" in self.scratch:
            torch._foreach_copy_([s.w for s in self.slots], self.scratch["w"][1])
        return result


def differ(space: Space, slots: list[Slot], gradient: str) -> bool:
    """Whether neighbours may differ in their group, their scaling, or a step count that matters."""
    first = slots[0]
    if any(s.group != first.group for s in slots):
        return True
    if gradient == "g1":
        return space.mode == "official" or any((s.a, s.b) != (first.a, first.b) for s in slots)
    return space.base == "adam" or reference.is_on(space.rows[first.group].dampening)


def features(h: Hyper) -> tuple[str, ...]:
    return tuple(name for name in FEATURES if reference.is_on(getattr(h, name)))


def stretches(space: Space, gradient: str) -> list[Stretch | Slot]:
    """The slots that have a gradient: as stretches, or by themselves where they cannot be. Groups
    may differ in their hyper-parameters, not in what the base optimizer does."""
    kinds = tuple(features(h) for h in space.rows)

    def cut() -> list[Stretch | Slot]:
        found = runs.neighbours(space, gradient, lambda s: kinds[s.group], math.inf)
        return [Stretch(space, slots, gradient)
                if slots[0].dense and sum(s.w.numel() for s in slots) > 1 else slots[0]
                for slots in found]

    key = kinds, runs.without_eps(space), space.scaling, space.is_set("inv_scale" + gradient[1])
    objects = space._memory, space.v, space.hyper, space.scalings()
    return runs.remembered(space, gradient, key, objects, cut)


def each(space: Space, gradient: str, function: Callable, gather: bool = True, **more
         ) -> Iterator[tuple[list[Slot], Tensor | None]]:
    """What the function of the reference gives for every stretch, with the stretch's slots.
    Nothing runs before all of it is compiled: what cannot be leaves everything as it was.
    gather: as in `runs.parts`."""
    found, now = stretches(space, gradient), setting()
    codes = [compiled(function, x.plan, now) if isinstance(x, Stretch) else None for x in found]
    for x, run in zip(found, codes, strict=True):
        if run is not None and not run.tried:
            run.try_out(x.gathered(gather), more)
    for x, run in zip(found, codes, strict=True):
        if run is None:
            yield [x], function(space, x, **more)
        else:
            yield x.slots, x.call(run, more, gather)


def total_of(parts: list[Tensor]) -> Tensor | float:
    return torch.stack(parts).sum(0) if parts else 0.0


def dots(space: Space) -> None:
    """As `reference.dots`."""
    space.dots.zero_()
    space.dots[:, 0] = total_of([x for _, x in each(space, "g1", reference.dots_of)])


def norm(space: Space) -> None:
    """As `reference.norm`."""
    space.partials.zero_()
    space.partials[0] = total_of([x for _, x in each(space, "g1", reference.norm_of)])


def climb(space: Space, partials: Tensor) -> None:
    """As `reference.climb`."""
    total = partials.sum().sqrt()
    ok = total.isfinite()
    space.radii.zero_()
    radii = []
    for slots, squares in each(space, "g1", reference.climb_slot, gather=False,
                               total=total, ok=ok):
        radii.append(squares)
        for slot in slots:
            slot.climbed = True
    space.radii[:1 + reference.rounds(space), 0] = total_of(radii)
    if space.mode in ("algorithm1", "official"):
        reference.count(space.steps[0], [slot.climbed for slot in space.slots], ok)
    space.control.norm.copy_(total)
    space.control.ok.copy_(ok)


def step(space: Space, perturbed: bool) -> None:
    """As `reference.step`."""
    c = space.control
    ok = (c.found_inf == 0) & (c.ok != 0) if perturbed else c.found_inf == 0
    for _ in each(space, "g2", reference.step_slot, perturbed=True, ok=ok):
        pass  # a slot that has climbed is perturbed
    for slot in space.slots:
        if slot.g2 is None and perturbed and slot.climbed:
            slot.w.copy_(slot.backup)
    stepped = [slot.g2 is not None and reference.has_v(space, space.rows[slot.group])
               for slot in space.slots]
    reference.count(space.steps[1], stepped, ok)
    c.skipped += ~ok
