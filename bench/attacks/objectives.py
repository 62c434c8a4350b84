"""What an attack climbs, as strong at every scale of the logits, and what counts as an answer.

z are logits, y the labels. Cross-entropy is log(1 + e^u), where u = log sum_k!=y e^(z_k - z_y) are
the log-odds against the label: it rises with u and has u's direction, and u neither underflows
where the network is sure nor is lost in a mean over the batch. Yet e^(c z) weighs the other classes
by another c differently: a network whose logits are small seems to withstand more than it does. So
attacks see logits of one spread: a low one in PGD's first steps, by which all wrong classes count,
and a high one in its last, by which the likeliest does (few steps want it high, many low).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SPREAD = 8.0  # from the highest logit to the third: what well-trained networks have anyway
FIRST, LAST = 5.0, 10.0  # the same in PGD's first and last step, and LAST where it has only one


def spread(z: Tensor) -> Tensor:
    """Return every image's distance from its highest logit to the third, (B, 1), detached.

    As the DLR loss has it: classes far below, or switched off by a logit of -1e9, do not matter.
    To the lowest where the third is as high as the first; 1 where all are equal.
    """
    z = z.detach()
    high, low = z.amax(1, keepdim=True), z.amin(1, keepdim=True)
    third = z.topk(min(3, z.shape[1])).values[:, -1:]
    whole = torch.where(high > low, high - low, 1.0)
    return torch.where(high > third, high - third, whole)


def in_words(*spreads: float) -> str:
    return f"cross-entropy (logits scaled: 1st - 3rd = {' to '.join(f'{s:g}' for s in spreads)})"


def rising(i: int, steps: int) -> float:
    """Return the spread at PGD's step i of `steps`, a geometric course from FIRST to LAST."""
    return LAST * (FIRST / LAST) ** ((steps - 1 - i) / max(steps - 1, 1))


def log_odds(z: Tensor, y: Tensor, scale: Tensor | None = None, to: float = SPREAD) -> Tensor:
    """Return every image's log-odds against its label, of logits that are scaled to a spread `to`.

    scale: what `spread` returned for other logits of these images; None: for these.
    """
    y = y[:, None]
    distance = to * ((z - z.gather(1, y)) / (spread(z) if scale is None else scale))
    return distance.scatter(1, y, -torch.inf).logsumexp(1)


def targeted_dlr(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio of every image, for the target classes t:
    -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2). Needs four classes."""
    first, _, third, fourth = z.topk(4).values.unbind(1)
    z_y, z_t = (z.gather(1, c[:, None]).squeeze(1) for c in (y, t))
    # (first - third) + (first - fourth): halves of large logits lose what tells them apart
    ratio = ((first - third) + (first - fourth)) / 2
    return -(z_y - z_t) / torch.where(ratio == 0, 1.0, ratio)


def log_softmax(z: Tensor, top: Tensor, scale: Tensor) -> Tensor:
    """Return the logarithms of the probabilities at SPREAD, by the distance from the class `top`,
    whose probability is near 1: its own rounding would hide how the others move."""
    return F.log_softmax(SPREAD * ((z - z.gather(1, top)) / scale), 1)


def departure(z: Tensor, z_adv: Tensor) -> Tensor:
    """Return KL(p || p') of every image: p of the logits z, p' of z_adv, both by z's spread."""
    top, scale = z.argmax(1, keepdim=True), spread(z)
    log_p, log_q = (log_softmax(each, top, scale) for each in (z, z_adv))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def answers(z: Tensor) -> Tensor:
    """Return the class of the highest logit, and -1, which no label is, where one is not finite."""
    return torch.where(z.isfinite().all(1), z.argmax(1), -1)
