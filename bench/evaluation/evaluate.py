"""Natural and robust accuracy of a trained model, always in eval mode and judged in float32.

What is not finite is never right: an image counts as wrong whose logits are NaN or inf, clean or
attacked, or whose attack met a gradient that is.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.attacks.by_name import Attempt, Perturb, attempt, by_pgd
from bench.attacks.notation import eps_key, split_name
from bench.attacks.objectives import answers
from bench.attacks.pgd import Attack, Forward
from bench.data.datasets import Split
from bench.data.photographs import Photographs
from bench.devices import warn_of_slow_bf16
from bench.evaluation import masked_gradients
from bench.evaluation.progress import Progress
from bench.settings.evaluation import Evaluation

NORM_NAMES = {"linf": "l_inf", "l2": "l2"}
INSPECTED = 128  # images for the checks of the model


def answered(
    model: nn.Module, split: Split, batch_size: int, tell: Callable[[int], Any] = lambda n: None
) -> Tensor:
    """Return the (N,) classes that the model in its current mode gives, -1 where the logits are not
    finite. tell: takes the number of images after each batch. Raises ValueError as refuse_unfit,
    and where there is no image."""
    if not len(split):
        raise ValueError("there are no images to evaluate on; give one at least")
    parts = []
    with torch.no_grad():
        for i in range(0, len(split), batch_size):
            x, y = split.batch(slice(i, i + batch_size))
            untouched = version(x)
            z = model(x)
            if version(x) != untouched:
                raise ValueError(
                    "the model changes the images that it is given; let it make new ones, "
                    "without inplace=True"
                )
            refuse_unfit(x, z)
            refuse_labels(y, len(x), z.shape[1])
            parts.append(answers(z))
            tell(len(x))
    return torch.cat(parts)


def version(x: Tensor) -> int | None:
    """Return what changes when x is written in place; None in inference mode, where none counts."""
    return None if x.is_inference() else x._version


def refuse_unfit(x: Tensor, z: Any) -> None:
    """Raise ValueError for images outside [0, 1], which attacks would move there before they begin,
    and for a model's outputs that are no (B, classes) tensor of logits."""
    if x.min() < 0 or x.max() > 1:
        raise ValueError(
            f"there are images from {x.min():.4g} to {x.max():.4g}, and attacks are for images in "
            "[0, 1]; give them as they are, and let the model normalise them"
        )
    if not isinstance(z, Tensor):
        raise ValueError(f"the model returns a {type(z).__name__}; wrap it, so that it returns the "
                         "logits alone")  # fmt: skip
    if z.ndim != 2 or len(z) != len(x) or z.shape[1] < 2 or not z.is_floating_point():
        raise ValueError(
            f"of {len(x)} images the model returns {tuple(z.shape)} of {z.dtype}; logits are "
            f"({len(x)}, classes) of floats, of two classes at least"
        )


def refuse_labels(y: Tensor, images: int, classes: int) -> None:
    """Raise ValueError for labels that are not one of the model's classes for every image: none of
    them could be right, but for -1, which stands for an answer that is not finite."""
    if y.shape != (images,) or y.dtype != torch.int64:
        raise ValueError(
            f"of {images} images the labels are {tuple(y.shape)} of {y.dtype}; give ({images},) of "
            "int64"
        )
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"there are labels from {y.min()} to {y.max()}, and the model has {classes} classes, "
            f"counted from 0 to {classes - 1}; count the labels so, or leave those images out"
        )


def refuse_training(model: nn.Module) -> None:
    """Raise ValueError for a model in training mode; a function has no mode."""
    if getattr(model, "training", False):
        raise ValueError(
            "the model is in training mode, in which dropout is on and BatchNorm takes its "
            "statistics from the images that are judged; call model.eval() before, which has to "
            "set its `training` to False"
        )


