"""Auto-PGD on [0, 1] images: projected gradient ascent that sets its own step size.

Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", Algorithm 1, with cross-entropy or the targeted DLR loss, for l_inf and l2.
x(k) are the iterates, f the objective, eta the step size, w_j the checkpoints, all as there; for
cross-entropy, f are the log-odds that it rises with (bench.attacks.objectives). Every image has its
own course and leaves the batch when an iterate is misclassified.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bench.attacks.objectives import answers, log_odds, spread, targeted_dlr
from bench.attacks.pgd import (
    Attack,
    Forward,
    Generators,
    gradient,
    into_l2_ball,
    largest,
    lost_where,
    per_image,
    random_start,
    unit,
)

RHO = 0.75  # the share of a stretch's steps that must raise f
ALPHA = 0.75  # the new step's weight beside the momentum
TARGETS = 9  # classes that a targeted attack tries


def checkpoints(steps: int) -> list[int]:
    """Return w_j = ceil(p_j steps) in (0, steps], ascending, with p_0 = 0, p_1 = 0.22 and
    p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06)."""
    p = [0, 22]  # in hundredths, which are exact
    while p[-1] < 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    return sorted({-(-percent * steps // 100) for percent in p if 0 < percent <= 100})


def project(x_adv: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """Return x_adv moved into the eps ball around x, then into the box of images."""
    delta = x_adv - x
    delta = delta.clamp(-eps, eps) if norm == "linf" else into_l2_ball(delta, eps)
    return (x + delta).clamp(0, 1)


@dataclass
class Course:
    """The images that are still right, an entry of each tensor for every one.

    index: its place in the batch. scale: the logits' spread at x(0). now, before: x(k) and x(k-1).
    g, f: the gradient and objective at x(k). best, g_best, f_best: x_max, its gradient and
    objective. eta: the step size. rises: steps since the last checkpoint that raised f. f_checked,
    halved: f_best at the last checkpoint, and whether eta was halved there.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    t: Tensor
    scale: Tensor
    now: Tensor
    before: Tensor
    g: Tensor
    f: Tensor
    best: Tensor
    g_best: Tensor
    f_best: Tensor
    eta: Tensor
    rises: Tensor
    f_checked: Tensor
    halved: Tensor

    def keep(self, kept: Tensor) -> "Course":
        if kept.all():
            return self
        return Course(*(getattr(self, field.name)[kept] for field in fields(self)))

    def arrive(self, f: Tensor, g: Tensor) -> None:
        """Take the objective and the gradient at x(k)."""
        self.rises = self.rises + (f > self.f)
        self.f, self.g = f, g
        better = f > self.f_best
        wide = per_image(better, self.now)
        self.best = torch.where(wide, self.now, self.best)
        self.g_best = torch.where(wide, g, self.g_best)
        self.f_best = torch.where(better, f, self.f_best)

    def check(self, length: int) -> None:
        """At a checkpoint, `length` steps after the last: halve eta and go back to x_max where f
        rose in too few of the steps, or where f_best stayed although eta did."""
        stuck = ~self.halved & (self.f_best == self.f_checked)
        self.halved = (self.rises < RHO * length) | stuck
        wide = per_image(self.halved, self.now)
        self.eta = torch.where(wide, self.eta / 2, self.eta)
        self.now = torch.where(wide, self.best, self.now)
        self.g = torch.where(wide, self.g_best, self.g)
        self.f = torch.where(self.halved, self.f_best, self.f)
        self.rises = torch.zeros_like(self.rises)
        self.f_checked = self.f_best

    def climb(self, norm: str, eps: float, alpha: float) -> None:
        """x(k+1) = P(x(k) + alpha (z - x(k)) + (1 - alpha) (x(k) - x(k-1))), z the plain step."""
        direction = self.g.sign() if norm == "linf" else unit(self.g)
        z = project(self.now + self.eta * direction, self.x, norm, eps)
        step = alpha * (z - self.now) + (1 - alpha) * (self.now - self.before)
        self.before, self.now = self.now, project(self.now + step, self.x, norm, eps)


