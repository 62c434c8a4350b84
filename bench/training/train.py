"""Train one model by one method, so that a killed run continues to bit-equal weights.

last.pt holds weights, optimizer, loss scale and, within an epoch, bench.training.epoch_state's
state. It is replaced atomically, at every epoch's end and every few minutes. Several processes
(torchrun) train the same weights; the first alone writes.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.objectives import answers
from bench.data.augmentation import Augmentation
from bench.data.datasets import Data, load_data, training_images
from bench.devices import usable_device, warn_of_slow_bf16
from bench.evaluation.evaluate import correct, robust
from bench.evaluation.progress import bar_of
from bench.files import remove_unfinished, write_json, write_jsonl
from bench.models import build_model
from bench.models.airbench import Airbench
from bench.provenance import git_hash, stamp
from bench.settings.config import Config, differences
from bench.training import processes
from bench.training.adversarial import attacked, watch_single_step
from bench.training.checkpoint import changed_data, load_checkpoint, load_weights, save_checkpoint
from bench.training.diverged import Diverged
from bench.training.epoch_state import Position
from bench.training.optimizers import build_optimizer, lr_at
from bench.training.pretrained import start_from
from bench.training.run import Run, forward_of
from bench.training.session import STOP, Sitting
from bench.training.step import step
from bench.training.stopped import Stopped
from bench.training.tracking import tracked

PLACE = ("git", "versions", "device", "cpus", "threads")
FITTED_TO = 5000  # images, as in airbench; evenly spread, for they may lie class by class


def set_up(config: Config, download: bool = False) -> Run:
    """Load the data and build model and optimizer; everything that can be refused is, here.

    Raises ValueError for data, device, optimizer values or backends that cannot be used. Writes
    nothing, unless `download` lets torchvision fetch CIFAR.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    device = usable_device(config.device)
    data = data_of(config, download)
    data.train, data.val = data.train.to(device), data.val.to(device)
    images = training_images(data.train, augmentation_of(config), data.mean)
    torch.manual_seed(config.seed)
    model = build_model(
        config.model, config.width, data.channels, len(data.classes), data.mean, data.std
    )
    fit_to(model, data)
    if config.weights is not None:
        start_from(model, Path(config.weights))
    model = model.to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    steps = math.ceil(len(data.train) / config.batch_size)
    refuse_empty_shares(len(data.train) // steps, len(data.val), config.micro)
    opt = build_optimizer(config, model, steps)
    net = processes.replicated(model, config.sync_bn)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    return Run(config, data, model, opt, device, [], images=images, net=net, scaler=scaler)


def data_of(config: Config, download: bool = False) -> Data:
    return load_data(
        config.data, config.val, config.seed, config.data_dir, download, config.image_size,
        config.label_noise, config.noise_kind, config.normalisation, config.reads_lazily,
        config.workers,
    )  # fmt: skip


def fit_to(model: nn.Module, data: Data) -> None:
    """Set what a network takes from the training images before it is trained on them."""
    if isinstance(model[1], Airbench):
        n = len(data.train)
        spread = torch.linspace(0, n - 1, min(n, FITTED_TO), dtype=torch.float64).long()
        x, _ = data.train.batch(spread.to(data.train.labels.device))
        model[1].whitening.fit(model[0](x.cpu()))


def refuse_empty_shares(smallest: int, held_out: int, micro: int = 1) -> None:
    """Raise ValueError where a process would have no image of the smallest batch, or none of those
    held out, or fewer of the batch than `micro` parts."""
    counts = (("a batch", smallest, "--batch-size"), ("validation", held_out, "--val"))
    for what, n, option in counts:
        if 0 < n < processes.processes():
            raise ValueError(
                f"{what} has {n} images for {processes.processes()} processes; raise {option}, or "
                "lower torchrun's --nproc-per-node"
            )
    if (mine := smallest // processes.processes()) < micro:
        raise ValueError(f"micro {micro} parts are more than the {mine} images of a batch in a "
                         "process; lower --micro, or raise --batch-size")  # fmt: skip


def augmentation_of(config: Config) -> Augmentation | None:
    """Return what is done to images that are in memory."""
    if config.augment == "none":
        return None
    return Augmentation(config.pad, config.padding, config.augment == "crop-flip", config.cutout)


def load_state(run: Run, out: Path) -> None:
    """Continue what `out` holds; where it holds nothing, the run stays new. Raises ValueError.

    The directory must belong to the same config and data, and its last.pt to the same model.
    """
    path = out / "last.pt"
    if not path.exists():
        return
    checkpoint = load_checkpoint(path, str(run.device))
    if missing := {"optimizer", "history"} - checkpoint.keys():
        raise ValueError(
            f"{str(path)!r} has no {sorted(missing)[0]}, so that no run can go on from it; remove "
            "it and train again, or choose another --out"
        )
    if changed := differences(checkpoint["config"], run.config):
        raise ValueError(
            f"{str(out)!r} holds a run of another config ({changed}); choose another --out or "
            "repeat its options"
        )
    if parts := changed_data(checkpoint, run.data):
        raise ValueError(
            f"the {parts} images of {run.config.data!r} changed since {str(out)!r} was started; "
            "restore them or choose another --out"
        )
    load_weights(run.model, checkpoint, path)
    run.opt.load_state_dict(checkpoint["optimizer"])
    run.scaler.load_state_dict(checkpoint.get("scaler", {}))
    run.history, run.position = checkpoint["history"], checkpoint.get("position")
    run.trained = checkpoint.get("trained", [])


def refuse_early(
    config: Config, out: Path, download: bool = False, elsewhere: bool = False
) -> None:
    """Raise the ValueError that train() would, without training or writing anything.

    elsewhere: the device is another process's or machine's, and is not asked.
    """
    run = set_up(replace(config, device="cpu", backend=None) if elsewhere else config, download)
    run.config = config
    load_state(run, out)


def save(run: Run, out: Path, position: dict[str, Any] | None = None) -> None:
    """Write last.pt, from which the run continues to the same bits.

    position: where in an epoch the run is; None: between two of them.
    """
    if processes.rank() == 0:
        save_checkpoint(
            out / "last.pt", run.config, run.data, run.model, epoch=len(run.history) - 1,
            optimizer=run.opt.state_dict(), scaler=run.scaler.state_dict(), history=run.history,
            position=position, trained=run.trained,
        )  # fmt: skip


def train_epoch(run: Run, epoch: int, out: Path, sitting: Sitting) -> dict[str, Any]:
    """Train one epoch, or the rest of it; return its row of metrics.

    Sums stay on the device until its end. Writes last.pt when it is due. Raises Stopped and
    Diverged.
    """
    config, here = run.config, Position(run, epoch)
    if run.position is not None:
        here.load_state_dict(run.position)
        run.position = None
    to_attack, to_train = forward_of(run), forward_of(run, run.net)
    steps = len(here.batches)
    images = run.images.augmented(here.batches[here.done :], here.augmentation, processes.share)
    run.epoch = epoch
    run.model.train()
    start = time.perf_counter()
    shown = bar_of(sitting.bar, iterable=images, desc=f"epoch {epoch + 1}", total=steps,
                   initial=here.done, unit="step")  # fmt: skip
    for i, (x, y) in enumerate(shown, here.done):
        for group in run.opt.param_groups:
            group["lr"] = lr_at(config, epoch, i, steps)
        processes.same_statistics(run.model)
        run.weight = processes.weight(len(here.batches[i]))
        # a copy: .contiguous() would leave grey images the strides of channels_last
        x = x.clone(memory_format=torch.contiguous_format)
        x = attacked(run, to_attack, x, y, here.attack)
        loss, logits = step(run, to_train, x, y)
        here.sums += torch.stack([loss * len(y), (answers(logits) == y).sum()])
        here.done = i + 1
        if here.done < steps and (demand := sitting.demand(run.device, here.done)):
            if processes.highest(len(lost_in(run)), run.device):
                break  # nothing to save; the epoch's end says so
            here.seconds += time.perf_counter() - start
            save(run, out, here.state_dict())
            if demand == STOP:
                raise Stopped(f"after {here.done} of {steps} steps of epoch {epoch + 1}")
            sitting.saved, start = time.monotonic(), time.perf_counter()
    loss_sum, right = processes.total(here.sums).tolist()
    seconds = here.seconds + time.perf_counter() - start
    n = sum(map(len, here.batches[: here.done]))
    row = {
        "epoch": epoch,
        "lr": run.opt.param_groups[0]["lr"],
        "train_loss": loss_sum / n,
        "train_acc": right / n,
        "seconds": seconds,
        "images_per_second": n / seconds,
    }
    refuse_divergence(run, row, loss, out)
    return row


def validate(run: Run, bar: bool = False) -> dict[str, Any]:
    """Return validation accuracy, that of adversarial training under PGD, and whether it is the
    best so far. Where nothing is held out, the last epoch counts as the best."""
    run.model.eval()
    split, attack = run.data.val, run.config.validation_attack
    if not len(split):
        return {"best": True}
    mine = split.take(processes.share(torch.arange(len(split), device=run.device)))
    if attack is None:
        right = correct(run.model, mine, 500)
    else:
        right = robust(run.model, mine, attack, 500, seed=run.epoch, bar=bar)
    accuracy = processes.total(right.double().sum()).item() / len(split)
    return {"val_acc": accuracy, "best": all(accuracy > old["val_acc"] for old in run.history)}


def train(
    config: Config,
    out: Path,
    download: bool = False,
    after_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    sitting: Sitting | None = None,
) -> Run:
    """Train in `out`, or continue there after an interruption; return the finished run.

    Writes config.json, metrics.jsonl, last.pt, and best.pt, the first epoch of the highest
    validation accuracy, the last where nothing is held out. after_epoch: called with every
    finished epoch's row, those of earlier sittings included. Raises ValueError, before anything is
    written, for what set_up and load_state refuse, Stopped where `sitting` ends before, and
    Diverged.
    """
    sitting = sitting or Sitting()
    run = set_up(config, download)
    load_state(run, out)
    refuse_different_places(run, out)
    note_place(run)
    first = processes.rank() == 0
    if first:
        out.mkdir(parents=True, exist_ok=True)
        remove_unfinished(out)
        write_json(out / "config.json", asdict(config))
    for row in run.history:
        after_epoch(row)
    if first and config.amp == "bf16" and len(run.history) < config.epochs:
        warn_of_slow_bf16(run.device, "--amp off")
    tracker = sitting.track if first else None
    must = sitting.must_track
    with tracked(tracker, config, out, run.history, must) as track, sitting.training():
        for epoch in range(len(run.history), config.epochs):
            row = train_epoch(run, epoch, out, sitting)
            finish_epoch(run, row, out, sitting.bar)
            track(run.history)
            after_epoch(row)
            sitting.saved = time.monotonic()
            if sitting.demand(run.device, 0) == STOP:
                raise Stopped(f"after epoch {epoch + 1} of {config.epochs}")
    if first:
        write_jsonl(out / "metrics.jsonl", run.history)
    return run


def note_place(run: Run) -> None:
    """Note what trains what is left of a run, where that is another commit or machine than
    before."""
    if len(run.history) == run.config.epochs:
        return
    now = {k: x for k, x in stamp(str(run.device), git_hash()).items() if k in PLACE}
    if not run.trained or now != {k: run.trained[-1][k] for k in PLACE}:
        run.trained.append({"epoch": len(run.history), **now})


def lost_in(run: Run) -> list[str]:
    """Return the names of the weights and statistics that are not finite."""
    return [name for name, t in run.model.state_dict().items()
            if t.is_floating_point() and not t.isfinite().all()]  # fmt: skip


def refuse_divergence(run: Run, row: dict[str, Any], loss: Tensor, out: Path) -> None:
    """Raise Diverged after an epoch that ended with weights or a loss that are not finite, with its
    row in metrics.jsonl; last.pt stays what it was. Warn where a loss on the way was not.

    loss: the last step's.
    """
    lost = len(lost_in(run))
    tensors = sum(t.is_floating_point() for t in run.model.state_dict().values())
    where = f"epoch {row['epoch'] + 1} of {run.config.name}"
    if not processes.highest(int(lost > 0 or not loss.isfinite()), run.device):
        if not math.isfinite(row["train_loss"]):
            warnings.warn(f"in {where} the loss of some batches was NaN or inf", stacklevel=2)
        return
    if processes.rank() == 0:
        write_jsonl(out / "metrics.jsonl", [*run.history, row])
    raise Diverged(
        f"the training diverged in {where}: the loss is {loss:g} and {lost} of {tensors} "
        f"tensors of weights are not finite; lower lr ({run.config.lr:g}) or what else drives it, "
        f"and choose another --out than {str(out)!r}"
    )


def finish_epoch(run: Run, row: dict[str, Any], out: Path, bar: bool = False) -> None:
    """Validate, complete the epoch's row, and write what an epoch leaves."""
    processes.same_statistics(run.model)
    row |= validate(run, bar) | processes.from_first(watch_single_step, run)
    run.history.append(row)
    first = processes.rank() == 0
    if first and row["best"]:
        save_checkpoint(out / "best.pt", run.config, run.data, run.model, epoch=row["epoch"],
                        trained=run.trained)
    save(run, out)
    if first:
        write_jsonl(out / "metrics.jsonl", run.history)


def refuse_different_places(run: Run, out: Path) -> None:
    """Raise ValueError where processes found different checkpoints; wait until all have read."""
    position = run.position or {"done": 0}
    places = set(processes.gathered((len(run.history), position["done"])))
    if len(places) > 1:
        raise ValueError(
            f"the processes found different checkpoints in {str(out)!r} (epochs, steps: "
            f"{sorted(places)}); give an --out that all of them see"
        )
