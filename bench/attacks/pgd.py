"""Attacks on [0, 1] images.

PGD (Madry et al. 2018): x_adv <- Proj_eps(x_adv + alpha step(grad loss(x_adv))), from a random
start; one step of it with alpha 1.25 eps is FGSM-RS (Wong et al. 2020). The gradient is taken with
respect to the input only, so no parameter's .grad is touched. On a GPU the step is one fused kernel
(fastsam.kernels.triton), elsewhere plain PyTorch.

Every image goes its own way: the loss is a sum over the batch, and neither the size of its gradient
nor that of the logits matters (bench.attacks.objectives). An image whose gradient is not finite
becomes NaN, so that nobody takes it for one that was attacked.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.attacks.objectives import LAST, departure, log_odds, rising
from fastsam.choose import why_not_triton

Forward = Callable[[Tensor], Tensor]
# for the whole batch; or one an image, on the CPU: its start is then its own, whatever the batch
Generators = torch.Generator | Sequence[torch.Generator] | None

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


def evaluation_attack(norm: str, eps: float, steps: int) -> Attack:
    """Return SAM_AT eval.py's PGD: alpha eps/4 for l_inf, eps/8 for l2."""
    return Attack(norm, eps, eps / (4 if norm == "linf" else 8), steps)


def per_image(numbers: Tensor, x: Tensor) -> Tensor:
    """Return (B,) numbers in a shape that multiplies the images x."""
    return numbers.view(-1, *[1] * (x.dim() - 1))


def largest(g: Tensor) -> Tensor:
    """Return every image's largest |g|, (B,); NaN or inf where g is not finite."""
    return torch.linalg.vector_norm(g.flatten(1), math.inf, dim=1)


def l2_norm(delta: Tensor) -> Tensor:
    return per_image(delta.flatten(1).norm(dim=1), delta)


def unit(g: Tensor) -> Tensor:
    """Return g / ||g|| of every image, 0 where g is 0.

    By the largest |g| first: squares of numbers below 1e-23 are 0 in float32.
    """
    size = per_image(largest(g), g)
    g = g / torch.where(size == 0, 1.0, size)
    norm = l2_norm(g)
    return g / torch.where(norm == 0, 1.0, norm)


def into_l2_ball(delta: Tensor, eps: float) -> Tensor:
    norm = l2_norm(delta)
    return delta * torch.where(norm <= eps, 1.0, eps / norm)  # NaN stays NaN


def drawn(x: Tensor, fill: Callable[..., Tensor], generator: Generators) -> Tensor:
    """Return a tensor like x that `fill`, such as Tensor.normal_, has filled."""
    if not isinstance(generator, Sequence):
        return fill(torch.empty_like(x), generator=generator)
    rows = torch.empty(x.shape, dtype=x.dtype)
    for row, own in zip(rows, generator, strict=True):
        fill(row, generator=own)
    return torch.empty_like(x).copy_(rows)


def uniform_within(radius: float) -> Callable[..., Tensor]:
    return lambda t, generator: t.uniform_(-radius, radius, generator=generator)


def random_start(x: Tensor, attack: Attack, generator: Generators) -> Tensor:
    """Return x + delta, clamped to [0, 1]; delta is uniform in the l_inf ball, or for l2 a random
    direction times eps U(0, 1)."""
    if attack.norm == "linf":
        delta = drawn(x, uniform_within(attack.eps), generator)
    else:
        direction = unit(drawn(x, Tensor.normal_, generator))
        radius = drawn(x.new_empty(len(x)), Tensor.uniform_, generator)
        delta = direction * per_image(attack.eps * radius, x)
    return (x + delta).clamp(0, 1)


