"""The whole two-pass step as one CUDA graph."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .batchnorm import freeze_bn_stats
from .optimizer import SAM


class GraphedStep:
    """One training step, both passes and the attack if there is one, replayed as a CUDA graph.

    `step(x, y)` does what this loop does, with one launch from the host:

        x = attack(model, x, y)                         if there is an attack
        loss_fn(model(x), y).backward(); optimizer.first_step(zero_grad=True)
        with freeze_bn_stats(model):
            loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    The graph is captured at the first call, after warm-up steps whose effect on the model and the
    optimizer is undone, and again after `optimizer.load_state_dict`, a new group, or moved
    parameters. Learning rate, rho and the other hyper-parameters may change between calls. Steps
    that do not climb (`interval`, `start`) have a graph of their own. On a CPU the same step runs
    without a graph.

    Args:
        model: in training mode, on one device.
        loss_fn: (output, target) -> mean loss, a scalar.
        optimizer: a SAM-family optimizer of the model's parameters; on a GPU its base optimizer
            must be fused.
        sample: (x, y) of the shapes, dtypes and device of every batch to come.
        attack: (model, x, y) -> x_adv, without host synchronisation. Default None.
        autocast: dtype of torch.autocast around the forward passes, such as torch.bfloat16; there
            is no GradScaler here, which float16 would need. Default None: no autocast.

    Attributes:
        output: the model's output of the last step's first pass; overwritten by the next.

    Raises:
        ValueError: the optimizer is not of this package; its base is not fused, on a GPU.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable, optimizer: SAM,
                 sample: Sequence[Tensor], *, attack: Callable | None = None,
                 autocast: torch.dtype | None = None):
        if not isinstance(optimizer, SAM):
            raise ValueError(f"optimizer is a {type(optimizer).__name__}: GraphedStep takes an "
                             "optimizer of fastsam")
        self.device = sample[0].device
        if self.device.type == "cuda" and not optimizer.backend_report()["fused_base"]:
            raise ValueError(f"{type(optimizer.base_optimizer).__name__} takes a step of its own, "
                             "which no graph can hold: use torch.optim.SGD, Adam or AdamW")
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.attack, self.autocast = attack, autocast
        self.output: Tensor | None = None
        self._batch = [torch.empty_like(t, memory_format=torch.preserve_format) for t in sample]
        self._graphs: dict[bool, Captured] = {}
        self._built_for: list | None = None
        optimizer.register_load_state_dict_post_hook(lambda _: self._graphs.clear())

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take one step.

        Args:
            *batch: (x, y), shaped as the sample.

        Returns:
            The loss of the first pass, a 0-dim tensor of its own on the device.

        Raises:
            ValueError: a batch of other shapes or dtypes than the sample's.
        """
        for given, static in zip(batch, self._batch, strict=True):
            if (given.shape, given.dtype) != (static.shape, static.dtype):
                raise ValueError(f"a batch of shape {tuple(given.shape)} and {given.dtype} where "
                                 f"the sample has {tuple(static.shape)} and {static.dtype}: drop "
                                 "the last, smaller batch (drop_last=True)")
            static.copy_(given, non_blocking=True)
        if self.device.type != "cuda":
            return self._eager()
        climbs, spaces = self.optimizer.climbs_next, self.optimizer._spaces
        for space in spaces:
            space.follow_parameters()
        built_for = [(space, space._memory, id(space.v)) for space in spaces]
        if built_for != self._built_for:
            self._graphs.clear()
            self._built_for = built_for
        if climbs not in self._graphs:
            self._graphs[climbs] = Captured(self)
        self.output = self._graphs[climbs].output
        return self._graphs[climbs].replay(self.optimizer)

    def _eager(self) -> Tensor:
        x, *rest = self._batch
        if self.attack is not None:
            x = self.attack(self.model, x, *rest)
        self.optimizer.zero_grad()
        loss, self.output = self._backward(x, *rest)
        if self.optimizer.climbs_next:
            self.optimizer.first_step(zero_grad=True)
            with freeze_bn_stats(self.model):
                self._backward(x, *rest)
        self.optimizer.step()
        return loss

    def _backward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.model(x)
            loss = self.loss_fn(output, *rest)
        loss.backward()
        return loss.detach(), output.detach()


class Captured:
    """A captured step: its graph, its outputs, and the tables its kernels read at replay."""

    WARM_UPS = 3

    def __init__(self, step: GraphedStep):
        spaces = step.optimizer._spaces
        self._warm_up(step)
        step.optimizer._bring_hyper()
        for space in spaces:
            space.follow_parameters()
            space.late_uploads = []
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.loss = step._eager()
        finally:
            late = [space.late_uploads for space in spaces]
            for space in spaces:
                space.late_uploads = None
        for space, uploads in zip(spaces, late, strict=True):
            for values, target in uploads:
                space._upload(values, target)
        self.output = step.output
        self.tables = [{name: space._tables[name] for name in ("w", "g1", "g2")
                        if name in space._tables} for space in spaces]
        for group in step.optimizer.param_groups:
            group["sam_steps"] -= 1  # capturing is no step

    @staticmethod
    def _warm_up(step: GraphedStep) -> None:
        """Run the step a few times on a stream of its own, and undo it."""
        kept = [(t, t.detach().clone()) for t in state_of(step.model, step.optimizer)]
        counts = [group["sam_steps"] for group in step.optimizer.param_groups]
        random = torch.cuda.get_rng_state(step.device)
        stream = torch.cuda.Stream(step.device)
        stream.wait_stream(torch.cuda.current_stream(step.device))
        with torch.cuda.stream(stream):
            for _ in range(Captured.WARM_UPS):
                step._eager()
                for group, count in zip(step.optimizer.param_groups, counts, strict=True):
                    group["sam_steps"] = count
        torch.cuda.current_stream(step.device).wait_stream(stream)
        with torch.no_grad():
            for t, value in kept:
                t.copy_(value)
        torch.cuda.set_rng_state(random, step.device)

    def replay(self, optimizer: SAM) -> Tensor:
        """One step with the batch that lies in the static buffers."""
        optimizer._bring_hyper()
        for space, tables in zip(optimizer._spaces, self.tables, strict=True):
            for name, (values, target) in tables.items():
                if space._tables[name][0] is not values:  # an eager step came between
                    space._upload(values, target)
                    space._tables[name] = (values, target)
        self.graph.replay()
        for group in optimizer.param_groups:
            group["sam_steps"] += 1
        return self.loss.clone()


def state_of(model: nn.Module, optimizer: SAM) -> list[Tensor]:
    """Every tensor that a training step changes in place."""
    tensors = [*model.parameters(), *model.buffers()]
    for s in optimizer._spaces:
        tensors += [t for t in (s.backup, s.m, s.v, s.u, s.steps, s.counters, s.control_buffer)
                    if t is not None]
    return tensors
