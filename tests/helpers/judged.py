"""One optimizer beside the float64 oracle, and what must hold of both.

The oracle takes over the optimizer's weights and state before each half of a step, so what is
judged is that half's own rounding, by the bound that `rounding` derives; what must not change is
compared bit for bit.
"""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from fastsam import SAM

from .gradients import give
from .oracle import Oracle
from .rounding import Rounded, units
from .setups import BASES, CLASSES, Grads, Group, Setup, formed, in_a_bucket

MAY_BE_TENSORS = ("rho", "sigma", "lmbda", "lr", "weight_decay")
STATE = {"m": ("ema", "full_gradient", "sam_ema", "sam_full_gradient"),
         "v": ("momentum_buffer", "exp_avg"), "u": ("exp_avg_sq",)}
SENTINEL = 7.0


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


class Judged:
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
