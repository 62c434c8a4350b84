"""Runs: small neighbours of the flat space taken as one, so that a network's many small parameters
cost one operation. Their gradients, which autograd left apart, are gathered first."""

from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from .flat import PAD, Slot, Space

LARGE = 2**17  # elements: from here on calls of its own cost less than being gathered
REMEMBERED = 8  # ways to cut a space, such as those of the steps with a climb and of those without
TINY = 1.2e-38  # an eps below is 0, or nothing beside a root, in float32


def remembered(space: Space, gradient: str, key: Hashable, objects: tuple, cut: Callable) -> list:
    """What `cut` makes of the slots that have a gradient (g1 or g2) now, made once.

    Args:
        key: what that depends on, besides which slots have one and have climbed; `objects` too,
            by their identity.
    """
    state = tuple((getattr(s, gradient) is not None, s.climbed) for s in space.slots)
    key = (gradient, state, key, *map(id, objects))
    if key not in space.cuts:
        if len(space.cuts) == REMEMBERED:
            space.cuts.clear()
        with torch.inference_mode(False):  # what is made here is used outside of it, too
            space.cuts[key] = cut(), objects
    return space.cuts[key][0]


def without_eps(space: Space) -> tuple[bool, ...]:
    """By group, whether Adam would make NaN of the zeros between slots: no runs there."""
    return tuple(space.base == "adam" and h.eps < TINY for h in space.rows)


def neighbours(space: Space, gradient: str, kind: Callable[[Slot], Hashable], most: float,
               ) -> list[list[Slot]]:
    """The slots that have a gradient, in the order of memory: small ones of a kind together, of
    `most` elements or fewer; large ones, and those that cannot be, by themselves."""
    found, last, size, alone = [], None, 0, without_eps(space)
    for s in sorted(space.slots, key=lambda s: s.offset):
        n = s.w.numel()
        if getattr(s, gradient) is None:
            last = None
            continue
        by_itself = n >= LARGE or n == 0 or not s.dense or alone[s.group]
        own = None if by_itself else (kind(s), s.climbed)
        if own is not None and own == last and size + n <= most:
            found[-1].append(s)
            size += n
        else:
            found.append([s])
            size = n
        last = own
    return found


def span(slots: list[Slot]) -> tuple[int, int]:
    """Where a run begins in the flat space, and its size, with the zeros between its slots."""
    start, last = slots[0].offset, slots[-1]
    return start, -(-(last.offset + last.w.numel() - start) // PAD) * PAD


def chunked(flat: Tensor, slots: list[Slot], start: int = 0) -> Tensor:
    """A run's part of a flat buffer that begins at `start`, (chunks, PAD)."""
    offset, size = span(slots)
    return flat.narrow(0, offset - start, size).view(-1, PAD)


def chunk_of(space: Space, slots: list[Slot]) -> tuple[Tensor, Tensor]:
    """The number and the group of the slot that each of a run's chunks belongs to, (chunks, 1)."""
    rows = torch.tensor([(s.number, s.group) for s in slots], device="cpu")
    chunks = torch.tensor([-(-s.w.numel() // PAD) for s in slots], device="cpu")
    numbers, groups = (x.repeat_interleave(chunks).unsqueeze(1).to(space.device)
                       for x in rows.unbind(1))
    return numbers, groups


def scratch(space: Space, slots: list[Slot], kind: str) -> tuple[Tensor, list[Tensor]]:
    """A run's part of the scratch memory that all small slots of the space have for their gradients
    ("g") or weights ("w"), 0 between them; and every slot's part of that."""
    if kind not in space.scratch:
        start = min(s.offset for s in space.slots if s.w.numel() < LARGE)
        space.scratch[kind] = torch.zeros(space.size - start, dtype=space.dtype,
                                          device=space.device)
    flat = space.scratch[kind]
    tail = space.size - len(flat)
    return chunked(flat, slots, tail), [
        flat.as_strided(s.w.shape, s.w.stride(), s.offset - tail) for s in slots]


def is_packed(space: Space, slots: list[Slot]) -> bool:
    """Whether these weights lie in the flat buffer."""
    return space.flat_w is not None and all(
        s.w.data_ptr() == space.flat_w.data_ptr() + s.offset * s.w.itemsize for s in slots)


class Run:
    """Neighbours of one group and one scaling T as the reference sees a slot. Its tensors are
    (chunks, PAD), so that their step counts, which may differ, are looked up once a chunk."""

    MOST = 2**18  # elements: a bound for the temporaries; the time hardly depends on it

    def __init__(self, space: Space, slots: list[Slot], gradient: str):
        first = slots[0]
        self.slots, self.steps = slots, space.steps
        self.group, self.a, self.b, self.climbed = first.group, first.a, first.b, first.climbed
        self.numbers, _ = chunk_of(space, slots)
        for name in ("backup", "m", "v", "u"):
            flat = getattr(space, name)
            setattr(self, name, None if flat is None else chunked(flat, slots))
        self.gathers = (gradient,)
        if is_packed(space, slots):
            self.w = chunked(space.flat_w, slots)
        else:
            self.gathers += ("w",)
        self.pieces = {}
        for name in self.gathers:
            gathered, self.pieces[name] = scratch(space, slots, name[0])
            setattr(self, name, gathered)

    m_steps = property(lambda self: self.steps[0][self.numbers])
    v_steps = property(lambda self: self.steps[1][self.numbers])

    def gather(self) -> None:
        for name in self.gathers:
            torch._foreach_copy_(self.pieces[name], [getattr(s, name) for s in self.slots])

    def scatter(self) -> None:
        """Give weights that are not packed back to their owners."""
        if "w" in self.gathers:
            torch._foreach_copy_([s.w for s in self.slots], self.pieces["w"])


def parts(space: Space, gradient: str, moves: bool = False, gather: bool = True
          ) -> Iterator[tuple[Slot | Run, list[Slot]]]:
    """The slots that have a gradient, g1 or g2, in as few parts as the reference can take: each
    part, with its slots.

    Args:
        moves: what is done to a part changes w.
        gather: False when the same step has gathered the same gradients already.
    """
    def cut() -> list[Slot | Run]:
        runs = neighbours(space, gradient, lambda s: (s.group, s.a, s.b), Run.MOST)
        return [Run(space, slots, gradient) if len(slots) > 1 else slots[0] for slots in runs]

    key = tuple((s.a, s.b) for s in space.slots), without_eps(space)
    for part in remembered(space, gradient, key, (space._memory, space.v), cut):
        if isinstance(part, Slot):
            yield part, [part]
        else:
            if gather:
                part.gather()
            yield part, part.slots
            if moves:
                part.scatter()
