"""The flat parameter space: one padded 1-D space for all parameters of one device and dtype.

Every parameter owns a slot that starts at a multiple of PAD elements; the saved weights, the
moving average m and the base optimizer's v and u are flat buffers over the slots, and, where that
is safe, the parameters themselves become views of one flat weight buffer. Gradients stay where
autograd left them and are read through a table of addresses.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import placed_like

PAD = 16  # elements: 16-byte alignment for the narrowest dtype, with room
PARTIALS = 1024  # partial sums of one norm; also the most programs a kernel is launched with
NOWHERE = 16  # stands for the address of an empty tensor, which nobody reads
GUARD = 1e-12  # keeps rho / norm finite at norm 0, as in the public SAM classes


class Hyper(NamedTuple):
    """One parameter group's hyper-parameters: the columns of the device table, in order. A value
    is a number, or a 0-dim tensor on any device."""

    rho: float | Tensor
    sigma: float | Tensor
    lmbda: float | Tensor
    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float | Tensor
    nesterov: bool
    beta1: float
    beta2: float
    eps: float
    decoupled: bool

    # What follows from them, exact only when taken before rounding.
    ema_share = property(lambda self: 1 - self.lmbda)
    momentum_share = property(lambda self: 1 - self.dampening)
    beta1_share = property(lambda self: 1 - self.beta1)
    beta2_share = property(lambda self: 1 - self.beta2)
    log_beta1 = property(lambda self: math.log(self.beta1) if self.beta1 else -math.inf)
    log_beta2 = property(lambda self: math.log(self.beta2) if self.beta2 else -math.inf)

    def corrections(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 - beta^t for both of Adam's, at step t."""
        return -torch.expm1(t * self.log_beta1), -torch.expm1(t * self.log_beta2)

    def shares(self) -> list:
        """More columns: SHARES, in order. given_sigma is sigma before `multiply_sigma`."""
        return [self.sigma, self.ema_share, self.momentum_share, self.beta1_share,
                self.beta2_share, self.log_beta1, self.log_beta2]


SHARES = ("given_sigma", "ema_share", "momentum_share", "beta1_share", "beta2_share", "log_beta1",
          "log_beta2")
# ||T d|| and whether it was finite; 1 / the loss scale of either pass; GradScaler's overflow
CONTROL = ("norm", "ok", "inv_scale1", "inv_scale2", "found_inf")
NEUTRAL = {"inv_scale1": 1, "inv_scale2": 1, "found_inf": 0}
COUNTERS = ("skipped", "climb_ticket", "step_ticket")


@dataclass(eq=False)
class Slot:
    """One parameter, its memory w, its group, its part of the flat buffers, and this step's
    gradients.

    w is `param` itself, or this process's shard of it where it is a DTensor. backup is the w that
    the climb saved, or the float32 master. m is Friendly-SAM's average, or a given full gradient.
    g1 is the first-pass gradient (None: this slot does not climb) and is let go after the climb,
    which `climbed` remembers; g2 is the second-pass one (None: the base optimizer leaves the slot
    alone). a and b define the scaling T: a |w| + b for ASAM, 1 / sqrt(1 + a g^2) for FisherSAM. v
    is SGD's momentum or Adam's first moment, u Adam's second. m_steps and v_steps are how often m,
    and v and u, were updated. number is its place among the slots.
    """

    param: Tensor
    w: Tensor
    name: str | None
    group: int
    offset: int
    a: float = 0.0
    b: float = 1.0
    backup: Tensor | None = None
    m: Tensor | None = None
    v: Tensor | None = None
    u: Tensor | None = None
    m_steps: Tensor | None = None
    v_steps: Tensor | None = None
    number: int = 0
    dense: bool = True
    climbed: bool = False
    g1: Tensor | None = None
    g2: Tensor | None = None


def local(t: Tensor) -> Tensor:
    """The memory of this process: t itself, or the shard that a DTensor has here."""
    return t.to_local() if hasattr(t, "to_local") else t


