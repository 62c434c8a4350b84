"""One run's settings: defaults, then the method's, then the recipe's, then the command line's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.attacks.notation import form_of, parse_eps, refuse_mixed
from bench.data.known import KNOWN
from bench.settings.checks import check
from bench.settings.methods import FULL, PLAIN, SAMS, SINGLE_STEP, method_of, split_method
from bench.settings.recipes import Recipe, load_recipe
from bench.settings.setting import setting, settings_of
from bench.spelling import meant

if TYPE_CHECKING:
    from bench.attacks.pgd import Attack


@dataclass(frozen=True)
class Config:
    """Everything that decides the trained weights; two runs with equal configs are bit-equal.

    recipe: the published row that the run stands for, whatever else was changed of it. processes:
    torchrun's; each has its share of every batch. eps, alpha: for images in [0, 1]; eps is None
    where the method does not attack.
    """

    method: str
    data: str = setting(
        "digits", f"{', '.join(KNOWN)}, or a directory of images with train/<class>/ and "
        "test/<class>/, or <class>/ alone",
    )
    data_dir: str = setting(".data", "where torchvision keeps CIFAR", machine=True)
    image_size: int | None = setting(
        None, "resize a directory's images to this many pixels square (resized-crop: to 224 "
        "unless given)", bounds="[1, inf)",
    )
    val: float = setting(
        0.1, "fraction of the training images that chooses best.pt; 0: none, and the last epoch is "
        "the best", bounds="[0, 1)",
    )
    label_noise: float = setting(
        0.0, "share of the training labels that are replaced", bounds="[0, 1]", metavar="RATE",
        told=True,
    )
    noise_kind: str = setting(
        "published", "published: as in Friendly-SAM's paper, redrawn, some to the right class",
        choices=("published", "true"),
    )
    augment: str = setting(
        "crop-flip", "of the training images; resized-crop reads photographs of various sizes from "
        "a directory as needed", choices=("none", "crop", "crop-flip", "resized-crop"),
    )
    pad: int = setting(4, "pixels that a crop can move", bounds="[0, inf)")
    padding: str = setting(
        "reflect", "what surrounds the image", choices=("reflect", "zero")
    )
    cutout: int = setting(
        0, "side of a square that half of the images lose; 0 for none", bounds="[0, inf)"
    )
    normalisation: str | None = setting(
        None, "of the colours, by mean and deviation", choices=("f-sam", "imagenet"),
        default="the data's own",
    )
    model: str = setting(
        "preactresnet18", "preactresnet18, resnet18, vgg16bn, wrn28-10, wrn28-10-fsam, "
        "pyramidnet110, airbench, airbench-relu, smallconv, resnet50, deit-small, "
        "torchvision:NAME, timm:NAME",
    )
    width: int = setting(
        64, "64: as published; others scale all channels (smallconv: the first layer's channels)"
    )
    weights: str | None = setting(
        None, "weights to start from: a checkpoint of this bench or a state_dict, of any number of "
        "classes", metavar="FILE",
    )
    epochs: int = setting(100, "passes over the training images", bounds="[1, inf)")
    batch_size: int = setting(128, "images in a step", bounds="[1, inf)")
    lr: float = setting(0.1, "learning rate", bounds="(0, inf)")
    schedule: str = setting(
        "piecewise", "of the learning rate; piecewise: x0.1 at 75% and 90% of the epochs",
        choices=("piecewise", "cosine", "linear"),
    )
    warmup: float = setting(
        0.0, "share of the steps in which the learning rate grows from 0", bounds="[0, 1)"
    )
    momentum: float = setting(0.9, "SGD's", bounds="[0, inf)")
    nesterov: bool = setting(False, "Nesterov's form of SGD's momentum")
    weight_decay: float = setting(5e-4, "added to the gradient (AdamW: taken off the weights), "
                                  "times the weights", bounds="[0, inf)")
    base: str = setting(
        "sgd", "the optimizer under SAM", choices=PLAIN,
        used_by=dict.fromkeys(SAMS, "sgd"),
    )
    rho: float | None = setting(
        None, "SAM's radius", bounds="[0, inf)",
        # F-SAM table 1 (CIFAR-10); SAM_AT's smallest. ASAM's there belongs to the form that scales
        # all parameters by |w|; F-ASAM's is not stated in F-SAM table 3: as ASAM's. Momentum-SAM's
        # authors have 3 in their code for CIFAR-100 and ImageNet, where SAM has 0.2.
        used_by=dict.fromkeys(SAMS, 0.1) | {"asam": 2.0, "fasam": 2.0, "msam": 3.0},
    )
    sigma: float | None = setting(
        None, "how much of the gradient's average is removed",
        used_by={"fsam": 1.0, "fasam": 1.0},  # F-SAM table 1, ResNet-18
    )
    lmbda: float | None = setting(
        None, "the average's decay", bounds="[0, 1)", used_by={"fsam": 0.6, "fasam": 0.6}
    )
    convention: str | None = setting(
        None, "algorithm1: the paper's; official: the published code's, whose average "
        "starts at the first gradient", choices=("algorithm1", "official"), default="algorithm1",
        used_by={"fsam": None, "fasam": None},
    )
    scale: str | None = setting(
        None, "weights: the authors' form", choices=("all", "weights"),
        used_by={"asam": "all"},
    )
    eta: float | None = setting(
        None, "ASAM's, added to |w|; FisherSAM's weight of the Fisher diagonal",
        used_by={"asam": 0.01, "fishersam": 1.0},  # F-SAM table 1; FisherSAM's is not stated
    )
    interval: int = setting(
        1, "climb at every so-many-th step; LookSAM's k", bounds="[1, inf)",
        used_by={"sam-interval": 5, "looksam": 5},
    )
    look_alpha: float | None = setting(
        None, "LookSAM's alpha: the length of what it reuses, in lengths of the gradient",
        bounds="(-inf, inf)", used_by={"looksam": 0.7},  # as in Momentum-SAM's authors' code
    )
    gsam_alpha: float | None = setting(
        None, "GSAM's alpha: the share of the surrogate gap's gradient", bounds="(-inf, inf)",
        used_by={"gsam": 0.4},  # its authors' example on CIFAR
    )
    late: float = setting(
        0.0, "share of the epochs before the first climb", bounds="[0, 1)",
        used_by={"sam-late": 0.75},
    )
    ascent_part: float = setting(
        1.0, "share of the batch to climb from", bounds="(0, 1]",
        used_by={"sam-part": 0.25},
    )
    ascent_batches: int = setting(
        1, "of how many batches, this one among them, the gradient to climb by is",
        bounds="[1, inf)", used_by={"sam-batches": 4},
    )
    micro: int = setting(
        1, "parts of the batch, each with a climb of its own", bounds="[1, inf)",
        used_by={"sam-micro": 4},
    )
    full_every: int | None = setting(
        None, "steps between gradients of all training images, which are not "
        "augmented", bounds="[1, inf)", used_by=dict.fromkeys(FULL, 10),
    )
    projection: str | None = setting(
        None, "cosine: as printed",
        choices=("cosine", "orthogonal"), used_by=dict.fromkeys(FULL, "cosine"),
    )
    second_bn: str = setting(
        "frozen", "BatchNorm's running statistics in SAM's second pass",
        choices=("frozen", "moving"),
    )
    eps: float | None = setting(
        None, "training attack's radius: 8/255, 8 (the same), or 0.031", as_text=True,
        default="8/255; 128/255 for at-l2",
        # SAM_AT 5.2 and its code, and its largest l2 eps; Wong et al. 2020; de Jorge et al. 2022
        used_by={"at-linf": 8 / 255, "at-l2": 128 / 255, "fgsm-rs": 8 / 255, "n-fgsm": 8 / 255,
                 "trades": 8 / 255},  # fmt: skip
    )
    alpha: float | None = setting(
        None, "training attack's step, written like eps", as_text=True,
        default="the preset's share of eps; 1.25 eps for fgsm-rs, eps for n-fgsm",
        # SAM_AT's code. It is not stated there for l2 (its 2/255 could not cross this ball in 10
        # steps), so eps/8 as in its evaluation. A single step is 1.25 eps (Wong), or eps (de Jorge)
        used_by={"at-linf": 2 / 255, "at-l2": 16 / 255, "fgsm-rs": None, "n-fgsm": None,
                 "trades": 2 / 255},  # fmt: skip
    )
    attack_steps: int | None = setting(
        None, "steps of the training attack", bounds="[1, inf)",
        used_by={"at-linf": 10, "at-l2": 10, "trades": 10},  # SAM_AT 5.2; Zhang et al. 2019
    )
    attack_bn: str = setting(
        "eval", "BatchNorm in the training attack; train: batch statistics; moving: those, and "
        "the running ones move", choices=("eval", "train", "moving"),
    )
    beta: float | None = setting(
        None, "weight of the robust term", bounds="[0, inf)",
        used_by={"trades": 6.0},  # Zhang et al. 2019: 1/lambda
    )
    awp_gamma: float = setting(
        0.0, "adversarial weight perturbation, of each layer's norm; 0 for none",
        bounds="[0, inf)", told=True,
    )
    awp_warmup: int = setting(0, "epochs before it", bounds="[0, inf)")
    seed: int = setting(0, "of weights, order, augmentation and attacks", bounds="[0, 4294967296)",
                        machine=True)  # scikit-learn, which holds images out, takes 32 bits
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...", machine=True)
    amp: str = setting(
        "off", "of training; evaluation is always float32",
        choices=("off", "bf16", "fp16"),
    )
    channels_last: bool = setting(False, "torch's channels_last memory format", machine=True)
    graph: bool = setting(
        False, "replay every step's passes and update as a CUDA graph, by fastsam's Triton "
        "kernels; attacks stay outside", machine=True,
    )
    backend: str | None = setting(
        None, "fastsam's", choices=("triton", "numba", "reference"),
        default="fastsam chooses", used_by=dict.fromkeys(SAMS), machine=True,
    )
    threads: int | None = setting(None, "CPU threads of one run", bounds="[1, inf)", machine=True)
    workers: int | None = setting(
        None, "processes that read photographs; they change no bit", bounds="[0, inf)",
        default="by CPUs", machine=True,
    )
    processes: int = 1
    sync_bn: bool = setting(
        False, "under torchrun on GPUs: BatchNorm over the whole batch, not each process's share"
    )
    local_ascent: bool = setting(
        False, "under torchrun: SAM climbs in each process by its own share's gradient, not by the "
        "whole batch's",
    )
    recipe: str | None = None

    @property
    def adversary(self) -> str | None:
        return split_method(self.method)[0]

    @property
    def optimizer(self) -> str:
        return split_method(self.method)[1]

    @property
    def reads_lazily(self) -> bool:
        return self.augment == "resized-crop"

    @property
    def late_epoch(self) -> int:
        """The first epoch that climbs."""
        return round(self.late * self.epochs)

    @property
    def attack(self) -> Attack | None:
        """The ball and the steps of the training attack, or None."""
        from bench.attacks.pgd import Attack

        if self.eps is None:
            return None
        norm = "l2" if self.adversary == "at-l2" else "linf"
        whole_step = 1.25 * self.eps if self.adversary == "fgsm-rs" else self.eps
        return Attack(norm, self.eps, self.alpha or whole_step, self.attack_steps or 1)

    @property
    def validation_attack(self) -> Attack | None:
        """PGD on the training attack's ball: the training attack, but ten steps for one."""
        from bench.attacks.pgd import evaluation_attack

        if self.adversary in SINGLE_STEP:
            return evaluation_attack("linf", self.eps, 10)
        return self.attack

    @property
    def name(self) -> str:
        """The run's directory name within a comparison."""
        return f"{self.method}-seed{self.seed}"


