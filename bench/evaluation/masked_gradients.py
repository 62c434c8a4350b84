"""Signs that a robust accuracy is not what it seems: what makes gradient attacks fail."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.attacks.objectives import SPREAD, log_odds, spread
from bench.attacks.pgd import ascent, l2_norm, largest, unit

SHARE = 0.01  # of the images; fewer vanishing gradients are no sign
SLACK = 0.005  # of the images, and at least one: differences that chance can make
GUARD = 1e-10  # the largest number that public attacks put in the place of a gradient's norm
PILE = 0.2  # of the images: so many highest outputs at one value are a bound's doing
FEW = 20  # images, of which some may fall because a step leads too far
CLOSE = 1e-3  # of the outputs' range
COARSE = 1e-2  # of the outputs: more than what bf16 rounds away
UNTARGETED = ("fgsm", "pgd", "apgd-ce")  # attacks that climb the log-odds against the label
BY_GRADIENTS = (*UNTARGETED, "apgd-t")  # attacks that have nothing else
FAR = 1e2  # median distances from the highest logit to the third
LEAST = 1e-4  # a narrower range of log-probabilities is not told from rounding


def of_answers(answers: Tensor) -> list[str]:
    """Return a sentence if answers are -1: bench.attacks.objectives.answers found outputs not
    finite."""
    lost, n = (answers == -1).sum().item(), len(answers)
    if not lost:
        return []
    return [f"the model's outputs are NaN or inf for {lost} of {n} images, which count as wrong"]


def of_attack(where: str, lost: int, n: int) -> list[str]:
    """Return a sentence if an attack had no finite gradient or answer for some images."""
    if not lost:
        return []
    return [
        f"{where}: the gradient, or the model's output for the attacked image, is NaN or inf for "
        f"{lost} of {n} images, which count as not robust"
    ]


def of_model(
    model: nn.Module, x: Tensor, y: Tensor, batch_size: int | None = None, attacked: bool = True
) -> list[str]:
    """Return a sentence for every sign in the model's answers to images.

    x: (B, C, H, W) in [0, 1]. y: (B,) labels. The model is in eval mode. batch_size: images at a
    time, None: all. attacked: whether its gradients matter.
    """
    size = min(batch_size or len(x), len(x))

    def outputs(size: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part) for part in x.split(size)])

    z, again, others = outputs(size), outputs(size), outputs(size // 2 or 2)
    z, again, others = (out[:, switched_on(z)] for out in (z, again, others))
    parts = list(zip(x.split(size), y.split(size), strict=True))
    said = of_gradients(model, parts) if attacked else []
    return said + (of_randomness(z, again) or of_company(z, others)) + of_outputs(z)


def switched_on(z: Tensor) -> Tensor:
    """Return which classes, (classes,), are not far below the others at every image, as those are
    that a logit of -1e9 switches off: beside it no difference of others has a size."""
    z = z[z.isfinite().all(1)]
    if not len(z):
        return z.new_ones(z.shape[1], dtype=torch.bool)
    return z.amax(0) > z.max() - FAR * spread(z).median()


Parts = list[tuple[Tensor, Tensor]]  # images and labels


def sizes(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], parts: Parts) -> Tensor:
    """Return every image's largest |g|. loss: (logits, labels) -> (B,)."""
    return torch.cat([largest(ascent(lambda x, y=y: loss(model(x), y), x)) for x, y in parts])


def vanishing(g: Tensor) -> tuple[int, str]:
    """Return how many gradients of these sizes are 0 or denormal, and what to say of them."""
    still = (g < torch.finfo(g.dtype).tiny).sum().item()
    return still, "exactly 0" if (g == 0).sum() == still else "0 or too small for float32"


Survivors = list[tuple[Tensor, Tensor, Tensor]]  # attacked images, labels, images as they were


def of_way(where: str, kind: str, model: nn.Module, survivors: Survivors) -> list[str]:
    """Return a sentence for every sign in where an attack has led images that it did not fool.
    kind: the attack's name without steps and restarts."""
    misled = of_ascent(where, model, survivors) if kind in UNTARGETED else []
    if kind in BY_GRADIENTS:
        misled = misled or of_direction(where, model, survivors)
    return of_survivors(where, model, survivors) + misled


