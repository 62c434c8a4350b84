"""Natural and robust accuracy of a trained model, always in eval mode and in float32."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bench.attacks import Attack, eps_key, pgd
from bench.config import Evaluation
from bench.data import Split
from bench.presets import evaluation_attack

NORM_NAMES = {"linf": "l_inf", "l2": "l2"}


def correct(model: nn.Module, split: Split, batch_size: int) -> torch.Tensor:
    """Return an (N,) bool tensor: which images the model in its current mode gets right."""
    with torch.no_grad():
        parts = [split.batch(slice(i, i + batch_size)) for i in range(0, len(split), batch_size)]
        return torch.cat([model(x).argmax(1) == y for x, y in parts])


def robust(
    model: nn.Module, split: Split, attack: Attack, batch_size: int, seed: int = 0
) -> torch.Tensor:
    """Return an (N,) bool tensor: which images stay right under the attack, all (N,) tried."""
    generator = torch.Generator(split.images.device).manual_seed(seed)
    parts = []
    for i in range(0, len(split), batch_size):
        x, y = split.batch(slice(i, i + batch_size))
        x_adv = pgd(model, x, y, attack, generator)
        with torch.no_grad():
            parts.append(model(x_adv).argmax(1) == y)
    return torch.cat(parts)


def attacks_of(evaluation: Evaluation) -> Iterable[Attack]:
    for norm in NORM_NAMES:
        for eps in getattr(evaluation, norm):
            yield evaluation_attack(norm, eps, evaluation.steps)


def evaluate(model: nn.Module, split: Split, evaluation: Evaluation) -> dict[str, Any]:
    """Return natural and robust accuracy (fractions), and each attack's configuration in words.

    An image counts as robust when the model is right on it clean and attacked; only images that it
    gets right clean are attacked. {"natural": a, "robust": {"linf": {"8/255": r}}, "attacks":
    {"linf": {"8/255": "PGD-10, ..."}}, "images": N}. The model is left in eval mode.
    """
    model.eval()
    if evaluation.samples is not None:
        # the images lie sorted by class in folders: a fixed shuffle keeps a subset mixed
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        split = split.take(order[: evaluation.samples].to(split.labels.device))
    natural = correct(model, split, evaluation.batch_size)
    right = split.take(natural.nonzero().squeeze(1))
    result = {"natural": natural.double().mean().item(), "images": len(split)}
    result |= {"robust": {}, "attacks": {}}
    for attack in attacks_of(evaluation):
        kept = robust(model, right, attack, evaluation.batch_size).sum().item() if len(right) else 0
        result["robust"].setdefault(attack.norm, {})[eps_key(attack.eps)] = kept / len(split)
        result["attacks"].setdefault(attack.norm, {})[eps_key(attack.eps)] = attack.describe()
    return result


def report(result: dict[str, Any]) -> str:
    """Return the accuracies as text, one a line, each attack's configuration beside its number."""
    images = f"{result['images']} test images, model.eval()"
    lines = [f"{'natural':<12} {result['natural']:7.2%}   {images}"]
    for norm, by_eps in result["robust"].items():
        for eps, accuracy in by_eps.items():
            label = f"{NORM_NAMES[norm]} {eps}"
            lines.append(f"{label:<12} {accuracy:7.2%}   {result['attacks'][norm][eps]}")
    return "\n".join(lines)
