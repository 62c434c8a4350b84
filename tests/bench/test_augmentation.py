"""How training images are augmented, in bench's loop and in the plain recipe, beside slow code."""


import numpy as np
import pytest
import torch

from bench.data.augmentation import Augmentation, Decisions, Pipeline, decide, gather
from bench.speed import plain_recipe

from ..helpers.loops import one_image, rng


def random_images(n=12, c=3, h=9, w=7, levels=255):
    images = torch.randint(0, levels + 1, (n, c, h, w), generator=rng(5), dtype=torch.uint8)
    return images, torch.arange(n)


@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cutout", [0, 3, 4])
@pytest.mark.parametrize("levels, channels", [(255, 3), (16, 1)])
def test_augmentation_is_bit_equal_to_image_after_image(padding, flip, cutout, levels, channels):
    images, labels = random_images(c=channels, levels=levels)
    augmentation = Augmentation(pad=4, padding=padding, flip=flip, cutout=cutout)
    fill = [0.1, 0.2, 0.3][:channels]
    pipeline = Pipeline(images, labels, levels, augmentation, fill)
    seen, draws = set(), rng()
    for seed in range(20):
        index = torch.randperm(len(images), generator=draws)[:8]
        moved = decide(8, 9, 7, augmentation, rng(seed))
        x, y = pipeline.batch(index, rng(seed))
        assert torch.equal(y, labels[index]) and x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        for i, k in enumerate(index):
            one = one_image(images[k], i, moved, augmentation, fill, levels)
            assert np.array_equal(x[i].numpy(), one), moved
            seen.add((int(moved.down[i]), int(moved.right[i])))
    assert len(seen) > 60, "some of the 81 crops never occur"


def test_decisions_are_random_in_every_part_and_repeat():
    augmentation = Augmentation(pad=2, cutout=4)
    moved, again, other = (decide(4000, 9, 7, augmentation, rng(s)) for s in (0, 0, 1))
    for name, values in zip(Decisions._fields, moved, strict=True):
        assert torch.equal(values, getattr(again, name))
        assert not torch.equal(values, getattr(other, name)), name
        count = torch.unique(values, return_counts=True)[1].double()
        chances = {"mirrored": 2, "cut": 2, "cut_row": 9, "cut_col": 7}.get(name, 5)
        assert len(count) == chances
        assert (count / 4000 - 1 / chances).abs().max() < 0.04, f"{name} is not uniform"


def test_training_still_draws_what_it_drew():
    """Crops down, crops right, mirror images, in this order: old runs can be repeated."""
    images, labels = random_images(n=30)
    pipeline = Pipeline(images, labels, 1, Augmentation(3), [0.0] * 3)
    out, _ = next(pipeline.augmented([labels], rng(1)))
    draws = rng(1)
    down, right = (torch.randint(-3, 4, (30, 1), generator=draws) for _ in range(2))
    moved = Decisions(down, right, torch.rand(30, 1, generator=draws) < 0.5)
    for i in range(30):
        one = one_image(images[i], i, moved, Augmentation(3), None, 1)
        assert np.array_equal(out[i].numpy(), one)


def test_an_epoch_has_every_image_once_and_full_batches_only():
    images, labels = random_images(n=20)
    pipeline = Pipeline(images, labels, 255, None, [0.0] * 3)
    epochs = [list(pipeline.batches(6, rng(seed))) for seed in (0, 1)]
    for batches in epochs:
        assert [len(y) for _, y in batches] == [6, 6, 6]
        order = torch.cat([y for _, y in batches])
        assert len(order.unique()) == 18
        for x, y in batches:
            assert torch.equal(x, images[y].float() / 255)
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


def test_gather_of_no_decision_is_the_image():
    images, _ = random_images()
    nothing = Decisions(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long))
    nhwc, index = images.permute(0, 2, 3, 1), torch.tensor([7, 0, 7])
    for padding in ("reflect", "zero"):
        assert torch.equal(gather(nhwc, index, nothing, padding), nhwc[index])


@pytest.mark.parametrize(
    "values, said",
    [({"pad": -1}, "-1"), ({"cutout": -2}, "-2"), ({"padding": "mirror"}, "reflect, zero")],
)
def test_refused_augmentations(values, said):
    with pytest.raises(ValueError, match=said):
        Augmentation(**values)


def test_reflection_of_more_than_the_image_is_refused():
    images, labels = random_images()
    with pytest.raises(ValueError, match="at most 6"):
        Pipeline(images, labels, 255, Augmentation(pad=7), [0.0] * 3)
    Pipeline(images, labels, 255, Augmentation(pad=7, padding="zero"), [0.0] * 3)


@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize("cutout", [0, 4])
def test_plain_transform_makes_images_of_the_same_kind(padding, cutout):
    """Every image that torchvision's transforms make is one that some decision makes."""
    image = random_images(n=1, h=6, w=6)[0]
    augmentation = Augmentation(pad=1, padding=padding, cutout=cutout)
    transform = plain_recipe.transform_of(augmentation, (6, 6), [0.5] * 3)
    images = plain_recipe.Images(image.permute(0, 2, 3, 1).numpy(), [3], transform)
    zero = torch.zeros(1, 1, dtype=torch.long)
    squares = [(False, 0, 0)]
    squares += [(True, y, x) for y in range(6) for x in range(6)] if cutout else []
    possible = {}
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            for mirrored in (False, True):
                for cut, y, x in squares:
                    moved = Decisions(zero + down, zero + right, zero == int(not mirrored),
                                      zero == int(not cut), zero + y, zero + x)  # fmt: skip
                    one = one_image(image[0], 0, moved, augmentation, [0.5] * 3, 255)
                    possible[one.tobytes()] = (down, right, mirrored, cut)
    seen = set()
    for _ in range(200):
        x, y = images[0]
        assert y == 3 and x.numpy().tobytes() in possible
        seen.add(possible[x.numpy().tobytes()][:3])
    assert len(seen) == 18
    assert not cutout or len({possible[images[0][0].numpy().tobytes()][3] for _ in range(50)}) == 2
