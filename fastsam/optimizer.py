"""The torch optimizer front: parameter groups, the two-phase step, closures and state."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from . import distributed, saving
from .amp import inverse_scale, report_overflow
from .checks import check_group, check_options, refuse_shared, refuse_unfused, refuse_unusable
from .dispatch import Kind, resolve
from .flat import Hyper, Slot, Space, is_dense
from .radius import RadiusWatch
from .reference import projection

FUSED = {SGD: "sgd", Adam: "adam", AdamW: "adam"}


class PhaseError(RuntimeError):
    """A call that does not fit the phase: perturbed (after first_step) or not."""


@dataclass
class Phase:
    """Where in a step an optimizer is: whether the weights are moved, the GradScaler and the
    process group of its first pass, and what `stash_grad` has set aside. An object of its own,
    because wrappers such as Lightning's share an optimizer's attributes by copying them."""

    perturbed: bool = False
    scaler: object = None
    group: object = None
    stash: dict[Tensor, Tensor] = field(default_factory=dict)
    stash_ok: Tensor | None = None


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021) over any base optimizer.

    One step is: gradient at w, `first_step` climbs to w + rho g / ||g||, gradient there,
    `second_step` returns to w and lets the base optimizer update it. The norm is one l2 norm over
    all parameters of all groups (biases and normalisation weights too, weight decay not).

    `torch.optim.SGD`, `Adam` and `AdamW` are fused into the kernels and never wait for the
    device (their foreach, fused and capturable flags are taken and change nothing); any other
    base optimizer runs its own step after the weights are restored.

    Args:
        params: parameters, groups, or named parameters, as for any torch optimizer. Group keys:
            `rho`, `adaptive`, `perturb` (False: the group neither climbs nor enters the norm) and
            the base optimizer's own. Complex parameters are refused.
        base_optimizer: a torch optimizer class, such as `torch.optim.SGD`.
        rho: radius of the perturbation, in units of the weights; at least 0. Default 0.05.
        adaptive: ASAM's perturbation with T = |w| (see `ASAM`). Default False.
        backend: None chooses (see `backend_report`); "triton", "compiled" or "reference" is
            obeyed or raises.
        interval: climb at every interval-th step only; the others are plain steps of the base
            optimizer, of one pass. `step(closure)` sees to it; a loop of its own asks
            `climbs_next`. Default 1.
        start: the number of plain steps before the first climb. Default 0.
        master_weights: keep float32 weights for 16-bit parameters, from which each step starts
            and which the model sees rounded. A weight that someone else writes into the model is
            taken over. Default False.
        **kwargs: the base optimizer's arguments, such as lr, momentum and weight_decay.

    Raises:
        ValueError: a negative or non-finite rho, an empty parameter list, a complex parameter,
            an unknown backend or one that cannot run here, an interval below 1, a negative start,
            master_weights with a base that is not fused, a bad base-optimizer argument.
        TypeError: base_optimizer is not an optimizer class.
    """

    _mode: str | None = None
    _projection: str | None = None
    _scales_with = "weights"
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable, base_optimizer: type[Optimizer], rho: float = 0.05,
                 adaptive: bool = False, *, backend: str | None = None, interval: int = 1,
                 start: int = 0, master_weights: bool = False, **kwargs):
        self._build(params, base_optimizer, dict(rho=rho, adaptive=adaptive), backend=backend,
                    interval=interval, start=start, master_weights=master_weights, **kwargs)

    def _build(self, params, base_optimizer, own: dict, *, backend: str | None = None,
               interval: int = 1, start: int = 0, master_weights: bool = False, **kwargs) -> None:
        wrapped = isinstance(base_optimizer, Optimizer)
        kind = type(base_optimizer) if wrapped else base_optimizer
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise TypeError(f"base_optimizer={base_optimizer!r} is not an optimizer class: "
                            "pass the class, such as torch.optim.SGD, and its arguments by name")
        if wrapped and (kwargs or params is not base_optimizer.param_groups):
            raise TypeError(f"an existing {kind.__name__} has its parameters and arguments: "
                            f"use {type(self).__name__}.wrap(optimizer, rho=...)")
        own = {**own, "perturb": True, "sam_steps": 0}
        check_group(own)
        self._fused = FUSED.get(kind)
        check_options(interval, start, master_weights, self._fused, kind)
        self._requested_backend, self._backend, self._report = backend, None, {}
        self._interval, self._start, self._masters = interval, start, master_weights
        self._spaces: list[Space] = []
        self._phase = Phase()
        self._watch = RadiusWatch()
        self.base_optimizer = None
        super().__init__(params, own)
        self.base_optimizer = base_optimizer if wrapped else kind(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults = {**self.base_optimizer.defaults, **own}
        if self._fused:
            refuse_unfused(self.param_groups)
        else:  # one state for both, to which m is added when the base has set it up
            self.state = self.base_optimizer.state
        self._add_spaces(range(len(self.param_groups)))
        if wrapped and self._fused:
            for p, state in base_optimizer.state.items():
                saving.load_slot(*self._slot_of(p), state)
            base_optimizer.state.clear()
            self._link_state()

    @classmethod
    def wrap(cls, base_optimizer: Optimizer, *args, **kwargs) -> "SAM":
        """Put this class around an existing optimizer, whose groups and state it takes over.

        Args:
            base_optimizer: the instance; its param_groups stay shared.
            *args, **kwargs: rho and the other arguments of the class; a group's own rho wins.
        """
        return cls(base_optimizer.param_groups, base_optimizer, *args, **kwargs)

    # ---- parameters and their spaces

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, in mid-training too. It shares the kernel launches of the others.

        Raises:
            PhaseError: while perturbed.
            ValueError: as the constructor.
        """
        if getattr(self, "base_optimizer", None) is None:  # called by torch's constructor
            super().add_param_group(param_group)
            check_group(self.param_groups[-1])
            return
        self._need_phase(False, "add_param_group")
        merged = {**self.defaults, **param_group, "sam_steps": self.param_groups[0]["sam_steps"]}
        check_group(merged)
        if self._fused:
            refuse_unfused([merged])
        self.base_optimizer.add_param_group(merged)
        try:
            self._add_spaces([len(self.param_groups) - 1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _add_spaces(self, group_indices: Iterable[int]) -> None:
        """Lay the groups' parameters out: one space per device, dtype and sharding."""
        kinds: dict[tuple, list] = {}
        for i in group_indices:
            group = self.param_groups[i]
            names = group.get("param_names") or [None] * len(group["params"])
            for p, name in zip(group["params"], names, strict=True):
                refuse_unusable(p)
                key = p.device, p.dtype, distributed.shards_of(p)
                kinds.setdefault(key, []).append((p, name, i))
        refuse_shared([slot.param for slot in self._slots()]
                      + [p for rows in kinds.values() for p, _, _ in rows])
        new = [Kind(*key[:2], all(is_dense(p) for p, _, _ in rows),
                    sum(p.numel() for p, _, _ in rows)) for key, rows in kinds.items()]
        self._backend, self._report = resolve(self._requested_backend, self._kinds() + new)
        for key, rows in kinds.items():
            self._add_space(key, rows)
        self._scaled_by = None
        self._bring_hyper()
        self._link_state()

    def _add_space(self, key: tuple, rows: list) -> None:
        """Make a space; of a kind that there is already, one with the old slots and the new."""
        old = next((s for s in self._spaces if (s.device, s.dtype, s.shards) == key), None)
        if old is not None:
            rows = [(slot.param, slot.name, slot.group) for slot in old.slots] + rows
        space = Space(rows, self._mode, self._fused, self._masters, key[2], pack=old is None)
        if self._fused == "adam" or (old is not None and old.v is not None):
            space.allocate_base()
        if old is None:
            self._spaces.append(space)
        else:
            space.absorb(old)
            self._spaces[self._spaces.index(old)] = space

    def _slots(self) -> list[Slot]:
        return [slot for space in self._spaces for slot in space.slots]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _slot_of(self, p: Tensor) -> tuple[Space, Slot]:
        return next((space, slot) for space in self._spaces for slot in space.slots
                    if slot.param is p)

    def _kinds(self) -> list[Kind]:
        return [Kind(s.device, s.dtype, all(x.dense for x in s.slots),
                     sum(x.w.numel() for x in s.slots)) for s in self._spaces]

    def _link_state(self, initialised: Iterable[Tensor] = ()) -> None:
        """Make `state[p]` show the slot's own tensors, under torch's names for the base's. A base
        that is not fused sets p's state up at a step where it finds none, so m is shown beside it
        only from then on: where there is a state, and for `initialised`."""
        for space in self._spaces:
            for slot in space.slots:
                p = slot.param
                if self._fused or p in initialised or self.state.get(p):
                    self.state[p].update(saving.entry(space, slot))

    def _bring_hyper(self) -> None:
        """Send the groups' current values (a scheduler may have changed them) to the device."""
        rows = [hyper_row(group, self._mode, self._fused) for group in self.param_groups]
        momentum = self._fused == "sgd" and any(row.momentum for row in rows)
        scaled_by = [(g["adaptive"], g.get("scale"), g.get("eta")) for g in self.param_groups]
        for space in self._spaces:
            space.set_hyper(rows)
            if momentum and space.v is None:
                space.allocate_base()
                self._link_state()
            if scaled_by != self._scaled_by:
                space.set_scalings([self._scaling(self.param_groups[s.group], s)
                                    for s in space.slots], self._scales_with)
        self._scaled_by = scaled_by

    def _scaling(self, group: dict, slot: Slot) -> tuple[float, float]:
        """(a, b) of T = a |w| + b for one parameter; FisherSAM's a is its eta."""
        if not group["adaptive"]:
            return 0.0, 1.0
        if self._scales_with == "gradient":
            return float(group["eta"]), 1.0
        if group.get("scale", "all") == "all":
            return 1.0, 0.0
        is_weight = "weight" in slot.name if slot.name is not None else slot.param.ndim >= 2
        return (1.0, float(group["eta"])) if is_weight else (0.0, 1.0)

    # ---- the step

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, scaler=None) -> None:
        """Climb from w to w + e with the gradients in `.grad`, and save w.

        A zero norm moves nothing. A norm that is not finite moves nothing, leaves the moving
        average alone and makes the coming second step a counted skip (`skipped_steps`).

        Args:
            zero_grad: clear the gradients afterwards, as the second pass needs. Default False.
            scaler: the `torch.amp.GradScaler` that scaled the loss, if any; the gradients are
                still scaled, and the scale is divided out on the device. The second pass then
                ends in `scaler.step(opt); scaler.update()`.

        Raises:
            PhaseError: called twice without a second step or `restore()`.
            ValueError: a sparse gradient; a scaler that has scaled nothing or unscaled already.
            RuntimeError: a parameter changed its device, dtype or shape.
        Whatever is raised, the weights are as before.
        """
        self._need_phase(False, "first_step")
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        inverse = None if scaler is None else inverse_scale(scaler, self)
        gradients = self._gradients()
        self._bring_hyper()
        for slot, g in gradients:
            slot.g1 = g if self.param_groups[slot.group].get("perturb", True) else None
        self._phase.perturbed, self._phase.scaler = True, scaler
        try:
            for space in self._spaces:
                space.set_control("inv_scale1", inverse)
            if self._projection:
                self._project()
            for space in self._spaces:
                self._backend.norm(space)
                space.sum_over_shards(space.partials)
            for space in self._spaces:
                self._backend.climb(space, self._all_partials(space))
        except BaseException:
            self._go_back()
            raise
        for slot, _ in gradients:
            slot.g1 = None
        self._announce(slot.w for slot, _ in gradients if slot.climbed)
        self._watch.look(self._spaces)
        if zero_grad:
            self.zero_grad()

    def _gradients(self) -> list[tuple[Slot, Tensor | None]]:
        """Every slot with its gradient; whatever can be refused is, before anything changes."""
        if any([space.follow_parameters() for space in self._spaces]):
            refuse_shared([slot.param for slot in self._slots()])
            self._link_state()
        return [(slot, Space.read_gradient(slot)) for slot in self._slots()]

    def _project(self) -> None:
        """Multiply sigma with the projection's share, a function of g and m."""
        for space in self._spaces:
            self._backend.dots(space)
        first = self._spaces[0]
        sums = sum(s.sum_over_shards(s.dots).sum(1).to(first.device, first.acc, non_blocking=True)
                   for s in self._spaces)
        for space in self._spaces:
            space.multiply_sigma(projection(sums, self._projection).to(space.device, space.acc))

    def _all_partials(self, space: Space) -> Tensor:
        """The partial sums of every space, where and as `space` has its own: a global norm."""
        if len(self._spaces) == 1:
            return space.partials
        return torch.cat([s.partials.to(space.device, space.acc, non_blocking=True)
                          for s in self._spaces])

    def _announce(self, changed: Iterable[Tensor]) -> None:
        """Tell autograd and autocast, which do not see all writes, of new weights."""
        torch.autograd.graph.increment_version(list(changed))
        torch.clear_autocast_cache()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Return to w and let the base optimizer update it with the gradients in `.grad`.

        Goes through `step()`, so learning-rate schedulers and step hooks count it.

        Raises:
            PhaseError: without a `first_step` before.
        """
        self._need_phase(True, "second_step")
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable | None = None,
             ascent_closure: Callable | None = None) -> Tensor | None:
        """Both passes with a closure; without one, the second step or a plain base step.

        Args:
            closure: computes the loss, calls backward and returns the loss. It is called twice,
                at w and at w + e, each time with cleared gradients; once, at w, where this step
                does not climb (`interval`, `start`). None: the second step when perturbed, else a
                plain step of the base optimizer.
            ascent_closure: what is called at w instead of `closure`: another batch (SAM-db of the
                F-SAM paper's section 4.2), a larger one, or a part of the batch.

        Returns:
            The loss of the first call, or None without a closure.

        Raises:
            PhaseError: a closure while perturbed, or through GradScaler.step.
            ValueError: an ascent_closure without a closure.
        """
        if closure is None:
            if ascent_closure is not None:
                raise ValueError("step(ascent_closure=...) needs a closure for the second pass")
            self._base_step()
            return None
        self._need_phase(False, "step(closure)")
        if getattr(self, "found_inf", None) is not None:
            raise PhaseError("a GradScaler cannot see a closure's gradients: call first_step("
                             "scaler=scaler), the second backward, then scaler.step(optimizer)")
        climbs = self.climbs_next
        had_gradients = self._has_gradients()
        with torch.enable_grad():
            self.zero_grad()
            loss = (ascent_closure or closure)() if climbs else closure()
        if had_gradients and not self._has_gradients():
            warnings.warn("the closure left no gradients, and those there were before it are "
                          "cleared: a closure computes the loss and calls backward; without one, "
                          "call first_step and second_step", stacklevel=3)
        if not climbs:
            self._base_step()
            return loss
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad():
                closure()
            self._base_step()
        except BaseException:
            self._go_back()
            raise
        return loss

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._parameters())

    @torch.no_grad()
    def _base_step(self) -> None:
        grad_scale = getattr(self, "grad_scale", None)  # set by torch.amp.GradScaler.step
        found_inf = getattr(self, "found_inf", None)
        phase = self._phase
        if phase.scaler is not None and found_inf is None:
            raise PhaseError("first_step had a scaler, so the second pass's gradients are "
                             "scaled too: call scaler.step(optimizer), not second_step()")
        if phase.stash:
            raise PhaseError("gradients are set aside: call unstash_grad() before the step")
        ok = self._agreed_ok()
        if phase.scaler is not None:
            report_overflow(phase.scaler, self, self._spaces[0].control.ok if ok is None else ok)
        if ok is not None:
            found_inf = (1 - ok) if found_inf is None else found_inf.to(ok) + (1 - ok)
        if self._fused:
            self._fused_step(grad_scale, found_inf)
        else:
            self._foreign_step(grad_scale, found_inf)
        for group in self.param_groups:
            group["sam_steps"] = group.get("sam_steps", 0) + 1

    def _agreed_ok(self) -> Tensor | None:
        """Whether the climbs of this step were finite, in every micro-batch and on every rank;
        None where there is only the one that the kernels know of."""
        phase, last = self._phase, self._spaces[0].control.ok
        if phase.stash_ok is None and phase.group is None:
            return None
        ok = last if phase.perturbed else torch.ones_like(last)
        if phase.stash_ok is not None:
            ok, phase.stash_ok = ok * phase.stash_ok, None
        return ok if phase.group is None else distributed.all_ok(ok, phase.group)

    def _fused_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        gradients = self._gradients()
        self._bring_hyper()
        for slot, g in gradients:
            slot.g2 = g
        for space in self._spaces:
            space.set_control("inv_scale2", None if grad_scale is None else 1 / grad_scale)
            space.set_control("found_inf", found_inf)
            self._backend.step(space, self._phase.perturbed)
        self.base_optimizer._opt_called = True  # for a scheduler that was built around it
        self._leave_phase([slot.w for slot, _ in gradients
                           if slot.climbed or slot.g2 is not None])

    def _foreign_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Restore and let the base optimizer step. Whether the step is a skip is read on the
        host here: an optimizer of someone else's cannot be skipped from the device."""
        control = self._spaces[0].control
        skip = (found_inf is not None and bool(found_inf)) or (
            self._phase.perturbed and not control.ok)
        self._go_back()
        self._phase.scaler = self._phase.group = None
        if skip:
            control.skipped += 1
            return
        if grad_scale is not None:
            for p in self._parameters():
                if p.grad is not None:
                    p.grad.div_(grad_scale)
        new = {p for p in self._parameters() if p.grad is not None and not self.state.get(p)}
        self.base_optimizer.step()
        if new:
            self._link_state(new)

    # ---- several first passes for one step

    @torch.no_grad()
    def stash_grad(self) -> None:
        """Return to w and set the gradients in `.grad` aside, added to those already set aside.

        For m-sharpness over micro-batches: climb on each by itself, set its second gradient
        aside, and step once after `unstash_grad()`. A climb that was not finite makes that step a
        counted skip. Costs one more gradient's memory.
        """
        phase = self._phase
        if phase.perturbed:
            ok = self._spaces[0].control.ok
            phase.stash_ok = ok.clone() if phase.stash_ok is None else phase.stash_ok * ok
        scaler, group = phase.scaler, phase.group
        self._go_back()
        phase.scaler, phase.group = scaler, group  # still true of the gradients set aside
        for p in self._parameters():
            if p.grad is not None:
                aside = phase.stash.get(p)
                if aside is not None:
                    aside.add_(p.grad)
                else:  # a view belongs to a bucket of DistributedDataParallel, which is reused
                    phase.stash[p] = p.grad.clone() if p.grad._is_view() else p.grad
                p.grad = None

    @torch.no_grad()
    def unstash_grad(self) -> None:
        """Put the sums of the gradients set aside into `.grad`, in place of what is there.

        Raises:
            PhaseError: while perturbed, or with nothing set aside.
        """
        self._need_phase(False, "unstash_grad")
        if not self._phase.stash:
            raise PhaseError("unstash_grad with nothing set aside: call stash_grad after each "
                             "micro-batch's second backward")
        for p in self._parameters():
            p.grad = self._phase.stash.pop(p, None)

    @contextmanager
    def local_first_pass(self, model: torch.nn.parallel.DistributedDataParallel) -> Iterator[None]:
        """Around the first pass (forward and backward) of a DistributedDataParallel model, to
        climb on each rank by the gradient of its own batch: there is no all-reduce in it. The
        ranks' second gradients are averaged as ever, and whether a climb was finite is agreed on
        (one number), so that all ranks step or none. Friendly-SAM's average is each rank's own
        then.

        Raises:
            PhaseError: while perturbed.
            ValueError: another kind of model.
        """
        self._need_phase(False, "local_first_pass")
        group = distributed.group_of(model)
        with model.no_sync():
            yield
        self._phase.group = group

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to w, bit for bit, without an update: give the step up, and with it what
        `stash_grad` set aside. Harmless where there is nothing to give up."""
        self._go_back()
        self._phase.stash.clear()
        self._phase.stash_ok = self._phase.scaler = self._phase.group = None

    @torch.no_grad()
    def _go_back(self) -> None:
        if not self._phase.perturbed:
            return
        moved = [slot for slot in self._slots() if slot.climbed]
        for slot in moved:
            slot.w.copy_(slot.backup)  # rounds a master as it was rounded
        self._leave_phase([slot.w for slot in moved])

    def _leave_phase(self, changed: list[Tensor]) -> None:
        self._phase.perturbed, self._phase.scaler, self._phase.group = False, None, None
        for slot in self._slots():
            slot.climbed, slot.g1, slot.g2 = False, None, None
        self._announce(changed)

    def _need_phase(self, perturbed: bool, call: str) -> None:
        if self._phase.stash and call in ("state_dict", "copying or pickling"):
            raise PhaseError(f"{call} with gradients set aside: finish the step first")
        if self._phase.perturbed == perturbed:
            return
        if perturbed:
            raise PhaseError(f"{call} without a first_step before it: the weights are not "
                             "perturbed; call first_step, then compute the gradients again")
        raise PhaseError(f"{call} while the weights are perturbed: call second_step (or restore "
                         "to give the step up) first")

    # ---- what can be asked

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at w + e: after first_step, before second_step or restore."""
        return self._phase.perturbed

    @property
    def climbs_next(self) -> bool:
        """Whether the coming step climbs, by `interval` and `start`. A loop of its own calls
        first_step, and computes the gradients again, only then; else `step()` alone."""
        past = self.param_groups[0].get("sam_steps", 0) - self._start
        return past >= 0 and past % self._interval == 0

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, for a norm that was not finite or because a GradScaler
        found an overflow. Waits for the device."""
        return int(self._spaces[0].control.skipped)

    @property
    def last_radius(self) -> float:
        """The l2 distance the last first_step really moved the weights, after rounding to their
        dtype; of sharded parameters, this process's part of it. Waits for the device."""
        return sum(float(s.radii[0].sum(dtype=torch.float64)) for s in self._spaces) ** 0.5

    @property
    def last_grad_norm(self) -> float:
        """||T d|| of the last first_step: for SAM the gradient's norm. Waits for the device."""
        return float(self._spaces[0].control.norm)

    def backend_report(self) -> dict:
        """What runs and why: `backend`, `why`, `fused_base` and one line per `spaces`."""
        spaces = [f"{len(s.slots)} tensors, {sum(x.w.numel() for x in s.slots)} parameters, "
                  f"{s.dtype} on {s.device}, "
                  + ("packed in one buffer" if s.flat_w is not None else "in their own memory")
                  + (", float32 masters" if s.masters else "")
                  + (", sharded" if s.shards else "")
                  for s in self._spaces]
        return {**self._report, "fused_base": self._fused is not None, "spaces": spaces}

    def memory_report(self) -> dict[str, int]:
        """Bytes that the optimizer keeps between steps, by buffer: the saved weights (`backup`;
        the masters, where there are), F-SAM's average or the full gradient (`ema`), the fused
        base's buffers (`base`). Weights packed into one buffer are the model's own and not
        counted, nor is the state of a base optimizer that is not fused."""
        report = dict.fromkeys(("backup", "ema", "base", "other"), 0)
        for s in self._spaces:
            for name, t in (("backup", s.backup), ("ema", s.m), ("base", s.v), ("base", s.u)):
                report[name] += 0 if t is None else t.nbytes
            report["other"] += sum(t.nbytes for t in (
                s.steps, s.partials, s.radii, s.dots, s.control_buffer, s.counters,
                *s.scratch.values()))
        return report

    # ---- saving and loading

    def state_dict(self) -> dict:
        """The whole state, the base optimizer's included, in torch's format.

        Raises:
            PhaseError: while perturbed (the weights that belong to it are not in the model), or
                with gradients set aside.
        """
        self._need_phase(False, "state_dict")
        with saving.without_hooks(self, "_optimizer_state_dict_post_hooks") as (hooks,):
            state = super().state_dict()
        if self._fused:
            state["state"] = {i: saving.as_torch_saves(x) for i, x in state["state"].items()}
        else:
            own = self._by_index(saving.entry)
            base = self.base_optimizer.state_dict()["state"]
            state["state"] = {i: {**base.get(i, {}), **own.get(i, {})} for i in {**base, **own}}
        for hook in hooks.values():
            state = hook(self, state) or state
        return state

    def _by_index(self, entry: Callable[[Space, Slot], dict]) -> dict[int, dict]:
        """What `entry` gives for every slot, under the parameter's index in torch's format."""
        index = {p: i for i, p in enumerate(self._parameters())}
        entries = {index[slot.param]: entry(space, slot)
                   for space in self._spaces for slot in space.slots}
        return {i: e for i, e in entries.items() if e}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a state: of this class, of the base optimizer alone, or of a public SAM or
        F-SAM class, whose saved weights (`old_p`) are transient and left out. Group keys that it
        lacks, such as rho in SGD's, stay as they are.

        Raises:
            PhaseError: while perturbed.
            ValueError: groups, parameter counts or shapes differ, or a value this class refuses;
                nothing has changed then.
        """
        self._need_phase(False, "load_state_dict")
        with saving.hooks_around(self, state_dict) as state_dict:
            self._load(state_dict)

    def _load(self, state_dict: dict) -> None:
        groups = saving.merged_groups(self.param_groups, state_dict["param_groups"])
        for group in groups:
            check_group(group)
        if self._fused:
            refuse_unfused(groups)
        states = [state_dict["state"].get(i, {}) for g in groups for i in g["params"]]
        params = self._parameters()
        for p, state in zip(params, states, strict=False):
            saving.check_entry(p, state)
        state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict({**state_dict, "state": {}})
        self.base_optimizer.param_groups = self.param_groups
        if not self._fused:
            theirs = {i: saving.bases_part(state) for i, state in state_dict["state"].items()}
            theirs = {i: part for i, part in theirs.items() if part}
            self.base_optimizer.load_state_dict({**state_dict, "state": theirs})
            self.param_groups, self.state = (self.base_optimizer.param_groups,
                                             self.base_optimizer.state)
            for p in [p for p, state in self.state.items() if state is None]:
                del self.state[p]  # ZeroRedundancyOptimizer's sign for another process's
        for p, state in zip(params, states, strict=True):
            saving.load_slot(*self._slot_of(p), state)
        for space in self._spaces:
            space.clear_between()
        self._link_state()

    def __getstate__(self) -> dict:
        self._need_phase(False, "copying or pickling")
        hooks = [name for name in self.__dict__ if name.endswith("_hooks")]
        return {k: v for k, v in self.__dict__.items()
                if k not in (*hooks, "_backend", "_watch", "step", "_zero_grad_profile_name")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if "_spaces" in state:  # a copy or a pickle; without it, load_state_dict
            self._watch = RadiusWatch()
            self._backend, self._report = resolve(self._requested_backend, self._kinds())
            self._link_state()


def hyper_row(group: dict, mode: str | None, base: str | None) -> Hyper:
    """One group's row of the device table: only what this optimizer and its base use."""
    g = group if base else {}
    friendly = group if mode in ("algorithm1", "official") else {}
    beta1, beta2 = g.get("betas", (0.0, 0.0))
    return Hyper(
        rho=group["rho"], sigma=friendly.get("sigma", 1.0), lmbda=friendly.get("lmbda", 0.0),
        lr=g.get("lr", 0.0), momentum=g.get("momentum", 0.0), dampening=g.get("dampening", 0.0),
        weight_decay=g.get("weight_decay", 0.0), nesterov=g.get("nesterov", False),
        beta1=float(beta1), beta2=float(beta2), eps=g.get("eps", 0.0),
        decoupled=g.get("decoupled_weight_decay", False))
