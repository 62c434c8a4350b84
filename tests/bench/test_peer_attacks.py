"""Ours beside torchattacks, foolbox, ART and AutoAttack at equal budgets: no weaker, whatever the
scale of the logits."""

import json
from pathlib import Path

import pytest
import torch

from bench.data.datasets import load_data
from bench.evaluation.evaluate import evaluate
from bench.experiments.peer_attacks import (
    FACTORS,
    RADII,
    TOOLS,
    by_attack,
    measure,
    of_checkpoint,
    on_digits,
)

from ..helpers.trained import evaluation

ROWS = Path(__file__).parents[2] / "bench" / "results" / "attacks.jsonl"
SLACK = 0.01  # of the images: other random starts


def no_weaker(rows):
    """Hold ours to the strongest peer on each attack, and to ourselves at other scales."""
    found = by_attack(rows)
    assert len(found) == 5 * len(RADII) * len(FACTORS)
    for (norm, attack, factor), own in found.items():
        ours = own["fastsam"]
        assert ours <= min(own.values()) + SLACK, (norm, attack, factor, own)
        assert abs(ours - found[norm, attack, 1.0]["fastsam"]) <= 0.004, (norm, attack, factor)
    assert {row["tool"] for row in rows} == set(TOOLS)


def test_the_committed_comparison_shows_it():
    no_weaker([json.loads(line) for line in ROWS.read_text().splitlines()])


def test_a_checkpoint_is_attacked_on_the_images_that_it_is_evaluated_on(checkpoint):
    net, x, y = of_checkpoint(checkpoint, 50)
    split = load_data("digits", 0.1, 0).test
    found = evaluate(net, split, evaluation(attacks=("clean",), samples=50))
    assert (net(x).argmax(1) == y).float().mean().item() == pytest.approx(found["natural"])
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"test_fingerprint": "another"}, checkpoint)
    with pytest.raises(ValueError, match="the test images are not those"):
        of_checkpoint(checkpoint, 50)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # what the peers' own code does
def test_no_peer_is_stronger_at_an_equal_budget():
    """Needs the extra `peers`, which `make prove` installs."""
    no_weaker(list(measure(*on_digits())))
