"""The flat parameter space: where fastsam's own buffers lie, and the tables that kernels read.

All parameters of one device, dtype and sharding make one `Space`. Each has a `Slot`, which starts
at a multiple of PAD elements of flat buffers: the saved weights, the moving average m, the base
optimizer's v and u, and the gradient that GSAM and LookSAM keep. Weights and gradients stay where
their owners have them, and are reached through columns of addresses (`Tables`). Spaces and slots do
not change: what moves a parameter to another place makes new ones, and the state follows
(`fastsam.shown.adopt`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .hyper import COLUMN, COLUMNS, KEEPING, WITH_M, Hyper

PAD = 16  # elements: 16-byte alignment for the narrowest dtype, with room
PARTIALS = 1024  # room for the partial sums of one norm
NOWHERE = 16  # stands for the address of a tensor without elements
GUARD = 1e-12  # keeps rho / norm finite at norm 0, as in the public SAM classes

# ||T d|| and whether it was finite (1 or 0); 1 / the loss scale of either pass; GradScaler's
# overflow; the share c of `Pass.mix`
CONTROL = ("norm", "ok", "inv_scale1", "inv_scale2", "found_inf", "share")
# steps that were skipped; how many programs of a Triton kernel have come to its end
COUNTERS = ("skipped", "climb_ticket", "step_ticket")

MaybeTensor = Any  # a Tensor, or None where `Kind` keeps none: who reads it knows the kind


def noise_share(dtype: torch.dtype) -> float:
    """The most that ||T d||^2 / ||T g||^2 is where d is only what rounding leaves of a difference
    that is 0: (64 unit roundoffs)^2."""
    return (32 * torch.finfo(dtype).eps) ** 2


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter's place.

    Attributes:
        param, name, group: the parameter, its name or None, the index of its group.
        number: its place among the slots of its space.
        offset, numel: its part of the flat buffers, in elements.
        shape, stride, dtype: of its memory here; the views below have the same shape and stride.
        dense: whether its elements fill one stretch of memory.
        saved: the w that the climb saved, or the float32 master.
        m: Friendly-SAM's average, a given full gradient, or LookSAM's g_v; None without.
        v, u: SGD's momentum or Adam's first moment, Adam's second; None without.
        m_steps, v_steps: how often m, and v and u, were updated; int32, 0-dim.
        kept: the first pass's gradient, for the second; None without.
    """

    param: Tensor
    name: str | None
    group: int
    number: int
    offset: int
    numel: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    dense: bool
    saved: Tensor
    m: MaybeTensor
    v: MaybeTensor
    u: MaybeTensor
    m_steps: Tensor
    v_steps: Tensor
    kept: MaybeTensor


