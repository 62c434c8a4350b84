"""One optimizer step on a batch: the passes of plain training, of SAM, and of AWP around both."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

import fastsam
from bench.settings.methods import FULL
from bench.training.adversarial import loss_of
from bench.training.awp import perturbed_weights
from bench.training.graphed import graphed_step
from bench.training.run import Forward, Run, backward, forward_of


def step(run: Run, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Make one optimizer step on a batch that `attacked` made, all passes on the same images.

    Returns the first pass's loss and logits, detached (the second's, where the first does not see
    the whole batch; Momentum-SAM's only pass is at the moved weights).
    """
    if run.config.graph:
        return graphed_step(run, x, y)
    with weight_perturbation(run, x, y):
        climbs = run.config.rho is not None and run.opt.climbs_next
        if climbs and not run.opt.climbs_first:
            loss, logits = sharp_gradient(run, forward, x, y)
        else:
            if climbs:
                run.opt.first_step(scaler=run.scaler)
            loss, logits = loss_of(run, forward, x, y)
            backward(run, loss)
        run.scaler.step(run.opt)
    run.scaler.update()
    run.opt.zero_grad()
    return loss.detach(), logits.detach()


def weight_perturbation(run: Run, x: Tensor, y: Tensor) -> AbstractContextManager[None]:
    if run.config.awp_gamma == 0 or run.epoch < run.config.awp_warmup:
        return nullcontext()
    with fastsam.freeze_bn_stats(run.model):
        loss, _ = loss_of(run, forward_of(run), x, y)
    return perturbed_weights(run.model, run.weight * loss, run.config.awp_gamma)


def first_pass(run: Run) -> AbstractContextManager:
    """Around forward and backward: whether each process climbs by its own share's gradient."""
    return run.opt.local_first_pass(run.net) if run.config.local_ascent else nullcontext()


def second_pass(run: Run) -> AbstractContextManager:
    moving = run.config.second_bn == "moving"
    return nullcontext() if moving else fastsam.freeze_bn_stats(run.model)


def sharp_gradient(run: Run, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Leave SAM's gradient of a batch in `.grad`, for the optimizer's step."""
    if run.config.micro > 1:
        return micro_gradients(run, forward, x, y)
    n = max(1, round(run.config.ascent_part * len(y)))
    if run.config.optimizer in FULL and steps_done(run) % run.config.full_every == 0:
        measure_full_gradient(run)
    other = run.config.optimizer == "sam-db"
    ascent_x, ascent_y = another_batch(run, len(y)) if other else (x[:n], y[:n])
    if run.config.ascent_batches > 1:
        more_x, more_y = another_batch(run, (run.config.ascent_batches - 1) * len(y))
        ascent_x, ascent_y, other = torch.cat([x, more_x]), torch.cat([y, more_y]), True
    with first_pass(run):
        loss, logits = loss_of(run, forward, ascent_x, ascent_y)
        backward(run, loss)
    run.opt.first_step(zero_grad=True, scaler=run.scaler)
    with second_pass(run):
        loss2, logits2 = loss_of(run, forward, x, y)
    backward(run, loss2)
    return (loss, logits) if n == len(y) and not other else (loss2, logits2)


def steps_done(run: Run) -> int:
    return run.opt.param_groups[0]["sam_steps"]


def measure_full_gradient(run: Run) -> None:
    """Set G to the gradient of the mean loss of all training images, not augmented, with the
    batches' own BatchNorm statistics; the running ones stay."""
    n = len(run.data.train)
    parts = torch.arange(n, device=run.device).split(run.config.batch_size)
    forward = forward_of(run)

    def mean_loss(index: Tensor) -> tuple[Tensor, int]:
        loss, _ = loss_of(run, forward, *run.data.train.batch(index))
        return loss, len(index)

    with fastsam.freeze_bn_stats(run.model):
        run.opt.measure_full_gradient(parts, mean_loss)


def another_batch(run: Run, n: int) -> tuple[Tensor, Tensor]:
    """Return n other training images, drawn and augmented by the global generator, whose state is
    part of a checkpoint."""
    index = torch.randperm(len(run.data.train), device=run.device)[:n]
    rng = torch.Generator(run.device).manual_seed(int(torch.randint(2**62, ())))
    ((x, y),) = run.images.augmented([index], rng)
    return x.clone(memory_format=torch.contiguous_format), y


def micro_gradients(run: Run, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """m-sharpness: the mean over parts of the batch of SAM's gradient of each."""
    losses, logits = [], []
    for part_x, part_y in zip(
        x.tensor_split(run.config.micro), y.tensor_split(run.config.micro), strict=True
    ):
        share = len(part_y) / len(y)
        with first_pass(run):
            loss, part_logits = loss_of(run, forward, part_x, part_y)
            backward(run, share * loss)
        run.opt.first_step(zero_grad=True, scaler=run.scaler)
        with second_pass(run):
            loss2, _ = loss_of(run, forward, part_x, part_y)
        backward(run, share * loss2)
        run.opt.stash_grad()
        losses.append(share * loss)
        logits.append(part_logits)
    run.opt.unstash_grad()
    return torch.stack(losses).sum(), torch.cat(logits)
