"""The whole two-pass step as one CUDA graph."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .batchnorm import freeze_bn_stats
from .checks import params_of
from .optimizer import SAM
from .phase import restoring

UNSCALED = ("GraphedStep has no GradScaler, and without one small gradients of float16 are 0 and "
            "large ones inf: use autocast=torch.bfloat16, or the plain loop with "
            "first_step(scaler=scaler) and scaler.step(optimizer)")


class GraphedStep:
    """One training step, both passes and the attack if there is one, replayed as a CUDA graph.

    `step(x, y)` does what this loop does, with one launch from the host:

        x = attack(model, x, y)                         if there is an attack
        loss_fn(model(x), y).backward(); optimizer.first_step(zero_grad=True)
        with freeze_bn_stats(model):
            loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    Gradients that are there before it are dropped, also of the model's parameters that are not the
    optimizer's. Momentum-SAM's `first_step` comes after the attack, before its only pass. The graph
    is captured at the first call, after warm-up steps whose effect on the model and the optimizer
    is undone, and again after `optimizer.load_state_dict`, a new group, moved or frozen parameters,
    `eval()` or `train()` of the model or a layer, or a change of what the kernels branch on
    (`adaptive`, `eta`, `perturb`, a first momentum). Python in the model, such as a layer's hooks,
    runs at captures only. Learning rate, rho and the other hyper-parameters are data of the graph
    and may change between calls. Steps that do not climb (`interval`, `start`) have a graph of
    their own. A batch in pinned memory is copied beside the work: leave it as it is until the step
    is done. Where a capture fails, weights and state are as before. On a CPU the same step runs
    without a graph; where it raises, the weights are back, as with `SAM.step(closure)`.

    Args:
        model: in training mode, on one device.
        loss_fn: (output, target) -> mean loss, a scalar.
        optimizer: a SAM-family optimizer of the model's parameters; on a GPU one of the Triton
            kernels, base optimizer included.
        sample: (x, y) of the shapes, dtypes and device of every batch to come; x is what the model
            takes, and loss_fn all others after the output.
        attack: (model, x, y) -> x_adv, without host synchronisation. Default None.
        autocast: dtype of torch.autocast around the forward passes, such as torch.bfloat16; there
            is no GradScaler here, which float16 needs: that is warned of. Default None: no
            autocast.

    Attributes:
        output: the model's output of the last step's first pass, without its graph of autograd;
            overwritten by the next.

    Raises:
        ValueError: the optimizer is not of this package; a sample that is no tuple of tensors; on
            a GPU, the optimizer is not the kernels', or it has step hooks.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor], optimizer: SAM,
                 sample: Sequence[Tensor], *, attack: Callable[..., Tensor] | None = None,
                 autocast: torch.dtype | None = None):
        if not isinstance(optimizer, SAM):
            raise ValueError(f"optimizer is a {type(optimizer).__name__}: GraphedStep takes an "
                             "optimizer of fastsam")
        if isinstance(sample, Tensor) or not sample or not are_tensors(sample):
            raise ValueError(f"sample is a {type(sample).__name__}, and has to be the tensors of a "
                             "batch, for the model and the loss: give them, such as (x, y)")
        self.device = sample[0].device
        if self.device.type == "cuda":
            refuse_uncapturable(optimizer)
        if autocast is torch.float16:
            optimizer._phase.warn("float16", UNSCALED)
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.attack, self.autocast = attack, autocast
        self.output: Any = None
        self._batch = [torch.empty_like(t, memory_format=torch.preserve_format) for t in sample]
        self._graphs: dict[bool, Captured] = {}
        self._built_for: list[Any] | None = None
        self._layers: list[nn.Module] = []
        self._forget_when_loaded()

    def _forget_when_loaded(self) -> None:
        this = weakref.ref(self)  # the optimizer is not to keep the graphs' memory

        def forget(_: torch.optim.Optimizer) -> None:
            if (step := this()) is not None:
                step._graphs.clear()

        hook = self.optimizer.register_load_state_dict_post_hook(forget)
        weakref.finalize(self, hook.remove)

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take one step.

        Args:
            *batch: (x, y), shaped as the sample.

        Returns:
            The loss of the first pass, a 0-dim tensor of its own on the device.

        Raises:
            ValueError: a batch of other shapes or dtypes than the sample's, or of another number of
                tensors; on a GPU, an optimizer that has left the kernels, or has step hooks.
            PhaseError: while perturbed, or with gradients set aside.
        """
        self.optimizer._phase.need(False, "GraphedStep")
        if len(batch) != len(self._batch) or not are_tensors(batch):
            what = ", ".join(f"a {type(t).__name__}" for t in batch) or "nothing"
            raise ValueError(f"{what} where the sample has {len(self._batch)} tensors: call "
                             "step(x, y), with as many as the sample has")
        for given, static in zip(batch, self._batch, strict=True):
            if (given.shape, given.dtype) != (static.shape, static.dtype):
                raise ValueError(f"a batch of shape {tuple(given.shape)} and {given.dtype} where "
                                 f"the sample has {tuple(static.shape)} and {static.dtype}: drop "
                                 "the last, smaller batch (drop_last=True)")
            static.copy_(given, non_blocking=True)
        if self.device.type == "cuda":
            loss = self._replayed()
        else:
            with restoring(self.optimizer.restore):
                loss = self._eager()
        self.optimizer.zero_grad()
        return loss

    def _replayed(self) -> Tensor:
        refuse_step_hooks(self.optimizer)
        climbs = self.optimizer.climbs_next
        if self._structure() != self._built_for:
            refuse_uncapturable(self.optimizer)
            self._graphs.clear()
            self._layers = [*self.model.modules()]  # a walk that is too long for every call
            self._built_for = self._structure()
        if climbs not in self._graphs:
            self._graphs[climbs] = Captured(self)
        self.output = self._graphs[climbs].output
        return self._graphs[climbs].replay(self.optimizer)

    def _structure(self) -> list[Any]:
        """What a graph has in it as it was at the capture. Brings the rest to the device."""
        groups = self.optimizer.param_groups
        scaled = [(group["adaptive"], group.get("scale"), group.get("eta"), group["perturb"])
                  for group in groups]
        memory = [(p.data_ptr(), p.stride(), p.requires_grad)
                  for group in groups for p in group["params"]]
        of_layers = [t.data_ptr() for layer in self._layers  # beside them those of no group
                     for tensors in (layer._parameters, layer._buffers)
                     for t in tensors.values() if t is not None]
        modes = [layer.training for layer in self._layers]
        return [modes, self.optimizer.spaces, scaled, memory, of_layers]

    def _eager(self) -> Tensor:
        x, *rest = self._batch
        self._clear_gradients()
        if self.attack is not None:
            x = self.attack(self.model, x, *rest)
            self._clear_gradients()
        if self.optimizer.climbs_first and self.optimizer.climbs_next:
            self.optimizer.first_step()
        loss, self.output = self._backward(x, *rest)
        if all(p.grad is None for p in params_of(self.optimizer.param_groups)):
            self.optimizer._phase.warn("closure", "the loss has no gradient for any parameter of "
                                       "the optimizer, so this step changes nothing: give the "
                                       "optimizer of this model's parameters")
        if not self.optimizer.climbs_first and self.optimizer.climbs_next:
            self.optimizer.first_step(zero_grad=True)
            with freeze_bn_stats(self.model):
                self._backward(x, *rest)
        self.optimizer.step()
        return loss

    def _clear_gradients(self) -> None:
        """Those of the model's other parameters too: a graph would add to what is there at its
        capture, in memory that is freed one day."""
        self.optimizer.zero_grad()
        self.model.zero_grad()

    def _backward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Any]:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.model(x)
            loss = self.loss_fn(output, *rest)
        loss.backward()
        return loss.detach(), tree_map_only(Tensor, Tensor.detach, output)


class Captured:
    """A captured step: its graph, its outputs, and the tables its kernels read at replay."""

    WARM_UPS = 3

    def __init__(self, step: GraphedStep):
        optimizer = step.optimizer
        counts = [group["sam_steps"] for group in optimizer.param_groups]
        try:
            with torch.cuda.device(step.device):
                self._warm_up(step, counts)
                self._capture(step)
        except BaseException:
            step._clear_gradients()  # those of a capture, which nothing has computed
            raise
        finally:  # neither is a step
            set_counts(optimizer, counts)

    def _capture(self, step: GraphedStep) -> None:
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        # a capture that fails leaves its stream current, but for the outer block
        with step.optimizer.capture() as self.tables, torch.cuda.stream(stream), torch.cuda.graph(
                self.graph, stream=stream, capture_error_mode="thread_local"):
            self.loss = step._eager()
        self.output = step.output

    @staticmethod
    def _warm_up(step: GraphedStep, counts: list[int]) -> None:
        """Run the step a few times on a stream of its own, and undo it."""
        kept = [(t, t.detach().clone()) for t in state_of(step.model, step.optimizer)]
        random = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(Captured.WARM_UPS):
                    step._eager()
                    set_counts(step.optimizer, counts)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            step.optimizer.restore()  # half a step, where one failed
            with torch.no_grad():
                for t, value in kept:
                    t.copy_(value)
            torch.cuda.set_rng_state(random)

    def replay(self, optimizer: SAM) -> Tensor:
        """One step with the batch that lies in the static buffers."""
        with optimizer.replay():
            self.graph.replay()
        return self.loss.clone()


def are_tensors(batch: Iterable[object]) -> bool:
    return all(isinstance(t, Tensor) for t in batch)


def state_of(model: nn.Module, optimizer: SAM) -> list[Tensor]:
    """Every tensor that a training step changes in place."""
    # the optimizer may have parameters that are not the model's, such as the loss's own
    theirs = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*{*model.parameters(), *theirs}, *model.buffers()]
    for s in optimizer.spaces:
        # what an eager step sets the other cells to, the warm-ups' steps have put back for good
        tensors += [t for t in (s.saved, s.m, s.v, s.u, s.steps, s.counters, s.cells.norm,
                                s.cells.ok) if t is not None]
    return tensors


def set_counts(optimizer: SAM, counts: list[int]) -> None:
    for group, count in zip(optimizer.param_groups, counts, strict=True):
        group["sam_steps"] = count


def refuse_step_hooks(optimizer: SAM) -> None:
    """Raise ValueError for hooks that a capture would call and no replay."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(f"{type(optimizer).__name__} has step hooks, which a graph calls at its "
                         "capture alone: remove them, or use the plain loop")


def refuse_uncapturable(optimizer: SAM) -> None:
    """Raise ValueError for a step that a graph cannot hold, or would hold with its numbers."""
    refuse_step_hooks(optimizer)
    report = optimizer.backend_report()
    if not report["fused_base"]:
        raise ValueError(f"{type(optimizer.base_optimizer).__name__} takes a step of its own, "
                         "which no graph can hold: use torch.optim.SGD, Adam or AdamW")
    if report["backend"] != "triton":
        raise ValueError(f"the backend is {report['backend']!r} ({report['why']}), whose learning "
                         "rate would stay in a graph as it was at the capture: use "
                         "backend='triton', which names what it cannot serve, or the plain loop")
