"""Ours beside torchattacks, foolbox, ART and AutoAttack at equal budgets: no weaker, whatever the
scale of the logits."""

import json
from pathlib import Path

import pytest
import torch

from bench.data.datasets import load_data
from bench.evaluation.evaluate import evaluate
from bench.experiments import peer_attacks
from bench.experiments.peer_attacks import (
    FACTORS,
    RADII,
    TOOLS,
    by_attack,
    main,
    measure,
    of_checkpoint,
    on_digits,
)

from ..helpers.trained import digits, evaluation, model

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
    _, net, x, y = of_checkpoint(checkpoint)
    split = load_data("digits", 0.1, 0).test
    found = evaluate(net, split, evaluation(attacks=("clean",), samples=50))
    right = (net(x[:50]).argmax(1) == y[:50]).float().mean().item()
    assert right == pytest.approx(found["natural"])


@pytest.mark.parametrize("change, options, said", [
    ({"test_fingerprint": "another"}, [], "the test images are not those"),
    ({"classes": ["a", "b"]}, [], "2 classes"),
    ({}, ["--images", "0"], "at least 1, got 0"),
    ({}, ["--images", "-3"], "at least 1, got -3"),
    ({}, ["--rows", "/dev/null/rows.jsonl"], "/dev/null/rows.jsonl"),
])  # fmt: skip
def test_what_cannot_be_attacked_is_refused_in_a_sentence(
    change, options, said, checkpoint, monkeypatch, capsys
):
    if change:
        torch.save(torch.load(checkpoint, weights_only=True) | change, checkpoint)
    monkeypatch.setattr("sys.argv", ["peer_attacks", "--checkpoint", str(checkpoint), *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_peers_that_are_not_installed_are_named_before_anything_is_attacked(
    checkpoint, monkeypatch, capsys
):
    monkeypatch.setattr(peer_attacks, "PACKAGES", {"a": "torch", "b": "no_such_tool"})
    monkeypatch.setattr("sys.argv", ["peer_attacks", "--checkpoint", str(checkpoint)])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "no_such_tool: not installed; pip install" in said and "torch," not in said


def test_a_network_that_is_right_on_nothing_is_refused():
    with pytest.raises(ValueError, match="right on none of 9"):
        list(measure(model(), digits()[0][:9], torch.full((9,), -5)))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # what the peers' own code does
def test_no_peer_is_stronger_at_an_equal_budget():
    """Needs the extra `peers`, which `make prove` installs."""
    no_weaker(list(measure(*on_digits())))
