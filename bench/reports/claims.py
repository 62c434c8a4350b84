"""Claims about two methods, judged by the differences of runs that share a seed.

A claim says that one method's accuracy is above another's, or not more than `margin` points below
it, natural or at some radii. Of the seeds' differences d_1 ... d_n, in points, the mean has the
95 % interval  mean ± t(0.975, n - 1) s / sqrt(n).  Where the whole interval lies above -margin the
claim shows; where it lies below, it does not show; else these runs cannot tell. The interval is
about new seeds on the same test images, and each is one by itself: of twenty one may miss.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from bench.data.known import TRAINING_IMAGES
from bench.reports.tables import markdown
from bench.settings.config import Config
from bench.settings.methods import FULL
from bench.settings.names import method_name

SHOWS, NOT, CANNOT = "shows", "does not show", "cannot tell"
NATURAL = "natural"


@dataclass(frozen=True)
class Claim:
    """more, less: methods. at: "natural", "linf 1/255", "l2 32/255", ... margin: in points."""

    text: str
    more: str
    less: str
    at: tuple[str, ...]
    margin: float = 0.0


@dataclass(frozen=True)
class Difference:
    """The accuracy of `more` above that of `less` at one place, in points, a value a seed."""

    at: str
    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        return fmean(self.by_seed.values())

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval; infinite for one seed."""
        n = len(self.by_seed)
        if n < 2:
            return math.inf
        from scipy.stats import t

        return float(t.ppf(0.975, n - 1)) * stdev(self.by_seed.values()) / math.sqrt(n)

    def verdict(self, margin: float) -> str:
        if self.mean - self.half_width > -margin:
            return SHOWS
        return NOT if self.mean + self.half_width < -margin else CANNOT


def accuracy(row: dict[str, Any], at: str) -> float | None:
    """Return a row's accuracy in %, None where it was not measured or is not a number."""
    norm, _, eps = at.partition(" ")
    value = row["natural"] if at == NATURAL else row["robust"].get(norm, {}).get(eps)
    return None if value is None or math.isnan(value) else 100 * value


def differences_of(rows: list[dict[str, Any]], claim: Claim) -> list[Difference]:
    """Return the claim's difference at each of its places that two rows of one seed measured.

    rows: of one evaluation, each method and seed at most once.
    """
    by = {(row["method"], row["config"]["seed"]): row for row in rows}
    seeds = sorted({seed for _, seed in by})
    found = []
    for at in claim.at:
        by_seed = {}
        for seed in seeds:
            pair = [by.get((method, seed)) for method in (claim.more, claim.less)]
            values = [row and accuracy(row, at) for row in pair]
            if None not in values:
                by_seed[seed] = values[0] - values[1]
        if by_seed:
            found.append(Difference(at, by_seed))
    return found


def verdict_of(claim: Claim, found: list[Difference]) -> str:
    """Return SHOWS where every place shows it, NOT where one shows the opposite, else CANNOT."""
    verdicts = [difference.verdict(claim.margin) for difference in found]
    if NOT in verdicts:
        return NOT
    whole = len(found) == len(claim.at) and set(verdicts) == {SHOWS}
    return SHOWS if whole else CANNOT


def judged(rows: list[dict[str, Any]], claims: list[Claim]) -> str:
    """Return a Markdown table: a line a claim, and a line below it for each of its places."""
    lines = []
    for claim in claims:
        found = differences_of(rows, claim)
        beyond = f", by {claim.margin:g} points at most" if claim.margin else ""
        lines.append([f"**{claim.text}**{beyond}", "", "", "", f"**{verdict_of(claim, found)}**"])
        lines += [line_of(claim, difference) for difference in found]
        missing = [at for at in claim.at if at not in {difference.at for difference in found}]
        lines += [[f"{at}", "0", "-", "-", "not run"] for at in missing]
    return markdown(["claim", "seeds", "difference", "95 % interval", "verdict"], lines, left=1)


def line_of(claim: Claim, difference: Difference) -> list[str]:
    low, high = (difference.mean + s * difference.half_width for s in (-1, 1))
    interval = f"[{low:+.1f}, {high:+.1f}]" if math.isfinite(low) else "one seed has none"
    pair = f"{method_name(claim.more)} - {method_name(claim.less)}, {difference.at}"
    n = f"{len(difference.by_seed)}"
    return [pair, n, f"{difference.mean:+.1f}", interval, difference.verdict(claim.margin)]


def cost(config: Config) -> float:
    """Return how many passes, forward and backward, an image takes in a whole training: those of
    the optimizer, of AWP and of the attack. NaN where only the data tell."""
    passes = float(config.epochs)
    if config.rho is not None and config.optimizer != "msam":
        climbs = (config.epochs - config.late_epoch) / config.interval
        passes += climbs * config.ascent_part * config.ascent_batches
    if config.awp_gamma:
        passes += config.epochs - config.awp_warmup
    if config.adversary == "trades":  # of x and of x'
        passes *= 2
    if config.optimizer in FULL:
        passes += full_gradients(config)
    return passes + config.epochs * (config.attack.steps if config.attack else 0)


def full_gradients(config: Config) -> float:
    """Return how often a training takes the gradient of all training images, NaN of a directory of
    images, whose number a config does not have."""
    if config.data not in TRAINING_IMAGES:
        return math.nan
    images = TRAINING_IMAGES[config.data]
    images -= math.ceil(config.val * images)  # as scikit-learn holds out
    steps = config.epochs * math.ceil(images / config.batch_size)
    return math.ceil(steps / (config.full_every or 1))