@dataclass(frozen=True, eq=False)
class Kind:
    """What the parameters of a space have in common, and what is kept for them.

    Attributes:
        device, dtype: of the parameters.
        shards: the process groups that they are sharded over; none for plain ones.
        mode: where the climb's direction comes from: None (SAM), "algorithm1" or "official"
            (Friendly-SAM), "full" or "noise" (a given full gradient); "gsam" and "looksam" climb
            as SAM, and keep the gradient.
        base: the fused base optimizer, "sgd" (without momentum), "sgd-momentum" or "adam"; None:
            it takes its own step.
        masters: float32 weights are kept for these 16-bit parameters, in `saved`.
    """

    device: torch.device
    dtype: torch.dtype
    shards: tuple = ()
    mode: str | None = None
    base: str | None = None
    masters: bool = False

    @property
    def acc(self) -> torch.dtype:
        """The dtype of state and arithmetic."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Space:
    """All parameters of one device, dtype and sharding. Made by `Space.of`.

    Buffers, on `kind.device`, of dtype `kind.acc` where no other is said:
        saved: (size,), dtype of the parameters, or float32 masters.
        m, v, u: (size,) or None.
        steps: (2, slots) int32, the slots' m_steps and v_steps.
        partials: (2, PARTIALS), parts of ||T d||^2 and, where d is made with m, of ||T g||^2.
        dots: (3, PARTIALS), parts of <g, m>, <g, g>, <m, m>, for a projection or a `Pass.mix`
            (of which some have the kept gradient in m's place).
        radii: (2, PARTIALS), parts of the climb's squared length: as stored, and as wanted.
        control: (6,), the cells of CONTROL.
        counters: (3,) int32, the cells of COUNTERS.
        hyper: (groups, COLUMNS), the hyper-parameters.
        scalings: (slots, 2), a and b of each slot's T.
        layout: (slots, 3) int64, each slot's offset, numel and group.
        kept: (size,) or None, the first pass's gradient.
    Elements between the slots belong to nobody and are neither read nor written.
    """

    kind: Kind
    slots: tuple[Slot, ...]
    size: int
    saved: Tensor
    m: MaybeTensor
    v: MaybeTensor
    u: MaybeTensor
    steps: Tensor
    partials: Tensor
    dots: Tensor
    radii: Tensor
    control: Tensor
    counters: Tensor
    hyper: Tensor
    scalings: Tensor
    layout: Tensor
    kept: MaybeTensor
    _blocks: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    @torch.no_grad()
    def of(kind: Kind, members: Sequence[tuple[Tensor, str | None, int]], groups: int) -> "Space":
        """Lay parameters out.

        Args:
            members: (parameter, name or None, index of its group) of each.
            groups: the number of groups.
        """
        def zeros(*size: int, dtype: torch.dtype = kind.acc) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=kind.device)

        memory = [local(p) for p, _, _ in members]
        offsets, size = [], 0
        for w in memory:
            offsets.append(size)
            size += -(-w.numel() // PAD) * PAD
        saved = zeros(size, dtype=kind.acc if kind.masters else kind.dtype)
        m = zeros(size) if kind.mode in (*WITH_M, "looksam") else None
        kept = zeros(size) if kind.mode in KEEPING else None
        v = zeros(size) if kind.base in ("sgd-momentum", "adam") else None
        u = zeros(size) if kind.base == "adam" else None
        steps = zeros(2, len(memory), dtype=torch.int32)
        slots = []
        for i, ((p, name, group), w, offset) in enumerate(zip(members, memory, offsets,
                                                              strict=True)):
            own = {key: view(flat, w, offset) for key, flat in dict(
                saved=saved, m=m, v=v, u=u, kept=kept).items()}
            slots.append(Slot(p, name, group, i, offset, w.numel(), w.shape, w.stride(),
                              w.dtype, is_dense(w), m_steps=steps[0, i], v_steps=steps[1, i],
                              **own))
            if kind.masters:
                own["saved"].copy_(w)
        control = zeros(len(CONTROL))
        control[CONTROL.index("ok"):CONTROL.index("found_inf")] = 1  # ok, and no loss scale
        layout = torch.tensor([[s.offset, s.numel, s.group] for s in slots], dtype=torch.int64,
                              device="cpu").to(kind.device)
        return Space(kind, tuple(slots), size, saved, m, v, u, steps, zeros(2, PARTIALS),
                     zeros(3, PARTIALS), zeros(2, PARTIALS), control,
                     zeros(len(COUNTERS), dtype=torch.int32), zeros(groups, len(COLUMNS)),
                     zeros(len(slots), 2), layout, kept)

    @cached_property
    def cells(self) -> SimpleNamespace:
        """Views of the cells of control and counters, by name."""
        return SimpleNamespace(**dict(zip(CONTROL, self.control.unbind(), strict=True)),
                               **dict(zip(COUNTERS, self.counters.unbind(), strict=True)))

    @cached_property
    def params(self) -> list[Tensor]:
        return [slot.param for slot in self.slots]

    @cached_property
    def plain(self) -> bool:
        """Whether the parameters are themselves what lies in memory here, and no DTensors."""
        return all(local(p) is p for p in self.params)

    @property
    def numel(self) -> int:
        return sum(slot.numel for slot in self.slots)

    @property
    def dense(self) -> bool:
        return all(slot.dense for slot in self.slots)

    def blocks(self, block: int) -> Tensor:
        """(slot, index within the slot) of every stretch of `block` elements, in order; int32
        (blocks, 2)."""
        if block not in self._blocks:
            counts = torch.tensor([-(-s.numel // block) for s in self.slots], device="cpu")
            slot = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
            start = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            index = torch.arange(len(slot), device="cpu") - start
            table = torch.stack([slot, index], 1).to(torch.int32)
            self._blocks[block] = table.to(self.kind.device)
        return self._blocks[block]

    @property
    def tables_of_blocks(self) -> list[Tensor]:
        """What `blocks` has made."""
        return [*self._blocks.values()]

    def bring_hyper(self, rows: Sequence[Hyper], brought: list | None) -> list:
        """Bring the groups' hyper-parameters to the device: one copy, only when one changed;
        tensors are copied on the device.

        Args:
            rows: one per group.
            brought: what the last call returned, or None.
        """
        table = [row.columns() for row in rows]
        numbers = [[None if isinstance(x, Tensor) else float(x) for x in row] for row in table]
        if numbers != brought:
            upload([[x or 0.0 for x in row] for row in numbers], self.hyper)
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    self.hyper[i, j].copy_(value.reshape(()), non_blocking=True)
        return numbers

    def multiply_sigma(self, c: Tensor) -> None:
        """Use sigma c, with c on the device, for sigma in every group until the next call."""
        torch.mul(self.hyper[:, COLUMN["given_sigma"]], c, out=self.hyper[:, COLUMN["sigma"]])

    def sum_over_shards(self, sums: Tensor) -> Tensor:
        """Sums over this process's shards -> those over the whole parameters, in place."""
        for group in self.kind.shards:
            dist.all_reduce(sums, group=group)
        return sums


class Tables:
    """The columns of addresses that kernels read for one space: int64 (slots,) on its device, 0
    where there is nothing. `w` are the weights, `g1` the first pass's gradients, `g2` the second's,
    `part` some of those.

    Args:
        space: whose.
        late: nothing is uploaded before `upload_late`: a graph is captured, and reads the columns
            at its replay.
    """

    def __init__(self, space: Space, late: bool = False):
        self.late, self._held = late, dict[str, list[int]]()
        self.columns = torch.zeros(4, len(space.slots), dtype=torch.int64,
                                   device=space.kind.device)
        self.w, self.g1, self.g2, self.part = self.columns

    def bring(self, name: str, addresses: list[int]) -> Tensor:
        """The column `name`, holding these addresses: uploaded where they changed.

        Raises:
            RuntimeError: a graph is captured that would need the column to hold others, too.
        """
        column: Tensor = getattr(self, name)
        if self._held.get(name) != addresses:
            if not self.late:
                upload(addresses, column)
            elif name in self._held:
                raise RuntimeError("a capture holds one step, with one climb: another in it would "
                                   "make all of them read the last one's gradients at a replay")
            self._held[name] = addresses
        return column

    def held(self, name: str) -> list[int] | None:
        """The addresses that a column holds; None before the first."""
        return self._held.get(name)

    def upload_late(self) -> None:
        self.late = False
        for name, addresses in self._held.items():
            upload(addresses, getattr(self, name))


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device becomes a part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(values: list, target: Tensor) -> None:
    """target = values, without waiting for the device.

    Raises:
        RuntimeError: a graph is captured, whose every replay would bring these values again.
    """
    if target.device.type == "cpu":
        target.numpy()[...] = values
        return
    if capturing(target.device):
        raise RuntimeError("a CUDA graph that is captured would bring the gradients' addresses and "
                           "the hyper-parameters of today at every replay: use GraphedStep, or "
                           "capture within the optimizer's capture() and replay within replay()")
    pinned = torch.tensor(values, dtype=target.dtype, device="cpu",
                          pin_memory=target.device.type == "cuda")
    target.copy_(pinned, non_blocking=True)


def sent(t: Tensor, device: torch.device) -> Tensor:
    """t on a device. A GPU is not waited for, but where t goes to the host's memory: who reads it
    there would read what was there before."""
    return t.to(device, non_blocking=device.type != "cpu")


def local(t: Tensor) -> Tensor:
    """The memory of this process: t itself, or the shard that a DTensor has here."""
    return t.to_local() if hasattr(t, "to_local") else t


def view(flat: MaybeTensor, w: Tensor, offset: int) -> MaybeTensor:
    """The part of a flat buffer that belongs to w, in the order of w's memory."""
    if flat is None:
        return None
    stride = w.stride() if is_dense(w) else torch.empty(w.shape, device="meta").stride()
    return flat.as_strided(w.shape, stride, offset)


def is_dense(t: Tensor) -> bool:
    """Whether t's elements fill one stretch of memory without gaps or overlaps, as they are: what
    has the negative bit is minus what lies in memory."""
    if t.is_neg():
        return False
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