def start(x: Tensor, y: Tensor, t: Tensor | None, x0: Tensor, eps: float) -> Course:
    """Return the course of a batch that starts at x0, before f is known there."""
    n, nothing = len(x), torch.zeros_like(x)
    low = x.new_full((n,), -torch.inf)  # x0 is an improvement on it, and no rise
    index = torch.arange(n, device=x.device)
    return Course(
        index=index, x=x, y=y, t=y if t is None else t, scale=low[:, None],
        now=x0, before=x0, g=nothing, f=-low, best=x0, g_best=nothing, f_best=low,
        eta=per_image(x.new_full((n,), 2 * eps), x), rises=torch.zeros_like(index), f_checked=low,
        halved=torch.ones_like(index).bool(),
    )  # fmt: skip


def apgd(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    norm: str,
    eps: float,
    steps: int,
    t: Tensor | None = None,
    generator: Generators = None,
    judge: Forward | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (B, C, H, W) images in [0, 1] within eps of x, and which of them are misclassified.

    The first misclassified iterate of an image, or the one of highest objective; NaN, and counted
    as misclassified, where the gradient is not finite. forward: images -> (B, classes) logits,
    without randomness. norm: "linf" or "l2". t: (B,) target classes for the DLR loss, None for
    cross-entropy. generator: for the random start, as in pgd. judge: must agree that an iterate is
    misclassified, where forward is less exact; None: forward decides. A step takes one forward and
    one backward pass, the start another; x(w_j) is what a checkpoint replaces.
    """
    x0 = random_start(x, Attack(norm, eps, eps, steps), generator)
    found, fooled = x0.clone(), torch.zeros_like(y, dtype=torch.bool)
    course, checks, last = start(x, y, t, x0, eps), set(checkpoints(steps)), 0
    for k in range(steps + 1):
        ends = k == steps
        now = course.now.detach().requires_grad_(not ends)
        with torch.set_grad_enabled(not ends):
            logits = forward(now)
            if k == 0:
                course.scale = spread(logits)
            f = log_odds(logits, course.y, course.scale) if t is None else targeted_dlr(
                logits, course.y, course.t
            )  # fmt: skip
        g = course.g if ends else gradient(f, now)
        course.now = now.detach()
        course.arrive(f.detach(), g)
        right = still_right(logits.detach(), course, judge)
        lost = right & ~largest(g).isfinite()
        over = ~right | lost
        found[course.index[over]] = lost_where(lost, course.now)[over]
        fooled[course.index[over]] = True
        course = course.keep(~over)
        if ends or not len(course.index):
            break
        if k in checks:
            course.check(k - last)
            last = k
        course.climb(norm, eps, alpha=ALPHA if k else 1.0)
    found[course.index] = course.best
    return found, fooled


def still_right(logits: Tensor, course: Course, judge: Forward | None) -> Tensor:
    right = answers(logits) == course.y
    if judge is not None and not right.all():
        wrong = (~right).nonzero().squeeze(1)
        with torch.no_grad():
            right[wrong] = answers(judge(course.now[wrong])) == course.y[wrong]
    return right


def apgd_targeted(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    norm: str,
    eps: float,
    steps: int,
    generator: Generators = None,
    judge: Forward | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `apgd` does, after one run for each of the 9 other classes (or as many as there
    are) that have the highest logits at x; images that one run fools take no part in the next."""
    with torch.no_grad():
        others = forward(x).scatter(1, y[:, None], -torch.inf)
    targets = others.topk(min(TARGETS, others.shape[1] - 1)).indices
    found, fooled = x.clone(), torch.zeros_like(y, dtype=torch.bool)
    for t in targets.unbind(1):
        left = (~fooled).nonzero().squeeze(1)
        if not len(left):
            break
        found[left], fooled[left] = apgd(
            forward, x[left], y[left], norm, eps, steps, t[left], of_images(generator, left), judge
        )
    return found, fooled


def of_images(generator: Generators, index: Tensor) -> Generators:
    """Return the generators of the images at `index`; one for the whole batch stays that."""
    return [generator[i] for i in index.tolist()] if isinstance(generator, list) else generator
