"""One run's settings: defaults, then the method's, then the recipe's, then the command line's."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from bench.attacks.by_name import split_name
from bench.attacks.notation import form_of, parse_eps, refuse_mixed
from bench.attacks.pgd import Attack, evaluation_attack
from bench.data.augmentation import PADDINGS
from bench.settings.methods import (
    FULL,
    OTHER_IMAGES,
    PLAIN,
    SINGLE_STEP,
    USED_BY,
    WHOLE_BATCH,
    method_of,
    split_method,
    values_of,
)
from bench.settings.recipes import load_recipe
from fastsam.choose import BACKENDS

# SAM_AT eval.py's four small radii, and the larger two where adversarial training shows
EVAL_EPS = {
    "linf": (1 / 255, 2 / 255, 8 / 255),
    "l2": (16 / 255, 32 / 255, 128 / 255),
}
DIGITS_EVAL_EPS = {
    "linf": (*EVAL_EPS["linf"], 16 / 255, 32 / 255),
    "l2": (*EVAL_EPS["l2"], 256 / 255),
}
CHOICES = {
    "noise_kind": ("published", "true"),
    "augment": ("none", "crop", "crop-flip", "resized-crop"),
    "padding": PADDINGS,
    "normalisation": (None, "f-sam", "imagenet"),
    "base": PLAIN,
    "schedule": ("piecewise", "cosine", "linear"),
    "second_bn": ("frozen", "moving"),
    "attack_bn": ("eval", "train", "moving"),
    "amp": ("off", "bf16", "fp16"),
    "backend": (None, *BACKENDS),
    "scale": (None, "all", "weights"),
    "projection": (None, "cosine", "orthogonal"),
    "convention": (None, "algorithm1", "official"),
}
JUDGES = ("test", "held-out")
AT_LEAST = {"epochs": 1, "batch_size": 1, "pad": 0, "cutout": 0, "momentum": 0, "weight_decay": 0,
            "seed": 0, "interval": 1, "micro": 1, "awp_gamma": 0,
            "awp_warmup": 0, "ascent_batches": 1}
AT_LEAST_IF_GIVEN = {"image_size": 1, "attack_steps": 1, "threads": 1, "workers": 0, "beta": 0,
                     "full_every": 1}


@dataclass(frozen=True)
class Config:
    """Everything that decides the trained weights; two runs with equal configs are bit-equal.

    recipe: the published row that the run stands for, whatever else was changed of it.
    label_noise, noise_kind: see bench.data.label_noise. augment "resized-crop": for directories of
    photographs of various sizes, which are read when they are needed and become image_size pixels
    square (224 if None). padding, cutout: see bench.data.augmentation.Augmentation. normalisation:
    see bench.data.datasets.constants. weights: a file with the network's weights to start from.
    schedule, warmup: see bench.training.optimizers.lr_at. base: the optimizer under SAM. rho,
    sigma, lmbda, eta, scale, interval: as in fastsam's optimizers; looksam's interval is LookSAM's
    k. look_alpha, gsam_alpha: fastsam.LookSAM's alpha and fastsam.GSAM's, which are two things.
    convention: as in fastsam.FriendlySAM, None: "algorithm1". late: the share of the epochs before SAM's first climb.
    ascent_part: the share of the batch that the climb's gradient comes from. ascent_batches: from
    how many batches it comes, the step's own and others drawn from the training set. micro: in how
    many parts a batch is climbed from, each by itself. full_every: sam-full and sam-noise measure
    the gradient G of all training images, not augmented, at every so-many-th step of the run.
    projection: as in fastsam.FullGradientSAM. second_bn: whether SAM's second pass moves
    BatchNorm's running statistics. eps, alpha: the training attack's radius and step for images in
    [0, 1]; eps is None where the method does not attack. attack_bn: BatchNorm in the training
    attack uses its running statistics ("eval"), the batch's ("train"), or the batch's and moves the
    others ("moving"). beta: weight of TRADES' second term. awp_gamma: adversarial weight
    perturbation, relative to each layer's norm, after awp_warmup epochs; 0 for none. workers:
    processes that read images, None: by the number of CPUs; they change no bit. processes:
    torchrun's; each has its share of every batch. sync_bn: BatchNorm's batch statistics are those
    of all processes. local_ascent: each process climbs by its own share's gradient.
    """

    method: str
    data: str = "digits"
    data_dir: str = ".data"
    image_size: int | None = None
    val: float = 0.1
    label_noise: float = 0.0
    noise_kind: str = "published"
    augment: str = "crop-flip"
    pad: int = 4
    padding: str = "reflect"
    cutout: int = 0
    normalisation: str | None = None
    model: str = "preactresnet18"
    width: int = 64
    weights: str | None = None
    epochs: int = 100
    batch_size: int = 128
    base: str = "sgd"
    lr: float = 0.1
    schedule: str = "piecewise"
    warmup: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    rho: float | None = None
    sigma: float | None = None
    lmbda: float | None = None
    convention: str | None = None
    eta: float | None = None
    scale: str | None = None
    look_alpha: float | None = None
    gsam_alpha: float | None = None
    interval: int = 1
    late: float = 0.0
    ascent_part: float = 1.0
    ascent_batches: int = 1
    micro: int = 1
    full_every: int | None = None
    projection: str | None = None
    second_bn: str = "frozen"
    eps: float | None = None
    alpha: float | None = None
    attack_steps: int | None = None
    attack_bn: str = "eval"
    beta: float | None = None
    awp_gamma: float = 0.0
    awp_warmup: int = 0
    seed: int = 0
    device: str = "cpu"
    amp: str = "off"
    channels_last: bool = False
    backend: str | None = None
    threads: int | None = None
    workers: int | None = None
    processes: int = 1
    sync_bn: bool = False
    local_ascent: bool = False
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
    def attack(self) -> Attack | None:
        """The ball and the steps of the training attack, or None."""
        if self.eps is None:
            return None
        norm = "l2" if self.adversary == "at-l2" else "linf"
        whole_step = 1.25 * self.eps if self.adversary == "fgsm-rs" else self.eps
        return Attack(norm, self.eps, self.alpha or whole_step, self.attack_steps or 1)

    @property
    def validation_attack(self) -> Attack | None:
        """PGD on the training attack's ball: the training attack, but ten steps for one."""
        if self.adversary in SINGLE_STEP:
            return evaluation_attack("linf", self.eps, 10)
        return self.attack

    @property
    def name(self) -> str:
        """The run's directory name within a comparison."""
        return f"{self.method}-seed{self.seed}"


