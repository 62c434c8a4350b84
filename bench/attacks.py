"""Projected gradient descent on [0, 1] images, its eps notation, and its configuration in words.

PGD (Madry et al. 2018): x_adv <- Proj_eps(x_adv + alpha step(grad loss(x_adv))), from a random
start. The gradient is taken with respect to the input only, so no parameter's .grad is touched.
On a GPU the step is one fused kernel (fastsam.kernels), elsewhere plain PyTorch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam.dispatch import why_not_triton

LARGEST_LINF = 0.25


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


def eps_key(eps: float) -> str:
    """Return eps in 255ths: 0.0313725... -> "8/255"."""
    return f"{round(eps * 255, 6):g}/255"


def both_forms(eps: float) -> str:
    """Return eps in 255ths and as a number: "8/255 = 0.03137"."""
    return f"{eps_key(eps)} = {eps:.4g}"


def parse_eps(text: str, norm: str, force: bool = False) -> float:
    """Return the radius or step size that `text` means, for images in [0, 1].

    "8/255" is a fraction, "8" (1 or more) counts 255ths, "0.031" (below 1) is the value itself.
    Raises ValueError for anything else, for values that are not positive, and for an l_inf value
    above 0.25 unless `force`: that much hides the image and usually is a mistake of units.
    """
    hint = "write it as 8/255, as 8 (the same) or as 0.0314"
    numerator, slash, denominator = text.strip().partition("/")
    try:
        value = float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"eps {text!r} is not a number; {hint}") from None
    if not slash and value >= 1:
        value /= 255
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"eps {text!r} is not a positive finite number; {hint}")
    if norm == "linf" and value > LARGEST_LINF and not force:
        raise ValueError(
            f"l_inf eps {text!r} means {both_forms(value)}, above {LARGEST_LINF}: images are in "
            f"[0, 1], so {hint}, or pass --force"
        )
    return value


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
    from fastsam import kernels

    if g.stride() != x.stride():  # a model that converts to channels_last returns g like that
        g = torch.empty_like(x).copy_(g)
    step = kernels.linf_step if attack.norm == "linf" else kernels.l2_step
    step(x_adv, g, x, attack.eps, attack.alpha)
    return x_adv


def can_fuse(x: Tensor) -> bool:
    return x.is_cuda and why_not_triton(x.device, x.dtype, dense=True) is None


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
    climb = fused_climb if can_fuse(x) else plain_climb
    x_adv = random_start(x, attack, generator)
    for _ in range(attack.steps):
        x_adv.requires_grad_(True)
        loss = F.cross_entropy(forward(x_adv), y)
        (g,) = torch.autograd.grad(loss, x_adv)
        x_adv = climb(x_adv.detach(), g, x, attack)
    return x_adv
