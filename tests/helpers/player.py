"""One optimizer beside the float64 oracle: what may happen to it, and what must hold after it.

Every public method of `Player` from `step` on is an event. The oracle takes over the optimizer's
weights and state before each half of a step, so what is judged is that half's own rounding, by the
bound that `rounding` derives; what must not change is compared bit for bit.
"""

import copy
import io
import math
import pickle
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from fastsam import SAM, PhaseError

from .gradients import give
from .oracle import Oracle
from .rounding import Rounded, units
from .variants import VARIANTS


class OwnSGD(torch.optim.SGD):
    """Not fused: a subclass takes its own step."""


class OwnAdamW(torch.optim.AdamW):
    """Not fused: a subclass takes its own step."""


CLASSES = {of.oracle["method"]: of.cls for of in VARIANTS.values() if "adaptive" not in of.own}
BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
         "own sgd": OwnSGD, "own adamw": OwnAdamW}
MAY_BE_TENSORS = ("rho", "sigma", "lmbda", "lr", "weight_decay")
STATE = {"m": ("ema", "full_gradient", "sam_ema", "sam_full_gradient"),
         "v": ("momentum_buffer", "exp_avg"), "u": ("exp_avg_sq",)}
SENTINEL = 7.0


class Interruption(Exception):
    """What a closure of the user's raises."""


