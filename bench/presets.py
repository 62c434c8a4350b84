"""The papers' values, as plain data. Anything a preset leaves out comes from METHODS and Config.

SAM_AT  Zhang, He, Zhu, Chen, Wang, Wei: "On the duality between sharpness-aware minimization and
        adversarial training" (ICML 2024), and its code.
F-SAM   Li, Zhou, He, Cheng, Huang: "Friendly sharpness-aware minimization" (CVPR 2024).
"""

from bench.attacks import Attack

# What each method needs where neither a preset nor an option says otherwise.
METHODS = {
    "sgd": {},
    "sam": {"rho": 0.1, "backend": None},  # F-SAM table 1 (CIFAR-10); the smallest rho of SAM_AT
    # cheaper SAM, and m-sharpness: SAM on every fourth of the batch by itself
    "sam-interval": {"rho": 0.1, "interval": 5, "backend": None},
    "sam-late": {"rho": 0.1, "late": 0.75, "backend": None},
    "sam-part": {"rho": 0.1, "ascent_part": 0.25, "backend": None},
    "sam-micro": {"rho": 0.1, "micro": 4, "backend": None},
    # F-SAM table 1 (CIFAR-10), whose rho belongs to the form that scales all parameters by |w|
    "asam": {"rho": 2.0, "scale": "all", "eta": 0.01, "backend": None},
    "fishersam": {"rho": 0.1, "eta": 1.0, "backend": None},  # F-SAM table 1; its eta is not stated
    "fsam": {"rho": 0.1, "sigma": 1.0, "lmbda": 0.6, "backend": None},  # F-SAM table 1, ResNet-18
    # rho is not stated in F-SAM table 3: as ASAM's
    "fasam": {"rho": 2.0, "sigma": 1.0, "lmbda": 0.6, "backend": None},
    # SAM_AT 5.2: PGD-10; its code: eps 8/255, alpha 2/255, random start
    "at-linf": {"eps": 8 / 255, "alpha": 2 / 255, "attack_steps": 10},
    # SAM_AT's largest l2 eps; alpha is not stated there (its code's 2/255 could not cross this
    # ball in 10 steps), so eps/8 as in its evaluation
    "at-l2": {"eps": 128 / 255, "alpha": 16 / 255, "attack_steps": 10},
}

SAM_AT = {  # section 5.1 and train.py
    "model": "preactresnet18", "width": 64, "epochs": 100, "batch_size": 128, "lr": 0.1,
    "schedule": "piecewise", "momentum": 0.9, "weight_decay": 5e-4, "augment": "crop-flip",
    "pad": 4,
}  # fmt: skip
F_SAM = {  # section 6.1; batch size from run.sh
    "model": "preactresnet18", "width": 64, "epochs": 200, "batch_size": 128, "lr": 0.05,
    "schedule": "cosine", "momentum": 0.9, "weight_decay": 5e-4, "augment": "crop-flip", "pad": 4,
}  # fmt: skip

# preset -> {"common": values for every method, method: values for that one}
PRESETS = {
    "sam-at-cifar10": {"common": {"data": "cifar10", **SAM_AT}},
    "sam-at-cifar100": {"common": {"data": "cifar100", **SAM_AT}},
    "fsam-cifar10": {
        "common": {"data": "cifar10", **F_SAM},
        **{m: {"weight_decay": 1e-3} for m in ("sam", "asam", "fsam", "fasam")},
    },
    "fsam-cifar100": {
        "common": {"data": "cifar100", **F_SAM},
        "sam": {"rho": 0.2, "weight_decay": 1e-3},
        "asam": {"rho": 4.0, "weight_decay": 1e-3},
        "fsam": {"rho": 0.2, "weight_decay": 1e-3},
        "fasam": {"rho": 4.0, "weight_decay": 1e-3},
    },
    # ours: scikit-learn's 8x8 digits in a few minutes on two CPU cores; eps grows with the strokes
    "digits": {
        "common": {
            "data": "digits", "model": "smallconv", "width": 16, "epochs": 30, "batch_size": 64,
            "lr": 0.05, "schedule": "cosine", "momentum": 0.9, "weight_decay": 5e-4,
            "augment": "crop", "pad": 1,
        },
        "at-linf": {"eps": 32 / 255, "alpha": 8 / 255},
        "at-l2": {"eps": 256 / 255, "alpha": 32 / 255},
        "asam": {"rho": 0.5},
        "fasam": {"rho": 0.5},
    },
    # ours: SAM_AT's recipe cut to two CPU cores, for 6,102 of CIFAR-10's images. Mirrored but not
    # shifted (pad 0), so that SGD fits the training set in 45 epochs as it does in the papers' 100
    # to 200: where it does not, there is little for SAM to improve. rho and the l_inf eps are from
    # SAM_AT's grids, eps below its largest because a network this narrow does not fit 8/255.
    "cifar6k": {
        "common": {
            **SAM_AT, "data": ".data/cifar10", "width": 8, "epochs": 45, "pad": 0, "amp": "bf16",
            "channels_last": True, "threads": 1,
        },
        "sam": {"rho": 0.2},
        "fsam": {"rho": 0.2},
        "at-linf": {"eps": 4 / 255, "alpha": 1 / 255},
    },
}  # fmt: skip

# SAM_AT eval.py's four small radii, and the larger two where adversarial training shows
EVAL_EPS = {
    "linf": (1 / 255, 2 / 255, 8 / 255),
    "l2": (16 / 255, 32 / 255, 128 / 255),
}
DIGITS_EVAL_EPS = {
    "linf": (*EVAL_EPS["linf"], 16 / 255, 32 / 255),
    "l2": (*EVAL_EPS["l2"], 256 / 255),
}


def evaluation_attack(norm: str, eps: float, steps: int) -> Attack:
    """Return SAM_AT eval.py's PGD: alpha eps/4 for l_inf, eps/8 for l2."""
    return Attack(norm, eps, eps / (4 if norm == "linf" else 8), steps)
