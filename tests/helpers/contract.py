"""What the contract's tests share: the classes, a small network, its batches and both passes."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastsam import SAM, freeze_bn_stats
from fastsam.choose import BACKENDS

from .variants import ALL, RELATIVES, VARIANTS, Variant, full_gradient

HYPER = dict(lr=0.07, momentum=0.85, dampening=0.1, weight_decay=3e-3)
ADAM = dict(lr=0.01, betas=(0.8, 0.97), eps=1e-3, weight_decay=0.02)
BASES = {  # the last is not fused
    "sgd": (torch.optim.SGD, HYPER),
    "adam": (torch.optim.Adam, ADAM),
    "adamw": (torch.optim.AdamW, ADAM),
    "rmsprop": (torch.optim.RMSprop, dict(lr=0.005, momentum=0.8, eps=1e-2, weight_decay=0.02)),
}
# A case is a variant, with SGD, or "variant on base". All of them on the reference; elsewhere one
# of each mode, scaling and base: the kernels' tests and the drawn sequences cover the rest. A climb
# and a base's update have nothing in common: each variant meets SGD and one other base for every
# change, and the others for `make prove`; so do those that Triton's interpreter, the slowest, does
# not take.
PAIRS = {f"{name} on {base}": i % 3 == j for i, name in enumerate(VARIANTS)
         for j, base in enumerate(("adam", "adamw", "rmsprop"))}
EVERY = [*VARIANTS, *PAIRS]
SOME = ["sam", "fsam-official", "fasam on adamw", "sam-noise on adam", "fisher on rmsprop"]
CASES = [(case, backend) for backend in BACKENDS
         for case in (EVERY if backend == "reference" else SOME)]
CASES += [(f"{name} on {base}", backend) for name in RELATIVES for backend in BACKENDS
          for base in (("sgd", "adam", "adamw") if backend == "reference" else
                       ("adamw",) if name == "looksam" else ("sgd",))]
INTERPRETED = ["sam", "fasam on adamw", "looksam on adamw"]


def variant_of(case: str) -> Variant:
    return ALL[case.partition(" on ")[0]]


def marks(case: str, backend: str):
    if backend == "triton":
        return pytest.mark.interpreted(variant=INTERPRETED)
    return pytest.mark.long if backend == "reference" and not PAIRS.get(case, True) else ()


def pytest_generate_tests(metafunc):
    if {"variant", "backend"} <= set(metafunc.fixturenames):
        name = metafunc.function.__name__
        metafunc.parametrize("variant, backend", [
            pytest.param(*case, marks=marks(*case)) for case in CASES
            if name not in variant_of(case[0]).exempt])
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


class Net(nn.Module):
    """Convolution, BatchNorm and a linear layer: every kind of parameter, few tensors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().flatten(1))


def network(device) -> Net:
    torch.manual_seed(1)
    return Net().to(device)


def batch(i: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    x = torch.randn(12, 3, 4, 4, generator=generator)
    return x.to(device), torch.randint(4, (12,), generator=generator).to(device)


def base_of(variant: str) -> tuple[type[torch.optim.Optimizer], dict]:
    """A variant's base optimizer and its hyper-parameters."""
    return BASES[variant.partition(" on ")[2] or "sgd"]


def optimizer(params, variant: str, backend: str, **changes) -> SAM:
    """The optimizer of a variant; a full gradient is set, where one is needed."""
    of, (base, hyper) = variant_of(variant), base_of(variant)
    opt = of.cls(params, base, backend=backend, **{**hyper, **of.suits, **of.own, **changes})
    if "part" in of.own:
        opt.set_full_gradient(full_gradient(
            [p for group in opt.param_groups for p in group["params"]]))
    return opt


def build(net, variant: str, backend: str, **changes) -> SAM:
    return optimizer(net.parameters(), variant, backend, **changes)


def backward(net, i: int, device) -> torch.Tensor:
    x, y = batch(i, device)
    loss = cross_entropy(net(x), y)
    loss.backward()
    return loss


def two_passes(net, opt, i: int, device) -> None:
    backward(net, i, device)
    opt.first_step(zero_grad=True)
    with freeze_bn_stats(net):
        backward(net, i, device)
    opt.second_step(zero_grad=True)


def bits(net) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_bits(net, expected) -> None:
    for p, q in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p, q)


def trained(variant, backend, device, steps: int = 3):
    net = network(device)
    opt = build(net, variant, backend)
    for i in range(steps):
        two_passes(net, opt, i, device)
    return net, opt