def of_survivors(where: str, model: nn.Module, survivors: Survivors) -> list[str]:
    """Say where the gradient has vanished on an attack's way, at images that it did not fool."""
    if not survivors:
        return []
    g = sizes(model, log_odds, [(x_adv, y) for x_adv, y, _ in survivors])
    still, size = vanishing(g)
    if still <= max(1, SHARE * len(g)):
        return []
    return [
        f"{where}: where it ended, the gradient is {size} for {still} of {len(g)} images that it "
        "did not fool: attacks by gradients get no further there"
    ]


def of_ascent(where: str, model: nn.Module, survivors: Survivors) -> list[str]:
    """Say where an attack that climbs the log-odds against the label ended below where it began, at
    images that it did not fool: the gradient that it was given is not that of the outputs."""
    fallen, n = 0, 0
    for x_adv, y, x in survivors:
        with torch.no_grad():
            z, again, z_adv = model(x), model(x), model(x_adv)
        before, same, after = (log_odds(logits, y, spread(z)) for logits in (z, again, z_adv))
        chance = (same - before).abs().max()  # of a random model
        fallen += (after - before < -COARSE * SPREAD - chance).sum().item()
        n += len(y)
    if n < FEW or fallen <= PILE * n:
        return []
    return [
        f"{where}: where it ended, the model is surer of the label than it was for {fallen} of {n} "
        "images that it did not fool: the gradient does not lead where the outputs rise"
    ]


def of_direction(where: str, model: nn.Module, survivors: Survivors) -> list[str]:
    """Say where the gradient leads down at images that an attack did not fool, as one that is noise
    does for half of them: a step along it, as long as the attack's way, ends below one against it.
    """
    fallen, n = 0, 0
    for x_adv, y, x in survivors:
        g = ascent(lambda x, y=y: log_odds(model(x), y), x)
        step = l2_norm(x_adv - x) * unit(g)
        with torch.no_grad():
            ends = (x + step).clamp(0, 1), (x - step).clamp(0, 1)
            outputs = [model(images) for images in (x, x, *ends)]
        scale = spread(outputs[0])  # as the gradient has it
        before, same, along, against = (log_odds(z, y, scale) for z in outputs)
        chance = (same - before).abs().max()  # of a random model
        fallen += (along - against < -COARSE * SPREAD - chance).sum().item()
        n += len(y)
    if n < FEW or fallen <= PILE * n:
        return []
    return [
        f"{where}: a step along the gradient leaves the model surer of the label than one against "
        f"it for {fallen} of {n} images that the attack did not fool: the gradient does not lead "
        "where the outputs rise"
    ]


def of_gradients(model: nn.Module, parts: Parts) -> list[str]:
    """Say where no attack, or none that follows cross-entropy as it stands, finds a direction."""
    ours = sizes(model, log_odds, parts)
    plain = sizes(model, partial(F.cross_entropy, reduction="none"), parts)
    n, (still, size) = len(ours), vanishing(ours)
    if still > SHARE * n:
        return [
            f"the gradient is {size} for {still} of {n} images: attacks by gradients cannot move "
            "them"
        ]
    faint = (plain < GUARD).sum().item()
    if faint > SHARE * n:
        none = (plain == 0).sum().item()
        return [
            f"cross-entropy's gradient is below {GUARD:g} for {faint} of {n} images (the gradient "
            f"is exactly 0 for {none}): its own attacks scale the logits, but others that follow "
            "cross-entropy as it stands cannot move them"
        ]
    return []


def largest_gap(z: Tensor, other: Tensor) -> float:
    """Return the largest difference between finite outputs, in parts of the largest output."""
    finite = z.isfinite().all(1) & other.isfinite().all(1)
    z, other = z[finite].double(), other[finite].double()
    if not len(z) or (gap := (other - z).abs().max().item()) == 0:
        return 0.0
    return gap / z.abs().max().item()


