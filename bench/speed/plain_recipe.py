"""The plain recipe that `throughput` compares with, written from the papers' descriptions alone.

Images one by one through torchvision's transforms and a DataLoader, float32, NCHW, a
per-parameter SAM, and a PGD whose every step is a full `loss.backward()`: the parameters' gradients
are computed and thrown away (SAM_AT section 5.1; PGD: Madry et al. 2018).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.attacks.objectives import log_odds, rising
from bench.attacks.pgd import Attack, random_start
from bench.data.augmentation import Augmentation
from bench.settings.config import Config
from bench.speed.baselines import PerParameterFriendlySAM, PerParameterSAM
from bench.speed.plain_relatives import (
    PerParameterGSAM,
    PerParameterLookSAM,
    PerParameterMomentumSAM,
)
from fastsam import freeze_bn_stats


class Cutout:
    """Half of the (C, H, W) images lose a square around a random pixel, which becomes `fill`."""

    def __init__(self, side: int, fill: Sequence[float]) -> None:
        self.side, self.fill = side, torch.tensor(fill).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        if torch.rand(()) < 0.5:
            return image
        (h, w), half = image.shape[1:], self.side // 2
        top, left = (int(torch.randint(n, ())) - half for n in (h, w))
        rows, cols = (slice(max(0, i), max(0, i + self.side)) for i in (top, left))
        image[:, rows, cols] = self.fill
        return image


class Images(Dataset):
    """(N, H, W, C) uint8 images, each transformed by itself."""

    def __init__(self, pixels: np.ndarray, labels: list[int], transform: Callable) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def transform_of(
    augmentation: Augmentation | None, size: tuple[int, int], fill: Sequence[float]
) -> Callable:
    """Return the augmentation of one PIL image, which becomes (C, H, W) float32 in [0, 1]."""
    if augmentation is None:
        return transforms.ToTensor()
    mode = {"reflect": "reflect", "zero": "constant"}[augmentation.padding]
    steps = [transforms.RandomCrop(size, augmentation.pad, padding_mode=mode)]
    steps += [transforms.RandomHorizontalFlip()] if augmentation.flip else []
    steps += [transforms.ToTensor()]
    steps += [Cutout(augmentation.cutout, fill)] if augmentation.cutout else []
    return transforms.Compose(steps)


def batches(
    images: Dataset, batch_size: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches on the device, epoch after epoch, without end."""
    loader = DataLoader(
        images, batch_size, shuffle=True, num_workers=workers, drop_last=True,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        for x, y in loader:
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


class Algorithm1FriendlySAM(PerParameterFriendlySAM):
    """Friendly-SAM in the order of its paper's Algorithm 1, which fastsam follows too:
    m = lmbda m + (1 - lmbda) g from m = 0, then d = g - sigma m."""

    def directions(self) -> list[Tensor]:
        gs = [p.grad for p in self.params]
        old = self.state["ema"] or [torch.zeros_like(g) for g in gs]
        pairs = zip(old, gs, strict=True)
        self.state["ema"] = [self.lmbda * m + (1 - self.lmbda) * g for m, g in pairs]
        return [g - self.sigma * m for g, m in zip(gs, self.state["ema"], strict=True)]


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer | PerParameterSAM:
    """Return torch's SGD, or a per-parameter SAM around it; ValueError for ASAM's other form."""
    if config.scale not in (None, "all"):
        raise ValueError(f"the plain recipe has no ASAM of scale {config.scale!r}; use all")
    w, sgd = list(model.parameters()), torch.optim.SGD
    base = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay,
            "nesterov": config.nesterov}  # fmt: skip
    if config.rho is None:
        return sgd(w, **base)
    base["rho"] = config.rho
    match config.method:
        case "msam":
            return PerParameterMomentumSAM(w, sgd, **base)
        case "gsam":
            return PerParameterGSAM(w, sgd, alpha=config.gsam_alpha, **base)
        case "looksam":
            return PerParameterLookSAM(w, sgd, alpha=config.look_alpha, k=config.interval, **base)
    base["adaptive"] = config.method in ("asam", "fasam")
    if config.lmbda is None:
        return PerParameterSAM(w, sgd, **base)
    return Algorithm1FriendlySAM(w, sgd, sigma=config.sigma, lmbda=config.lmbda, **base)


def climb(x_adv: Tensor, g: Tensor, x: Tensor, attack: Attack) -> Tensor:
    """Return x_adv after one step of PGD, in the ball and in [0, 1]."""
    if attack.norm == "linf":
        x_adv = x_adv + attack.alpha * g.sign()
        return torch.min(torch.max(x_adv, x - attack.eps), x + attack.eps).clamp(0, 1)
    delta = x_adv + attack.alpha * F.normalize(g.flatten(1), eps=1e-12).view_as(g) - x
    length = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return (x + delta * (attack.eps / length).clamp_max(1)).clamp(0, 1)


def attacked(
    config: Config, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
) -> Tensor:
    """Return x, or under adversarial training its PGD images; the model is in train mode after."""
    if config.attack is None:
        return x
    in_eval = config.attack_bn == "eval"
    model.train(not in_eval)
    x_adv = random_start(x, config.attack, generator)
    with nullcontext() if in_eval else freeze_bn_stats(model):
        for i in range(config.attack.steps):
            x_adv = x_adv.detach().requires_grad_()
            log_odds(model(x_adv), y, to=rising(i, config.attack.steps)).sum().backward()
            x_adv = climb(x_adv.detach(), x_adv.grad, x, config.attack)
    model.zero_grad()
    model.train()
    return x_adv


def update(
    opt: torch.optim.Optimizer | PerParameterSAM,
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """Make one optimizer step on a batch; return the first pass's loss and logits, detached."""
    climbs = isinstance(opt, PerParameterSAM) and opt.climbs_next
    if climbs and opt.climbs_first:
        opt.first_step()
    logits = forward(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    if climbs and not opt.climbs_first:
        opt.first_step()
        model.zero_grad()
        with freeze_bn_stats(model):
            F.cross_entropy(forward(x), y).backward()
    (opt.second_step if isinstance(opt, PerParameterSAM) else opt.step)()
    model.zero_grad()
    return loss.detach(), logits.detach()
