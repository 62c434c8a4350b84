"""The torch optimizer: parameter groups, the two-phase step and closures."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from typing_extensions import Self

from . import all_spaces, distributed, following, foreign, grad_scaler, micro_batches, reports
from . import state_dict as saving
from .calls import unseen, untraced
from .checks import (
    check_base,
    check_call,
    check_closures,
    check_group,
    check_groups,
    check_options,
    params_of,
    refuse_arguments_of_existing,
    refuse_changed_step,
    refuse_fleeting,
    steps_of,
)
from .entries import kept_names
from .interrupts import surely
from .layout import Layout, Method, Traits
from .passes import Pass
from .phase import Phase, PhaseError, restoring
from .space import Space, Tables

Loss = TypeVar("Loss")  # what a closure returns
FUSED: dict[type[Optimizer], str] = {SGD: "sgd", Adam: "adam", AdamW: "adam"}


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021) over any base optimizer.

    One step is: gradient at w, `first_step` climbs to w + rho g / ||g||, gradient there,
    `second_step` returns to w and lets the base optimizer update it. The norm is one l2 norm over
    all parameters of all groups (biases and normalisation weights too, weight decay not).

    `torch.optim.SGD`, `Adam` and `AdamW` are fused into the kernels and never wait for the
    device (their foreach, fused and capturable flags are taken and change nothing); any other
    base optimizer runs its own step after the weights are restored. `param_groups` and `state` may
    be edited as any torch optimizer's: parameters added, replaced, moved or removed between
    steps, state cleared or replaced.

    Args:
        params: parameters, groups, or named parameters, as for any torch optimizer. Group keys:
            `rho`, `adaptive`, `perturb` (False: the group neither climbs nor enters the norm) and
            the base optimizer's own. A key that the base has too, as Adadelta has `rho`, is SAM's;
            the base's is `base_rho`. Complex parameters are refused.
        base_optimizer: a torch optimizer class, such as `torch.optim.SGD`.
        rho: radius of the perturbation, in units of the weights; at least 0. Default 0.05.
        adaptive: ASAM's perturbation with T = |w| (see `ASAM`). Default False.
        backend: None chooses (see `backend_report`); "triton", "numba" or "reference" is used,
            or an error says why it cannot be.
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
            parameters that share memory, an unknown backend or one that cannot run here, an
            interval below 1, a negative start, master_weights with a base that is not fused, a
            base that needs a closure (LBFGS) or makes its groups or state anew whenever it is
            asked, a bad base-optimizer argument.
        TypeError: base_optimizer is not an optimizer class; an argument that nobody has.
    """

    _step_supports_amp_scaling = True
    profile_hook_step = staticmethod(grad_scaler.hooked)  # around `step`
    climbs_first = False  # whether it climbs before the forward pass, without a gradient
    base_optimizer: Optimizer

    def __init__(self, params: Iterable[Any], base_optimizer: type[Optimizer], rho: float = 0.05,
                 adaptive: bool = False, *, backend: str | None = None, interval: int = 1,
                 start: int = 0, master_weights: bool = False, **kwargs: Any):
        self._build(params, base_optimizer, dict(rho=rho, adaptive=adaptive), Method(),
                    backend=backend, interval=interval, start=start,
                    master_weights=master_weights, **kwargs)

    def _build(self, params: Any, base_optimizer: Any, own: dict[str, Any],
               method: Method, /, *, backend: str | None = None,
               interval: int = 1, start: int = 0, master_weights: bool = False,
               **kwargs: Any) -> None:
        wrapped = isinstance(base_optimizer, Optimizer)
        kind = type(base_optimizer) if wrapped else base_optimizer
        kwargs = foreign.plain_names(kwargs, own)
        check_base(params, kind, type(self), kwargs)
        if wrapped:
            refuse_arguments_of_existing(params, base_optimizer, type(self), kwargs)
        own = {**own, "perturb": True}
        check_group(own, own)
        fused = FUSED.get(kind)
        check_options(interval, start, master_weights, fused, kind)
        self._traits = Traits(method.mode, method.projection, fused, master_weights,
                              method.scales_with, backend, tuple(own), method.along_v)
        own["sam_steps"] = 0
        self._interval, self._start = interval, start
        self._phase, self._built = Phase(), False
        if not (wrapped or isinstance(params, Tensor)):
            params = foreign.given(params, own)
        with foreign.lent(self, params):
            if wrapped:
                names = kept_names(method.mode) if fused else None
                foreign.forget_another(base_optimizer, own, names)
            super().__init__(foreign.own_part(base_optimizer, own) if wrapped else params, own)
            mine = [dict(group) for group in self.param_groups]
            self.base_optimizer = (base_optimizer if wrapped else
                                   foreign.build(kind, self.param_groups, own, kwargs))
            self._join_base(mine, own)

    def _join_base(self, mine: Sequence[dict[str, Any]], own: dict[str, Any]) -> None:
        """Share groups and state with the base.

        Args:
            mine: the groups' values of SAM's own keys.
            own: the defaults of these.
        """
        base = self.base_optimizer
        refuse_fleeting(base)
        shared = foreign.shared_keys(base, own)
        self._traits = self._traits._replace(shared=shared)
        self.param_groups = foreign.join(base, mine, own, shared)
        theirs = foreign.defaults_of(base)
        self.defaults = {**theirs, **own, **{"base_" + key: theirs[key] for key in shared}}
        self._check(self.param_groups)
        self.state = base.state
        self._built = True
        self._follow()

    @classmethod
    def wrap(cls, base_optimizer: Optimizer, *args: Any, **kwargs: Any) -> Self:
        """Put this class around an existing optimizer, whose groups and state it takes over.

        Args:
            base_optimizer: the instance; its param_groups stay shared.
            *args, **kwargs: rho and the other arguments of the class; a group's own rho wins, but
                not one that all groups have of an optimizer of this package around it before.

        Raises:
            TypeError: a class instead of an optimizer; arguments of the base's.
            ValueError: as the constructor.
        """
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(f"wrap takes an optimizer that exists, a torch.optim.Optimizer, not "
                            f"{base_optimizer!r}: use {cls.__name__}(params, torch.optim.SGD, ...) "
                            "to build one")
        base: Any = base_optimizer  # where the constructor is documented to take its class
        return cls(base.param_groups, base, *args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, in mid-training too. It shares the kernel launches of the others, and is
        this very dict, filled in, as in torch; a copy, where another of these optimizers counts
        its steps in it.

        Raises:
            TypeError: no dict.
            PhaseError: while perturbed.
            ValueError: as the constructor.
        """
        if not self._built:  # called by torch's constructor
            super().add_param_group(param_group)
            check_group(self.param_groups[-1], self._traits.own)
            return
        self._phase.need(False, "add_param_group")
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group is a {type(param_group).__name__}: use a dict")
        param_group = foreign.unless_counted(param_group)
        steps = steps_of(self._join_containers() or self._phase.layout.groups)
        merged = {**self.defaults, **param_group, "sam_steps": steps}
        self._check([merged])
        was, count, added = dict(param_group), len(self.param_groups), False

        def add() -> None:
            nonlocal added
            param_group.update(merged, **foreign.exchanged(merged, self._traits.shared))
            foreign.as_base_sees(self.base_optimizer, self._traits.shared,
                                 lambda: self.base_optimizer.add_param_group(param_group))
            self._follow()
            added = True

        def leave_no_part() -> None:
            if not added:
                del self.param_groups[count:]
            if not any(group is param_group for group in self.param_groups):
                # their parameters stay a list, as an iterator is used up
                was.update((k, param_group[k]) for k in ("params", "param_names")
                           if k in param_group)
                param_group.update(was)
                for key in param_group.keys() - was.keys():
                    del param_group[key]

        surely(add, leave_no_part)

    if not TYPE_CHECKING:  # which is to refuse what nobody has

        def __getattr__(self, name: str) -> Callable[..., Any]:
            """What the base has beside torch's methods, such as schedule-free's `train` and `eval`,
            which trainers look for. `train` before the second pass changes nothing: the climb has
            begun from that mode.

            Raises:
                PhaseError: another is called while the weights are perturbed.
            """
            base = vars(self).get("base_optimizer")
            method = None if base is None else foreign.method_of(base, name)
            if hasattr(type(self), name):  # a property that failed: in its own words
                return object.__getattribute__(self, name)
            if method is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

            @wraps(method)
            def call(*args: Any, **kwargs: Any) -> Any:
                if name == "train" and self.is_perturbed:
                    return None
                self._phase.need(False, name)
                self._join_containers()
                result = foreign.as_base_sees(base, self._traits.shared,
                                              lambda: method(*args, **kwargs))
                return self if result is base else result

            return call

    def _check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse groups with a value that this class or its base cannot take."""
        check_groups(groups, self._traits.own, self._traits.base, self._traits.along_v,
                     self._traits.mode)

    # ---- what others may have changed

    def _follow_untraced(self) -> Layout:
        """`_follow`, where nothing is traced already: in a step, whose host time counts."""
        if self._traits.base:
            refuse_changed_step(self.base_optimizer, FUSED)
        return following.follow(self._phase, self._traits, self._join_containers(), self.state)

    @untraced
    def _follow(self) -> Layout:
        """The layout of the parameters and values as they are now (see `following.follow`)."""
        return self._follow_untraced()

    def _join_containers(self) -> list[dict[str, Any]]:
        """The groups. They and the state are shared with the base again, where one of the two was
        given others."""
        base, layout = self.base_optimizer, self._phase.layout
        if self.param_groups is not base.param_groups or self.state is not base.state:
            foreign.join_containers(self, base, *(layout.containers if layout else (None, None)))
        return self.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters, as torch's optimizers do, and what a `zero_grad`
        of the base's own clears besides."""
        self._join_containers()
        super().zero_grad(set_to_none)
        foreign.zero_grad(self.base_optimizer, set_to_none)

    def _read(self, first: bool, inverse: Tensor | None) -> list[Pass]:
        """What a pass reads, as things are now (see `following.read`)."""
        self._follow_untraced()
        return following.read(self._phase, self._traits, self.param_groups, self.state, first,
                              inverse)

    # ---- the step

    @unseen
    def first_step(self, zero_grad: bool = False, scaler: Any = None) -> None:
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
            TypeError: a loss or a closure in place of a flag; a scaler that is none.
            ValueError: a sparse gradient; a scaler that has scaled nothing or unscaled already; a
                value in a group that is out of range; parameters that share memory.
            RuntimeError: a parameter changed its device, dtype or shape; a CUDA graph is captured
                outside of `capture()` that would bring stale addresses back.
        Whatever is raised, the weights are as before.
        """
        phase = self._phase
        phase.need(False, "first_step")
        check_call(zero_grad, scaler)
        if (eaten := phase.watch.read()) is not None:
            phase.warn("rounding", eaten)
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        scaled_by = None if self._traits.along_v else scaler
        passes, climbs = self._read(True, grad_scaler.inverse_scale(scaled_by, self)), []
        try:
            climbs = all_spaces.climb(phase.layout, passes)
            phase.climbs, phase.perturbed, phase.scaler, phase.plain = climbs, True, scaler, None
            all_spaces.announce(all_spaces.written_weights(passes, climbs))
            phase.watch.note(phase.layout.spaces)
            if zero_grad:
                self.zero_grad()
            else:
                phase.keep_witness()
        except BaseException:
            phase.climbs, phase.perturbed = climbs, True
            self._go_back()
            raise

    def second_step(self, zero_grad: bool = False) -> None:
        """Return to w and let the base optimizer update it with the gradients in `.grad`.

        Goes through `step()`, so learning-rate schedulers and step hooks count it.

        Args:
            zero_grad: clear the gradients afterwards. Default False.

        Raises:
            PhaseError: without a `first_step` before; one pass was scaled, and the other not.
            TypeError, ValueError, RuntimeError: as `first_step`, of the second gradients.
        Where it raises, the weights stay moved: mend what is wrong and call it again, or
        `restore()`.
        """
        self._phase.need(True, "second_step")
        check_call(zero_grad)
        self._phase.look_for_second_pass()
        self.step()
        if zero_grad:
            self.zero_grad()

    @overload
    def step(self, closure: None = None, ascent_closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss],
             ascent_closure: Callable[[], Loss] | None = None) -> Loss: ...

    def step(self, closure: Callable[[], Any] | None = None,
             ascent_closure: Callable[[], Any] | None = None) -> Any:
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
            PhaseError: a closure while perturbed, with gradients set aside, or through
                GradScaler.step.
            TypeError: a closure that cannot be called, such as a loss.
            ValueError, RuntimeError: an ascent_closure without a closure; else as `first_step`.
        Where it or a closure raises, the weights are back at w; without a closure they are where
        they were.
        """
        self._check_closures(closure, ascent_closure)
        if closure is None:
            self._base_step()
            return None
        self._phase.need(False, "step(closure)")
        if vars(self).get("found_inf") is not None:
            raise PhaseError("a GradScaler cannot see a closure's gradients: call first_step("
                             "scaler=scaler), the second backward, then scaler.step(optimizer)")
        if self.climbs_next:
            return self._climbing_step(closure, ascent_closure or closure)
        loss = self._call(closure)
        self._base_step()
        return loss

    def _climbing_step(self, closure: Callable[[], Loss], ascent_closure: Callable[[], Loss],
                       ) -> Loss:
        loss = self._call(ascent_closure)
        self._climb_and_step(closure, zero_grad=True)
        return loss

    def _climb_and_step(self, closure: Callable[[], Loss], zero_grad: bool) -> Loss:
        """The climb, the pass at w + e and the step after it; back at w if any of them fails."""
        try:
            self.first_step(zero_grad)
            loss = self._call(closure)
            self._base_step()
            return loss
        except BaseException:
            self.restore()
            raise

    def _check_closures(self, closure: Any, ascent_closure: Any) -> None:
        check_closures(closure, ascent_closure)

    def _call(self, closure: Callable[[], Loss]) -> Loss:
        """Call a closure with cleared gradients; say so where it leaves none."""
        with torch.enable_grad():
            self.zero_grad()
            loss = closure()
        if all(p.grad is None for p in params_of(self._join_containers())):
            self._phase.warn("closure", "the closure left no gradients, so this step changes "
                             "nothing: a closure computes the loss and calls backward; without "
                             "one, call first_step and second_step")
        return loss

    @unseen
    def _base_step(self) -> None:
        """Return to w if perturbed, then update."""
        phase, (grad_scale, found_inf) = self._phase, grad_scaler.scale_and_flag(self)
        grad_scaler.check_passes(phase, self._traits, found_inf is not None, self.restore)
        if phase.stash:
            raise PhaseError("gradients are set aside: call unstash_grad() before the step")
        if not phase.perturbed:
            phase.count_plain(self.climbs_next)
        ok = micro_batches.agreed_ok(phase)
        grad_scaler.report_overflow(phase, self, ok)
        if ok is not None:
            found_inf = (1 - ok) if found_inf is None else found_inf.to(ok) + (1 - ok)
        steps = steps_of(self._join_containers()) + 1
        if self._traits.base:
            self._fused_step(grad_scale, found_inf)
        else:
            self._foreign_step(grad_scale, found_inf)
        for group in self.param_groups:
            group["sam_steps"] = steps

    def _fused_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        phase = self._phase
        passes = self._read(False, None if grad_scale is None else 1 / grad_scale)
        climbs = phase.climbs if phase.perturbed else [None] * len(passes)
        all_spaces.step(phase.layout, passes, climbs, found_inf)
        vars(self.base_optimizer)["_opt_called"] = True  # for a scheduler that was built around it
        phase.finish()
        all_spaces.announce(all_spaces.written_weights(passes, climbs))

    def _foreign_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Restore and let the base optimizer step. Whether the step is a skip is read on the
        host here: an optimizer of someone else's cannot be skipped from the device."""
        phase, layout = self._phase, self._follow()
        cells = layout.spaces[0].cells
        skip = (found_inf is not None and bool(found_inf)) or (phase.perturbed and not cells.ok)
        self._go_back()
        phase.finish()
        if skip:
            cells.skipped += 1
            return
        stepped = grad_scaler.unscaled(self.param_groups, grad_scale, lambda: foreign.step(
            self.base_optimizer, self._traits.shared, layout.shown, self.state))
        if grad_scale is not None:
            self.grad_scale = None  # the gradients are unscaled from here on
        layout.show(self.state, stepped)

    # ---- several first passes for one step

    @untraced
    def stash_grad(self) -> None:
        """Return to w and set the gradients in `.grad` aside, added to those already set aside.

        For m-sharpness over micro-batches: climb on each by itself, set its second gradient
        aside, and step once after `unstash_grad()`. A climb that was not finite makes that step a
        counted skip. Costs one more gradient's memory. Where it raises (out of memory, a gradient
        whose storage was freed), the whole step is given up, as by `restore`.
        """
        with restoring(self.restore):
            micro_batches.stash(self._phase, params_of(self._join_containers()), self._go_back)

    @untraced
    def unstash_grad(self) -> None:
        """Put the sums of the gradients set aside into `.grad`, in place of what is there.

        Raises:
            PhaseError: while perturbed, or with nothing set aside.
            ValueError: a parameter has another shape or device by now; nothing has changed then.
        """
        self._phase.need(False, "unstash_grad")
        micro_batches.unstash(self._phase, params_of(self._join_containers()))

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
        self._phase.need(False, "local_first_pass")
        group = distributed.group_of(model)
        with model.no_sync():
            yield
        self._phase.group = group

    @unseen
    def restore(self) -> None:
        """Go back to w, bit for bit, without an update: give the step up, and with it what
        `stash_grad` set aside. Harmless where there is nothing to give up.

        Raises:
            RuntimeError: a parameter has another shape, or no memory, by now; the others are back.
        """
        grad_scaler.keep_scaled(self._phase, self)
        try:
            self._go_back()
        finally:
            self._phase.give_up()

    def _go_back(self) -> None:
        """Bring moved weights back to w."""
        climbs = self._phase.climbs
        if self._phase.perturbed:
            try:
                all_spaces.go_back(climbs)
                self._phase.leave()  # a Ctrl-C before it leaves what restore() goes back from
            except RuntimeError:
                self._phase.leave()
                raise
            finally:
                all_spaces.announce(all_spaces.moved_weights(climbs))

    @contextmanager
    def capture(self) -> Iterator[list[Tables]]:
        """Around the capture of a step as a CUDA graph: the addresses that its kernels read stand
        in tables of the graph's own, which are filled when the block ends. Keep them (what `as`
        gives) as long as the graph.

        Raises:
            PhaseError: while perturbed.
        """
        self._phase.need(False, "capture")
        self._bring_for_graph()
        layout = self._follow()
        eager, layout.tables = layout.tables, [Tables(s, late=True) for s in layout.spaces]
        try:
            yield layout.tables
        finally:
            tables, layout.tables = layout.tables, eager
            self._phase.leave()
            for table in tables:
                table.upload_late()

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Around the replay of a captured step, which the optimizer itself does not see, nor does
        torch: autograd, autocast and learning-rate schedulers are told of it.

        Raises:
            PhaseError: while perturbed.
        """
        self._phase.need(False, "replay")
        climbs = self.climbs_next
        self._bring_for_graph(climbs)
        yield
        if not climbs:
            self._phase.layout.keep_norm(None)
        for space in self._phase.layout.spaces:
            all_spaces.announce(all_spaces.with_memory(
                space, [p for p in space.params if p.requires_grad]))
        for stepped in (self, self.base_optimizer):
            vars(stepped)["_opt_called"] = True
        steps = steps_of(self._join_containers()) + 1
        for group in self.param_groups:
            group["sam_steps"] = steps

    @unseen
    def _bring_for_graph(self, climbs: bool = True) -> None:
        """Bring to the device what a graph has no launch for: the groups' values, the cells that an
        eager step has set, and for a climb the norm of a v that no step has left it of."""
        layout = self._follow()
        layout.clear_cells()
        if climbs and self._traits.along_v and not layout.has_norm():
            all_spaces.norm(layout.backend, self._read(True, None))
            self._phase.layout.keep_norm(self._phase.layout.climbing_along_v())

    # ---- what can be asked

    @property
    def spaces(self) -> tuple[Space, ...]:
        """Where fastsam's own buffers lie, by device, dtype and sharding of the parameters. Brings
        values that changed to the device."""
        return self._follow().spaces

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at w + e: after first_step, before second_step or restore."""
        return self._phase.perturbed

    @property
    def climbs_next(self) -> bool:
        """Whether the coming step climbs, by `interval` and `start`. A loop of its own calls
        first_step, and computes the gradients again, only then; else `step()` alone."""
        past = steps_of(self._join_containers()) - self._start
        return past >= 0 and past % self._interval == 0

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, for a norm that was not finite or because a GradScaler
        found an overflow. Waits for the device."""
        return self._phase.skipped + int(self._phase.layout.spaces[0].cells.skipped)

    @property
    def last_radius(self) -> float:
        """The l2 distance the last first_step really moved the weights, after rounding to their
        dtype; of sharded parameters, this process's part of it. Waits for the device."""
        return sum(float(s.radii[0].sum(dtype=torch.float64))
                   for s in self._phase.layout.spaces) ** 0.5

    @property
    def last_grad_norm(self) -> float:
        """||T d|| of the last first_step: for SAM the gradient's norm. Waits for the device."""
        return float(self._phase.layout.spaces[0].cells.norm)

    def backend_report(self) -> dict[str, Any]:
        """What runs and why: `backend`, `why`, `fused_base` and one line per `spaces`."""
        return reports.backend(self._follow(), self._traits)

    def memory_report(self) -> dict[str, int]:
        """Bytes that the optimizer keeps between steps, by buffer: the saved weights (`backup`;
        the masters, where there are), F-SAM's average, the full or a kept gradient, LookSAM's g_v
        (`ema`), the fused base's buffers (`base`), tables and sums (`other`; numba's sums, 24 bytes
        a tensor or 16,384 elements, are not in it). The state of a base optimizer that
        is not fused is not counted."""
        return reports.memory(self._follow())

    def __repr__(self) -> str:
        self._join_containers()
        options = self._interval, self._start, self._traits.masters
        return reports.line(super().__repr__(), self.base_optimizer, self._phase.layout, *options)

    # ---- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """The whole state, the base optimizer's included, in torch's format.

        Raises:
            PhaseError: while perturbed (the weights that belong to it are not in the model), or
                with gradients set aside.
        """
        self._phase.need(False, "state_dict")
        return saving.save(self, self.base_optimizer, self._traits, self._follow(),
                           super().state_dict)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state: of this class, of the base optimizer alone, or of a public SAM or
        F-SAM class, whose saved weights (`old_p`) are transient and left out. Group keys that it
        lacks, such as rho in SGD's, stay as they are. What another class of this package keeps
        under a name that is something else here is refused.

        Raises:
            PhaseError: while perturbed, or with gradients set aside.
            ValueError: it is no optimizer's state; groups, parameter counts or shapes differ, or a
                value this class refuses; nothing has changed then.
        """
        self._phase.need(False, "load_state_dict")
        saving.between_hooks(self, state_dict, self._load)

    def _load(self, state_dict: dict[str, Any]) -> None:
        base, traits, groups = self.base_optimizer, self._traits, self._join_containers()
        layout = following.placed(self._phase, traits, groups, self.state)
        fit, entries = saving.fitting(state_dict, groups, base, traits, layout)
        with foreign.all_or_nothing(self, base):
            saving.load(self, base, traits, layout, fit, entries, super().load_state_dict)
            self._follow()

    def __getstate__(self) -> dict[str, Any]:
        self._phase.need(False, "copying or pickling")
        hidden = self._follow().shown.hidden()
        hooks = [name for name in self.__dict__ if name.endswith("_hooks")]
        return {**{k: v for k, v in self.__dict__.items()
                   if k not in (*hooks, "_phase", "step", "_zero_grad_profile_name")},
                "_skipped": self.skipped_steps, "_hidden": hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped, hidden = state.pop("_skipped", None), state.pop("_hidden", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if skipped is not None:  # a copy or a pickle; without it, load_state_dict
            self._traits = self._traits._replace(  # which was written otherwise up to 0.1
                shared=foreign.shared_keys(self.base_optimizer, dict.fromkeys(self._traits.own)))
            self._phase = Phase(skipped=skipped)
            if (self._traits.base or self._traits.mode) and saving.is_shared(self.state):
                self._phase.warn("shared state", saving.SHARED)
            following.lay_out(self._phase, self._traits, self.param_groups, self.state, hidden)
            self._follow()
