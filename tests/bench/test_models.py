"""The published sizes, depths and initialisations, normalisation inside, the libraries' nets."""

import math
import sys

import pytest
import torch
from torch import nn

from bench.models import MODELS, build_model
from bench.models.preactresnet import PreActBlock
from bench.models.pyramidnet import PyramidBlock

SIZES = {  # parameters for 10 and for 100 classes
    "preactresnet18": (11_172_170, 11_218_340),
    "resnet18": (11_173_962, 11_220_132),
    "vgg16bn": (15_253_578, 15_299_748),
    "wrn28-10": (36_479_194, 36_536_884),
    "wrn28-10-fsam": (46_160_474, 46_218_164),
    "pyramidnet110": (18_323_787, 18_426_837),
    # 25,557,032 and 22,050,664 with ImageNet's 1,000 classes, of 2,048 and 384 features
    "resnet50": (25_557_032 - 990 * 2049, 25_557_032 - 900 * 2049),
    "deit-small": (22_050_664 - 990 * 385, 22_050_664 - 900 * 385),
}


def full(name, classes=10, channels=3, width=64):
    return build_model(name, width, channels, classes, [0.5] * channels, [0.2] * channels)


def on_meta(name, classes=10):
    with torch.device("meta"):
        return full(name, classes)


@pytest.mark.parametrize("name", SIZES)
def test_it_has_the_published_size(name):
    sizes = [sum(p.numel() for p in on_meta(name, k).parameters()) for k in (10, 100)]
    assert tuple(sizes) == SIZES[name]


@pytest.mark.parametrize(
    "name, wide, narrow, linear",
    [  # convolutions 3x3, 1x1, and linear layers
        ("preactresnet18", 17, 3, 1),  # 18 without the shortcuts
        ("resnet18", 17, 3, 1),
        ("vgg16bn", 13, 0, 3),
        ("wrn28-10", 25, 3, 1),  # 28 convolutions
        ("wrn28-10-fsam", 31, 3, 1),  # 34
        ("pyramidnet110", 1 + 36, 2 * 36, 1),  # 110 layers, no convolution in a shortcut
    ],
)
def test_it_has_the_published_layers(name, wide, narrow, linear):
    layers = list(on_meta(name).modules())
    kernels = [m.kernel_size for m in layers if isinstance(m, nn.Conv2d)]
    assert (kernels.count((3, 3)), kernels.count((1, 1)), len(kernels)) == (
        wide, narrow, wide + narrow
    )  # fmt: skip
    assert sum(isinstance(m, nn.Linear) for m in layers) == linear


@pytest.mark.parametrize("name, side", [("preactresnet18", 4), ("resnet18", 4), ("wrn28-10", 8),
                                        ("wrn28-10-fsam", 8), ("pyramidnet110", 8)])  # fmt: skip
def test_its_last_features_have_the_published_size(name, side):
    net = full(name, width=4)[1].eval()
    seen = []
    net.blocks.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    net(torch.rand(1, 3, 32, 32))
    assert seen[0][2:] == (side, side)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 32)])
def test_takes_images_and_returns_logits(name, channels, size):
    model = full(name, 7, channels, width=4)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)
    assert all(p.requires_grad for p in model.parameters())


def test_normalisation_is_inside_and_stored():
    torch.manual_seed(0)
    model = build_model("smallconv", 4, 2, 3, [0.1, 0.9], [0.5, 0.2]).eval()
    x = torch.rand(4, 2, 8, 8)
    by_hand = torch.stack([(x[:, 0] - 0.1) / 0.5, (x[:, 1] - 0.9) / 0.2], dim=1)
    assert torch.equal(model(x), model[1](by_hand))
    assert {"0.mean", "0.std"} <= model.state_dict().keys()


# ---- beside torchvision's, where theirs differ by what can be taken out


def with_state_of(net, other):
    """Give `other` the tensors of `net`, which come in the same order."""
    tensors = net.state_dict().values()
    names, shapes = zip(*((k, v.shape) for k, v in other.state_dict().items()), strict=True)
    assert [t.shape for t in tensors] == list(shapes)
    other.load_state_dict(dict(zip(names, tensors, strict=True)))
    return other.eval()


def shake(net):
    """Give BatchNorm statistics and weights that a fresh network does not have."""
    g = torch.Generator().manual_seed(1)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
                tensor.normal_(0.5, 0.3, generator=g)
            layer.running_var.uniform_(0.5, 2, generator=g)
    return net.eval()


@torch.no_grad()
def test_resnet18_is_torchvisions_behind_another_stem():
    from torchvision.models import resnet18

    net, other = shake(full("resnet18")[1]), resnet18(num_classes=10)
    other.conv1, other.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x), with_state_of(net, other)(x))


@torch.no_grad()
def test_vgg16bn_is_torchvisions_before_a_smaller_head():
    from torchvision.models import vgg16_bn

    with torch.device("meta"):
        features = vgg16_bn().features
    net, features = shake(full("vgg16bn")[1]), features.to_empty(device="cpu")
    x = torch.randn(2, 3, 32, 32)
    h = with_state_of(net.features, features)(x).flatten(1)
    assert h.shape == (2, 512)
    linear = [layer for layer in net.head if isinstance(layer, nn.Linear)]
    logits = linear[2](torch.relu(linear[1](torch.relu(linear[0](h)))))
    torch.testing.assert_close(net(x), logits)
    net.train()
    assert not torch.equal(net.head(h), net.head(h)), "no dropout"


