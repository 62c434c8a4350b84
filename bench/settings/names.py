"""What a method is called in tables, legends and prose: one name for each.

Its key in bench.settings.methods ("at-linf") stays what commands, files and rows say.
"""

from bench.settings.methods import split_method

OPTIMIZER_NAMES = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "sam": "SAM",
    "sam-interval": "SAM at intervals",
    "sam-late": "Late SAM",
    "sam-part": "SAM by part of the batch",
    "sam-micro": "m-sharpness SAM",
    "sam-full": "SAM-full",
    "sam-noise": "SAM-noise",
    "sam-db": "SAM-db",
    "sam-batches": "SAM by several batches",
    "asam": "ASAM",
    "fishersam": "FisherSAM",
    "fsam": "Friendly-SAM",
    "fasam": "F-ASAM",
    "msam": "Momentum-SAM",
    "looksam": "LookSAM",
    "gsam": "GSAM",
}
ADVERSARY_NAMES = {
    "at-linf": "AT (PGD, l_inf)",
    "at-l2": "AT (PGD, l2)",
    "fgsm-rs": "AT (FGSM-RS)",
    "n-fgsm": "AT (N-FGSM)",
    "trades": "TRADES",
}
SIGNS = {"l_inf": r"$\ell_\infty$", "l2": r"$\ell_2$"}


def method_name(method: str) -> str:
    """ "fsam" -> "Friendly-SAM", "at-linf+sam" -> "AT (PGD, l_inf) + SAM"; AT alone is with SGD.

    Raises ValueError for unknown methods.
    """
    adversary, optimizer = split_method(method)
    if adversary is None:
        return OPTIMIZER_NAMES[optimizer]
    beside = "" if optimizer == "sgd" else f" + {OPTIMIZER_NAMES[optimizer]}"
    return ADVERSARY_NAMES[adversary] + beside


def in_figures(name: str) -> str:
    """Return a name with the norms' signs, as matplotlib draws them."""
    for text, sign in SIGNS.items():
        name = name.replace(text, sign)
    return name
