"""The flat parameter space: one padded 1-D space for all parameters of one device and dtype.

Every parameter owns a slot that starts at a multiple of PAD elements; the saved weights, the
moving average m and the momentum buffer v are flat buffers over the slots, and, where that is
safe, the parameters themselves become views of one flat weight buffer. Gradients stay where
autograd left them and are read through a table of addresses.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

PAD = 16  # elements: 16-byte alignment for the narrowest dtype, with room
PARTIALS = 1024  # partial sums of one norm; also the most programs a kernel is launched with
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
    weight_decay: float
    nesterov: bool


SHARES = ("1 - lmbda", "1 - dampening")  # more columns: exact only when taken before rounding
CONTROL = ("norm", "ok", "inv_scale1", "inv_scale2", "found_inf")
COUNTERS = ("skipped", "climb_ticket", "step_ticket")


@dataclass(eq=False)
class Slot:
    """One parameter w, its group, its part of the flat buffers, and this step's gradients.

    g1 is the first-pass gradient (None: this slot does not climb) and is let go after the climb,
    which `climbed` remembers; g2 is the second-pass one (None: the base optimizer leaves the slot
    alone). a and b define ASAM's scaling T = a |w| + b.
    """

    w: Tensor
    name: str | None
    group: int
    offset: int
    a: float = 0.0
    b: float = 1.0
    backup: Tensor | None = None
    m: Tensor | None = None
    v: Tensor | None = None
    m_steps: Tensor | None = None
    v_steps: Tensor | None = None
    dense: bool = True
    climbed: bool = False
    g1: Tensor | None = None
    g2: Tensor | None = None


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
    """All parameters of one device and dtype as one padded 1-D space.

    Args:
        params: (parameter, name or None, index in the optimizer's param_groups) of every leaf
            tensor, of one device and one floating dtype.
        ema: None (SAM), "algorithm1" or "official" (Friendly-SAM).

    State (m, v) and arithmetic are float32, or float64 for float64 parameters.
    """

    guard = GUARD

    def __init__(self, params: list[tuple[Tensor, str | None, int]], ema: str | None):
        first = params[0][0]
        self.device, self.dtype, self.ema = first.device, first.dtype, ema
        self.acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.adaptive = self.momentum = False
        self.slots, self.size = [], 0
        for p, name, group in params:
            self.slots.append(Slot(p, name, group, self.size))
            self.size += -(-p.numel() // PAD) * PAD

        self.backup = self._zeros(self.size, self.dtype)
        self.m, self.v = self._zeros(self.size) if ema else None, None
        self.steps = self._zeros((2, len(params)), torch.int32)
        self.partials, self.radii = self._zeros(PARTIALS), self._zeros(PARTIALS)
        self.control_buffer = self._zeros(len(CONTROL))
        self.counters = self._zeros(len(COUNTERS), torch.int32)
        self._set: set[str] = set()  # controls that are not at their neutral value
        self._attach()
        self.control.inv_scale1.fill_(1)
        self.control.inv_scale2.fill_(1)
        self.flat_w = self._pack()

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

    def __getstate__(self) -> dict:
        slots = [Slot(s.w, s.name, s.group, s.offset, s.a, s.b) for s in self.slots]
        views = ("control", "hyper", "_hyper_values", "_tables", "_memory", "rows", "flat_w")
        return {**{k: x for k, x in self.__dict__.items() if k not in views}, "slots": slots}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, flat_w=None)  # the copied parameters may lie anywhere
        self._attach()

    def _zeros(self, size, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(size, dtype=dtype or self.acc, device=self.device)

    def _view(self, flat: Tensor, p: Tensor, offset: int) -> Tensor:
        stride = p.stride() if is_dense(p) else torch.empty(p.shape, device="meta").stride()
        return flat.as_strided(p.shape, stride, offset)

    def _lay_out(self, s: Slot) -> None:
        """Give the slot its views, in the order of its parameter's memory."""
        s.dense = is_dense(s.w)
        s.backup = self._view(self.backup, s.w, s.offset)
        s.m = None if self.m is None else self._view(self.m, s.w, s.offset)
        s.v = None if self.v is None else self._view(self.v, s.w, s.offset)

    def _pack(self) -> Tensor | None:
        """Turn the parameters into views, with their own strides, of one flat buffer; or leave
        them all where they are when one of them does not own all of its memory."""
        if not all(is_packable(s.w) for s in self.slots):
            return None
        flat = self._zeros(self.size, self.dtype)
        for s in self.slots:
            s.w.data = self._view(flat, s.w, s.offset).copy_(s.w.detach())
        return flat

    def climbing(self) -> Iterator[Slot]:
        """The slots that have a first-pass gradient."""
        return (s for s in self.slots if s.g1 is not None)

    def follow_parameters(self) -> bool:
        """Follow parameters whose memory someone replaced (`p.data = ...`, `model.to(...)`).

        Returns:
            Whether any has been since the last call.

        Raises:
            RuntimeError: a parameter has another device, dtype or shape than at construction, or
                its elements no longer fill one stretch of memory.
        """
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
                old = [None if t is None else t.clone() for t in (s.backup, s.m, s.v)]
                self._lay_out(s)
                for new, values in zip((s.backup, s.m, s.v), old, strict=True):
                    if new is not None:  # the same values in the parameter's new order
                        new.copy_(values)
        self._memory = memory
        return True

    def set_hyper(self, rows: list[tuple]) -> None:
        """Bring the groups' hyper-parameters to the device: one copy, only when one changed.

        Args:
            rows: one tuple per group in the order of `Hyper`; a value is a number, or a 0-dim
                tensor, which is copied on the device.
        """
        self.rows = [Hyper(*row) for row in rows]
        table = [[*h, 1 - h.lmbda, 1 - h.dampening] for h in self.rows]
        if self.hyper is None or len(rows) != len(self.hyper):
            self.hyper, self._hyper_values = self._zeros((len(rows), len(table[0]))), None
        numbers = [[None if isinstance(x, Tensor) else float(x) for x in row] for row in table]
        if numbers != self._hyper_values:
            self._upload([[x or 0.0 for x in row] for row in numbers], self.hyper)
            self._hyper_values = numbers
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    self.hyper[i, j].copy_(value, non_blocking=True)

    def set_scalings(self, scalings: list[tuple[float, float]]) -> None:
        """Set every slot's (a, b) of T = a |w| + b; (0, 1) is SAM."""
        for s, (a, b) in zip(self.slots, scalings, strict=True):
            s.a, s.b = a, b
        self.adaptive = any(s.a for s in self.slots)
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
            getattr(self.control, name).fill_(name != "found_inf")
            self._set.discard(name)

    def allocate_momentum(self) -> None:
        """Give every slot its momentum buffer v."""
        self.momentum, self.v = True, self._zeros(self.size)
        for s in self.slots:
            self._lay_out(s)

    @staticmethod
    def read_gradient(slot: Slot) -> Tensor | None:
        """The parameter's gradient, laid out like the parameter.

        Raises:
            ValueError: a sparse gradient.
        """
        g = slot.w.grad
        if g is None:
            return None
        if g.layout is not torch.strided:
            raise ValueError(f"a gradient of shape {tuple(g.shape)} has layout {g.layout}: use "
                             "dense gradients (sparse=False in torch.nn.Embedding)")
        if g.dtype == slot.w.dtype and (g.stride() == slot.w.stride() or same_layout(g, slot.w)):
            return g
        return torch.empty_like(slot.w, memory_format=torch.preserve_format).copy_(g)

    # What the kernels read: tables on the device, uploaded again only when their content changed.

    def addresses(self, name: str) -> Tensor:
        """The memory addresses of every slot's `name` (w, g1 or g2), int64 (slots,); 0: none."""
        tensors = [getattr(s, name) for s in self.slots]
        values = [0 if t is None else t.data_ptr() for t in tensors]
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
            [[s.offset, s.w.numel(), s.group] for s in self.slots]))

    def scalings(self) -> Tensor:
        """Each slot's (a, b) of T = a |w| + b, (slots, 2)."""
        return self._constant("scalings", lambda: torch.tensor(
            [[s.a, s.b] for s in self.slots], dtype=self.acc))

    def blocks(self, block: int) -> Tensor:
        """(slot, index within the slot) of every stretch of `block` elements, int32 (blocks, 2)."""
        def build() -> Tensor:
            counts = torch.tensor([-(-s.w.numel() // block) for s in self.slots])
            slot = torch.repeat_interleave(torch.arange(len(counts)), counts)
            start = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            return torch.stack([slot, torch.arange(len(slot)) - start], 1).to(torch.int32)

        return self._constant(f"blocks{block}", build)

    def _constant(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        if name not in self._tables:
            self._tables[name] = ([], build().to(self.device))
        return self._tables[name][1]

    def _upload(self, values: list, target: Tensor) -> None:
        pinned = self.device.type == "cuda"
        target.copy_(torch.tensor(values, dtype=target.dtype, pin_memory=pinned),
                     non_blocking=True)
