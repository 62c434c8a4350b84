"""One optimizer step on a batch: the passes of plain training, of SAM, and of AWP around both."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

import fastsam
from bench.adversarial import loss_of
from bench.awp import perturbed_weights
from bench.run import Forward, Run


def step(run: Run, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Make one optimizer step on a batch that `attacked` made, all passes on the same images.

    Returns the first pass's loss and logits, detached (the second's, where the first sees a part of
    the batch).
    """
    with weight_perturbation(run, forward, x, y):
        if run.config.rho is not None and run.opt.climbs_next:
            loss, logits = sharp_gradient(run, forward, x, y)
        else:
            loss, logits = loss_of(run, forward, x, y)
            loss.backward()
        run.opt.step()
    run.opt.zero_grad()
    return loss.detach(), logits.detach()


def weight_perturbation(
    run: Run, forward: Forward, x: Tensor, y: Tensor
) -> AbstractContextManager[None]:
    if run.config.awp_gamma == 0 or run.epoch < run.config.awp_warmup:
        return nullcontext()
    with fastsam.freeze_bn_stats(run.model):
        loss, _ = loss_of(run, forward, x, y)
    return perturbed_weights(run.model, loss, run.config.awp_gamma)


def second_pass(run: Run) -> AbstractContextManager:
    moving = run.config.second_bn == "moving"
    return nullcontext() if moving else fastsam.freeze_bn_stats(run.model)


def sharp_gradient(run: Run, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Leave SAM's gradient of a batch in `.grad`, for the optimizer's step."""
    if run.config.micro > 1:
        return micro_gradients(run, forward, x, y)
    n = max(1, round(run.config.ascent_part * len(y)))
    loss, logits = loss_of(run, forward, x[:n], y[:n])
    loss.backward()
    run.opt.first_step(zero_grad=True)
    with second_pass(run):
        loss2, logits2 = loss_of(run, forward, x, y)
    loss2.backward()
    return (loss, logits) if n == len(y) else (loss2, logits2)


def micro_gradients(run: Run, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """m-sharpness: the mean over parts of the batch of SAM's gradient of each."""
    losses, logits = [], []
    for part_x, part_y in zip(
        x.tensor_split(run.config.micro), y.tensor_split(run.config.micro), strict=True
    ):
        share = len(part_y) / len(y)
        loss, part_logits = loss_of(run, forward, part_x, part_y)
        (share * loss).backward()
        run.opt.first_step(zero_grad=True)
        with second_pass(run):
            loss2, _ = loss_of(run, forward, part_x, part_y)
        (share * loss2).backward()
        run.opt.stash_grad()
        losses.append(share * loss)
        logits.append(part_logits)
    run.opt.unstash_grad()
    return torch.stack(losses).sum(), torch.cat(logits)
