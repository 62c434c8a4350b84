"""PreActResNet-18 for small images (He et al. 2016, "Identity mappings"; as in SAM_AT)."""

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.layers import conv


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
    """Four stages of two blocks; 11,172,170 parameters for 3 channels and 10 classes.

    width: channels of the stem and first stage.
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
