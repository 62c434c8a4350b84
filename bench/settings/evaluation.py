"""What is measured of a trained network: its settings, by the data's own radii where not given."""

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from bench.attacks.notation import NAMES, split_name
from bench.settings.setting import check_settings, setting

# SAM_AT eval.py's four small radii, and the larger two where adversarial training shows
EVAL_EPS = {
    "linf": (1 / 255, 2 / 255, 8 / 255),
    "l2": (16 / 255, 32 / 255, 128 / 255),
}
DIGITS_EVAL_EPS = {
    "linf": (*EVAL_EPS["linf"], 16 / 255, 32 / 255),
    "l2": (*EVAL_EPS["l2"], 256 / 255),
}
JUDGES = ("test", "held-out")


@dataclass(frozen=True)
class Evaluation:
    """What is measured after training; changing it never retrains. Radii are for images in [0, 1].
    """

    linf: tuple[float, ...] = setting(
        MISSING, "radii, like --eps", option="eval-linf", metavar="EPS...", as_text=True,
        default="1 2 8; for digits 16 32 too",
    )
    l2: tuple[float, ...] = setting(
        MISSING, "radii, like --eps", option="eval-l2", metavar="EPS...", as_text=True,
        default="16 32 128; for digits 256 too",
    )
    steps: int = setting(
        10, "steps of the attack pgd", option="eval-steps", bounds="[1, inf)"
    )
    samples: int | None = setting(
        None, "attack this many test images, drawn once for all", option="n-examples",
        alias="eval-samples", bounds="[1, inf)", default="all",
    )
    batch_size: int = setting(
        500, "images attacked at a time", option="eval-batch-size", bounds="[1, inf)"
    )
    attacks: tuple[str, ...] = setting(
        ("pgd",), f"of {NAMES}; an image is robust when none of them fools the model",
        metavar="NAME...",
    )
    on: str = setting(
        "test", "held-out: the images that --val took from training, by which settings "
        "are chosen", option="eval-on", choices=JUDGES,
    )
    data: str | None = setting(
        None, "the test images of this directory, such as another encoding, in place of the data's "
        "own", option="eval-data", metavar="DIR",
    )
    precision: str = setting(
        "fp32", "of the attacks' gradients, for bf16 in channels_last; what they find is judged "
        "in float32", option="eval-precision", choices=("fp32", "bf16"),
    )


def resolve_evaluation(data: str, options: dict[str, Any]) -> Evaluation:
    """Return the evaluation settings for `data` with the command line's explicit values."""
    grid = DIGITS_EVAL_EPS if data == "digits" else EVAL_EPS
    known = {f.name for f in fields(Evaluation)}
    given = {k: v for k, v in options.items() if k in known}
    result = replace(Evaluation(**grid), **given)
    check_settings(result)
    for name in result.attacks:
        split_name(name)
    if result.on == "held-out" and result.data is not None:
        raise ValueError(
            f"images held out of training are the training data's, not of {result.data!r}; leave "
            "one of the two out"
        )
    return result


def check_judges(evaluation: Evaluation, val: float) -> None:
    """Raise ValueError where the evaluation is on held-out images and there are none."""
    if evaluation.on == "held-out" and val == 0:
        raise ValueError("val 0 holds out no image to evaluate on; pass --val 0.1, or evaluate on "
                         "the test images")  # fmt: skip