@dataclass(frozen=True)
class Weight:
    """One parameter. form: "contiguous", "channels_last", "transposed" or "gapped"; a lodger is a
    view into a storage that is larger, and shared with the other lodgers of its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    form: str = "contiguous"
    lodger: bool = False


@dataclass(frozen=True)
class Group:
    """A parameter group; tensors: what may be a tensor of its hyper-parameters is one."""

    weights: tuple[Weight, ...]
    hyper: dict
    tensors: bool = False


@dataclass(frozen=True)
class Setup:
    """An optimizer: its class (a key of CLASSES) with `own` arguments, its base (of BASES)."""

    groups: tuple[Group, ...]
    method: str = "sam"
    own: dict = field(default_factory=dict)
    base: str = "sgd"
    backend: str = "reference"
    options: dict = field(default_factory=dict)
    wrapped: bool = False
    named: bool = False


@dataclass(frozen=True)
class Grads:
    """One pass's gradients: normal of deviation `size`; bit i of `missing` and of `zero`: that of
    parameter i (modulo 8) is None, is 0. layout: "own", "contiguous", "transposed", "bucket"
    (misaligned, between NaNs) or "gapped"; wide: float32 where the weights have 16 bits and the
    base is fused."""

    seed: int
    size: float = 1.0
    missing: int = 0
    zero: int = 0
    layout: str = "own"
    wide: bool = False


def formed(values: torch.Tensor, form: str) -> torch.Tensor:
    """The same values with other strides, where their shape allows it."""
    if form == "channels_last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if form == "transposed" and values.ndim >= 2:
        turned = list(reversed(range(values.ndim)))
        return values.permute(turned).contiguous().permute(turned)
    if form == "gapped" and values.ndim and values.shape[-1] > 1:
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), math.nan)
        return wide[..., ::2].copy_(values)
    return values.contiguous()


def in_a_bucket(values: torch.Tensor) -> torch.Tensor:
    bucket = values.new_full((values.numel() + 4,), math.nan)
    return bucket[1:1 + values.numel()].view(values.shape).copy_(values)


def as_bits(t: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().clone().view(kinds[t.dtype.itemsize])


def all_finite(grads: list) -> bool:
    return all(g is None or bool(g.isfinite().all()) for g in grads)


def slot_of(opt: SAM, p: torch.Tensor):
    return next(slot for space in opt.spaces for slot in space.slots if slot.param is p)


def scalar(x) -> float:
    """A hyper-parameter as the oracle takes it."""
    return float(x) if isinstance(x, torch.Tensor) else x


class Player:
    """Args:
        setup: what to build.
        device: where.
        census: counts what has been judged, by name.
    """

    def __init__(self, setup: Setup, device, census: Counter | None = None):
        self.setup, self.device = setup, torch.device(device)
        self.census = Counter() if census is None else census
        self.generator = torch.Generator().manual_seed(1)
        self.params, self.names, self.members = [], [], []
        self.groups = list(setup.groups)
        self.fused = not setup.base.startswith("own")
        self.masters = setup.options.get("master_weights", False)
        self.steps, self.written, self.left_behind = 0, set(), []
        self.storages = []
        for group in self.groups:
            self._make(group)
        self.opt = self._build(self.params)
        self.oracle = Oracle([], [], method=setup.method, base=setup.base.split()[-1],
                             projection=setup.own.get("projection", "constant"),
                             convention=setup.own.get("convention", "algorithm1"),
                             number=lambda t: t)
        for g in range(len(self.groups)):
            self._teach(g)
        self._settle()
        if setup.method in ("full", "noise"):
            self.full_gradient(0)

    # ---- construction

    def _make(self, group: Group) -> None:
        """Make the group's parameters, lodgers in a storage of their own."""
        first = len(self.params)
        made = [formed(torch.randn(w.shape, generator=self.generator).to(self.device, w.dtype),
                       w.form) for w in group.weights]
        for dtype in {w.dtype for w in group.weights if w.lodger}:
            lodgers = [i for i, w in enumerate(group.weights) if w.lodger and w.dtype == dtype]
            places, end = {}, 3
            for i in lodgers:
                places[i] = end
                end += made[i].untyped_storage().nbytes() // made[i].itemsize + 2
            storage = torch.full((end,), SENTINEL, dtype=dtype, device=self.device)
            free = torch.ones(end, dtype=torch.bool, device=self.device)
            for i, place in places.items():
                shape, stride = made[i].shape, made[i].stride()
                made[i] = storage.as_strided(shape, stride, place).copy_(made[i])
                free.as_strided(shape, stride, place).fill_(False)
            self.storages.append((storage, free))
        for t in made:
            if t.numel():
                t[(0,) * t.ndim] = -0.0
            self.params.append(nn.Parameter(t))
            self.names.append(f"{len(self.params)}.{'bias' if t.numel() % 2 else 'weight'}")
        self.members.append(list(range(first, len(self.params))))

    def _group(self, g: int, params) -> dict:
        hyper = {k: self.tensor(g, x) if self.groups[g].tensors and k in MAY_BE_TENSORS else x
                 for k, x in self.groups[g].hyper.items()}
        named = self.setup.named
        return {**hyper, "params": [(self.names[i], params[i]) if named else params[i]
                                    for i in self.members[g]]}

    def tensor(self, g: int, value: float) -> torch.Tensor:
        """A hyper-parameter as a tensor, no coarser than the group's weights."""
        wide = any(w.dtype == torch.float64 for w in self.groups[g].weights)
        dtype = torch.float64 if wide else torch.float32
        return torch.tensor(value, dtype=dtype, device=self.device)

    def _build(self, params) -> SAM:
        s = self.setup
        cls, base = CLASSES[s.method], BASES[s.base]
        part = dict(part=s.method) if s.method in ("full", "noise") else {}
        own = {**part, **s.own, **s.options, "backend": s.backend}
        dicts = [self._group(g, params) for g in range(len(self.groups))]
        if s.wrapped:
            return cls.wrap(base(dicts, lr=0.1), **own)
        return cls(dicts, base, lr=0.1, **own)

    def _teach(self, g: int, members: list[int] | None = None) -> None:
        """Tell the oracle of a group, or of new members of one."""
        members = self.members[g] if members is None else members
        group = self.opt.param_groups[g]
        keys = ("rho", "sigma", "lmbda", "lr", "momentum", "dampening", "weight_decay", "nesterov",
                "perturb", "betas", "eps", "adaptive", "scale", "eta")
        self.oracle.extend([self.params[i].detach() for i in members],
                           {k: scalar(group[k]) for k in keys if k in group})
        for i in members:
            if self.setup.named:
                self.oracle.is_weight[i] = "weight" in self.names[i]
            if self.setup.method in ("full", "noise"):
                self.oracle.m[i] = torch.zeros_like(self.params[i])

    def _settle(self) -> None:
        """Note where the parameters lie; they must stay there."""
        self.places = [(p.data_ptr(), p.untyped_storage().data_ptr(), p.stride())
                       for p in self.params]

    # ---- the optimizer's numbers and the oracle's

    def acc(self, i: int) -> torch.dtype:
        """What fastsam computes in, except that a projection's share is one for all."""
        shared = self.params if self.oracle.projection != "constant" else [self.params[i]]
        wide = all(p.dtype == torch.float64 for p in shared)
        return torch.float64 if wide else torch.float32

    def base_dtype(self, i: int) -> torch.dtype:
        """What the base optimizer computes in: one that is not fused, in the weights' dtype."""
        return self.acc(i) if self.fused else self.params[i].dtype

    def entry(self, i: int) -> dict:
        return self.opt.state.get(self.params[i], {})

    def state(self, i: int, letter: str) -> torch.Tensor | None:
        if letter == "m" and not self.fused:  # in state_dict() alone
            return slot_of(self.opt, self.params[i]).m
        return next((self.entry(i)[k] for k in STATE[letter] if k in self.entry(i)), None)

    def counts(self, i: int) -> dict[str, torch.Tensor]:
        """How often m and v were updated, where that is kept."""
        entry, found = self.entry(i), {}
        if self.setup.method == "fsam":
            found["m"] = slot_of(self.opt, self.params[i]).m_steps
        for key in ("momentum_steps", "step"):
            if key in entry:
                found["v"] = entry[key]
        return found

    def master(self, i: int) -> torch.Tensor | None:
        return self.entry(i).get("master")

    def start(self, i: int) -> torch.Tensor:
        """What the next step starts from: the master, unless someone else wrote the weight."""
        p, master = self.params[i].detach(), self.master(i)
        return p if master is None else torch.where(master.to(p.dtype) == p, master, p.float())

    def follow(self) -> None:
        """The oracle takes the optimizer's numbers over; not whether there are any."""
        for i in range(len(self.params)):
            if not self.opt.is_perturbed:
                self.oracle.w[i] = Rounded.exactly(self.start(i), self.acc(i))
            for letter in STATE:
                own, dtype = getattr(self.oracle, letter), self.acc(i)
                if own[i] is not None:
                    dtype = dtype if letter == "m" else self.base_dtype(i)
                    own[i] = Rounded.exactly(self.state(i, letter), dtype)

    def bits(self) -> dict[str, torch.Tensor]:
        """Everything that a skip or a misuse must leave alone."""
        found = {}
        for i, p in enumerate(self.params):
            found[f"w[{i}]"] = as_bits(p)
            if self.master(i) is not None and i not in self.written:
                found[f"M[{i}]"] = as_bits(self.master(i))
            for letter in STATE:
                if self.state(i, letter) is not None:
                    found[f"{letter}[{i}]"] = as_bits(self.state(i, letter))
            for letter, count in self.counts(i).items():
                found[f"{letter} steps[{i}]"] = count.clone()
        return found

    def assert_bits(self, before: dict, why: str, letters: str = "wMmvu") -> None:
        now = self.bits()
        for what, value in before.items():
            if what[0] in letters:
                assert torch.equal(now[what], value), f"{what} changed by {why}"

    # ---- gradients

    def make(self, grads: Grads, scale: float = 1.0) -> list[torch.Tensor | None]:
        generator = torch.Generator().manual_seed(1000 + grads.seed)
        made = []
        for i, p in enumerate(self.params):
            g = grads.size * scale * torch.randn(p.shape, generator=generator)
            if grads.zero >> i % 8 & 1:
                g.zero_()
            wide = grads.wide and self.fused and p.dtype.itemsize == 2
            g = g.to(self.device, torch.float32 if wide else p.dtype)
            if grads.layout == "own":
                g = torch.empty_like(p, dtype=g.dtype).copy_(g)
            else:
                g = in_a_bucket(g) if grads.layout == "bucket" else formed(g, grads.layout)
            made.append(None if grads.missing >> i % 8 & 1 else g)
        return made

    def spoiled(self, grads: list, where: int, value: float) -> list:
        """The gradients with one element that is not finite, where there is one that climbs."""
        there = [i for i, g in enumerate(grads)
                 if g is not None and g.numel() and self.oracle.h[i]["perturb"]]
        if there:
            g = grads[there[where % len(there)]]
            at = where % g.numel()
            g[tuple(int(k) for k in torch.unravel_index(torch.tensor(at), g.shape))] = value
        return grads

    def set(self, grads: list) -> None:
        for p, g in zip(self.params, grads, strict=True):
            give(p, g)

    def numbers(self, grads: list, scale: float, dtype) -> list:
        """The gradients without the loss scale, whose inverse a GradScaler has in float32."""
        if math.frexp(scale)[0] != 0.5:  # no power of two
            scale = Rounded.exactly(torch.tensor(scale), torch.float32)
        return [None if g is None else Rounded.exactly(g, dtype(i)) / scale
                for i, g in enumerate(grads)]

    # ---- judging

    def hold(self, what: str, actual: torch.Tensor, expected: Rounded) -> None:
        actual = actual.detach()
        good = expected.allows(actual)
        self.census["judged"] += 1
        self.census["unbounded"] += not expected.is_bounded()
        if not good.all():
            error = (actual.to("cpu", torch.float64) - expected.value).abs()
            i = int((~good).flatten().nonzero()[0])
            raise AssertionError(
                f"{what}, element {i}: {float(actual.flatten()[i]):.9g} where "
                f"{float(expected.value.flatten()[i]):.9g} is right: error "
                f"{float(error.flatten()[i]):.3g}, bound {float(expected.error.flatten()[i]):.3g}")

    def compare(self, when: str) -> None:
        """Weights, masters, m, v, u and how often each was updated, against the oracle's."""
        for i, p in enumerate(self.params):
            self.hold(f"w[{i}] {when}", p, self.oracle.w[i])
            master = self.master(i)
            if master is not None and not self.opt.is_perturbed and i not in self.written:
                self.hold(f"master[{i}] {when}", master, self.oracle.w[i])
                assert torch.equal(as_bits(master.to(p.dtype)), as_bits(p)), f"w[{i}] {when}"
            for letter in STATE:
                actual, expected = self.state(i, letter), getattr(self.oracle, letter)[i]
                if expected is not None:
                    assert actual is not None, f"{letter}[{i}] {when} is missing"
                    self.hold(f"{letter}[{i}] {when}", actual, expected)
                else:
                    assert actual is None or not actual.any(), f"{letter}[{i}] {when} is not 0"
            for letter, count in self.counts(i).items():
                right = (self.oracle.climbs if letter == "m" else self.oracle.t)[i]
                assert count == right, f"{letter} of {i}, {when}: {count} updates, not {right}"

    def check(self) -> None:
        """What holds between any two steps."""
        assert not self.opt.is_perturbed, "perturbed between two steps"
        skipped, right = self.opt.skipped_steps, self.oracle.skipped
        assert skipped == right, f"{skipped} steps skipped, not {right}"
        past = self.steps - self.setup.options.get("start", 0)
        climbs = past >= 0 and past % self.setup.options.get("interval", 1) == 0
        assert self.opt.climbs_next == climbs, f"climbs_next after {self.steps} steps"
        for i, (p, place) in enumerate(zip(self.params, self.places, strict=True)):
            assert (p.data_ptr(), p.untyped_storage().data_ptr(), p.stride()) == place, (
                f"parameter {i} was moved")
        for storage, free in self.storages:
            assert (storage[free] == SENTINEL).all(), "memory beside a parameter was written"
        for space in self.opt.spaces:
            padding = torch.ones(space.size, dtype=torch.bool)
            for slot in space.slots:
                padding[slot.offset:slot.offset + slot.numel] = False
            for buffer in (space.saved, space.m, space.v, space.u):
                assert buffer is None or not buffer.cpu()[padding].any(), "padding was written"
        for t, bits in self.left_behind:
            assert torch.equal(as_bits(t), bits), "the original of a copy changed"

    # ---- the two halves of a step

    def climb(self, grads: list, scaler=None, scale: float = 1.0, zero_grad: bool = True,
              call=None) -> None:
        """first_step (or `call`, which has the gradients), beside the oracle."""
        self.follow()
        before = self.bits()
        self.before = before, [p.detach().to("cpu", torch.float64).clone() for p in self.params]
        self.set(grads)
        if call is None:
            self.opt.first_step(zero_grad=zero_grad, scaler=scaler)
        else:
            call()
        self.climbed(grads, scale)

    def climbed(self, grads: list, scale: float = 1.0) -> None:
        """Judge the moved weights."""
        self.oracle.first_step(self.numbers(grads, scale, self.acc))
        assert self.opt.is_perturbed
        self.compare("moved")
        self.written -= set(self.oracle.saved)
        if not self.oracle.ok:
            self.assert_bits(self.before[0], "a climb that was not finite", "mvu")
            assert all(torch.equal(p.detach().to(w), w.to(p.device))  # but -0 + 0 is 0
                       for p, w in zip(self.params, self.before[1], strict=True))
        moved = sum(float((p.detach().to("cpu", torch.float64) - w).square().sum())
                    for p, w in zip(self.params, self.before[1], strict=True)) ** 0.5
        assert self.opt.last_radius == pytest.approx(moved, rel=1e-5, abs=1e-15)
        if isinstance(self.oracle.size, Rounded) and self.oracle.ok:
            norm = torch.tensor(self.opt.last_grad_norm, dtype=self.opt.spaces[0].kind.acc)
            self.hold("norm", norm, self.oracle.size)

    def back(self, why: str) -> None:
        """The weights are what they were, bit for bit; m may have moved."""
        self.oracle.restore()
        self.oracle.ok = True
        assert not self.opt.is_perturbed
        self.assert_bits(self.before[0], why, "wM")
        self.compare(f"after {why}")

    def descend(self, grads: list, scale: float = 1.0, found_inf: bool = False, call=None,
                ) -> None:
        """second_step (or `call`, which leaves the gradients set), beside the oracle."""
        if self.opt.is_perturbed:
            before = self.before[0]
        else:
            self.follow()
            before = self.bits()
        self.set(grads)
        numbers = self.numbers(grads, scale, self.base_dtype)
        (call or self.opt.second_step)()
        self.descended(numbers, before, found_inf)

    def descended(self, numbers: list, before: dict, found_inf: bool = False) -> None:
        """Judge the step."""
        skip = found_inf or not self.oracle.ok
        for i in range(len(self.params)):
            start = self.oracle.saved.get(i, self.oracle.w[i])
            start.unit, start.tiny = units(self.base_dtype(i))
        self.oracle.second_step(numbers, found_inf)
        self.steps += 1
        if skip:
            self.assert_bits(before, "a skipped step", "wMvu")
        else:
            self.written -= {i for i, g in enumerate(numbers) if g is not None}
        self.compare("after the step")
        self.census["skipped"] += skip

    # ---- events

    def step(self, first: Grads, second: Grads, zero_grad: bool = True) -> None:
        self.climb(self.make(first), zero_grad=zero_grad)
        self.descend(self.make(second), call=lambda: self.opt.second_step(zero_grad=zero_grad))

    def plain(self, second: Grads) -> None:
        """A step of the base optimizer alone."""
        self.descend(self.make(second), call=self.opt.step)

    def give_up(self, first: Grads, scale: float | None = None) -> None:
        """A climb and `restore`, with a GradScaler where there is a scale."""
        scaler = None if scale is None else self.scaler(scale)
        self.climb(self.make(first, scale or 1.0), scaler, scale or 1.0)
        self.opt.restore()
        self.opt.restore()  # a second time is harmless
        self.back("restore()")

    def bad(self, first: Grads, second: Grads, where: int, value: float) -> None:
        """A gradient of the first pass that is not finite."""
        self.climb(self.spoiled(self.make(first), where, value))
        self.descend(self.make(second))

    def closure(self, first: Grads, second: Grads, ascent: bool, fails: bool) -> None:
        """step(closure), with a closure of its own for the ascent, or one that fails when it is
        called at w + e."""
        climbs, calls = self.opt.climbs_next, []
        first, second = self.make(first), self.make(second)

        def run(at_w: bool) -> torch.Tensor:
            assert all(p.grad is None for p in self.params)
            calls.append(at_w)
            if len(calls) == 2:
                self.climbed(first)
                if fails:
                    raise Interruption
            self.set(first if at_w and climbs else second)
            return torch.tensor(float(len(calls)))

        def descent():
            return run(not ascent and not calls)

        arguments = (descent, lambda: run(True)) if ascent else (descent,)

        def call() -> None:
            assert self.opt.step(*arguments) == 1.0

        self.follow()
        self.before = self.bits(), [p.detach().to("cpu", torch.float64).clone()
                                    for p in self.params]
        if fails and climbs:
            with pytest.raises(Interruption):
                call()
            self.back("an exception in the second pass")
        else:
            call()
            self.descended(self.numbers(second, 1.0, self.base_dtype), self.before[0])
        assert len(calls) == 1 + climbs

    def scaler(self, scale: float) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler(self.device.type, init_scale=scale)
        scaler.scale(torch.ones((), device=self.device))
        return scaler

    def amp(self, first: Grads, second: Grads, scale: float, climbs: bool, bad: int | None,
            unscale: bool) -> None:
        """Both passes with a GradScaler; bad: where the second has an element that is not finite;
        unscale: `unscale_` before `scaler.step`, as for clipping."""
        first, second = self.make(first, scale), self.make(second, scale)
        if bad is not None:
            second = self.spoiled(second, bad, math.inf)
        if all(g is None for g in second):
            return
        scaler = self.scaler(scale)
        if climbs:
            self.climb(first, scaler, scale)
        found = not all_finite(second)
        overflow = found or not self.oracle.ok
        rest = scale
        if unscale and not any(g is not None and g.dtype == torch.float16 for g in second):
            self.set(second)
            scaler.unscale_(self.opt)
            rest = 1.0

        def call() -> None:
            scaler.step(self.opt)
            scaler.update()

        self.descend(second, rest, found, call)
        assert scaler.get_scale() == (scale / 2 if overflow else scale)

    def flags(self, first: Grads, second: Grads, scale: float, found_inf: bool) -> None:
        """The second pass scaled, and the attributes that GradScaler.step sets."""
        self.climb(self.make(first))
        second = self.make(second, scale)
        found_inf |= not all_finite(second)

        def call() -> None:
            self.opt.grad_scale = torch.tensor(scale, device=self.device)
            self.opt.found_inf = torch.tensor(float(found_inf), device=self.device)
            self.opt.step()
            del self.opt.grad_scale, self.opt.found_inf

        self.descend(second, scale, found_inf, call)

    def stash(self, batches: tuple, bad: int | None, scale: float | None, given_up: bool) -> None:
        """m-sharpness: a climb for each micro-batch and one step with the sum of the second
        gradients; bad: the micro-batch whose climb is not finite."""
        scaler, all_ok = None if scale is None else self.scaler(scale), True
        total = [None] * len(self.params)
        for k, (first, second) in enumerate(batches):
            first = self.make(first, scale or 1.0)
            if k == bad:
                first = self.spoiled(first, k, math.nan)
            self.climb(first, scaler, scale or 1.0)
            second, all_ok = self.make(second, scale or 1.0), all_ok and self.oracle.ok
            total = [g if t is None else t if g is None else t + g
                     for t, g in zip(total, second, strict=True)]
            self.set(second)
            self.opt.stash_grad()
            self.back("stash_grad()")
        if given_up:
            self.opt.restore()
        if given_up or all(t is None for t in total):
            with pytest.raises(PhaseError, match="nothing set aside"):
                self.opt.unstash_grad()
            self.opt.restore()
            return
        for call in (self.opt.step, self.opt.state_dict):
            with pytest.raises(PhaseError):
                call()
        self.opt.unstash_grad()
        for p, t in zip(self.params, total, strict=True):
            assert (p.grad is None) == (t is None)
            assert t is None or torch.equal(p.grad, t)
        self._step_with(total, scaler, scale or 1.0, not all_ok)

    def _step_with(self, grads: list, scaler, scale: float, found_inf: bool) -> None:
        if scaler is None:
            self.descend(grads, found_inf=found_inf, call=self.opt.step)
            return
        found_inf |= not all_finite(grads)
        self.descend(grads, scale, found_inf, lambda: scaler.step(self.opt))
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if found_inf else scale)

    def hyper(self, group: int, changes: dict, tensor: bool) -> None:
        """New hyper-parameters, as numbers or as tensors."""
        g = group % len(self.groups)
        mine = self.opt.param_groups[g]
        for name, value in changes.items():
            if name not in mine:
                continue
            if isinstance(mine[name], torch.Tensor):
                mine[name].fill_(value)
            elif tensor and name in MAY_BE_TENSORS and self.fused:
                mine[name] = self.tensor(g, value)
            else:
                mine[name] = value
            for i in self.members[g]:
                self.oracle.h[i][name] = scalar(mine[name])

    def grow(self, group: Group) -> None:
        """add_param_group in mid-training."""
        before = self.bits()
        kinds = {s.kind.dtype for s in self.opt.spaces} | {w.dtype for w in group.weights}
        self._make(group)
        self.groups.append(group)
        self.opt.add_param_group(self._group(len(self.groups) - 1, self.params))
        self._teach(len(self.groups) - 1)
        self.assert_bits(before, "add_param_group")
        assert len(self.opt.spaces) == len(kinds)
        old = self.places
        self._settle()
        assert self.places[:len(old)] == old, "a parameter of another group was moved"

    def append(self, group: Group, where: int) -> None:
        """One more parameter, appended to a group's own list."""
        g = where % len(self.groups)
        if group.weights[0].dtype == torch.float64 and self._has_tensors(g):
            return
        before, mine = self.bits(), self.opt.param_groups[g]
        self._make(Group(group.weights[:1], {}))
        i = self.members.pop()[0]
        mine["params"].append(self.params[i])
        if "param_names" in mine:
            mine["param_names"].append(self.names[i])
        self.members[g].append(i)
        self._teach(g, [i])
        self.assert_bits(before, "append")
        self._settle()

    def rearrange(self, how: str, which: int, to: int) -> None:
        """Parameters in another order, or moved to another group."""
        g, to = which % len(self.groups), to % len(self.groups)
        if how == "move" and (to == g or len(self.members[g]) < 2 or self._has_tensors(to)):
            return
        before = self.bits()
        groups = self.opt.param_groups
        for lists in (self.members, *([group[key] for group in groups] for key in
                                      ("params", "param_names") if key in groups[0])):
            if how == "reverse":
                lists[g].reverse()
            else:
                lists[to].append(lists[g].pop(which % len(lists[g])))
        if how == "move":
            self.oracle.h[self.members[to][-1]] = dict(self.oracle.h[self.members[to][0]])
        self.assert_bits(before, f"rearrange: {how}")

    def _has_tensors(self, g: int) -> bool:
        """Whether a group has hyper-parameters that may be too coarse for others' weights."""
        return any(isinstance(x, torch.Tensor) for x in self.opt.param_groups[g].values())

    def forget(self, how: str, which: int) -> None:
        """The state cleared, one parameter's taken out, or all replaced by copies."""
        if not self.fused or self.masters or self.setup.method in ("full", "noise"):
            return  # the base's own affair; masters are weights; a full gradient is no average
        state, chosen = self.opt.state, range(len(self.params))
        if how == "clear":
            state.clear()
        elif how == "pop":
            chosen = [which % len(self.params)]
            state.pop(self.params[chosen[0]], None)
        else:
            chosen = []
            for entry in state.values():
                entry.update({k: x.clone() for k, x in entry.items()})
        for i in chosen:
            self.oracle.forget(i)

    def reload(self, fresh: bool, file: bool) -> None:
        """state_dict and load_state_dict: into the same optimizer, or into a new one with new
        parameters of the same values; through torch.save, or not."""
        before, state = self.bits(), self.opt.state_dict()
        if file:
            data = io.BytesIO()
            torch.save(state, data)
            data.seek(0)
            state = torch.load(data, weights_only=True)
        elif not self.fused:  # torch's own load_state_dict shares the tensors
            state = copy.deepcopy(state)
        if fresh:
            self._leave([nn.Parameter(p.detach().clone()) for p in self.params])
            self.opt = self._build(self.params)
            self._settle()
            self.oracle.skipped = 0
        self.opt.load_state_dict(state)
        self.assert_bits(before, "loading its own state")

    def copy(self, way: str) -> None:
        """Go on with a copy, and leave the original behind."""
        before, old = self.bits(), self.params
        self._leave(old)
        make = copy.deepcopy if way == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        self.params, self.opt = make((old, self.opt))
        self._settle()
        self.assert_bits(before, way)

    def _leave(self, params: list) -> None:
        """Go on with other parameters; these and their state must not change any more."""
        for i, p in enumerate(self.params):
            kept = [x for x in self.entry(i).values() if isinstance(x, torch.Tensor)]
            self.left_behind += [(t, as_bits(t)) for t in (p, *kept)]
        self.params, self.storages = params, []

    def write(self, which: int, seed: int) -> None:
        """Someone else writes into a weight."""
        i = which % len(self.params)
        p = self.params[i]
        values = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        keep = torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        with torch.no_grad():
            p.copy_(torch.where(keep.to(p.device), p, values.to(p)))
        self.written.add(i)

    def move(self, form: str) -> None:
        """Someone else gives the parameters other memory and another order, as
        model.to(memory_format=...) does."""
        for p in self.params:
            if p.stride() == torch.empty_like(p).stride():  # gaps cannot be closed, by contract
                p.grad = None
                p.data = formed(p.detach().clone(), form)
        self.storages = []
        self._settle()

    def full_gradient(self, seed: int) -> None:
        if self.setup.method not in ("full", "noise"):
            return
        G = self.make(Grads(seed + 500))
        order = [i for members in self.members for i in members]
        self.opt.set_full_gradient([G[i] for i in order])
        for i in range(len(self.params)):
            self.oracle.m[i] = G[i]
            m = self.state(i, "m")
            assert torch.equal(m, G[i].to(m.dtype))

    def misuse(self, first: Grads, perturbed: bool, kind: int) -> None:
        """A call that does not fit: PhaseError or ValueError, and nothing has changed."""
        if perturbed:
            self.climb(self.make(first))
        before = self.bits()
        calls = self._while_perturbed() if perturbed else self._while_at_rest()
        name = sorted(calls)[kind % len(calls)]
        self.census[f"misuse: {name}"] += 1
        error = ValueError if name.startswith("bad") else PhaseError
        with pytest.raises(error):
            calls[name]()
        assert self.opt.is_perturbed == perturbed
        self.assert_bits(before, f"misuse: {name}")
        if perturbed:
            self.opt.restore()
            self.back("restore()")

    def _while_perturbed(self) -> dict:
        new = nn.Parameter(torch.ones(2, device=self.device))
        opt = self.opt
        calls = {"first_step": opt.first_step, "state_dict": opt.state_dict,
                 "load_state_dict": lambda: opt.load_state_dict({}),
                 "add_param_group": lambda: opt.add_param_group(dict(params=[new])),
                 "step(closure)": lambda: opt.step(lambda: None),
                 "unstash_grad": opt.unstash_grad, "deepcopy": lambda: copy.deepcopy(opt),
                 "pickle": lambda: pickle.dumps(opt)}
        if self.setup.method in ("full", "noise"):
            calls["set_full_gradient"] = opt.set_full_gradient
        return calls

    def _while_at_rest(self) -> dict:
        opt, p = self.opt, self.params[0]
        shared = nn.Parameter(p.detach()) if p.numel() else p
        state = opt.state_dict()
        other = {**state, "state": {**state["state"], 0: {"momentum_buffer": torch.ones(9, 9, 9),
                                                          "exp_avg": torch.ones(9, 9, 9)}}}

        def sparse_gradient() -> None:
            self.set([None] * len(self.params))
            p.grad = torch.ones_like(p).to_sparse()
            try:
                opt.first_step()
            finally:
                p.grad = None

        calls = {"second_step": opt.second_step, "unstash_grad": opt.unstash_grad,
                 "bad: shared memory": lambda: opt.add_param_group(dict(params=[shared])),
                 "bad: rho=-1": lambda: opt.add_param_group(
                     dict(params=[nn.Parameter(torch.ones(1))], rho=-1.0))}
        if self.fused:  # the state of another base is its own affair
            calls["bad: another model's state"] = lambda: opt.load_state_dict(other)
        if p.ndim and p.numel():
            calls["bad: sparse gradient"] = sparse_gradient
        return calls
