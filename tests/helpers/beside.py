"""An optimizer of ours beside the base optimizer alone, as torch has it: whatever is done to both,
both must train alike. The gradients are given, so SAM's return and step is the base's step."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam import SAM

BASES = {
    "sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.02)),
    "plain sgd": (torch.optim.SGD, dict(lr=0.1)),
    "adamw": (torch.optim.AdamW, dict(lr=0.02, betas=(0.8, 0.97), eps=1e-3, weight_decay=0.1)),
    "adam": (torch.optim.Adam, dict(lr=0.02, betas=(0.8, 0.97), eps=1e-3, weight_decay=0.1)),
    "rmsprop": (torch.optim.RMSprop, dict(lr=0.01, momentum=0.8, eps=1e-2)),
}
KEPT = ("momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg")
RHO = 0.25


class Side:
    """One optimizer and its parameters: numbers 0 to 2 in its first group, 3 in its second, which
    has another learning rate; the others are spare."""

    SHAPES = ((3, 4), (5,), (2, 3), (5,), (3, 4), ())

    def __init__(self, base: str, make: Callable):
        generator = torch.Generator().manual_seed(5)
        cls, hyper = BASES[base]
        self.params = [nn.Parameter(torch.randn(shape, generator=generator))
                       for shape in self.SHAPES]
        groups = [dict(params=self.params[:3]), dict(params=[self.params[3]], lr=0.03)]
        self.opt: Optimizer = make(groups, cls, **hyper)

    def members(self) -> list[Tensor]:
        return [p for group in self.opt.param_groups for p in group["params"]]


class Beside:
    """Both sides, in lockstep."""

    def __init__(self, base: str, backend: str, make: type[SAM] = SAM, **kwargs):
        self.t = 0
        self.ours = Side(base, lambda groups, cls, **hyper: make(
            groups, cls, rho=RHO, backend=backend, **hyper, **kwargs))
        self.torch = Side(base, lambda groups, cls, **hyper: cls(groups, **hyper))

    def both(self, edit: Callable[[Optimizer, list], object]) -> None:
        """Do the same to both."""
        for side in (self.ours, self.torch):
            edit(side.opt, side.params)

    def gradients(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(p.shape, generator=generator).to(p) for p in self.ours.params]

    def set(self, side: Side, grads: Sequence[Tensor | None]) -> None:
        for p, g in zip(side.params, grads, strict=True):
            p.grad = None if g is None else g.clone()

    def climb(self) -> None:
        """Our first step: those in the groups move, by rho together."""
        self.t += 1
        self.before = [p.detach().clone() for p in self.ours.params]
        self.set(self.ours, self.gradients(self.t))
        self.ours.opt.first_step(zero_grad=True)
        members = {id(p) for p in self.ours.members()}
        moved = [(p.detach() - w).norm() for p, w in zip(self.ours.params, self.before,
                                                         strict=True)]
        assert float(torch.stack(moved).norm()) == pytest.approx(RHO, rel=1e-4)
        for p, distance in zip(self.ours.params, moved, strict=True):
            assert (distance > 0) == (id(p) in members)

    def descend(self) -> None:
        """Our second step and torch's, and the comparison."""
        grads = self.gradients(1000 + self.t)
        for side in (self.ours, self.torch):
            self.set(side, grads)
        self.ours.opt.second_step()
        self.torch.opt.step()
        self.compare()

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.climb()
            self.descend()

    def restored(self) -> None:
        """restore() brings back what the climb moved, bit for bit."""
        self.ours.opt.restore()
        assert not self.ours.opt.is_perturbed
        for p, w in zip(self.ours.params, self.before, strict=True):
            assert torch.equal(p, w)

    def compare(self) -> None:
        for i, (p, q) in enumerate(zip(self.ours.params, self.torch.params, strict=True)):
            close(p, q, f"parameter {i}")
            mine, theirs = (side.opt.state.get(x, {}) for side, x in
                            ((self.ours, p), (self.torch, q)))
            for name in KEPT:
                if isinstance(theirs.get(name), Tensor):
                    close(mine[name], theirs[name], f"{name} of {i}")
            if "step" in theirs:
                assert float(mine["step"]) == float(theirs["step"]), f"step of {i}"


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=2e-5, atol=2e-6,
                               check_dtype=False, msg=lambda text: f"{what}: {text}")
