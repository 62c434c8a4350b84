"""The images and the loss of adversarial training, and the check on attacks of a single step."""

import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsam
from bench.attacks.pgd import n_fgsm, pgd, trades
from bench.data.datasets import Split
from bench.evaluation.evaluate import judged, robust
from bench.settings.methods import SINGLE_STEP
from bench.training.run import Forward, Run, forward_of

WATCHED = 500  # training images that single-step methods are watched on when none are held out


def attacked(run: Run, forward: Forward, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    """Return x, or under adversarial training its attacked images.

    TRADES needs both: (B, 2, C, H, W), x and x'. What the attack's passes do to BatchNorm is
    config.attack_bn's to say; only "moving" changes the running statistics. No parameter's .grad is
    touched.
    """
    config = run.config
    if config.attack is None:
        return x
    run.model.train(config.attack_bn != "eval")
    with fastsam.freeze_bn_stats(run.model) if config.attack_bn == "train" else nullcontext():
        x_adv = perturbed(run, forward, x, y, rng)
    run.model.train()
    return torch.stack([x, x_adv], 1) if config.adversary == "trades" else x_adv


def perturbed(run: Run, forward: Forward, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    match run.config.adversary:
        case "n-fgsm":
            return n_fgsm(forward, x, y, run.config.attack, rng)
        case "trades":
            return trades(forward, x, run.config.attack, rng)
        case _:
            return pgd(forward, x, y, run.config.attack, rng)


def divergence(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """Return KL(softmax(logits) || softmax(logits_adv)), the mean over the batch."""
    log_p, log_q = (F.log_softmax(z, 1) for z in (logits, logits_adv))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def loss_of(run: Run, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss of a batch that `attacked` made, and its logits (TRADES': those on x').

    TRADES (Zhang et al. 2019): CE(f(x), y) + beta KL(f(x) || f(x')).
    """
    if run.config.adversary != "trades":
        logits = forward(x)
        return F.cross_entropy(logits, y), logits
    clean, adv = (forward(part) for part in x.unbind(1))
    return F.cross_entropy(clean, y) + run.config.beta * divergence(clean, adv), adv


def watch_single_step(run: Run) -> dict[str, float]:
    """Return accuracy under a single-step training attack and under PGD on the same eps ball.

    Where they part, the network has learnt to mislead the one step and is not robust:
    catastrophic overfitting (Wong et al. 2020), which is warned of. Measured on the held-out
    images, without them on the first training images, unaugmented. {} for other methods.
    """
    config = run.config
    if config.adversary not in SINGLE_STEP:
        return {}
    split: Split = run.data.val
    if not len(split):
        first = torch.arange(min(WATCHED, len(run.data.train)), device=run.device)
        split = run.data.train.take(first)
    run.model.eval()
    forward, rng = forward_of(run), torch.Generator(run.device).manual_seed(run.epoch)
    right = 0
    for i in range(0, len(split), WATCHED):
        x, y = split.batch(slice(i, i + WATCHED))
        x_adv = perturbed(run, forward, x, y, rng)
        right += (judged(forward, x_adv) == y).sum().item()
    pgd_right = robust(run.model, split, config.validation_attack, WATCHED, seed=run.epoch)
    fgsm_acc, pgd_acc = right / len(split), pgd_right.double().mean().item()
    if pgd_acc < fgsm_acc / 2 and fgsm_acc - pgd_acc > 0.2:
        warnings.warn(
            f"catastrophic overfitting in epoch {run.epoch}: {fgsm_acc:.1%} right under "
            f"{config.adversary}, {pgd_acc:.1%} under PGD-10 of the same eps; use a smaller eps, "
            "n-fgsm or at-linf",
            stacklevel=2,
        )
    return {"single_step_acc": fgsm_acc, "pgd_acc": pgd_acc}
