"""What an evaluation knows of an entry on RobustBench's leaderboards, as their `model_info` files.

Names, order and forms of the fields are those of the files in RobustBench's repository and of
robustbench 1.1.1 (utils.ModelInfo, utils.update_json): accuracies are percentages as text, eps is
text, and the norm is no field but the folder that a file lies in.
"""

from typing import Any

from bench.attacks.notation import eps_key, parse_eps
from bench.models import FULL_WIDTH
from bench.settings.evaluation import Evaluation

RADII = {("cifar10", "linf"): "8/255", ("cifar10", "l2"): "0.5", ("cifar100", "linf"): "8/255"}
ARCHITECTURES = {  # as the leaderboards write them; others go by their names here
    "preactresnet18": "PreActResNet-18",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "wrn28-10": "WideResNet-28-10",
    "wrn28-10-fsam": "WideResNet-34-10",  # what it is
}


def leaderboard(data: str, evaluation: Evaluation, images: int) -> tuple[str, str]:
    """Return norm and radius, as text, of the leaderboard that an evaluation is made for.

    images: how many the test set has. Raises ValueError for an evaluation that no leaderboard
    lists: other data, images other than its test images, not AutoAttack, not every image, not one
    norm at the leaderboard's radius.
    """
    radii = {norm: eps for (name, norm), eps in RADII.items() if name == data}
    if not radii:
        raise ValueError(
            f"RobustBench has no leaderboard for data {data!r}, but for cifar10 and cifar100; "
            "leave out --robustbench"
        )
    if evaluation.on != "test" or evaluation.data is not None:
        of = f"--eval-data {evaluation.data}" if evaluation.data else f"--eval-on {evaluation.on}"
        raise ValueError(
            f"RobustBench lists accuracies on {data}'s own test images; leave out {of}"
        )
    if "autoattack" not in evaluation.attacks:
        raise ValueError(
            f"RobustBench lists what AutoAttack leaves, and the attacks are "
            f"{' '.join(evaluation.attacks)}; add autoattack to --attacks"
        )
    if evaluation.samples is not None and evaluation.samples < images:
        raise ValueError(
            f"RobustBench lists accuracies on all {images} test images, not on "
            f"{evaluation.samples}; leave out --n-examples"
        )
    tried = [(norm, eps_key(e)) for norm in ("linf", "l2") for e in getattr(evaluation, norm)]
    for norm, eps in radii.items():
        if tried == [(norm, eps_key(parse_eps(eps, norm)))]:
            return norm, eps
    ways = " or ".join(f"--norms {norm} --eval-{norm} {eps}" for norm, eps in radii.items())
    given = ", ".join(f"{norm} {eps}" for norm, eps in tried)
    raise ValueError(
        f"an entry at RobustBench is one norm at its leaderboard's radius, and not {given}; pass "
        f"{ways}"
    )


def model_info(config: dict[str, Any], result: dict[str, Any], norm: str, eps: str) -> dict:
    """Return the fields, those that only the authors of an entry can fill as None.

    config: the run's. result: what bench.evaluation.evaluate.evaluate returned. norm, eps: what
    `leaderboard` returned. additional_data is None for a run that started from given weights.
    `footnote`, `external` and `unreliable` are absent, which is not the same as null there.
    """
    own = result["each"][norm][eps_key(parse_eps(eps, norm))]
    return {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": None if config.get("weights") else False,
        "number_forward_passes": 1,
        "dataset": config["data"],
        "venue": None,
        "architecture": architecture(config["model"], config["width"]),
        "eps": eps,
        "clean_acc": percent(result["natural"]),
        "reported": None,
        "autoattack_acc": percent(own["autoattack"]),
    }


def architecture(model: str, width: int) -> str:
    name = ARCHITECTURES.get(model, model)
    return name if width == FULL_WIDTH else f"{name} (width {width} of {FULL_WIDTH})"


def percent(accuracy: float) -> str:
    return str(round(100 * accuracy, 2))
