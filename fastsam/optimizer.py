"""The torch optimizer front: parameter groups, the two-phase step, closures and state."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import SGD, Optimizer

from .checks import (
    check_group,
    check_state,
    refuse_shared,
    refuse_unfused,
    refuse_unusable,
    saved_ema,
)
from .dispatch import resolve
from .flat import Hyper, Slot, Space, is_dense

# saved by this class or by the public SAM and F-SAM classes, and not by any base optimizer
NOT_THE_BASES = ("ema", "ema_steps", "old_p", "momentum")


class PhaseError(RuntimeError):
    """A call that does not fit the phase: perturbed (after first_step) or not."""


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021) over any base optimizer.

    One step is: gradient at w, `first_step` climbs to w + rho g / ||g||, gradient there,
    `second_step` returns to w and lets the base optimizer update it. The norm is one l2 norm over
    all parameters of all groups (biases and normalisation weights too, weight decay not).

    `torch.optim.SGD` is fused into the kernels and never waits for the device; any other base
    optimizer runs its own step after the weights are restored.

    Args:
        params: parameters, groups, or named parameters, as for any torch optimizer. Group keys:
            `rho`, `adaptive`, `perturb` (False: the group neither climbs nor enters the norm) and
            the base optimizer's own. Complex parameters are refused.
        base_optimizer: a torch optimizer class, such as `torch.optim.SGD`.
        rho: radius of the perturbation, in units of the weights; at least 0. Default 0.05.
        adaptive: ASAM's perturbation with T = |w| (see `ASAM`). Default False.
        backend: None chooses, "triton" or "reference" is obeyed or raises.
        **kwargs: the base optimizer's arguments, such as lr, momentum and weight_decay.

    Raises:
        ValueError: a negative or non-finite rho, an empty parameter list, a complex parameter,
            an unknown backend or one that cannot run here, a bad base-optimizer argument.
        TypeError: base_optimizer is not an optimizer class.
    """

    _ema: str | None = None
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable, base_optimizer: type[Optimizer], rho: float = 0.05,
                 adaptive: bool = False, *, backend: str | None = None, **kwargs):
        self._build(params, base_optimizer, dict(rho=rho, adaptive=adaptive), backend, kwargs)

    def _build(self, params, base_optimizer, own: dict, backend: str | None, kwargs: dict) -> None:
        wrapped = isinstance(base_optimizer, Optimizer)
        kind = type(base_optimizer) if wrapped else base_optimizer
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise TypeError(f"base_optimizer={base_optimizer!r} is not an optimizer class: "
                            "pass the class, such as torch.optim.SGD, and its arguments by name")
        if wrapped and (kwargs or params is not base_optimizer.param_groups):
            raise TypeError(f"an existing {kind.__name__} has its parameters and arguments: "
                            f"use {type(self).__name__}.wrap(optimizer, rho=...)")
        own = {**own, "perturb": True}
        check_group(own, self._ema)
        self._requested_backend, self._backend, self._report = backend, None, {}
        self._spaces: list[Space] = []
        self._perturbed = False
        self._fused = kind is SGD
        self._scaler = None
        self.base_optimizer = None
        super().__init__(params, own)
        self.base_optimizer = base_optimizer if wrapped else kind(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults = {**self.base_optimizer.defaults, **own}
        if self._fused:
            refuse_unfused(self.param_groups)
        self._add_spaces(range(len(self.param_groups)))
        if wrapped and self._fused:
            for p, state in base_optimizer.state.items():
                self._load_slot(p, state)
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
        """Add a group, in mid-training too; it gets kernel launches of its own.

        Raises:
            PhaseError: while perturbed.
            ValueError: as the constructor.
        """
        if getattr(self, "base_optimizer", None) is None:  # called by torch's constructor
            super().add_param_group(param_group)
            check_group(self.param_groups[-1], self._ema)
            return
        self._need_phase(False, "add_param_group")
        merged = {**self.defaults, **param_group}
        check_group(merged, self._ema)
        if self._fused:
            refuse_unfused([merged])
        self.base_optimizer.add_param_group(merged)
        try:
            self._add_spaces([len(self.param_groups) - 1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _add_spaces(self, group_indices: Iterable[int]) -> None:
        """Lay the groups' parameters out in one space per device and dtype."""
        kinds: dict[tuple, list] = {}
        for i in group_indices:
            group = self.param_groups[i]
            names = group.get("param_names") or [None] * len(group["params"])
            for p, name in zip(group["params"], names, strict=True):
                refuse_unusable(p)
                kinds.setdefault((p.device, p.dtype), []).append((p, name, i))
        refuse_shared([slot.w for slot in self._slots()]
                      + [p for rows in kinds.values() for p, _, _ in rows])
        new = [(*kind, all(is_dense(p) for p, _, _ in rows)) for kind, rows in kinds.items()]
        self._backend, self._report = resolve(self._requested_backend, self._kinds() + new)
        self._spaces += [Space(rows, self._ema) for rows in kinds.values()]
        self._scaled_by = None
        self._bring_hyper()
        self._link_state()

    def _slots(self) -> list[Slot]:
        return [slot for space in self._spaces for slot in space.slots]

    def _kinds(self) -> list[tuple[torch.device, torch.dtype, bool]]:
        return [(s.device, s.dtype, all(x.dense for x in s.slots)) for s in self._spaces]

    def _link_state(self) -> None:
        """Make `state[p]` show the slot's own tensors: m, v and how often each was updated."""
        for space in self._spaces:
            for slot in space.slots:
                if slot.m is not None:
                    self.state[slot.w].update(ema=slot.m, ema_steps=slot.m_steps)
                if slot.v is not None:
                    self.state[slot.w].update(momentum_buffer=slot.v, momentum_steps=slot.v_steps)

    def _bring_hyper(self) -> None:
        """Send the groups' current values (a scheduler may have changed them) to the device."""
        names = Hyper._fields if self._fused else ("rho", "sigma", "lmbda")
        rows = [tuple(g.get(name, 0) if name in names else 0 for name in Hyper._fields)
                for g in self.param_groups]
        momentum = self._fused and any(g["momentum"] != 0 for g in self.param_groups)
        scaled_by = [(g["adaptive"], g.get("scale"), g.get("eta")) for g in self.param_groups]
        for space in self._spaces:
            space.set_hyper(rows)
            if momentum and not space.momentum:
                space.allocate_momentum()
                self._link_state()
            if scaled_by != self._scaled_by:
                space.set_scalings([scaling(self.param_groups[s.group], s.w, s.name)
                                    for s in space.slots])
        self._scaled_by = scaled_by

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
        self._perturbed, self._scaler = True, scaler
        try:
            for space in self._spaces:
                space.set_control("inv_scale1", inverse)
                self._backend.norm(space)
            for space in self._spaces:
                self._backend.climb(space, self._all_partials(space))
        except BaseException:
            self.restore()
            raise
        for slot, _ in gradients:
            slot.g1 = None
        self._announce(slot.w for slot, _ in gradients if slot.climbed)
        if zero_grad:
            self.zero_grad()

    def _gradients(self) -> list[tuple[Slot, Tensor | None]]:
        """Every slot with its gradient; whatever can be refused is, before anything changes."""
        if any([space.follow_parameters() for space in self._spaces]):
            refuse_shared([slot.w for slot in self._slots()])
            self._link_state()
        return [(slot, Space.read_gradient(slot)) for slot in self._slots()]

    def _all_partials(self, space: Space) -> Tensor:
        """The partial sums of every space, where and as `space` has its own: a global norm."""
        if len(self._spaces) == 1:
            return space.partials
        return torch.cat([s.partials.to(space.device, space.acc, non_blocking=True)
                          for s in self._spaces])

    def _announce(self, changed: Iterable[Tensor]) -> None:
        """Tell autograd and autocast, which do not see the kernels' writes, of new weights."""
        if self._report["backend"] == "triton":
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

    def step(self, closure: Callable | None = None) -> Tensor | None:
        """Both passes with a closure; without one, the second step or a plain base step.

        Args:
            closure: computes the loss, calls backward and returns the loss. It is called twice,
                at w and at w + e, each time with cleared gradients. None: the second step when
                perturbed, else a plain step of the base optimizer.

        Returns:
            The loss of the first call, or None without a closure.

        Raises:
            PhaseError: a closure while perturbed, or through GradScaler.step.
        """
        if closure is None:
            self._base_step()
            return None
        self._need_phase(False, "step(closure)")
        if getattr(self, "found_inf", None) is not None:
            raise PhaseError("a GradScaler cannot see a closure's gradients: call first_step("
                             "scaler=scaler), the second backward, then scaler.step(optimizer)")
        with torch.enable_grad():
            self.zero_grad()
            loss = closure()
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad():
                closure()
            self._base_step()
        except BaseException:
            self.restore()
            raise
        return loss

    @torch.no_grad()
    def _base_step(self) -> None:
        grad_scale = getattr(self, "grad_scale", None)  # set by torch.amp.GradScaler.step
        found_inf = getattr(self, "found_inf", None)
        if self._perturbed and self._scaler is not None:
            if found_inf is None:
                raise PhaseError("first_step had a scaler, so the second pass's gradients are "
                                 "scaled too: call scaler.step(optimizer), not second_step()")
            self._report_overflow(self._scaler)
        if not self._fused:
            self._foreign_step(grad_scale, found_inf)
            return
        gradients = self._gradients()
        self._bring_hyper()
        for slot, g in gradients:
            slot.g2 = g
        for space in self._spaces:
            space.set_control("inv_scale2", None if grad_scale is None else 1 / grad_scale)
            space.set_control("found_inf", found_inf)
            self._backend.step(space, self._perturbed)
        self.base_optimizer._opt_called = True  # for a scheduler that was built around it
        self._leave_phase([slot.w for slot, _ in gradients
                           if slot.climbed or slot.g2 is not None])

    def _foreign_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Restore and let the base optimizer step. Whether the step is a skip is read on the
        host here: an optimizer of someone else's cannot be skipped from the device."""
        control = self._spaces[0].control
        skip = bool(found_inf) or (self._perturbed and not control.ok)
        if self._perturbed:
            self.restore()
        if skip:
            control.skipped += 1
            return
        if grad_scale is not None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(grad_scale)
        self.base_optimizer.step()

    def _report_overflow(self, scaler) -> None:
        """Let an overflow of the first pass, too, make the scaler back off at its update()."""
        state = scaler._per_optimizer_states[id(self)]
        for device, found_inf in state["found_inf_per_device"].items():
            for space in self._spaces:
                if space.device == device:
                    found_inf.logical_or_(space.control.ok == 0)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to w, bit for bit, without an update. Does nothing when not perturbed."""
        if not self._perturbed:
            return
        moved = [slot for slot in self._slots() if slot.climbed]
        for slot in moved:
            slot.w.copy_(slot.backup)
        self._leave_phase([slot.w for slot in moved])

    def _leave_phase(self, changed: list[Tensor]) -> None:
        self._perturbed, self._scaler = False, None
        for slot in self._slots():
            slot.climbed, slot.g1, slot.g2 = False, None, None
        self._announce(changed)

    def _need_phase(self, perturbed: bool, call: str) -> None:
        if self._perturbed == perturbed:
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
        return self._perturbed

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, for a norm that was not finite or because a GradScaler
        found an overflow. Waits for the device."""
        return int(self._spaces[0].control.skipped)

    @property
    def last_radius(self) -> float:
        """The l2 distance the last first_step really moved the weights, after rounding to their
        dtype. Waits for the device."""
        return sum(float(s.radii.sum(dtype=torch.float64)) for s in self._spaces) ** 0.5

    @property
    def last_grad_norm(self) -> float:
        """||T d|| of the last first_step: for SAM the gradient's norm. Waits for the device."""
        return float(self._spaces[0].control.norm)

    def backend_report(self) -> dict:
        """What runs and why: `backend`, `why`, `fused_base` and one line per `spaces`."""
        spaces = [f"{len(s.slots)} tensors, {sum(x.w.numel() for x in s.slots)} parameters, "
                  f"{s.dtype} on {s.device}, "
                  + ("packed in one buffer" if s.flat_w is not None else "in their own memory")
                  for s in self._spaces]
        return {**self._report, "fused_base": self._fused, "spaces": spaces}

    def memory_report(self) -> dict[str, int]:
        """Bytes that the optimizer keeps between steps, by buffer. Weights packed into one
        buffer are the model's own and not counted."""
        report = dict.fromkeys(("backup", "ema", "momentum", "other"), 0)
        for s in self._spaces:
            for name, t in (("backup", s.backup), ("ema", s.m), ("momentum", s.v)):
                report[name] += 0 if t is None else t.nbytes
            report["other"] += sum(t.nbytes for t in (
                s.steps, s.partials, s.radii, s.control_buffer, s.counters))
        return report

    # ---- saving and loading

    def state_dict(self) -> dict:
        """The whole state, the base optimizer's included, in torch's format.

        Raises:
            PhaseError: while perturbed (the weights that belong to it are not in the model).
        """
        self._need_phase(False, "state_dict")
        state = super().state_dict()
        if not self._fused:
            base = self.base_optimizer.state_dict()["state"]
            state["state"] = {i: {**state["state"].get(i, {}), **base.get(i, {})}
                              for i in {**state["state"], **base}}
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a state: of this class, of torch's SGD, or of a public SAM or F-SAM class,
        whose saved weights (`old_p`) are transient and left out. Group keys that it lacks, such
        as rho in SGD's, stay as they are.

        Raises:
            PhaseError: while perturbed.
            ValueError: groups, parameter counts or shapes differ, or a value this class refuses;
                nothing has changed then.
        """
        self._need_phase(False, "load_state_dict")
        groups = [{**{k: x for k, x in mine.items() if k != "params"}, **theirs}
                  for mine, theirs in zip(self.param_groups, state_dict["param_groups"],
                                          strict=False)]
        if len(groups) == len(state_dict["param_groups"]):  # else torch's own words, below
            state_dict = {**state_dict, "param_groups": groups}
        for group in groups:
            check_group(group, self._ema)
        if self._fused:
            refuse_unfused(groups)
        states = [state_dict["state"].get(i, {}) for g in groups for i in g["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for p, state in zip(params, states, strict=False):
            check_state(p, state)
        super().load_state_dict({**state_dict, "state": {}})
        self.base_optimizer.param_groups = self.param_groups
        if not self._fused:
            theirs = {i: {k: x for k, x in state.items() if k not in NOT_THE_BASES}
                      for i, state in state_dict["state"].items()}
            self.base_optimizer.load_state_dict({**state_dict, "state": theirs})
            self.param_groups = self.base_optimizer.param_groups
        for p, state in zip(params, states, strict=True):
            self._load_slot(p, state)
        self._link_state()

    def _load_slot(self, p: Tensor, state: dict) -> None:
        """Copy a saved m and v into the slot of p; what is not in `state` starts anew."""
        space, slot = next((space, slot) for space in self._spaces for slot in space.slots
                           if slot.w is p)
        m, v = saved_ema(state), state.get("momentum_buffer")
        if self._fused and v is not None and space.v is None:
            space.allocate_momentum()
        for own, steps, value, key in ((slot.m, slot.m_steps, m, "ema_steps"),
                                       (slot.v, slot.v_steps, v, "momentum_steps")):
            if own is not None:
                own.zero_() if value is None else own.copy_(value)
                steps.fill_(0) if value is None else steps.copy_(
                    torch.as_tensor(state.get(key, 1)))

    def __getstate__(self) -> dict:
        self._need_phase(False, "copying or pickling")
        hooks = [name for name in self.__dict__ if name.endswith("_hooks")]
        return {k: v for k, v in self.__dict__.items()
                if k not in (*hooks, "_backend", "step", "_zero_grad_profile_name")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if "_spaces" in state:  # a copy or a pickle; without it, load_state_dict
            self._backend, self._report = resolve(self._requested_backend, self._kinds())
            self._link_state()


def scaling(group: dict, p: Tensor, name: str | None) -> tuple[float, float]:
    """(a, b) of ASAM's T = a |w| + b for one parameter."""
    if not group["adaptive"]:
        return 0.0, 1.0
    if group.get("scale", "all") == "all":
        return 1.0, 0.0
    is_weight = "weight" in name if name is not None else p.ndim >= 2
    return (1.0, float(group["eta"])) if is_weight else (0.0, 1.0)


def inverse_scale(scaler, optimizer: SAM) -> Tensor:
    """1 / the loss scale of an enabled GradScaler, on its device."""
    if scaler._get_scale_async() is None:
        raise ValueError("the scaler has not scaled a loss yet: call scaler.scale(loss).backward() "
                         "before first_step(scaler=scaler)")
    if scaler._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY:
        raise ValueError("scaler.unscale_ before first_step would divide the scale out twice: "
                         "leave it out; first_step(scaler=scaler) does it on the device")
    return 1 / scaler._get_scale_async()
