"""The published size, normalisation inside the model, and the shortcut's place."""

import pytest
import torch

from bench.models import PreActBlock, build_model


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("classes, parameters", [(10, 11_172_170), (100, 11_218_340)])
def test_full_preactresnet18_has_the_published_size(classes, parameters):
    assert count(build_model("preactresnet18", 64, 3, classes, [0.5] * 3, [0.2] * 3)) == parameters


@pytest.mark.parametrize("name", ["preactresnet18", "smallconv"])
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 32)])
def test_takes_images_and_returns_logits(name, channels, size):
    model = build_model(name, 4, channels, 7, [0.5] * channels, [0.2] * channels)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


def test_normalisation_is_inside_and_stored():
    torch.manual_seed(0)
    model = build_model("smallconv", 4, 2, 3, [0.1, 0.9], [0.5, 0.2]).eval()
    x = torch.rand(4, 2, 8, 8)
    by_hand = torch.stack([(x[:, 0] - 0.1) / 0.5, (x[:, 1] - 0.9) / 0.2], dim=1)
    assert torch.equal(model(x), model[1](by_hand))
    assert {"0.mean", "0.std"} <= model.state_dict().keys()


def test_shortcut_sees_the_preactivation_and_has_no_batchnorm():
    block = PreActBlock(4, 8, 2).eval()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        block.conv2.weight.zero_()
        assert torch.equal(block(x), block.shortcut(torch.relu(block.bn1(x))))
    assert PreActBlock(4, 4, 1).shortcut is None


@pytest.mark.parametrize("name, width, said", [("resnet", 8, "'resnet'"), ("smallconv", 0, "0")])
def test_refuses(name, width, said):
    with pytest.raises(ValueError, match=said):
        build_model(name, width, 3, 10, [0.5] * 3, [0.2] * 3)