def refuse_nothing(**numbers: int) -> None:
    """Raise ValueError for numbers by which no image would be tried."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} tries no image: give at least 1")


def correct(model: nn.Module, split: Split, batch_size: int) -> Tensor:
    """Return an (N,) bool tensor: which images a model in eval mode gets right. Raises ValueError
    as `answered`, and in training mode."""
    refuse_training(model)
    refuse_nothing(batch_size=batch_size)
    return answered(model, split, batch_size) == split.labels


def generator_of(seed: int, image: int) -> torch.Generator:
    """Return an image's own generator, so that its attack is the same in every batch."""
    state = np.random.SeedSequence([seed, image]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def withstand(
    model: nn.Module, split: Split, perturb: Perturb, restarts: int, batch_size: int, seed: int = 0,
    forward: Forward | None = None, tell: Callable[[int], Any] = lambda n: None,
    survivors: list[tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Return which images stay right at every restart of an attack, (N,) bool, and how many do not
    because their attack or its answer was not finite.

    The model judges the finished images; an image that one restart fools is not tried again.
    forward: the model's passes for gradients; None: its own. tell: takes the number of images after
    each batch. survivors: gets the attacked images, up to INSPECTED, that stay right in the first
    batch where some do, their labels, and the images as they were. Raises ValueError for a model in
    training mode.
    """
    refuse_training(model)
    refuse_nothing(restarts=restarts, batch_size=batch_size)
    stands = torch.ones(len(split), dtype=torch.bool, device=split.images.device)
    lost = 0
    for i in range(0, len(split), batch_size):
        x, y = split.batch(slice(i, i + batch_size))
        generators = [generator_of(seed, i + k) for k in range(len(y))]
        for _ in range(restarts):
            left = stands[i : i + batch_size].nonzero().squeeze(1)
            if not len(left):
                break
            own = [generators[k] for k in left.tolist()]
            x_adv = perturb(forward or model, x[left], y[left], own, model)
            answer = judged(model, x_adv)
            stands[i + left] = answer == y[left]
            lost += (answer == -1).sum().item()
            if survivors is not None and not survivors and (answer == y[left]).any():
                kept = (answer == y[left]).nonzero().squeeze(1)[:INSPECTED]
                survivors.append((x_adv[kept], y[left][kept], x[left][kept]))
        tell(len(y))
    return stands, lost


def judged(model: Forward, x: Tensor) -> Tensor:
    """Return the model's answers, -1 where they or the images themselves are not finite."""
    with torch.no_grad():
        return torch.where(x.isfinite().flatten(1).all(1), answers(model(x)), -1)


def robust(
    model: nn.Module, split: Split, attack: Attack, batch_size: int, seed: int = 0,
    bar: bool = False,
) -> Tensor:  # fmt: skip
    """Return an (N,) bool tensor: which images stay right under PGD, all (N,) tried. bar: show
    progress on stderr, where that is a terminal."""
    with Progress(len(split), bar) as progress, progress.counting(model):
        progress.begin("validation", len(split), batch_size, attack.steps)
        perturb, tell = by_pgd(attack), progress.end_batch
        return withstand(model, split, perturb, 1, batch_size, seed, tell=tell)[0]


def passes_of(model: nn.Module, precision: str) -> tuple[Forward, nn.Module]:
    """Return the model's passes for an attack's gradients, and the module that makes them: its own,
    or in bf16 and channels_last, with float32 logits."""
    if precision == "fp32":
        return model, model
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return fast(x.contiguous(memory_format=torch.channels_last)).float()

    return forward, fast


def attempts(evaluation: Evaluation, classes: int) -> list[tuple[str, str, list[Attempt]]]:
    """Return norm, radius in 255ths and attacks, for every radius that is attacked."""
    names = [name for name in evaluation.attacks if name != "clean"]
    return [
        (norm, eps_key(eps),
         [attempt(n, norm, eps, evaluation.steps, classes, evaluation.precision) for n in names])
        for norm in NORM_NAMES
        for eps in getattr(evaluation, norm)
        if names
    ]  # fmt: skip


def evaluate(
    model: nn.Module,
    split: Split | Photographs,
    evaluation: Evaluation,
    say: Callable[[str], None] = lambda text: None,
    bar: bool = False,
) -> dict[str, Any]:
    """Return natural and robust accuracies (fractions), and what they were measured with.

    An image is robust at a radius when the model is right on it clean and under every attack: the
    worst case, image by image. Each attack is tried on all images that are right clean, so that its
    own accuracy does not depend on the others. {"natural": a, "robust": {"linf": {"8/255": r}},
    "attacks": {"linf": {"8/255": "PGD-10, ..."}}, "each": {"linf": {"8/255": {"pgd": r}}},
    "configurations": as "each" with texts, "images": N, "of": the number in the split, "warnings":
    sentences}. The model is left in eval mode. say: takes a line after each attack. bar: show
    progress on stderr, where that is a terminal. Raises ValueError, before any attack, for one that
    this model or this machine cannot have.
    """
    model.eval()
    cudnn, device = torch.backends.cudnn, split.images.device.type
    exact = cudnn.flags(cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False)
    with exact, torch.autocast(device, enabled=False):
        return measured(model, split, evaluation, say, bar)


def measured(
    model: nn.Module, split: Split, evaluation: Evaluation, say: Callable[[str], None], bar: bool
) -> dict[str, Any]:
    total = len(split)
    if evaluation.samples is not None:
        split = split.take(shuffled(split)[: evaluation.samples])
    with Progress(len(split), bar) as progress:
        progress.begin("natural", len(split), evaluation.batch_size, 1)
        answer = answered(model, split, evaluation.batch_size, progress.end_batch)
    natural = answer == split.labels
    right = split.take(natural.nonzero().squeeze(1))
    result = {"natural": natural.double().mean().item(), "images": len(split), "of": total}
    result |= {k: {norm: {} for norm in NORM_NAMES if getattr(evaluation, norm)}
               for k in ("robust", "attacks", "each", "configurations")}
    sample = inspected(split)
    with torch.no_grad():
        z = model(sample[0][:1])
    refuse_unfit(sample[0][:1], z)  # of one image, as an attack may leave it
    planned = attempts(evaluation, z.shape[1])
    result["warnings"] = masked_gradients.of_answers(answer)
    result["warnings"] += masked_gradients.of_model(
        model, *sample, evaluation.batch_size, attacked=bool(planned)
    )
    forward, fast = passes_of(model, evaluation.precision)
    if planned and evaluation.precision == "bf16":
        warn_of_slow_bf16(sample[0].device, "--eval-precision fp32")
    count = len(right) * sum(len(attacks) for _, _, attacks in planned)
    with Progress(count, bar) as progress, progress.counting(model, fast):
        for norm, eps, attacks in planned:
            stands, own = torch.ones(len(right), dtype=torch.bool, device=split.images.device), {}
            for a in attacks:
                where = f"{NORM_NAMES[norm]} {eps} {a.name}"
                progress.begin(where, len(right), evaluation.batch_size, a.passes * a.restarts)
                survivors: list[tuple[Tensor, Tensor, Tensor]] = []
                kept, lost = withstand(
                    model, right, a.perturb, a.restarts, evaluation.batch_size, 0, forward,
                    progress.end_batch, survivors,
                )  # fmt: skip
                own[a.name] = kept.sum().item() / len(split)
                stands &= kept
                result["warnings"] += masked_gradients.of_attack(where, lost, len(right))
                kind, _, _ = split_name(a.name)
                result["warnings"] += masked_gradients.of_way(where, kind, model, survivors)
                with progress.bar.external_write_mode(file=sys.stderr):
                    say(f"{where}: {own[a.name]:.2%}")
            result["robust"][norm][eps] = stands.sum().item() / len(split)
            result["attacks"][norm][eps] = summary_of(attacks)
            result["each"][norm][eps] = own
            result["configurations"][norm][eps] = {a.name: a.text for a in attacks}
    result["warnings"] += masked_gradients.of_numbers(result)
    return result


def shuffled(split: Split | Photographs) -> Tensor:
    """Return a fixed order: images lie sorted by class in folders, and a subset is to be mixed."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return order.to(split.labels.device)


def inspected(split: Split) -> tuple[Tensor, Tensor]:
    return split.take(shuffled(split)[:INSPECTED]).batch(slice(None))


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
