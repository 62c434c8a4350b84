"""Optimizer steps beside their peers: `make bench`. `make test` runs each once, untimed."""

import pytest
import torch
from torch import nn

from fastsam import SAM, FriendlySAM

SHAPES = [(64, 3, 3, 3), (64,), (64, 64, 3, 3), (128, 64, 3, 3), (128,), (256, 128, 3, 3),
          (256,), (512, 256, 3, 3), (10, 512), (10,)]  # 1.6 million parameters, mixed sizes
SGD = dict(lr=0.1, momentum=0.9, weight_decay=5e-4)


class EagerSAM(torch.optim.SGD):
    """The peer: one small operation after another for each parameter, as public classes do."""

    def both_steps(self, rho: float = 0.05) -> None:
        ps = [p for g in self.param_groups for p in g["params"]]
        norm = torch.stack([p.grad.norm() for p in ps]).norm()
        saved = [p.detach().clone() for p in ps]
        with torch.no_grad():
            for p in ps:
                p.add_(p.grad, alpha=float(rho / (norm + 1e-12)))
            for p, w in zip(ps, saved, strict=True):
                p.copy_(w)
        self.step()


def parameters() -> list[nn.Parameter]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ps = [nn.Parameter(0.1 * torch.randn(s, device=device)) for s in SHAPES]
    for p in ps:
        p.grad = torch.randn_like(p)
    return ps


def waited(call):
    def run() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return run


@pytest.mark.benchmark(group="optimizer step, 1.6 M parameters, float32")
@pytest.mark.parametrize("name", ["sgd", "eager-sam", "sam", "fsam"])
def test_optimizer_step(benchmark, name):
    ps = parameters()
    if name == "sgd":
        call = torch.optim.SGD(ps, **SGD).step
    elif name == "eager-sam":
        call = EagerSAM(ps, **SGD).both_steps
    else:
        backend = "triton" if torch.cuda.is_available() else "reference"
        cls = SAM if name == "sam" else FriendlySAM
        opt = cls(ps, torch.optim.SGD, rho=0.05, backend=backend, **SGD)

        def call() -> None:
            opt.first_step()
            opt.second_step()

    before = [p.detach().clone() for p in ps]
    benchmark(waited(call))
    assert all(p.isfinite().all() and not torch.equal(p, w)
               for p, w in zip(ps, before, strict=True))