SETTINGS = settings_of(Config)
USED_BY = {name: list(of.setting.used_by) for name, of in SETTINGS.items() if of.setting.used_by}
MACHINE = {name for name, of in SETTINGS.items() if of.setting.machine}


def values_of(method: str) -> dict[str, Any]:
    """Return the values that a method needs, with their defaults."""
    parts = split_method(method)
    return {name: own[part] for name, of in SETTINGS.items() for own in [of.setting.used_by]
            for part in parts if part in own}  # fmt: skip


def check_recipe(file: Recipe) -> None:
    """Raise ValueError for a value that is no setting's, or that the setting cannot have."""
    known = {f.name for f in fields(Config)}
    if odd := sorted(file.keys - known):
        guesses = "".join(meant(key, known) for key in odd)
        raise ValueError(f"recipe {file.name!r} has the unknown values {odd}{guesses}")
    for values in (file.config, *file.methods.values()):
        for name, value in values.items():
            if name in SETTINGS and not (SETTINGS[name].setting.as_text and isinstance(value, str)):
                try:
                    SETTINGS[name].check(value)
                except ValueError as e:
                    raise ValueError(f"recipe {file.name!r}: {e}") from e


def resolve(method: str | None, recipe: str | None, options: dict[str, Any]) -> Config:
    """Return the config of `method`: each value from the most specific place that gives it.

    method: a name of bench.settings.methods; None: the recipe's, or sgd. recipe: a recipe or a
    preset; None: the preset that suits the data. options: the command line's explicit values by
    field name, eps and alpha as text, and "optimizer". An eps without an alpha takes the preset's
    alpha / eps. Values that the method does not use (rho for sgd) are left out, so that one command
    line serves a comparison. Raises ValueError for unknown names and values out of range.
    """
    file = load_recipe(recipe or preset_of(options))
    check_recipe(file)
    settings = {f.name for f in fields(Config)}
    optimizer = options.get("optimizer")
    if method is None:
        adversary, own = split_method(file.config.get("method", "sgd"))
        method, optimizer = adversary or "standard", optimizer or own
    method = method_of(method, optimizer)
    own = file.values(*split_method(method))
    own |= {k: str(own[k]) for k in ("eps", "alpha") if own.get(k) is not None}
    preset = values_of(method) | own
    values = preset | options
    fitting = settings - (USED_BY.keys() - values_of(method).keys())
    values = {k: v for k, v in values.items() if k in fitting} | {"method": method}
    values["recipe"] = file.name if file.published else None
    if "adamw" in (split_method(method)[1], values.get("base")) and "nesterov" not in options:
        values.pop("nesterov", None)  # a preset's, of its SGD
    norm = "l2" if method.startswith("at-l2") else "linf"
    refuse_mixed_steps({k: options[k] for k in ("eps", "alpha") if k in options and k in values})
    for given in (values, preset):
        for k in ("eps", "alpha"):
            if isinstance(given.get(k), str):
                given[k] = parse_eps(given[k], norm, options.get("force", False))
    if takes_alpha(options) and values.get("alpha") is not None:
        values["alpha"] *= values["eps"] / preset["eps"]
    config = Config(**values)
    check(config)
    return config