@dataclass(frozen=True)
class Evaluation:
    """What is measured after training; changing it never retrains.

    linf, l2: radii for images in [0, 1]. steps: of the attack "pgd". samples: how many test images,
    None for all. attacks: names of bench.attacks.by_name. on: "test" images, or those that were
    "held-out" of the training images, by which settings are chosen. data: another directory whose
    test images take the place of the data's own, such as another encoding of them. precision: of
    the attacks' passes for gradients, fp32 or bf16; what they found is judged in float32.
    """

    linf: tuple[float, ...]
    l2: tuple[float, ...]
    steps: int = 10
    samples: int | None = None
    batch_size: int = 500
    attacks: tuple[str, ...] = ("pgd",)
    on: str = "test"
    data: str | None = None
    precision: str = "fp32"


def resolve(method: str | None, recipe: str | None, options: dict[str, Any]) -> Config:
    """Return the config of `method`: each value from the most specific place that gives it.

    method: a name of bench.settings.methods; None: the recipe's, or sgd. recipe: a recipe or a
    preset; None: the preset that suits the data. options: the command line's explicit values by
    field name, eps and alpha as text, and "optimizer". An eps without an alpha takes the preset's
    alpha / eps. Values that the method does not use (rho for sgd) are left out, so that one command
    line serves a comparison. Raises ValueError for unknown names and values out of range.
    """
    file = load_recipe(recipe or preset_of(options))
    settings = {f.name for f in fields(Config)}
    if odd := sorted(file.keys - settings):
        raise ValueError(f"recipe {file.name!r} has the unknown values {odd}")
    optimizer = options.get("optimizer")
    if method is None:
        adversary, own = split_method(file.config.get("method", "sgd"))
        method, optimizer = adversary or "standard", optimizer or own
    method = method_of(method, optimizer)
    preset = values_of(method) | file.values(*split_method(method))
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


