"""Attacks on [0, 1] images, and their configuration in words.

PGD (Madry et al. 2018): x_adv <- Proj_eps(x_adv + alpha step(grad loss(x_adv))), from a random
start; one step of it with alpha 1.25 eps is FGSM-RS (Wong et al. 2020). The gradient is taken with
respect to the input only, so no parameter's .grad is touched. On a GPU the step is one fused kernel
(fastsam.kernels.triton), elsewhere plain PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.radii import both_forms, eps_key, parse_eps  # noqa: F401
from fastsam.choose import why_not_triton

NOISE = 2.0  # N-FGSM's k for CIFAR


@dataclass(frozen=True)
class Attack:
    """PGD with random start, one restart, the last iterate.

    norm: "linf" or "l2". eps, alpha: radius and step size, for images in [0, 1].
    """

    norm: str
    eps: float
    alpha: float
    steps: int

    def describe(self) -> str:
        """Return the whole configuration in one line, for printing beside a number."""
        return (
            f"PGD-{self.steps}, {self.norm}, eps {both_forms(self.eps)}, "
            f"alpha {both_forms(self.alpha)}, random start, 1 restart, cross-entropy"
        )


def evaluation_attack(norm: str, eps: float, steps: int) -> Attack:
    """Return SAM_AT eval.py's PGD: alpha eps/4 for l_inf, eps/8 for l2."""
    return Attack(norm, eps, eps / (4 if norm == "linf" else 8), steps)


def l2_norm(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)


def random_start(x: Tensor, attack: Attack, generator: torch.Generator | None) -> Tensor:
    """Return x + delta, clamped to [0, 1]; delta is uniform in the l_inf ball, or for l2 a random
    direction times eps U(0, 1)."""
    if attack.norm == "linf":
        delta = torch.empty_like(x).uniform_(-attack.eps, attack.eps, generator=generator)
    else:
        direction = torch.empty_like(x).normal_(generator=generator)
        radius = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator)
        delta = direction / l2_norm(direction) * (attack.eps * radius)
    return (x + delta).clamp(0, 1)


def plain_climb(x_adv: Tensor, g: Tensor, x: Tensor, attack: Attack) -> Tensor:
    """Return x_adv after one ascent step, projected on the eps ball and then on [0, 1] images.

    The box projection moves every coordinate of delta towards 0, so it never leaves the ball.
    """
    delta = x_adv - x
    if attack.norm == "linf":
        delta = (delta + attack.alpha * g.sign()).clamp(-attack.eps, attack.eps)
    else:
        delta = delta + attack.alpha * g / l2_norm(g)
        delta = delta * (attack.eps / l2_norm(delta)).clamp_max(1)
    return (x + delta).clamp(0, 1)


def fused_climb(x_adv: Tensor, g: Tensor, x: Tensor, attack: Attack) -> Tensor:
    """Return x_adv after the same step, made in place by one kernel."""
    from fastsam.kernels import triton as kernels

    if g.stride() != x.stride():  # a model that converts to channels_last returns g like that
        g = torch.empty_like(x).copy_(g)
    step = kernels.linf_step if attack.norm == "linf" else kernels.l2_step
    step(x_adv, g, x, attack.eps, attack.alpha)
    return x_adv


def can_fuse(x: Tensor) -> bool:
    return x.is_cuda and why_not_triton(x.device, x.dtype) is None


def pgd(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    attack: Attack,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return adversarial images, (B, C, H, W) in [0, 1] within eps of x (up to rounding).

    forward: images in [0, 1] -> (B, classes) logits; the caller chooses its BatchNorm mode.
    x: (B, C, H, W) in [0, 1]. y: (B,) labels. generator: of x's device, for the random start.
    Raises ValueError on a GPU for x that is neither contiguous nor channels_last.
    """
    x_adv = random_start(x, attack, generator)
    return climbed(lambda x: F.cross_entropy(forward(x), y), x_adv, x, attack)


def climbed(
    loss_at: Callable[[Tensor], Tensor], x_adv: Tensor, x: Tensor, attack: Attack
) -> Tensor:
    """Return x_adv after the attack's steps up `loss_at`, within eps of x and [0, 1]."""
    climb = fused_climb if can_fuse(x) else plain_climb
    for _ in range(attack.steps):
        x_adv.requires_grad_(True)
        (g,) = torch.autograd.grad(loss_at(x_adv), x_adv)
        x_adv = climb(x_adv.detach(), g, x, attack)
    return x_adv


def n_fgsm(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    attack: Attack,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return x + noise + alpha sign(grad) in [0, 1] (de Jorge et al. 2022); as pgd otherwise.

    The noise is uniform up to NOISE eps, and nothing is projected on the eps ball.
    """
    k_eps = NOISE * attack.eps
    noise = torch.empty_like(x).uniform_(-k_eps, k_eps, generator=generator)
    start = (x + noise).clamp(0, 1).requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(forward(start), y), start)
    return (start.detach() + attack.alpha * g.sign()).clamp(0, 1)


def trades(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    attack: Attack,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return images on which the prediction differs most from that on x; as pgd otherwise.

    Zhang et al. 2019: ascent of KL(f(x) || f(x')) from x' = x + 0.001 N(0, 1).
    """
    with torch.no_grad():
        logits = forward(x)
    noise = torch.empty_like(x).normal_(generator=generator)
    return climbed(lambda x_adv: divergence(logits, forward(x_adv)), x + 0.001 * noise, x, attack)


def divergence(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """Return KL(softmax(logits) || softmax(logits_adv)), the mean over the batch."""
    log_p, log_q = (F.log_softmax(z, 1) for z in (logits, logits_adv))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
