"""What the contract's tests share: the classes, a small network, its batches and both passes."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastsam import ASAM, SAM, FriendlySAM, freeze_bn_stats

HYPER = dict(lr=0.07, momentum=0.85, dampening=0.1, weight_decay=3e-3)
CLASSES = {
    "sam": (SAM, dict(rho=0.08)),
    "asam-all": (ASAM, dict(rho=1.5)),
    "asam-weights": (ASAM, dict(rho=0.4, scale="weights", eta=0.02)),
    "fsam": (FriendlySAM, dict(rho=0.1, sigma=0.7, lmbda=0.6)),
    "fsam-official": (FriendlySAM, dict(rho=0.1, sigma=0.7, lmbda=0.6, convention="official")),
    "fasam": (FriendlySAM, dict(rho=1.2, sigma=0.7, lmbda=0.6, adaptive=True)),
}
# Every class on the reference; on the kernels, which test_kernels.py covers, one of each mode.
CASES = ([(variant, "reference") for variant in CLASSES]
         + [(variant, "triton") for variant in ("sam", "fasam", "fsam-official")])


def pytest_generate_tests(metafunc):
    if {"variant", "backend"} <= set(metafunc.fixturenames):
        metafunc.parametrize("variant, backend", CASES)
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["reference", "triton"])


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


def build(net, variant: str, backend: str, **changes) -> SAM:
    cls, kwargs = CLASSES[variant]
    return cls(net.parameters(), torch.optim.SGD, backend=backend,
               **{**HYPER, **kwargs, **changes})


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