# ---- blocks


def test_shortcut_sees_the_preactivation_and_has_no_batchnorm():
    block = PreActBlock(4, 8, 2).eval()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        block.conv2.weight.zero_()
        assert torch.equal(block(x), block.shortcut(torch.relu(block.bn1(x))))
    assert PreActBlock(4, 4, 1).shortcut is None


@torch.no_grad()
def test_pyramids_shortcut_is_pooled_and_padded_with_zeros():
    block = PyramidBlock(6, 2, 2).eval()
    block.bn4.weight.zero_()
    x = torch.randn(2, 6, 8, 8)
    pooled = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean(dim=(3, 5))
    out = block(x)
    torch.testing.assert_close(out[:, :6], pooled)
    assert out.shape == (2, 8, 4, 4) and (out[:, 6:] == 0).all()


@torch.no_grad()
def test_pyramids_first_batchnorm_has_no_relu():
    block = PyramidBlock(4, 1, 1).eval()
    x = -torch.rand(2, 4, 4, 4)
    seen = []
    block.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    block(x)
    torch.testing.assert_close(seen[0], block.bn1(x))


def test_pyramid_widens_by_7_and_a_half_channels():
    with torch.device("meta"):
        blocks = full("pyramidnet110")[1].blocks
    widths = [block.conv1.out_channels for block in blocks]
    assert widths[-1] == 286 and blocks[-1].conv3.out_channels == 1144
    for k, width in enumerate(widths, 1):
        assert abs(width - (16 + 7.5 * k)) <= 0.5
    assert [k for k, block in enumerate(blocks) if block.conv2.stride == (2, 2)] == [12, 24]


# ---- initialisation


@pytest.mark.parametrize(
    "name, fan",
    [("vgg16bn", "out"), ("wrn28-10", "in"), ("wrn28-10-fsam", "in"), ("pyramidnet110", "out")],
)
def test_convolutions_start_as_he_et_al_have_them(name, fan):
    convolutions = [m for m in full(name, width=16).modules() if isinstance(m, nn.Conv2d)]
    for layer in convolutions:
        n = math.prod(layer.kernel_size) * getattr(layer, f"{fan}_channels")
        drawn = layer.weight.numel()
        if drawn > 500:  # 6 standard errors
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / n), rel=6 / drawn**0.5)
        assert layer.bias is None or (layer.bias == 0).all()
    assert sum(layer.weight.numel() > 500 for layer in convolutions) > 10


def test_only_the_fsam_wrn_starts_from_logits_of_0():
    x = torch.rand(2, 3, 16, 16)
    assert (full("wrn28-10-fsam", width=4)(x) == 0).all()
    true = full("wrn28-10", width=4)
    assert (true(x) != 0).all() and (true[1].head.bias == 0).all()


# ---- torchvision and timm


@torch.no_grad()
@pytest.mark.parametrize(
    "name, channels",
    [("deit-small", 1), ("torchvision:resnet18", 1), ("timm:resnet10t", 1), ("timm:resnet10t", 4)],
)
def test_libraries_networks_take_images_of_any_size(name, channels):
    model = full(name, 7, channels).eval()
    assert model(torch.rand(2, channels, 40, 24)).shape == (2, 7)


@torch.no_grad()
def test_a_network_of_one_size_sees_its_images_at_that_size():
    model = full("deit-small", 4).eval()
    x = torch.rand(1, 3, 32, 32)
    large = nn.functional.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(x), model(large))
    assert full("resnet50")[1].size is None


def test_torchvisions_see_grey_as_three_equal_channels():
    grey, rgb = (full("torchvision:resnet18", 4, channels).eval() for channels in (1, 3))
    rgb[1].net.load_state_dict(grey[1].net.state_dict())
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), rgb(x.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    "name, width, channels, said",
    [
        ("resnet", 8, 3, "'resnet'.*deit-small"),
        ("smallconv", 0, 3, "0"),
        ("resnet50", 8, 3, "'resnet50'.* 8;.*--width 64"),
        ("timm:resnet10t", 16, 3, "--width 64"),
        ("torchvision:resnet19", 64, 3, "'torchvision:resnet19'.*resnet18"),
        ("torchvision:inception_v3", 64, 3, "inception_v3"),
        ("torchvision:fcn_resnet50", 64, 3, "fcn_resnet50"),
        ("timm:resnet10", 64, 3, "'timm:resnet10'"),
        ("resnet50", 64, 4, "'resnet50'.* 4;"),
    ],
)
def test_refuses(name, width, channels, said):
    with pytest.raises(ValueError, match=said):
        full(name, 10, channels, width)


@pytest.mark.parametrize("name, package", [("resnet50", "torchvision"), ("deit-small", "timm")])
def test_a_library_that_is_missing_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        full(name)
