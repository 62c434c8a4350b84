"""Image classifiers that take [0, 1] images, normalise them inside, and return logits."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """x -> (x - mean) / std per channel; mean and std travel in the state_dict."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after BN and ReLU; the 1x1 shortcut sees relu(bn1(x))."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = conv(c_out, c_out, 3)
        changes_shape = stride != 1 or c_in != c_out
        self.shortcut = conv(c_in, c_out, 1, stride) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + skip


class PreActResNet18(nn.Module):
    """PreActResNet-18 for small images (He et al. 2016, "Identity mappings"; as in SAM_AT).

    width: channels of the stem and first stage; 64 is the full network, 11,172,170 parameters
    for 3 input channels and 10 classes.
    """

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = conv(channels, width, 3)
        blocks, c_in = [], width
        for c_out, stride in zip(widths, [1, 2, 2, 2], strict=True):
            blocks += [PreActBlock(c_in, c_out, stride), PreActBlock(c_out, c_out, 1)]
            c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(c_in)
        self.head = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.head(h.mean(dim=(2, 3)))


class SmallConv(nn.Module):
    """Three 3x3 convolutions with BatchNorm, the last two of stride 2; for 8x8 to 32x32 images."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        layers, c_in = [], channels
        for c_out, stride in [(width, 1), (2 * width, 2), (4 * width, 2)]:
            layers += [conv(c_in, c_out, 3, stride), nn.BatchNorm2d(c_out), nn.ReLU()]
            c_in = c_out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


MODELS = {"preactresnet18": PreActResNet18, "smallconv": SmallConv}


def build_model(
    name: str,
    width: int,
    channels: int,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> nn.Sequential:
    """Return normalisation followed by the network, freshly initialised from torch's global seed.

    name: a key of MODELS. width: channels of the first layer. mean, std: one value per input
    channel, in [0, 1] pixel units. The model maps (B, channels, H, W) images in [0, 1] to
    (B, classes) logits. Raises ValueError for an unknown name or a width below 1.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return nn.Sequential(Normalize(mean, std), MODELS[name](channels, classes, width))