def check(config: Config) -> None:
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(
                f"unknown {name} {getattr(config, name)!r}; choose from "
                f"{', '.join(c for c in choices if c)}"
            )
    given = {k: least for k, least in AT_LEAST_IF_GIVEN.items() if getattr(config, k) is not None}
    for name, least in (AT_LEAST | given).items():
        if not least <= getattr(config, name) < math.inf:  # so that nan is refused too
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
    if not 0 < config.lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {config.lr}")
    if not 0 <= config.label_noise <= 1:
        raise ValueError(f"label_noise must be in [0, 1], got {config.label_noise}")
    if not 0 <= config.warmup < 1:
        raise ValueError(f"warmup must be in [0, 1), a share of the steps; got {config.warmup}")
    if config.nesterov and (config.momentum == 0 or "adamw" in (config.optimizer, config.base)):
        raise ValueError(
            f"nesterov has no effect on momentum {config.momentum} of {config.optimizer} with base "
            f"{config.base}; it needs SGD with momentum"
        )
    if not (0 <= config.late < 1 and 0 < config.ascent_part <= 1):
        raise ValueError(
            "late must be in [0, 1) and ascent_part in (0, 1], "
            f"got {config.late} and {config.ascent_part}"
        )
    check_relatives(config)
    check_processes(config)
    check_other_images(config)
    if config.amp == "fp16" and (config.attack is not None or config.awp_gamma):
        raise ValueError(
            "amp 'fp16' scales the loss of the optimizer's passes alone, and small gradients of "
            "attacks and of awp_gamma would become 0; use bf16 or off"
        )
    usable_device(config.device)


def check_relatives(config: Config) -> None:
    for name in ("look_alpha", "gsam_alpha"):
        value = getattr(config, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if config.optimizer == "msam" and config.base == "sgd" and config.momentum == 0:
        raise ValueError("msam climbs along SGD's momentum, of which momentum 0.0 leaves nothing; "
                         "use momentum 0.9, or base adamw")  # fmt: skip


def check_processes(config: Config) -> None:
    for name in ("sync_bn", "local_ascent"):
        if getattr(config, name) and config.processes == 1:
            raise ValueError(f"{name} has no effect in one process; start several with torchrun")
    if config.sync_bn and torch.device(config.device).type == "cpu":
        raise ValueError("sync_bn needs GPUs, torch has it for no CPU; leave it out")
    if config.local_ascent and (
        config.rho is None or config.sigma is not None or config.optimizer in WHOLE_BATCH
    ):
        raise ValueError(
            f"local_ascent is not for {config.method!r}: it needs a first pass, and no state of "
            "it, of which every process would have another; use sam or asam"
        )


def check_other_images(config: Config) -> None:
    if config.optimizer not in OTHER_IMAGES:
        return
    if config.adversary is not None:
        raise ValueError(
            f"{config.optimizer} climbs by other images than the batch's, which are not attacked: "
            "leave out the adversary, or use sam"
        )
    if config.amp == "fp16" and config.optimizer in FULL:
        raise ValueError(f"amp 'fp16' does not scale {config.optimizer}'s G; use bf16 or off")


def usable_device(name: str) -> torch.device:
    """Return the device, or raise ValueError when this machine or this torch does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        first_line = str(e).strip().splitlines()[0]
        raise ValueError(
            f"device {name!r} cannot be used here ({first_line}); try --device cpu"
        ) from e
    return device


def resolve_evaluation(data: str, options: dict[str, Any]) -> Evaluation:
    """Return the evaluation settings for `data` with the command line's explicit values."""
    grid = DIGITS_EVAL_EPS if data == "digits" else EVAL_EPS
    known = {f.name for f in fields(Evaluation)}
    given = {k: v for k, v in options.items() if k in known}
    result = replace(Evaluation(**grid), **given)
    for name in ("steps", "samples", "batch_size"):
        if (value := getattr(result, name)) is not None and value < 1:
            raise ValueError(f"evaluation {name} must be at least 1, got {value}")
    for name in result.attacks:
        split_name(name)
    if result.on not in JUDGES:
        raise ValueError(f"cannot evaluate on {result.on!r}; choose from {', '.join(JUDGES)}")
    if result.on == "held-out" and result.data is not None:
        raise ValueError(
            f"images held out of training are the training data's, not of {result.data!r}; leave "
            "one of the two out"
        )
    if result.precision not in ("fp32", "bf16"):
        raise ValueError(f"unknown precision {result.precision!r} of attacks; choose fp32 or bf16")
    return result


def check_judges(evaluation: Evaluation, val: float) -> None:
    """Raise ValueError where the evaluation is on held-out images and there are none."""
    if evaluation.on == "held-out" and val == 0:
        raise ValueError("val 0 holds out no image to evaluate on; pass --val 0.1, or evaluate on "
                         "the test images")  # fmt: skip


def differences(old: dict[str, Any], new: Config) -> str:
    """Return "lr 0.1 -> 0.05, ..." for the fields in which a stored config differs, or "".

    A config that was stored before a field existed has that field's default.
    """
    now, defaults = asdict(new), {f.name: f.default for f in fields(Config) if f.name != "method"}
    old = defaults | old
    keys = [k for k in now | old if old.get(k) != now.get(k)]
    return ", ".join(f"{k} {old.get(k)!r} -> {now.get(k)!r}" for k in keys)