def is_dense(t: Tensor) -> bool:
    """Whether t's elements fill one stretch of memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def same_layout(t: Tensor, u: Tensor) -> bool:
    """Whether walking both memories in order meets the same elements in the same order."""
    return t.shape == u.shape and all(
        s == r for s, r, n in zip(t.stride(), u.stride(), t.shape, strict=True) if n > 1)


def is_packable(p: Tensor) -> bool:
    """Whether p may become a view of a flat buffer without anyone else noticing."""
    shared = p.device.type == "cpu" and p.is_shared()  # between processes; true of all of CUDA
    whole = p.storage_offset() == 0 and p.untyped_storage().nbytes() == p.nbytes
    return type(p) in (torch.nn.Parameter, Tensor) and is_dense(p) and whole and not shared


class Space:
    """All parameters of one device, dtype and sharding as one padded 1-D space.

    Args:
        params: (parameter, name or None, index in the optimizer's param_groups) of every leaf
            tensor, of one device and one floating dtype.
        mode: where the climb's direction comes from: None (SAM), "algorithm1" or "official"
            (Friendly-SAM), "full" or "noise" (a given full gradient).
        base: the fused base optimizer, "sgd" or "adam"; None: it takes its own step.
        masters: keep float32 weights for 16-bit parameters; the saved weights are those then.
        shards: the process groups that the parameters are sharded over; none for plain ones.
        pack: make the parameters views of one flat buffer where that is safe.

    State (m, v, u) and arithmetic are float32, or float64 for float64 parameters.
    """

    guard = GUARD
    late_uploads: list | None = None

    @torch.no_grad()
    def __init__(self, params: list[tuple[Tensor, str | None, int]], mode: str | None = None,
                 base: str | None = "sgd", masters: bool = False, shards: tuple = (),
                 pack: bool = True):
        first = params[0][0]
        self.device, self.dtype, self.mode, self.base = first.device, first.dtype, mode, base
        self.acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.sums = self.acc
        self.masters, self.shards = masters and self.dtype.itemsize == 2, shards
        self.scaling: str | None = None
        self.slots, self.size = [], 0
        for number, (p, name, group) in enumerate(params):
            self.slots.append(Slot(p, local(p), name, group, 0, number=number))
        for slot in sorted(self.slots, key=lambda s: -s.w.numel()):  # small ones are neighbours
            slot.offset = self.size
            self.size += -(-slot.w.numel() // PAD) * PAD

        self.backup = self._zeros(self.size, self.acc if self.masters else self.dtype)
        self.m, self.v, self.u = self._zeros(self.size) if mode else None, None, None
        self.steps = self._zeros((2, len(params)), torch.int32)
        self.partials, self.radii = self._zeros(PARTIALS), self._zeros((2, PARTIALS))
        self.dots = self._zeros((3, PARTIALS))
        self.control_buffer = self._zeros(len(CONTROL))
        self.counters = self._zeros(len(COUNTERS), torch.int32)
        self._set: set[str] = set()  # controls that are not at their neutral value
        self._attach()
        for name, value in NEUTRAL.items():
            getattr(self.control, name).fill_(value)
        self.flat_w = self._pack() if pack else None
        if self.masters:
            for s in self.slots:
                s.backup.copy_(s.w)

    def _attach(self) -> None:
        """Make the views into the buffers, and forget what was known of the device tables."""
        self.control = SimpleNamespace(
            **dict(zip(CONTROL, self.control_buffer.unbind(), strict=True)),
            **dict(zip(COUNTERS, self.counters.unbind(), strict=True)))
        for s, m_steps, v_steps in zip(self.slots, *self.steps, strict=True):
            s.m_steps, s.v_steps = m_steps, v_steps
            self._lay_out(s)
        self.hyper, self._hyper_values = None, None
        self._tables: dict[str, tuple[list, Tensor]] = {}
        self._memory: list | None = None
        self.cuts: dict[tuple, tuple] = {}  # of `fastsam.runs`, as is the scratch
        self.scratch: dict[str, Tensor] = {}

    def __getstate__(self) -> dict:
        if self.shards:
            raise TypeError("an optimizer of sharded parameters cannot be copied or pickled: "
                            "use state_dict() or torch.distributed.checkpoint")
        slots = [Slot(s.param, s.param, s.name, s.group, s.offset, s.a, s.b, number=s.number)
                 for s in self.slots]
        views = ("control", "hyper", "_hyper_values", "_tables", "_memory", "rows", "flat_w",
                 "cuts", "scratch")
        return {**{k: x for k, x in self.__dict__.items() if k not in views}, "slots": slots,
                "orders": [s.backup.stride() for s in self.slots]}

    def __setstate__(self, state: dict) -> None:
        orders = state["orders"]
        self.__dict__.update({k: x for k, x in state.items() if k != "orders"}, flat_w=None)
        self._attach()
        for s, stride in zip(self.slots, orders, strict=True):
            self._reorder(s, stride)  # the copied parameters may lie anywhere, in any order

    def absorb(self, old: "Space") -> None:
        """Take over the state of a space whose slots are the first ones of this."""
        for mine, its in zip(self.slots, old.slots, strict=False):
            for name in ("backup", "m", "v", "u"):
                if getattr(its, name) is not None:
                    getattr(mine, name).copy_(getattr(its, name))
        self.steps[:, :len(old.slots)] = old.steps
        self.counters.copy_(old.counters)
        self.radii.copy_(old.radii)
        self.control.norm.copy_(old.control.norm)

    def _zeros(self, size, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(size, dtype=dtype or self.acc, device=self.device)

    def _view(self, flat: Tensor | None, p: Tensor, offset: int) -> Tensor | None:
        if flat is None:
            return None
        stride = p.stride() if is_dense(p) else torch.empty(p.shape, device="meta").stride()
        return flat.as_strided(p.shape, stride, offset)

    def _lay_out(self, s: Slot) -> None:
        """Give the slot its views, in the order of its parameter's memory."""
        s.dense = is_dense(s.w)
        s.backup, s.m, s.v, s.u = (self._view(flat, s.w, s.offset)
                                   for flat in (self.backup, self.m, self.v, self.u))

    def _reorder(self, s: Slot, stride: tuple[int, ...]) -> None:
        """Bring the slot's values from the order that they lie in into its parameter's."""
        old = [None if flat is None else flat.as_strided(s.w.shape, stride, s.offset).clone()
               for flat in (self.backup, self.m, self.v, self.u)]
        self._lay_out(s)
        for new, values in zip((s.backup, s.m, s.v, s.u), old, strict=True):
            if new is not None:
                new.copy_(values)

    def _pack(self) -> Tensor | None:
        """Turn the parameters into views, with their own strides, of one flat buffer; or leave
        them all where they are when one of them does not own all of its memory."""
        if not all(is_packable(s.param) for s in self.slots):
            return None
        flat = self._zeros(self.size, self.dtype)
        for s in self.slots:
            s.w.data = self._view(flat, s.w, s.offset).copy_(s.w.detach())
        return flat

    def climbing(self) -> Iterator[Slot]:
        """The slots that have a first-pass gradient."""
        return (s for s in self.slots if s.g1 is not None)

    def clear_between(self) -> None:
        """Put the zeros between the slots back, of which a hyper-parameter that is not finite has
        made NaN."""
        ends = [s.offset + s.w.numel() for s in self.slots]
        for flat in (self.flat_w, self.backup, self.m, self.v, self.u):
            if flat is not None:
                for end in ends:
                    flat[end:end + -end % PAD] = 0

    def follow_parameters(self) -> bool:
        """Follow parameters whose memory someone replaced (`p.data = ...`, `model.to(...)`).

        Returns:
            Whether any has been since the last call.

        Raises:
            RuntimeError: a parameter has another device, dtype or shape than at construction, or
                its elements no longer fill one stretch of memory.
        """
        for s in self.slots:
            s.w = local(s.param)
        memory = [(s.w.data_ptr(), s.w.stride(), s.w.shape, s.w.dtype, s.w.device)
                  for s in self.slots]
        if memory == self._memory:
            return False
        for s in self.slots:
            was = (self.device, self.dtype, s.backup.shape, s.dense)
            if (s.w.device, s.w.dtype, s.w.shape, is_dense(s.w)) != was:
                raise RuntimeError(
                    f"a parameter of shape {tuple(s.backup.shape)}, {self.dtype} on {self.device}, "
                    f"is now {tuple(s.w.shape)} of strides {s.w.stride()}, {s.w.dtype} on "
                    f"{s.w.device}: build the optimizer after the model has its final form")
            if is_dense(s.w) and not same_layout(s.w, s.backup):
                self._reorder(s, s.backup.stride())
        self._memory = memory
        return True

    def set_hyper(self, rows: list[tuple]) -> None:
        """Bring the groups' hyper-parameters to the device: one copy, only when one changed.

        Args:
            rows: one tuple per group in the order of `Hyper`; a value is a number, or a 0-dim
                tensor, which is copied on the device.
        """
        self.rows = [Hyper(*row) for row in rows]
        table = [[*h, *h.shares()] for h in self.rows]
        if self.hyper is None or len(rows) != len(self.hyper):
            self.hyper, self._hyper_values = self._zeros((len(rows), len(table[0]))), None
        numbers = [[None if isinstance(x, Tensor) else float(x) for x in row] for row in table]
        if numbers != self._hyper_values:
            self._upload([[x or 0.0 for x in row] for row in numbers], self.hyper)
            self._hyper_values = numbers
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                if isinstance(value, Tensor) and self.late_uploads is None:
                    self.hyper[i, j].copy_(value, non_blocking=True)

    def multiply_sigma(self, c: Tensor) -> None:
        """Use sigma c, with c on the device, for sigma in every group until the next call."""
        self.rows = [row._replace(sigma=row.sigma * c) for row in self.rows]
        torch.mul(self.hyper[:, len(Hyper._fields)], c,
                  out=self.hyper[:, Hyper._fields.index("sigma")])

    def set_scalings(self, scalings: list[tuple[float, float]], kind: str) -> None:
        """Set every slot's (a, b) of T; (0, 1) is SAM's T = 1.

        Args:
            kind: what T scales with, "weights" (ASAM) or "gradient" (FisherSAM).
        """
        for s, (a, b) in zip(self.slots, scalings, strict=True):
            s.a, s.b = a, b
        self.scaling = kind if any(s.a for s in self.slots) else None
        self._tables.pop("scalings", None)

    def is_set(self, name: str) -> bool:
        """Whether `control.name` holds a value of this step rather than its neutral one."""
        return name in self._set

    def set_control(self, name: str, value: Tensor | None) -> None:
        """Copy a device value into `control.name`; None puts it back to neutral."""
        if value is not None:
            getattr(self.control, name).copy_(value, non_blocking=True)
            self._set.add(name)
        elif name in self._set:
            getattr(self.control, name).fill_(NEUTRAL[name])
            self._set.discard(name)

    def allocate_base(self) -> None:
        """Give every slot the fused base optimizer's buffers: v, and u for Adam."""
        self.v = self._zeros(self.size)
        self.u = self._zeros(self.size) if self.base == "adam" else None
        for s in self.slots:  # as the other buffers are, which a re-ordered parameter left behind
            s.v, s.u = (self._view(flat, s.backup, s.offset) for flat in (self.v, self.u))

    def sum_over_shards(self, partials: Tensor) -> Tensor:
        """Partial sums of this process's shards -> those of the whole parameters."""
        for group in self.shards:
            dist.all_reduce(partials, group=group)
        return partials

    @staticmethod
    def read_gradient(slot: Slot) -> Tensor | None:
        """The parameter's gradient, laid out like the parameter.

        Raises:
            ValueError: a sparse gradient.
        """
        if slot.param.grad is None:
            return None
        g = local(placed_like(slot.param, slot.param.grad))
        if g.layout is not torch.strided:
            raise ValueError(f"a gradient of shape {tuple(g.shape)} has layout {g.layout}: use "
                             "dense gradients (sparse=False in torch.nn.Embedding)")
        if g.dtype == slot.w.dtype and (g.stride() == slot.w.stride() or same_layout(g, slot.w)):
            return g
        return torch.empty_like(slot.w, memory_format=torch.preserve_format).copy_(g)

    # What the kernels read: tables on the device, uploaded again only when their content changed.

    def addresses(self, name: str) -> Tensor:
        """The memory addresses of every slot's `name` (w, g1 or g2), int64 (slots,); 0: none.
        An empty tensor has a gradient or not like any other, but no address: NOWHERE."""
        tensors = [getattr(s, name) for s in self.slots]
        values = [0 if t is None else t.data_ptr() or NOWHERE for t in tensors]
        known = self._tables.get(name)
        if known is None:
            known = ([], torch.empty(len(values), dtype=torch.int64, device=self.device))
        if known[0] != values:
            self._upload(values, known[1])
            self._tables[name] = (values, known[1])
        return known[1]

    def climbed(self) -> Tensor:
        """Not 0 for every slot that climbed: g1's addresses as the climb left them, (slots,)."""
        return self._tables["g1"][1]

    def layout(self) -> Tensor:
        """Each slot's (offset, numel, group), int64 (slots, 3)."""
        return self._constant("layout", lambda: torch.tensor(
            [[s.offset, s.w.numel(), s.group] for s in self.slots], device="cpu"))

    def scalings(self) -> Tensor:
        """Each slot's (a, b) of its scaling T, (slots, 2)."""
        return self._constant("scalings", lambda: torch.tensor(
            [[s.a, s.b] for s in self.slots], dtype=self.acc, device="cpu"))

    def blocks(self, block: int) -> Tensor:
        """(slot, index within the slot) of every stretch of `block` elements, int32 (blocks, 2)."""
        def build() -> Tensor:
            counts = torch.tensor([-(-s.w.numel() // block) for s in self.slots], device="cpu")
            slot = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
            start = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            index = torch.arange(len(slot), device="cpu") - start
            return torch.stack([slot, index], 1).to(torch.int32)

        return self._constant(f"blocks{block}", build)

    def _constant(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        if name not in self._tables:
            self._tables[name] = ([], build().to(self.device))
        return self._tables[name][1]

    def _upload(self, values: list, target: Tensor) -> None:
        if self.late_uploads is not None:  # a graph is captured, and reads them at its replay
            self.late_uploads.append((values, target))
            return
        pinned = self.device.type == "cuda"
        target.copy_(torch.tensor(values, dtype=target.dtype, device="cpu", pin_memory=pinned),
                     non_blocking=True)
