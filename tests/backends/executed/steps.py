"""Steps of small optimizers, as the executed code's tests need them."""

import math

import torch

from fastsam import FriendlySAM

from ...helpers.drawn import normals

BLOCK = 1024
ROOM = 64  # bytes around every tensor, where NaN lies


def signs(sizes, seed=0, dtype=torch.float32) -> list[torch.Tensor]:
    """-1 and 1 at BLOCK places together, else 0: their norm is 32, whatever the order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(sum(sizes))
    places = torch.randperm(len(values), generator=generator)[:BLOCK]
    values[places] = torch.randint(0, 2, (BLOCK,), generator=generator) * 2.0 - 1
    return [part.to(dtype) for part in values.split(list(sizes))]


def surrounded(t: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """A copy of t with NaN before and behind, `offset` elements off a multiple of 64 bytes."""
    room = ROOM // t.element_size()
    storage = torch.full((room + offset + t.numel() + room,), math.nan, dtype=t.dtype)
    start = room + offset
    storage[start:start + t.numel()] = t
    return storage[start:start + t.numel()]


def untouched_around(t: torch.Tensor) -> bool:
    whole = torch.tensor([], dtype=t.dtype).set_(t.untyped_storage())
    start = t.storage_offset()
    return bool(whole[:start].isnan().all() and whole[start + t.numel():].isnan().all())


def gaps(opt) -> list[tuple[int, int]]:
    """The bytes of the optimizer's buffers that belong to no parameter."""
    found = []
    for space in opt._phase.layout.spaces:
        parts = sorted((s.offset, s.offset + s.numel) for s in space.slots)
        for flat in (space.saved, space.m, space.v, space.u):
            if flat is None:
                continue
            base, size = flat.data_ptr(), flat.element_size()
            ends, begins = [0] + [b for _, b in parts], [a for a, _ in parts] + [flat.numel()]
            found += [(base + end * size, base + begin * size)
                      for end, begin in zip(ends, begins, strict=True) if end < begin]
    return found


class Steps:
    """An optimizer over parameters that lie among NaN."""

    def __init__(self, tensors, backend="triton", cls=FriendlySAM, base=torch.optim.SGD,
                 offset=0, **kwargs):
        self.params = [torch.nn.Parameter(surrounded(t, offset)) for t in tensors]
        self.opt = cls(self.params, base, backend=backend, **{"lr": 0.125, **kwargs})

    @property
    def spaces(self):
        return self.opt._phase.layout.spaces

    def climb(self, grads, offset=0) -> None:
        self._set(grads, offset)
        self.opt.first_step(zero_grad=True)

    def step(self, grads, offset=0) -> None:
        self._set(grads, offset)
        self.opt.second_step(zero_grad=True)

    def _set(self, grads, offset) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = surrounded(g, offset)

    def run(self, sizes, steps=2, draw=normals) -> list[torch.Tensor]:
        """All weights and state after each half of `steps` steps."""
        dtype, seen = self.params[0].dtype, []
        for t in range(steps):
            self.climb(draw(sizes, 10 + t, dtype))
            seen += [p.detach().clone() for p in self.params]
            self.step(draw(sizes, 20 + t, dtype))
            seen += self.tensors()
        return seen

    def tensors(self) -> list[torch.Tensor]:
        state = self.opt.state
        return [p.detach().clone() for p in self.params] + [
            x.clone() for p in self.params for _, x in sorted(state[p].items())
            if isinstance(x, torch.Tensor)]