def refuse_mixed_steps(given: dict[str, Any]) -> None:
    """Raise ValueError for an eps that counts 255ths beside an alpha that is a value, or the other
    way round."""
    texts = [text for text in given.values() if isinstance(text, str)]
    where = " ".join(f"--{k} {text}" for k, text in given.items())
    refuse_mixed([text for text in texts if form_of(text) != "fraction"], where)


def takes_alpha(options: dict[str, Any]) -> bool:
    """Whether the command line gives the training attack's radius and leaves its step to follow."""
    return "eps" in options and "alpha" not in options


def check_used(methods: list[str], options: dict[str, Any]) -> None:
    """Raise ValueError for an option that only other methods than these have."""
    used = {key for m in methods for key in values_of(m)}
    for name in options.keys() & USED_BY.keys() - used:
        raise ValueError(
            f"{name} {options[name]!r} has no effect on {', '.join(methods)}; it belongs to "
            f"{', '.join(USED_BY[name])}"
        )


def preset_of(options: dict[str, Any]) -> str:
    """Return the recipe or preset that the command line names, or the preset for its data.

    Raises ValueError when it names both.
    """
    recipe, preset = options.get("recipe"), options.get("preset")
    if recipe and preset:
        raise ValueError(f"pass --recipe {recipe} or --preset {preset}, not both")
    by_data = {"digits": "digits", "cifar100": "sam-at-cifar100"}
    default = by_data.get(options.get("data", "digits"), "sam-at-cifar10")
    return recipe or preset or default


def folder_of(preset: str) -> Path:
    """Return where the runs of a recipe or preset go; those of a file of one's own by its name."""
    return Path("runs", Path(preset).stem if preset.endswith(".json") else preset)


def differences(old: dict[str, Any], new: Config) -> str:
    """Return "lr 0.1 -> 0.05, ..." for the fields in which a stored config differs, or "".

    A config that was stored before a field existed has that field's default. The number of workers
    changes no bit and may differ.
    """
    now, defaults = asdict(new), {f.name: f.default for f in fields(Config) if f.name != "method"}
    old = defaults | old
    keys = [k for k in now | old if old.get(k) != now.get(k) and k != "workers"]
    return ", ".join(f"{k} {old.get(k)!r} -> {now.get(k)!r}" for k in keys)
