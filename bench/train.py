"""Train one model by one method, so that a killed run continues to bit-equal weights.

All randomness of an epoch comes from generators seeded by (seed, epoch, purpose), so the state at
an epoch's end is the weights and the optimizer; last.pt holds both and is replaced atomically.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.adversarial import attacked, watch_single_step
from bench.checkpoint import load_checkpoint, load_weights, save_checkpoint
from bench.config import Config, differences, usable_device
from bench.data import load_data, training_images
from bench.evaluate import correct, robust
from bench.models import build_model
from bench.optimizers import build_optimizer, lr_at
from bench.passes import step
from bench.pipeline import Augmentation
from bench.record import write_json, write_jsonl
from bench.run import Run, forward_of
from bench.weights import start_from


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
        config.data, config.val, config.seed, config.data_dir, download, config.image_size,
        config.label_noise, config.noise_kind, config.normalisation, config.reads_lazily,
        config.workers,
    )  # fmt: skip
    data.train, data.val = data.train.to(device), data.val.to(device)
    images = training_images(data.train, augmentation_of(config), data.mean)
    torch.manual_seed(config.seed)
    model = build_model(
        config.model, config.width, data.channels, len(data.classes), data.mean, data.std
    )
    if config.weights is not None:
        start_from(model, Path(config.weights))
    model = model.to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    steps = math.ceil(len(data.train) / config.batch_size)
    opt = build_optimizer(config, model, steps)
    return Run(config, data, model, opt, device, [], images=images)


def augmentation_of(config: Config) -> Augmentation | None:
    """Return what is done to images that are in memory."""
    if config.augment == "none":
        return None
    return Augmentation(config.pad, config.padding, config.augment == "crop-flip", config.cutout)


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


def train_epoch(run: Run, epoch: int) -> dict[str, Any]:
    """Train one epoch; return its row of metrics. Sums stay on the device until its end."""
    config, n = run.config, len(run.data.train)
    order_rng, augment_rng, attack_rng, others = (generator(run, epoch, i) for i in range(4))
    torch.manual_seed(others.initial_seed())  # dropout's
    order = torch.randperm(n, generator=order_rng, device=run.device)
    batches = order.tensor_split(math.ceil(n / config.batch_size))
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    forward = forward_of(run)
    run.epoch = epoch
    run.model.train()
    start = time.perf_counter()
    for i, (x, y) in enumerate(run.images.augmented(batches, augment_rng)):
        for group in run.opt.param_groups:
            group["lr"] = lr_at(config, epoch, i, len(batches))
        # a copy: .contiguous() would leave grey images the strides of channels_last
        x = x.clone(memory_format=torch.contiguous_format)
        x = attacked(run, forward, x, y, attack_rng)
        loss, logits = step(run, forward, x, y)
        sums += torch.stack([loss * len(y), (logits.argmax(1) == y).sum()])
    loss_sum, right = sums.tolist()
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch,
        "lr": run.opt.param_groups[0]["lr"],
        "train_loss": loss_sum / n,
        "train_acc": right / n,
        "seconds": seconds,
        "images_per_second": n / seconds,
    }


def validate(run: Run) -> dict[str, Any]:
    """Return validation accuracy, that of adversarial training under PGD, and whether it is the
    best so far. Where nothing is held out, the last epoch counts as the best."""
    run.model.eval()
    split, attack = run.data.val, run.config.validation_attack
    if not len(split):
        return {"best": True}
    if attack is None:
        right = correct(run.model, split, 500)
    else:
        right = robust(run.model, split, attack, 500, seed=run.epoch)
    accuracy = right.double().mean().item()
    return {"val_acc": accuracy, "best": all(accuracy > old["val_acc"] for old in run.history)}


def train(
    config: Config,
    out: Path,
    download: bool = False,
    after_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Run:
    """Train in `out`, or continue there after an interruption; return the finished run.

    Writes config.json, metrics.jsonl, last.pt, and best.pt, the first epoch of the highest
    validation accuracy, the last where nothing is held out. after_epoch: called with every
    finished epoch's row, those of earlier sittings included. Raises ValueError, before anything is
    written, for what set_up and load_state refuse.
    """
    run = set_up(config, download)
    first = load_state(run, out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", asdict(config))
    for row in run.history:
        after_epoch(row)
    for epoch in range(first, config.epochs):
        row = train_epoch(run, epoch)
        row |= validate(run) | watch_single_step(run)
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