def plain_climb(x_adv: Tensor, g: Tensor, x: Tensor, attack: Attack) -> Tensor:
    """Return x_adv after one ascent step, projected on the eps ball and then on [0, 1] images.

    The box projection moves every coordinate of delta towards 0, so it never leaves the ball.
    """
    delta = x_adv - x
    if attack.norm == "linf":
        delta = (delta + attack.alpha * g.sign()).clamp(-attack.eps, attack.eps)
    else:
        delta = into_l2_ball(delta + attack.alpha * unit(g), attack.eps)
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
    forward: Forward, x: Tensor, y: Tensor, attack: Attack, generator: Generators = None
) -> Tensor:
    """Return adversarial images, (B, C, H, W) in [0, 1] within eps of x (up to rounding).

    forward: images in [0, 1] -> (B, classes) logits; the caller chooses its BatchNorm mode.
    x: (B, C, H, W) in [0, 1]. y: (B,) labels. generator: of x's device, for the random start, or
    one of the CPU for every image. Raises ValueError on a GPU for x that is neither contiguous nor
    channels_last.
    """
    x_adv = random_start(x, attack, generator)
    return climbed(lambda x, to: log_odds(forward(x), y, to=to), x_adv, x, attack)


def ascent(loss_at: Callable[..., Tensor], x: Tensor, *how: float) -> Tensor:
    """Return every image's gradient of its own loss. loss_at: (B, C, H, W), *how -> (B,)."""
    x = x.detach().requires_grad_(True)
    return gradient(loss_at(x, *how), x)


def gradient(f: Tensor, x: Tensor) -> Tensor:
    """Return every image's gradient of its own f, (B,). Raises ValueError where f has none."""
    g = torch.autograd.grad(f.sum(), x, allow_unused=True)[0] if f.requires_grad else None
    if g is None and not torch.is_grad_enabled():
        raise ValueError("gradients are off here, as in torch.no_grad() or torch.inference_mode(); "
                         "attack outside of it")  # fmt: skip
    if g is None:
        raise ValueError(
            "the model's outputs have no gradient with respect to the images: something in it cuts "
            "the graph (torch.no_grad, detach, NumPy, whole numbers); take that out, or evaluate "
            "clean alone"
        )
    return g


def lost_where(lost: Tensor, x_adv: Tensor) -> Tensor:
    return torch.where(per_image(lost, x_adv), torch.nan, x_adv)


def climbed(
    loss_at: Callable[[Tensor, float], Tensor], x_adv: Tensor, x: Tensor, attack: Attack
) -> Tensor:
    """Return x_adv after the attack's steps up `loss_at`, within eps of x and [0, 1].

    loss_at: images and the step's spread of logits -> (B,).
    """
    climb = fused_climb if can_fuse(x) else plain_climb
    lost = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for i in range(attack.steps):
        g = ascent(loss_at, x_adv, rising(i, attack.steps))
        lost |= ~largest(g).isfinite()
        x_adv = climb(x_adv, g, x, attack)
    return lost_where(lost, x_adv)


def fgsm(forward: Forward, x: Tensor, y: Tensor, attack: Attack) -> Tensor:
    """Return images one step from x (Goodfellow et al. 2015); for l2, along the gradient itself."""
    return climbed(lambda x, to: log_odds(forward(x), y, to=to), x.clone(), x, attack)


def n_fgsm(
    forward: Forward, x: Tensor, y: Tensor, attack: Attack, generator: Generators = None
) -> Tensor:
    """Return x + noise + alpha sign(grad) in [0, 1] (de Jorge et al. 2022); as pgd otherwise.

    The noise is uniform up to NOISE eps, and nothing is projected on the eps ball.
    """
    start = (x + drawn(x, uniform_within(NOISE * attack.eps), generator)).clamp(0, 1)
    g = ascent(lambda x: log_odds(forward(x), y, to=LAST), start)
    moved = (start + attack.alpha * g.sign()).clamp(0, 1)
    return lost_where(~largest(g).isfinite(), moved)


def trades(forward: Forward, x: Tensor, attack: Attack, generator: Generators = None) -> Tensor:
    """Return images on which the prediction differs most from that on x; as pgd otherwise.

    Zhang et al. 2019: ascent of KL(f(x) || f(x')) from x' = x + 0.001 N(0, 1), in [0, 1].
    """
    with torch.no_grad():
        logits = forward(x)
    start = (x + 0.001 * drawn(x, Tensor.normal_, generator)).clamp(0, 1)
    return climbed(lambda x_adv, to: departure(logits, forward(x_adv)), start, x, attack)
