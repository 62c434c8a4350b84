"""Label noise: how many labels are wrong, which, and where they end up."""

import random

import pytest
import torch

from bench.data.datasets import load_data
from bench.data.label_noise import noisy

N, K = 50_000, 10
LABELS = torch.arange(N) % K


def test_published_noise_is_the_published_procedure():
    """F-SAM's code: shuffle the indices, redraw the first int(rate N) labels, all by `random`."""
    random.seed(3)
    order = list(range(N))
    random.shuffle(order)
    expected = LABELS.tolist()
    for i in order[: int(0.8 * N)]:
        expected[i] = random.randint(0, 9)
    assert noisy(LABELS, K, 0.8, "published", 3).tolist() == expected


@pytest.mark.parametrize("rate", [0.2, 0.6, 0.7, 0.8])
def test_published_noise_hits_the_right_class_one_time_in_ten(rate):
    wrong = (noisy(LABELS, K, rate, "published", 0) != LABELS).sum().item()
    sigma = (rate * N * 0.1 * 0.9) ** 0.5
    assert abs(wrong - 0.9 * rate * N) < 5 * sigma


@pytest.mark.parametrize("rate, wrong", [
    (0.8, 40_000), (0.33333, 16_666), (0.333336, 16_667), (1.0, N)])
def test_true_noise_is_exact_and_uniform_over_the_other_classes(rate, wrong):
    given = noisy(LABELS, K, rate, "true", 0)
    assert (given != LABELS).sum() == wrong
    shift = torch.bincount((given - LABELS) % K, minlength=K)[1:].double()
    assert (shift - wrong / 9).abs().max() < 5 * (wrong / 9 * 8 / 9) ** 0.5
    by_class = torch.bincount(LABELS[given != LABELS], minlength=K).double()
    assert (by_class - wrong / K).abs().max() < 5 * (wrong / K * 9 / K) ** 0.5


@pytest.mark.parametrize("kind", ["published", "true"])
def test_the_seed_decides(kind):
    a, again, other = (noisy(LABELS, K, 0.5, kind, seed) for seed in (0, 0, 1))
    assert torch.equal(a, again) and not torch.equal(a, other)
    assert torch.equal(noisy(LABELS, K, 0.0, kind, 0), LABELS)


def test_training_and_validation_are_noisy_and_the_test_set_is_clean():
    clean, noise = (
        load_data("digits", 0.2, 0, label_noise=rate, noise_kind="true") for rate in (0.0, 0.4)
    )

    def truth(split):  # the digits are all different
        by_pixels = {i.numpy().tobytes(): y for s in (clean.train, clean.val)
                     for i, y in zip(s.images, s.labels.tolist(), strict=True)}  # fmt: skip
        return torch.tensor([by_pixels[i.numpy().tobytes()] for i in split.images])

    wrong = [(s.labels != truth(s)).sum().item() for s in (noise.train, noise.val)]
    assert sum(wrong) == noise.wrong_labels == round(0.4 * 1437) and clean.wrong_labels == 0
    assert min(wrong[0] / len(noise.train), wrong[1] / len(noise.val)) > 0.3
    assert torch.equal(noise.test.labels, clean.test.labels)
    assert torch.equal(noise.test.images, clean.test.images)


def test_the_fingerprint_knows_the_noise():
    options = [{}, {"label_noise": 0.2}, {"label_noise": 0.4}, {"label_noise": 0.2,
               "noise_kind": "true"}]  # fmt: skip
    prints = {load_data("digits", 0.1, 0, **given).fingerprint for given in options}
    prints |= {load_data("digits", 0.1, seed=1, label_noise=0.2).fingerprint}
    assert len(prints) == 5
