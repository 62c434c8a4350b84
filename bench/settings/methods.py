"""What can be trained: an adversary (or none) and an optimizer.

A method's name is an optimizer ("sam": standard training), an adversary ("at-linf": with SGD), or
both ("at-linf+sam"). Which values each needs, and their defaults, is told by the settings
themselves (bench.settings.config).
"""

from typing import Any

from bench.spelling import meant

PLAIN = ("sgd", "adamw")  # optimizers without a climb
# need the gradient G of all training images (F-SAM section 4: which part of the gradient climbs)
FULL = ("sam-full", "sam-noise")
SAMS = (
    # cheaper SAM, and m-sharpness: SAM on a part of the batch by itself
    "sam", "sam-interval", "sam-late", "sam-part", "sam-micro",
    # F-SAM section 4: which images climb: as many others, or several batches, this one among them
    *FULL, "sam-db", "sam-batches",
    "asam", "fishersam", "fsam", "fasam",
    "msam", "looksam", "gsam",
)  # fmt: skip
OPTIMIZERS = (*PLAIN, *SAMS)
ADVERSARIES = ("at-linf", "at-l2", "fgsm-rs", "n-fgsm", "trades")
OTHER_IMAGES = (*FULL, "sam-db", "sam-batches")  # climb by other images than the batch's
WHOLE_BATCH = ("msam", "looksam", "gsam")  # do not climb by a part of the batch, or a process's
SINGLE_STEP = ("fgsm-rs", "n-fgsm")
RELATIVES = {  # take a preset's values for the method they vary, where it names none of their own
    "sam": (*(m for m in SAMS if m.startswith("sam-")), "looksam", "gsam", "msam"),
    "at-linf": (*SINGLE_STEP, "trades"),
}
# but for these: a single step stays as long as it is, Momentum-SAM's rho is of another length
APART = dict.fromkeys(SINGLE_STEP, "alpha") | {"msam": "rho"}


def split_method(method: str) -> tuple[str | None, str]:
    """Return adversary and optimizer of a method: "at-linf+sam" -> ("at-linf", "sam").

    Raises ValueError for unknown names.
    """
    adversary, plus, optimizer = method.rpartition("+")
    if not plus and optimizer in ADVERSARIES:
        adversary, optimizer = optimizer, "sgd"
    if optimizer not in OPTIMIZERS or (plus and adversary not in ADVERSARIES):
        raise ValueError(
            f"unknown method {method!r}{meant(method, (*OPTIMIZERS, *ADVERSARIES))}; choose from "
            f"{', '.join(OPTIMIZERS)}, or {', '.join(ADVERSARIES)}, or two of them as at-linf+sam"
        )
    return adversary or None, optimizer


def method_of(method: str | None, optimizer: str | None) -> str:
    """Return the one name of what --method and --optimizer ask for.

    ("at-linf", "sam") -> "at-linf+sam"; ("standard", "sam") -> "sam"; (None, None) -> "sgd".
    Raises ValueError for unknown names, and for a method that already names another optimizer.
    """
    if optimizer is not None and optimizer not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {optimizer!r}{meant(optimizer, OPTIMIZERS)}; choose from "
            f"{', '.join(OPTIMIZERS)}"
        )
    if method in (None, "standard"):
        return optimizer or "sgd"
    adversary, own = split_method(method)
    named = adversary is None or "+" in method
    if named and optimizer not in (None, own):
        raise ValueError(
            f"method {method!r} and optimizer {optimizer!r} contradict each other; pass "
            f"--method {adversary or 'standard'} --optimizer {optimizer}"
        )
    optimizer = own if named else optimizer or own
    if adversary is None:
        return optimizer
    return adversary if optimizer == "sgd" else f"{adversary}+{optimizer}"


def with_relatives(methods: dict[str, dict[str, Any]], name: str | None) -> dict[str, Any]:
    """Return what a preset's "methods" say of an optimizer or adversary, its own values over those
    of the method that it is a relative of."""
    near = next((m for m, relatives in RELATIVES.items() if name in relatives), None)
    alike = {k: v for k, v in methods.get(near, {}).items() if k != APART.get(name)}
    return alike | methods.get(name, {})
