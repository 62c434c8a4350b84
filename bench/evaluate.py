"""Natural and robust accuracy of a trained model, always in eval mode and in float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench import sanity
from bench.attacks import Attack
from bench.battery import Attempt, Perturb, attempt, by_pgd
from bench.config import Evaluation
from bench.data import Split
from bench.radii import eps_key

NORM_NAMES = {"linf": "l_inf", "l2": "l2"}
INSPECTED = 128  # images for the checks of the model


def correct(model: nn.Module, split: Split, batch_size: int) -> torch.Tensor:
    """Return an (N,) bool tensor: which images the model in its current mode gets right."""
    with torch.no_grad():
        parts = [split.batch(slice(i, i + batch_size)) for i in range(0, len(split), batch_size)]
        return torch.cat([model(x).argmax(1) == y for x, y in parts])


def withstand(
    model: nn.Module, split: Split, perturb: Perturb, restarts: int, batch_size: int, seed: int = 0
) -> torch.Tensor:
    """Return an (N,) bool tensor: which images stay right at every restart of an attack.

    The model judges the finished images; an image that one restart fools is not tried again.
    """
    generator = torch.Generator(split.images.device).manual_seed(seed)
    stands = torch.ones(len(split), dtype=torch.bool, device=split.images.device)
    for i in range(0, len(split), batch_size):
        x, y = split.batch(slice(i, i + batch_size))
        for _ in range(restarts):
            left = stands[i : i + batch_size].nonzero().squeeze(1)
            if not len(left):
                break
            x_adv = perturb(model, x[left], y[left], generator)
            with torch.no_grad():
                stands[i + left] = model(x_adv).argmax(1) == y[left]
    return stands


def robust(
    model: nn.Module, split: Split, attack: Attack, batch_size: int, seed: int = 0
) -> torch.Tensor:
    """Return an (N,) bool tensor: which images stay right under PGD, all (N,) tried."""
    return withstand(model, split, by_pgd(attack), 1, batch_size, seed)


def attempts(evaluation: Evaluation, classes: int) -> list[tuple[str, str, list[Attempt]]]:
    """Return norm, radius in 255ths and attacks, for every radius that is attacked."""
    names = [name for name in evaluation.attacks if name != "clean"]
    return [
        (norm, eps_key(eps), [attempt(n, norm, eps, evaluation.steps, classes) for n in names])
        for norm in NORM_NAMES
        for eps in getattr(evaluation, norm)
        if names
    ]


def evaluate(
    model: nn.Module,
    split: Split,
    evaluation: Evaluation,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return natural and robust accuracies (fractions), and what they were measured with.

    An image is robust at a radius when the model is right on it clean and under every attack: the
    worst case, image by image. Each attack is tried on all images that are right clean, so that its
    own accuracy does not depend on the others. {"natural": a, "robust": {"linf": {"8/255": r}},
    "attacks": {"linf": {"8/255": "PGD-10, ..."}}, "each": {"linf": {"8/255": {"pgd": r}}},
    "configurations": as "each" with texts, "images": N, "of": the number in the split, "warnings":
    sentences}. The model is left in eval mode. say: takes a line after each attack. Raises
    ValueError, before any attack, for one that this model or this machine cannot have.
    """
    model.eval()
    total = len(split)
    if evaluation.samples is not None:
        # the images lie sorted by class in folders: a fixed shuffle keeps a subset mixed
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        split = split.take(order[: evaluation.samples].to(split.labels.device))
    natural = correct(model, split, evaluation.batch_size)
    right = split.take(natural.nonzero().squeeze(1))
    result = {"natural": natural.double().mean().item(), "images": len(split), "of": total}
    result |= {k: {norm: {} for norm in NORM_NAMES if getattr(evaluation, norm)}
               for k in ("robust", "attacks", "each", "configurations")}
    sample = split.batch(slice(0, min(INSPECTED, evaluation.batch_size)))
    with torch.no_grad():
        classes = model(sample[0][:1]).shape[1]
    planned = attempts(evaluation, classes)
    result["warnings"] = sanity.of_model(model, *sample)
    for norm, eps, attacks in planned:
        stands, own = torch.ones(len(right), dtype=torch.bool, device=split.images.device), {}
        for a in attacks:
            kept = withstand(model, right, a.perturb, a.restarts, evaluation.batch_size)
            own[a.name] = kept.sum().item() / len(split)
            stands &= kept
            say(f"{NORM_NAMES[norm]} {eps} {a.name}: {own[a.name]:.2%}")
        result["robust"][norm][eps] = stands.sum().item() / len(split)
        result["attacks"][norm][eps] = summary_of(attacks)
        result["each"][norm][eps] = own
        result["configurations"][norm][eps] = {a.name: a.text for a in attacks}
    result["warnings"] += sanity.of_numbers(result)
    return result


def summary_of(attacks: list[Attempt]) -> str:
    if len(attacks) == 1:
        return attacks[0].text
    return f"worst case over {', '.join(a.name for a in attacks)}"


def interval(accuracy: float, images: int) -> tuple[float, float]:
    """Return the 95% Clopper-Pearson interval of an accuracy that was counted on so many images."""
    from scipy.stats import binomtest

    found = binomtest(round(accuracy * images), images).proportion_ci(0.95, method="exact")
    return found.low, found.high


def report(result: dict[str, Any]) -> str:
    """Return the accuracies as text, one a line, each with its interval and its configuration, an
    attack's own below the worst case, and the warnings last."""
    n = result["images"]

    def line(label: str, accuracy: float, text: str) -> str:
        low, high = interval(accuracy, n)
        return f"{label:<14} {accuracy:7.2%} [{low:7.2%}, {high:7.2%}]   {text}"

    subset = f"{n} of {result['of']}" if result.get("of", n) != n else f"{n}"
    on = result.get("evaluation", {})
    judges = " ".join(filter(None, [on.get("data"), on.get("on", "test")]))
    lines = [line("natural", result["natural"], f"{subset} {judges} images, model.eval(); in "
                  "brackets: 95% Clopper-Pearson interval")]  # fmt: skip
    for norm, by_eps in result["robust"].items():
        for eps, accuracy in by_eps.items():
            label = f"{NORM_NAMES[norm]} {eps}"
            lines.append(line(label, accuracy, result["attacks"][norm][eps]))
            own = result.get("each", {}).get(norm, {}).get(eps, {})
            texts = result.get("configurations", {}).get(norm, {}).get(eps, {})
            lines += [line(f"  {a}", own[a], texts[a]) for a in own if len(own) > 1]
    return "\n".join(lines + [f"warning: {text}" for text in result.get("warnings", [])])
