"""PyramidNet-110 with bottlenecks and alpha 270 (Han, Kim & Kim 2017; as in F-SAM)."""

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.layers import conv, he_normal

ALPHA, BLOCKS = 270, 12  # channels added over all blocks; blocks a stage
EXPANSION = 4


class PyramidBlock(nn.Module):
    """BN, 1x1, BN, ReLU, 3x3, BN, ReLU, 1x1, BN; the shortcut is pooled and padded with zeros."""

    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv(c_in, c, 1)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = conv(c, c, 3, stride)
        self.bn3 = nn.BatchNorm2d(c)
        self.conv3 = conv(c, EXPANSION * c, 1)
        self.bn4 = nn.BatchNorm2d(EXPANSION * c)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.bn1(x))
        h = self.conv2(F.relu(self.bn2(h)))
        h = self.bn4(self.conv3(F.relu(self.bn3(h))))
        skip = x if self.stride == 1 else F.avg_pool2d(x, self.stride, ceil_mode=True)
        return h + F.pad(skip, (0, 0, 0, 0, 0, h.shape[1] - skip.shape[1]))


class PyramidNet110(nn.Module):
    """Three stages of 12 blocks whose bottlenecks widen by 7.5 channels each, from 16 to 286 times
    4; 18,323,787 parameters for 3 channels and 10 classes.

    width: 64 for these channels, others scale them by width / 64.
    """

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        start, step = 16 * width / 64, ALPHA / (3 * BLOCKS) * width / 64
        c_in = max(1, round(start))
        self.stem = nn.Sequential(conv(channels, c_in, 3), nn.BatchNorm2d(c_in))
        blocks = []
        for k in range(3 * BLOCKS):
            c = max(1, round(start + (k + 1) * step))
            blocks.append(PyramidBlock(c_in, c, 2 if k in (BLOCKS, 2 * BLOCKS) else 1))
            c_in = EXPANSION * c
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(c_in)
        self.head = nn.Linear(c_in, classes)
        he_normal(self, "fan_out")

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.head(h.mean(dim=(2, 3)))
