"""Signs that a robust accuracy is not what it seems: what makes gradient attacks fail."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARE = 0.01  # of the images; fewer zero gradients are no sign
SLACK = 0.005  # of the images, and at least one: differences that chance can make


def of_model(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Return a sentence for every sign in the model's answers to a batch of images.

    x: (B, C, H, W) in [0, 1]. y: (B,) labels. The model is in eval mode.
    """
    x = x.clone().requires_grad_(True)
    logits = model(x)
    (g,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    with torch.no_grad():
        again, logits = model(x), logits.detach()
    found = []
    flat = (g.flatten(1) == 0).all(1).sum().item()
    if flat > SHARE * len(x):
        found.append(
            f"the gradient is exactly 0 for {flat} of {len(x)} images: attacks by gradients cannot "
            "move them"
        )
    gap = (again - logits).abs().max().item()
    if gap > 1e-4 * logits.abs().max().item():
        found.append(
            f"two passes over the same images differ by up to {gap:.2g}: the model is random, and "
            "these attacks do not average over that"
        )
    total, low = logits.sum(1), logits.min().item()
    if low >= 0 and (total - 1).abs().max().item() < 1e-4:
        found.append(
            "the outputs look like probabilities (in [0, 1], of sum 1): give the attacks logits, "
            "softmax flattens their gradients"
        )
    return found


def of_numbers(result: dict[str, Any]) -> list[str]:
    """Return a sentence for every pair of accuracies that no sound evaluation has.

    result: what bench.evaluate.evaluate returns.
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
