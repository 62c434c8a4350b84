"""What may happen to an optimizer: every public method of `Player` is an event."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from fastsam import PhaseError

from .judged import MAY_BE_TENSORS, Judged, all_finite, as_bits, scalar
from .setups import Grads, Group, formed


class Interruption(Exception):
    """What a closure of the user's raises."""


class Player(Judged):
    """Events, each with what must hold after it. Args: those of `Judged`."""

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
