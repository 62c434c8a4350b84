"""What the contract's tests share: the classes, a small network, its batches and both passes."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastsam import (
    ASAM,
    GSAM,
    SAM,
    FisherSAM,
    FriendlySAM,
    FullGradientSAM,
    LookSAM,
    MomentumSAM,
    freeze_bn_stats,
)
from fastsam.choose import BACKENDS

HYPER = dict(lr=0.07, momentum=0.85, dampening=0.1, weight_decay=3e-3)
FRIENDLY = dict(rho=0.1, sigma=0.7, lmbda=0.6)
CLASSES = {
    "sam": (SAM, dict(rho=0.08)),
    "asam-all": (ASAM, dict(rho=1.5)),
    "asam-weights": (ASAM, dict(rho=0.4, scale="weights", eta=0.02)),
    "fisher": (FisherSAM, dict(rho=0.1, eta=0.8)),
    "fsam": (FriendlySAM, FRIENDLY),
    "fsam-official": (FriendlySAM, dict(**FRIENDLY, convention="official")),
    "fsam-cosine": (FriendlySAM, dict(**FRIENDLY, projection="cosine")),
    "fsam-orthogonal": (FriendlySAM, dict(**FRIENDLY, projection="orthogonal")),
    "fasam": (FriendlySAM, {**FRIENDLY, "rho": 1.2, "adaptive": True}),
    "sam-full": (FullGradientSAM, dict(part="full", rho=0.1)),
    "sam-noise": (FullGradientSAM, dict(part="noise", rho=0.1, projection="orthogonal")),
}
RELATIVES = {  # over SGD, Adam and AdamW only
    "msam": (MomentumSAM, dict(rho=0.2)),
    "gsam": (GSAM, dict(rho=0.1, alpha=0.3)),
    "looksam": (LookSAM, dict(rho=0.1, alpha=0.6, k=1)),
}
ADAM = dict(lr=0.01, betas=(0.8, 0.97), eps=1e-3, weight_decay=0.02)
BASES = {  # the last is not fused
    "sgd": (torch.optim.SGD, HYPER),
    "adam": (torch.optim.Adam, ADAM),
    "adamw": (torch.optim.AdamW, ADAM),
    "rmsprop": (torch.optim.RMSprop, dict(lr=0.005, momentum=0.8, eps=1e-2, weight_decay=0.02)),
}
# A variant is a class, with SGD, or "class on base". All of them on the reference; elsewhere, where
# test_kernels.py and the drawn sequences cover the rest, one of each mode, scaling and base.
VARIANTS = [*CLASSES, *(f"{name} on {base}" for name in CLASSES for base in list(BASES)[1:])]
SOME = ["sam", "fsam-official", "fasam on adamw", "sam-noise on adam", "fisher on rmsprop"]
CASES = [(variant, backend) for backend in BACKENDS
         for variant in (VARIANTS if backend == "reference" else SOME)]
RELATIVE_CASES = [(f"{name} on {base}", backend) for name in RELATIVES for backend in BACKENDS
                  for base in (("sgd", "adam", "adamw") if backend == "reference" else
                               ("adamw",) if name == "looksam" else ("sgd",))]
# the relatives differ: here a first gradient, or none, decides; or another base steps
NOT_FOR_RELATIVES = {
    "msam": {"test_a_gradient_that_is_not_finite_skips_the_step",
             "test_an_exception_in_the_second_pass_restores",
             "test_grad_scaler_is_divided_out_and_backs_off",
             "test_a_gradient_in_only_one_pass_is_handled",
             "test_a_stashed_climb_that_was_not_finite_skips_the_step",
             "test_an_ascent_closure_climbs_by_another_batch",
             "test_closure_runs_twice_and_returns_the_first_loss"},
    "gsam": {"test_a_stashed_climb_that_was_not_finite_skips_the_step"},
    "looksam": {"test_a_stashed_climb_that_was_not_finite_skips_the_step"},
}


def pytest_generate_tests(metafunc):
    if {"variant", "backend"} <= set(metafunc.fixturenames):
        name = metafunc.function.__name__
        relatives = [case for case in RELATIVE_CASES
                     if name not in NOT_FOR_RELATIVES[case[0].partition(" on ")[0]]]
        metafunc.parametrize("variant, backend", CASES + relatives)
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
    cls, kwargs = {**CLASSES, **RELATIVES}[variant.partition(" on ")[0]]
    base, hyper = base_of(variant)
    opt = cls(params, base, backend=backend, **{**hyper, **kwargs, **changes})
    if cls is FullGradientSAM:
        generator = torch.Generator().manual_seed(77)
        params = [p for group in opt.param_groups for p in group["params"]]
        opt.set_full_gradient([torch.randn(p.shape, generator=generator).to(p) for p in params])
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
