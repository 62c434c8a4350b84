"""Train one model by one method, so that a killed run continues to bit-equal weights.

All randomness of an epoch comes from generators seeded by (seed, epoch, purpose), so the state at
an epoch's end is the weights and the optimizer; last.pt holds both and is replaced atomically.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsam
from bench.attacks import pgd
from bench.checkpoint import load_checkpoint, load_weights, save_checkpoint
from bench.config import Config, differences, usable_device
from bench.data import Data, Split, augment, load_data
from bench.evaluate import correct, robust
from bench.models import build_model
from bench.record import write_json, write_jsonl


@dataclass
class Run:
    """What one training run works on. history: one row of metrics per finished epoch."""

    config: Config
    data: Data
    model: nn.Module
    opt: torch.optim.Optimizer
    device: torch.device
    history: list[dict[str, Any]]


def build_optimizer(config: Config, model: nn.Module, steps: int = 0) -> torch.optim.Optimizer:
    """Return SGD, or fastsam's optimizer around it. Raises ValueError as its constructor does.

    steps: the number in an epoch, for a late start.
    """
    base: dict[str, Any] = {
        "lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay,
    }  # fmt: skip
    w, sgd = model.parameters(), torch.optim.SGD
    base_sam = {
        "rho": config.rho, "backend": config.backend, "interval": config.interval,
        "start": round(config.late * config.epochs) * steps, **base,
    }  # fmt: skip
    match config.method:
        case "sam" | "sam-interval" | "sam-late" | "sam-part" | "sam-micro":
            return fastsam.SAM(w, sgd, **base_sam)
        case "asam":
            return fastsam.ASAM(w, sgd, scale=config.scale, eta=config.eta, **base_sam)
        case "fishersam":
            return fastsam.FisherSAM(w, sgd, eta=config.eta, **base_sam)
        case "fsam" | "fasam":
            adaptive = config.method == "fasam"
            return fastsam.FriendlySAM(
                w, sgd, sigma=config.sigma, lmbda=config.lmbda, adaptive=adaptive, **base_sam
            )
        case _:
            return sgd(w, **base)


def set_up(config: Config, download: bool = False) -> Run:
    """Load the data and build model and optimizer; everything that can be refused is, here.

    Raises ValueError for data, device, optimizer values or backends that cannot be used. Writes
    nothing, unless `download` lets torchvision fetch CIFAR.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    device = usable_device(config.device)
    data = load_data(
        config.data, config.val, config.seed, config.data_dir, download, config.image_size
    )
    if config.pad >= min(data.train.images.shape[2:]):
        raise ValueError(
            f"pad {config.pad} is too much for images of {tuple(data.train.images.shape[2:])}"
        )
    data.train, data.val = data.train.to(device), data.val.to(device)
    torch.manual_seed(config.seed)
    model = build_model(
        config.model, config.width, data.channels, len(data.classes), data.mean, data.std
    ).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    steps = math.ceil(len(data.train) / config.batch_size)
    return Run(config, data, model, build_optimizer(config, model, steps), device, [])


def load_state(run: Run, out: Path) -> int:
    """Continue what `out` holds: return the next epoch, 0 for a new run. Raises ValueError.

    The directory must belong to the same config and data, and its last.pt to the same model.
    """
    path = out / "last.pt"
    if not path.exists():
        return 0
    checkpoint = load_checkpoint(path, str(run.device))
    if changed := differences(checkpoint["config"], run.config):
        raise ValueError(
            f"{str(out)!r} holds a run of another config ({changed}); choose another --out or "
            "repeat its options"
        )
    if checkpoint["fingerprint"] != run.data.fingerprint:
        raise ValueError(
            f"the images of {run.config.data!r} changed since {str(out)!r} was started; restore "
            "them or choose another --out"
        )
    load_weights(run.model, checkpoint, path)
    run.opt.load_state_dict(checkpoint["optimizer"])
    run.history = checkpoint["history"]
    return len(run.history)


def refuse_early(config: Config, out: Path, download: bool = False) -> None:
    """Raise the ValueError that train() would, without training or writing anything."""
    load_state(set_up(config, download), out)


def generator(run: Run, epoch: int, purpose: int) -> torch.Generator:
    """Return a generator of its own for (seed, epoch, purpose)."""
    seeds = np.random.SeedSequence([run.config.seed, epoch, purpose])
    return torch.Generator(run.device).manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))


def lr_at(config: Config, epoch: int, step: int, steps: int) -> float:
    """Return the learning rate of one step.

    piecewise: x0.1 from 75% and again from 90% of the epochs (SAM_AT 5.1). cosine: to 0, changing
    at every step (F-SAM's code). steps: the number in an epoch.
    """
    if config.schedule == "piecewise":
        drops = (epoch >= 0.75 * config.epochs) + (epoch >= 0.9 * config.epochs)
        return config.lr * 0.1**drops
    t = (epoch * steps + step) / (config.epochs * steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * t))


def forward_of(run: Run) -> Callable[[Tensor], Tensor]:
    """Return images -> float32 logits, in the run's precision and memory format."""
    bf16 = run.config.amp == "bf16"
    layout = torch.channels_last if run.config.channels_last else torch.contiguous_format

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
            return run.model(x.contiguous(memory_format=layout)).float()

    return forward