def of_randomness(z: Tensor, again: Tensor) -> list[str]:
    if (gap := largest_gap(z, again)) <= 1e-4:
        return []
    return [
        f"two passes over the same images differ by up to {gap:.2g} of the largest output: the "
        "model is random, and these attacks do not average over that"
    ]


def of_company(z: Tensor, others: Tensor) -> list[str]:
    """Say where answers depend on which images are in a batch. others: of batches of another
    size."""
    if (gap := largest_gap(z, others)) <= COARSE:
        return []
    return [
        f"the answers to an image differ, by up to {gap:.2g} of the largest output, with the batch "
        "that it comes in, as by BatchNorm in training mode: other batches have other accuracies"
    ]


def of_outputs(z: Tensor) -> list[str]:
    """Say what the outputs look like where they are no logits, which have neither bounds nor a sum.

    Log-probabilities as log_softmax gives them are as good as logits.
    """
    z = z[z.isfinite().all(1)].double()
    if not len(z) or z.min() == z.max():
        return []
    width = (z.max() - z.min()).item()
    flat = "give the attacks the logits: {} flattens their gradients"
    softmax = flat.format("softmax")
    sums = z.sum(1)
    if constant(sums, width) and (sums.abs() > CLOSE * width).all():
        if z.min() >= 0 and (sums - 1).abs().max() < CLOSE:
            return [f"the outputs look like probabilities (in [0, 1], of sum 1): {softmax}"]
        if (z < z.min() + CLOSE * width).double().mean() > PILE:
            return [
                "the outputs look like scaled or shifted probabilities (their sum is "
                f"{sums.mean():.3g} always, many are {z.min():.3g}): {softmax}"
            ]
    if z.min() >= 0 and z.max() <= 1:
        return [f"the outputs all lie in [0, 1], as sigmoids do: {flat.format('a sigmoid')}"]
    total, at_the_floor = z.logsumexp(1), (z < z.min() + CLOSE * width).double().mean() > PILE
    if width > LEAST and constant(total, min(1.0, width) ** 2):
        if at_the_floor or (total.abs() > 1e-5).any():
            return [
                "the outputs look like log-probabilities that were shifted or cut off (their "
                f"logsumexp is {total.mean():.3g} always, the lowest is {z.min():.3g}): give the "
                "attacks the logits, small probabilities are lost in these"
            ]
        return []
    top = z.amax(1)
    piled = (top > z.max() - CLOSE * width).sum().item()
    if piled > max(1, PILE * len(z)):
        return [
            f"the highest output is {z.max():.3g} for {piled} of {len(z)} images, as if it had a "
            f"bound: {flat.format('what bounds them')}"
        ]
    return []


def constant(values: Tensor, width: float) -> bool:
    return len(values) > 1 and (values.max() - values.min()).item() < CLOSE * width


def of_numbers(result: dict[str, Any]) -> list[str]:
    """Return a sentence for every pair of accuracies that no sound evaluation has.

    result: what bench.evaluation.evaluate.evaluate returns.
    """
    found, slack = [], max(1.5 / result["images"], SLACK)
    for norm, by_eps in result["each"].items():
        for eps, own in by_eps.items():
            iterated = [a for name, a in own.items() if name.startswith("pgd")]
            if "fgsm" in own and iterated and own["fgsm"] < min(iterated) - slack:
                found.append(
                    f"{norm} {eps}: one step of FGSM ({own['fgsm']:.2%}) fools more images than "
                    f"PGD ({min(iterated):.2%}): too few steps of PGD, or masked gradients"
                )
    for norm, by_eps in result["robust"].items():
        by_radius = sorted(by_eps.items(), key=lambda item: float(item[0].removesuffix("/255")))
        for (eps, accuracy), (larger, above) in zip(by_radius, by_radius[1:], strict=False):
            if above > accuracy + slack:
                found.append(
                    f"{norm}: robust accuracy is {above:.2%} at {larger} and {accuracy:.2%} at the "
                    f"smaller {eps}: the attack is too weak, or gradients are masked"
                )
    return found
