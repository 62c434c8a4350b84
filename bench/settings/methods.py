"""What can be trained: an adversary (or none) and an optimizer, each with the values it needs.

A method's name is an optimizer ("sam": standard training), an adversary ("at-linf": with SGD), or
both ("at-linf+sam"). The values here hold where neither a recipe nor an option says otherwise.
"""

from typing import Any

SAM = {"rho": 0.1, "backend": None, "base": "sgd"}  # F-SAM table 1 (CIFAR-10); SAM_AT's smallest
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {},
    "sam": SAM,
    # cheaper SAM, and m-sharpness: SAM on every fourth of the batch by itself
    "sam-interval": SAM | {"interval": 5},
    "sam-late": SAM | {"late": 0.75},
    "sam-part": SAM | {"ascent_part": 0.25},
    "sam-micro": SAM | {"micro": 4},
    # F-SAM section 4: which part of the gradient climbs (G anew at every tenth step), and which
    # images: as many others, or several batches, this one among them
    "sam-full": SAM | {"full_every": 10, "projection": "cosine"},
    "sam-noise": SAM | {"full_every": 10, "projection": "cosine"},
    "sam-db": SAM,
    "sam-batches": SAM | {"ascent_batches": 4},
    # F-SAM table 1 (CIFAR-10), whose rho belongs to the form that scales all parameters by |w|
    "asam": SAM | {"rho": 2.0, "scale": "all", "eta": 0.01},
    "fishersam": SAM | {"eta": 1.0},  # F-SAM table 1; its eta is not stated
    "fsam": SAM | {"sigma": 1.0, "lmbda": 0.6, "convention": None},  # F-SAM table 1, ResNet-18
    # rho is not stated in F-SAM table 3: as ASAM's
    "fasam": SAM | {"rho": 2.0, "sigma": 1.0, "lmbda": 0.6, "convention": None},
    # Becker et al. 2024, their code's configurations: 3 on CIFAR-100 and ImageNet; SAM's 0.2 there
    "msam": SAM | {"rho": 3.0},
    # Liu et al. 2022: every 5th step climbs; alpha 0.7, as in the code of Becker et al.
    "looksam": SAM | {"interval": 5, "look_alpha": 0.7},
    "gsam": SAM | {"gsam_alpha": 0.4},  # Zhuang et al. 2022, their code's CIFAR example
}
ADVERSARIES: dict[str, dict[str, Any]] = {
    # SAM_AT 5.2: PGD-10; its code: eps 8/255, alpha 2/255, random start
    "at-linf": {"eps": 8 / 255, "alpha": 2 / 255, "attack_steps": 10},
    # SAM_AT's largest l2 eps; alpha is not stated there (its code's 2/255 could not cross this
    # ball in 10 steps), so eps/8 as in its evaluation
    "at-l2": {"eps": 128 / 255, "alpha": 16 / 255, "attack_steps": 10},
    "fgsm-rs": {"eps": 8 / 255, "alpha": None},  # Wong et al. 2020: 1.25 eps
    "n-fgsm": {"eps": 8 / 255, "alpha": None},  # de Jorge et al. 2022: eps
    # Zhang et al. 2019, CIFAR-10: eps 0.031, alpha 0.007, 10 steps, 1/lambda = 6
    "trades": {"eps": 8 / 255, "alpha": 2 / 255, "attack_steps": 10, "beta": 6.0},
}
SINGLE_STEP = ("fgsm-rs", "n-fgsm")
RELATIVES = {  # take a preset's values for the method they vary, where it names none of their own
    "sam": ("sam-interval", "sam-late", "sam-part", "sam-micro", "sam-full", "sam-noise", "sam-db",
            "looksam", "gsam"),
    "at-linf": (*SINGLE_STEP, "trades"),
}
FULL = ("sam-full", "sam-noise")  # need the gradient G of all training images
OTHER_IMAGES = (*FULL, "sam-db", "sam-batches")  # climb by other images than the batch's
PLAIN = ("sgd", "adamw")  # optimizers without a climb
WHOLE_BATCH = ("msam", "looksam", "gsam")  # do not climb by a part of the batch, or a process's

USED_BY = {
    key: [m for table in (OPTIMIZERS, ADVERSARIES) for m, values in table.items() if key in values]
    for table in (OPTIMIZERS, ADVERSARIES)
    for values in table.values()
    for key in values
}


def split_method(method: str) -> tuple[str | None, str]:
    """Return adversary and optimizer of a method: "at-linf+sam" -> ("at-linf", "sam").

    Raises ValueError for unknown names.
    """
    adversary, plus, optimizer = method.rpartition("+")
    if not plus and optimizer in ADVERSARIES:
        adversary, optimizer = optimizer, "sgd"
    if optimizer not in OPTIMIZERS or (plus and adversary not in ADVERSARIES):
        raise ValueError(
            f"unknown method {method!r}; choose from {', '.join(OPTIMIZERS)}, or "
            f"{', '.join(ADVERSARIES)}, or two of them as at-linf+sam"
        )
    return adversary or None, optimizer


def method_of(method: str | None, optimizer: str | None) -> str:
    """Return the one name of what --method and --optimizer ask for.

    ("at-linf", "sam") -> "at-linf+sam"; ("standard", "sam") -> "sam"; (None, None) -> "sgd".
    Raises ValueError for unknown names, and for a method that already names another optimizer.
    """
    if optimizer is not None and optimizer not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {optimizer!r}; choose from {', '.join(OPTIMIZERS)}"
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
    of the method that it is a relative of. A single step stays as long as it is."""
    near = next((m for m, relatives in RELATIVES.items() if name in relatives), None)
    alike = {k: v for k, v in methods.get(near, {}).items()
             if k != "alpha" or name not in SINGLE_STEP}  # fmt: skip
    return alike | methods.get(name, {})


def values_of(method: str) -> dict[str, Any]:
    """Return the values that a method needs, with their defaults."""
    adversary, optimizer = split_method(method)
    return OPTIMIZERS[optimizer] | (ADVERSARIES[adversary] if adversary else {})
