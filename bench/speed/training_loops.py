"""Ways to train the same network: `train`'s own step fed from the device, that step with one thing
changed, and the plain recipe; and how far they are from each other.

The images are random: throughput does not depend on what they show.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsam
from bench.data.augmentation import Pipeline
from bench.data.datasets import NORMALISATION, Data, Split
from bench.models import build_model
from bench.settings.config import Config
from bench.settings.speed import Options
from bench.speed import plain_recipe
from bench.training.train import Run, attacked, build_optimizer, forward_of, step

METHODS = (  # the plain recipe has these
    "sgd", "sam", "asam", "fsam", "fasam", "msam", "looksam", "gsam", "at-linf", "at-l2",
)  # fmt: skip
# Float32's rounding reaches a hundredth of these; 2% more rho or eps, four times as much.
TOLERANCE = {"training": 1e-4, "attack": 5e-3}


@dataclass
class Loop:
    """One way to train. A step is: take a batch, attack it, update the weights, count.

    prefetched: batches that a loader has ready when a turn begins; they are used up before the
    clock starts. sums: loss and correct answers so far, on the device.
    """

    name: str
    config: Config
    model: nn.Module
    opt: Any
    batch: Callable[[], tuple[Tensor, Tensor]]
    attack: Callable[[Tensor, Tensor], Tensor]
    update: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    prefetched: int = 0

    def __post_init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.config.device)

    def step(self) -> None:
        x, y = self.batch()
        loss, logits = self.update(self.attack(x, y), y)
        self.sums += torch.stack([loss * len(y), (logits.argmax(1) == y).sum()])


def random_data(options: Options) -> Data:
    """Return random images of the wanted number and size, with CIFAR-10's statistics."""
    rng = torch.Generator().manual_seed(0)
    shape = (options.images, 3, options.image_size, options.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    train = Split(images, torch.randint(0, 10, (len(images),), generator=rng), 255)
    none = train.take(torch.arange(0))
    mean, std = NORMALISATION["cifar10"]
    names = [str(c) for c in range(10)]
    return Data(train, none, none, names, list(mean), list(std), "random")


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """Let no parameter need a gradient: a compiled attack would compute them all otherwise."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def new_model(config: Config, data: Data) -> nn.Module:
    torch.manual_seed(config.seed)
    shape = (config.model, config.width, data.channels, len(data.classes))
    model = build_model(*shape, data.mean, data.std).to(config.device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def generators(config: Config) -> list[torch.Generator]:
    """Return a generator for the batches and one for the attack."""
    return [torch.Generator(config.device).manual_seed(config.seed + i) for i in range(2)]


def device_batches(config: Config, data: Data, options: Options, rng: torch.Generator) -> Iterator:
    """Yield augmented batches that never leave the device, epoch after epoch, without end."""
    train, augmentation = data.train.to(torch.device(config.device)), options.augmentation(config)
    pipeline = Pipeline(train.images, train.labels, train.levels, augmentation, data.mean)
    while True:
        yield from pipeline.batches(config.batch_size, rng)


def fast_run(config: Config, data: Data, options: Options, build: Callable) -> Run:
    """Return what train's functions work on; build: (config, model) -> optimizer."""
    model = new_model(config, data)
    opt = build(config, model)
    if options.compile:
        model.compile(dynamic=False)
    return Run(config, data, model, opt, torch.device(config.device), [])


def attack_on(run: Run, x: Tensor, y: Tensor, rng: torch.Generator | None) -> Tensor:
    if run.config.attack is None:
        return x
    with constant_weights(run.model):
        return attacked(run, forward_of(run), x, y, rng)


def fast_loop(config: Config, data: Data, options: Options, name: str = "fast") -> Loop:
    """Return train's own step on batches that never leave the device.

    name: "eager" takes a per-parameter SAM in fastsam's place.
    """
    eager = name == "eager"
    build = plain_recipe.build_optimizer if eager else build_optimizer
    run = fast_run(config, data, options, build)
    forward, (batch_rng, attack_rng) = forward_of(run), generators(config)
    batch = partial(next, device_batches(config, data, options, batch_rng))
    update = partial(step, run, forward)
    if eager:
        update = partial(plain_recipe.update, run.opt, run.model, forward)
    attack = partial(attack_on, run, rng=attack_rng)
    return Loop(name, config, run.model, run.opt, batch, attack, update)


def graph_loop(config: Config, data: Data, options: Options) -> Loop:
    """Return the fast loop with attack, passes and update in one GraphedStep, its `update`. The
    attack draws from the device's own generator, as a graph must."""
    run = fast_run(replace(config, graph=True), data, options, build_optimizer)
    batch = partial(next, device_batches(config, data, options, generators(config)[0]))
    graphed = fastsam.GraphedStep(
        run.model, F.cross_entropy, run.opt, batch(),
        attack=lambda _, x, y: attack_on(run, x, y, None),
        autocast=torch.bfloat16 if config.amp == "bf16" else None,
    )  # fmt: skip

    def update(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return graphed(x, y), graphed.output

    return Loop("graph", config, run.model, run.opt, batch, lambda x, y: x, update)


def plain_loop(config: Config, data: Data, options: Options) -> Loop:
    """Return the plain recipe of the same method, in float32 and NCHW."""
    config = replace(config, amp="off", channels_last=False)
    device = torch.device(config.device)
    model = new_model(config, data)
    opt = plain_recipe.build_optimizer(config, model)
    pixels = data.train.images.permute(0, 2, 3, 1).contiguous().numpy()
    size = tuple(data.train.images.shape[2:])
    transform = plain_recipe.transform_of(options.augmentation(config), size, data.mean)
    images = plain_recipe.Images(pixels, data.train.labels.tolist(), transform)
    batch = partial(next, plain_recipe.batches(images, config.batch_size, options.workers, device))
    attack = partial(plain_recipe.attacked, config, model, generator=generators(config)[1])
    update = partial(plain_recipe.update, opt, model, model)
    prefetched = 2 * options.workers if device.type == "cuda" else 0
    return Loop("plain", config, model, opt, batch, attack, update, prefetched)


def loops_of(config: Config, data: Data, options: Options) -> list[Loop]:
    """Return the fast loop and those beside it that differ from it."""
    float32, others = replace(config, amp="off"), options.beside
    loops = [fast_loop(config, data, options)]
    if "eager" in others and config.rho is not None:
        loops.append(fast_loop(config, data, options, "eager"))
    if "fp32" in others and config.amp != "off":
        loops.append(fast_loop(float32, data, options, "fp32"))
    if "fp32-nchw" in others and config.channels_last:
        nchw = replace(float32, channels_last=False)
        loops.append(fast_loop(nchw, data, options, "fp32-nchw"))
    if "uncompiled" in others and options.compile:
        loops.append(fast_loop(config, data, replace(options, compile=False), "uncompiled"))
    if "graph" in others:
        loops.append(graph_loop(config, data, options))
    if "plain" in others:
        loops.append(plain_loop(config, data, options))
    return loops


def state(model: nn.Module) -> Tensor:
    """Return the weights and BatchNorm's statistics as one float64 vector."""
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    return torch.cat([t.double().flatten() for t in tensors])


def losses_on(loop: Loop, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([loop.update(x, y)[0] for x, y in batches]).double()


def disagreement(
    config: Config, options: Options, loop: Callable = fast_loop
) -> dict[str, float]:
    """Return how far a loop is from the plain mathematics, on a small network: after four steps,
    or one more than a second climb takes.

    "training", in float32 and on the same attacked images: the error of the losses, relative, and
    of the state, relative to the way it moved. "attack", in float32: the error of the perturbed
    images relative to the perturbations, both as sums of absolute values; a gradient that is 0 up
    to rounding may take either sign, so it is not as small. "precision": the relative error of the
    losses in the config's own precision.
    """
    small = replace(
        config, model="smallconv", width=8, batch_size=16, lr=0.2, momentum=0.8, weight_decay=0.05
    )
    float32, steps = replace(small, amp="off"), max(4, config.interval + 2)
    options = replace(options, images=16 * steps, workers=0)
    data = random_data(options)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        fast, exact = loop(float32, data, options), plain_loop(float32, data, options)
        start, batches, wrong, moved = state(exact.model), [], 0.0, 0.0
        losses, exact_losses = [], []
        for _ in range(steps):
            x, y = fast.batch()
            x_adv, target = fast.attack(x, y), exact.attack(x, y)
            wrong += (x_adv - target).abs().sum().item()
            moved += (target - x).abs().sum().item()
            batches.append((x_adv, y))
            losses.append(losses_on(fast, batches[-1:]))
            exact_losses.append(losses_on(exact, batches[-1:]))
        end = state(exact.model)
    off, wanted = (state(fast.model) - end).norm() / (end - start).norm(), torch.cat(exact_losses)
    rough = losses_on(loop(small, data, options), batches)
    loss_error = (torch.cat(losses) / wanted - 1).abs().max()
    errors = {
        "training": float(torch.maximum(off, loss_error)),  # nan if either is
        "attack": wrong / moved if moved else 0.0,
        "precision": float((rough / wanted - 1).abs().max()),
    }
    return {name: e if e == e else float("inf") for name, e in errors.items()}