def attacked(run: Run, forward: Callable, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    """Return x, or under adversarial training its PGD images.

    Attack passes never update BatchNorm's running statistics: attack_bn "eval" uses them as they
    are, "train" uses the batch's own.
    """
    if run.config.attack is None:
        return x
    in_eval = run.config.attack_bn == "eval"
    run.model.train(not in_eval)
    with nullcontext() if in_eval else fastsam.freeze_bn_stats(run.model):
        x_adv = pgd(forward, x, y, run.config.attack, rng)
    run.model.train()
    return x_adv


def step(run: Run, forward: Callable, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Make one optimizer step on a batch; return the first pass's loss and logits, detached (the
    second's, where the first sees a part of the batch)."""
    if run.config.rho is not None and run.opt.climbs_next:
        loss, logits = sharp_gradient(run, forward, x, y)
    else:
        logits = forward(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
    run.opt.step()
    run.opt.zero_grad()
    return loss.detach(), logits.detach()


def sharp_gradient(run: Run, forward: Callable, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Leave SAM's gradient of a batch in `.grad`, for the optimizer's step."""
    if run.config.micro > 1:
        return micro_gradients(run, forward, x, y)
    n = max(1, round(run.config.ascent_part * len(y)))
    logits = forward(x[:n])
    loss = F.cross_entropy(logits, y[:n])
    loss.backward()
    run.opt.first_step(zero_grad=True)
    with fastsam.freeze_bn_stats(run.model):
        logits2 = forward(x)
        loss2 = F.cross_entropy(logits2, y)
    loss2.backward()
    return (loss, logits) if n == len(y) else (loss2, logits2)


def micro_gradients(run: Run, forward: Callable, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """m-sharpness: the mean over parts of the batch of SAM's gradient of each."""
    losses, logits = [], []
    for part_x, part_y in zip(
        x.tensor_split(run.config.micro), y.tensor_split(run.config.micro), strict=True
    ):
        share = len(part_y) / len(y)
        logits.append(forward(part_x))
        losses.append(share * F.cross_entropy(logits[-1], part_y))
        losses[-1].backward()
        run.opt.first_step(zero_grad=True)
        with fastsam.freeze_bn_stats(run.model):
            (share * F.cross_entropy(forward(part_x), part_y)).backward()
        run.opt.stash_grad()
    run.opt.unstash_grad()
    return torch.stack(losses).sum(), torch.cat(logits)


def train_epoch(run: Run, epoch: int) -> dict[str, Any]:
    """Train one epoch; return its row of metrics. Sums stay on the device until its end."""
    config, split = run.config, run.data.train
    order_rng, augment_rng, attack_rng = (generator(run, epoch, purpose) for purpose in range(3))
    order = torch.randperm(len(split), generator=order_rng, device=run.device)
    batches = order.tensor_split(math.ceil(len(split) / config.batch_size))
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    forward = forward_of(run)
    run.model.train()
    start = time.perf_counter()
    for i, index in enumerate(batches):
        for group in run.opt.param_groups:
            group["lr"] = lr_at(config, epoch, i, len(batches))
        batch = split.take(index)
        if config.augment != "none":
            flip = config.augment == "crop-flip"
            batch.images = augment(batch.images, config.pad, flip, augment_rng)
        x, y = batch.batch(slice(None))
        x = attacked(run, forward, x, y, attack_rng)
        loss, logits = step(run, forward, x, y)
        sums += torch.stack([loss * len(y), (logits.argmax(1) == y).sum()])
    loss_sum, right = sums.tolist()
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch,
        "lr": run.opt.param_groups[0]["lr"],
        "train_loss": loss_sum / len(split),
        "train_acc": right / len(split),
        "seconds": seconds,
        "images_per_second": len(split) / seconds,
    }


def validate(run: Run, epoch: int) -> float:
    """Return validation accuracy; adversarial training's is under its own attack."""
    run.model.eval()
    split: Split = run.data.val
    if run.config.attack is None:
        return correct(run.model, split, 500).double().mean().item()
    return robust(run.model, split, run.config.attack, 500, seed=epoch).double().mean().item()


def train(
    config: Config,
    out: Path,
    download: bool = False,
    after_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Run:
    """Train in `out`, or continue there after an interruption; return the finished run.

    Writes config.json, metrics.jsonl, last.pt, and best.pt, the first epoch of the highest
    validation accuracy. after_epoch: called with every finished epoch's row, those of earlier
    sittings included. Raises ValueError, before anything is written, for what set_up and
    load_state refuse.
    """
    run = set_up(config, download)
    first = load_state(run, out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", asdict(config))
    for row in run.history:
        after_epoch(row)
    for epoch in range(first, config.epochs):
        row = train_epoch(run, epoch)
        row["val_acc"] = validate(run, epoch)
        row["best"] = all(row["val_acc"] > old["val_acc"] for old in run.history)
        run.history.append(row)
        if row["best"]:
            save_checkpoint(out / "best.pt", config, run.data, run.model, epoch=epoch)
        save_checkpoint(
            out / "last.pt", config, run.data, run.model, epoch=epoch,
            optimizer=run.opt.state_dict(), history=run.history,
        )  # fmt: skip
        write_jsonl(out / "metrics.jsonl", run.history)
        after_epoch(row)
    write_jsonl(out / "metrics.jsonl", run.history)
    return run
