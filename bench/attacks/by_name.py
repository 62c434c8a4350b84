"""The evaluation's attacks by name: FGSM, PGD with restarts, Auto-PGD, and AutoAttack itself."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from bench.attacks.apgd import TARGETS, apgd, apgd_targeted
from bench.attacks.notation import both_forms, split_name
from bench.attacks.objectives import FIRST, LAST, SPREAD, in_words
from bench.attacks.pgd import Attack, Forward, Generators, evaluation_attack, fgsm, pgd
from bench.provenance import package_version

APGD_STEPS = 100
AUTOATTACK_PASSES = 7800  # about: APGD 101 and 9 x 101, FAB 9 x 200, Square 5000
AUTOATTACK = ("autoattack", "pyautoattack")  # the authors' module, from source and as a package

IN_BF16 = "; gradients in bf16, judged in float32"

Perturb = Callable[[Forward, Tensor, Tensor, Generators, nn.Module], Tensor]


@dataclass(frozen=True)
class Attempt:
    """An attack at one radius.

    text: its whole configuration. perturb: (forward, x, y, generators, model) -> images to judge,
    of a model in eval mode; forward makes its passes for gradients, perhaps less exactly. restarts:
    how often it is tried; an image is robust when it withstands all. passes: forward passes that an
    image takes in one try, at most and about, to show progress by.
    """

    name: str
    text: str
    perturb: Perturb
    restarts: int = 1
    passes: int = 1


def attempt(
    name: str, norm: str, eps: float, steps: int, classes: int, precision: str = "fp32"
) -> Attempt:
    """Return the attack that a name stands for; that of "clean" moves no image.

    norm: "linf" or "l2". eps: for images in [0, 1]. steps: of a plain "pgd" alone. classes: the
    model's. precision: of the passes for gradients, which AutoAttack always makes in fp32. Raises
    ValueError for an unknown name or norm, for numbers that are out of range, for too few classes,
    and for AutoAttack that is not installed.
    """
    kind, own_steps, restarts = split_name(name)
    refuse_another(norm, eps)
    if kind == "clean":
        return Attempt(name, "no attack", lambda forward, x, y, rng, model: x)
    passes = IN_BF16 if precision == "bf16" else ""
    tries = f"{restarts} restart{'s' if restarts > 1 else ''}"
    ball = f"{norm}, eps {both_forms(eps)}"
    if kind == "fgsm":
        text = f"FGSM, {ball}, one step of eps, no random start, {in_words(LAST)}{passes}"
        attack = Attack(norm, eps, eps, 1)
        return Attempt(name, text, lambda forward, x, y, rng, model: fgsm(forward, x, y, attack))
    if kind == "pgd":
        attack = evaluation_attack(norm, eps, own_steps or checked(steps))
        text = (f"PGD-{attack.steps}, {ball}, alpha {both_forms(attack.alpha)}, random start, "
                f"{tries}, {in_words(FIRST, LAST)}{passes}")  # fmt: skip
        return Attempt(name, text, by_pgd(attack), restarts, attack.steps)
    if kind == "autoattack":
        return autoattack(norm, eps, classes)
    own_steps = own_steps or APGD_STEPS
    start = f"{ball}, step from 2 eps, random start, {tries}"
    if kind == "apgd-ce":
        return Attempt(
            name, f"APGD-{own_steps}, {start}, {in_words(SPREAD)}{passes}",
            lambda forward, x, y, rng, model: apgd(
                forward, x, y, norm, eps, own_steps, None, rng, exact(model, forward)
            )[0],
            restarts, own_steps + 1,
        )  # fmt: skip
    if classes < 4:
        raise ValueError(
            f"{name!r} climbs the targeted DLR loss, which needs 4 classes, and the model has "
            f"{classes}; use apgd-ce"
        )
    return Attempt(
        name,
        f"APGD-{own_steps}, {start}, DLR at each of {min(TARGETS, classes - 1)} targets{passes}",
        lambda forward, x, y, rng, model: apgd_targeted(
            forward, x, y, norm, eps, own_steps, rng, exact(model, forward)
        )[0],
        restarts, min(TARGETS, classes - 1) * (own_steps + 1) + 1,
    )  # fmt: skip


def refuse_another(norm: str, eps: float) -> None:
    """Raise ValueError for what would be another attack than the one that was meant."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm={norm!r} is unknown: use 'linf' or 'l2'")
    if not isinstance(eps, Real):
        raise ValueError(f"eps={eps!r} is not a number: use one for images in [0, 1], such as "
                         "8 / 255")  # fmt: skip
    if not (0 <= eps <= 1 or norm == "l2" and 1 < eps < float("inf")):
        raise ValueError(f"eps={eps} is out of range in {norm}: give it for images in [0, 1], such "
                         "as 8 / 255")  # fmt: skip


def checked(steps: int) -> int:
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps={steps!r} is no number of steps: make at least 1")
    return int(steps)


def exact(model: nn.Module, forward: Forward) -> nn.Module | None:
    """Return the model where its passes for gradients are less exact than its own."""
    return None if forward is model else model


def by_pgd(attack: Attack) -> Perturb:
    return lambda forward, x, y, generator, model: pgd(forward, x, y, attack, generator)


def autoattack(norm: str, eps: float, classes: int) -> Attempt:
    """Croce & Hein's AutoAttack, standard version, by their own code. Raises ValueError where that
    is not installed, and for models of fewer classes than its nine targets and the right one."""
    module = authors_module()
    if classes <= TARGETS:
        raise ValueError(
            f"AutoAttack's standard version attacks {TARGETS} target classes, and the model has "
            f"{classes - 1} beside the right one; use apgd-ce and apgd-t"
        )
    release = package_version(module.__name__)
    text = (f"AutoAttack standard, {norm}, eps {both_forms(eps)}, seed 0, {module.__name__} "
            f"{release or '(version unknown)'}")  # fmt: skip

    def perturb(
        forward: Forward, x: Tensor, y: Tensor, generator: Generators, model: nn.Module
    ) -> Tensor:
        # some releases print their progress
        with redirect_stdout(sys.stderr), left_as_it_was(model, x.device):
            attack = module.AutoAttack(
                model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0,
                version="standard", device=x.device,
            )  # fmt: skip
            found = attack.run_standard_evaluation(x, y)
        return found[0] if isinstance(found, tuple) else found  # some return labels, too

    return Attempt("autoattack", text, perturb, passes=AUTOATTACK_PASSES)


@contextmanager
def left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep torch's global generators and the parameters' gradients from a block that seeds the ones
    and adds to the others, as AutoAttack does."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for p in trained:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)


def authors_module():
    for name in AUTOATTACK:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise ValueError(
        "AutoAttack is not installed; pip install pyautoattack, or use apgd-ce and apgd-t, which "
        "are a part of what it runs"
    )
