"""Wide residual networks (Zagoruyko & Komodakis 2016), and the one that F-SAM calls WRN-28-10."""

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.layers import conv, he_normal
from bench.models.preactresnet import PreActBlock

WIDEN = 10


class WideResNet(nn.Module):
    """A stem of 16 channels and three stages of 160, 320 and 640, `blocks` pre-activation blocks
    each; He's weights over the inputs, no dropout.

    width: 64 for these channels, others scale them by width / 64. zero_head: start from logits 0.
    """

    def __init__(
        self, channels: int, classes: int, width: int, blocks: int, zero_head: bool
    ) -> None:
        super().__init__()
        c_in = max(1, 16 * width // 64)
        self.stem = conv(channels, c_in, 3)
        layers = []
        for factor, stride in [(1, 1), (2, 2), (4, 2)]:
            c_out = max(1, 16 * WIDEN * factor * width // 64)
            for i in range(blocks):
                layers.append(PreActBlock(c_in, c_out, stride if i == 0 else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(c_in)
        self.head = nn.Linear(c_in, classes)
        he_normal(self, "fan_in")
        nn.init.zeros_(self.head.bias)
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.head(h.mean(dim=(2, 3)))


class WRN28x10(WideResNet):
    """WRN-28-10: four blocks a stage; 36,479,194 parameters for 3 channels and 10 classes."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__(channels, classes, width, blocks=4, zero_head=False)


class FSAMWideResNet(WideResNet):
    """What the F-SAM code builds under the name WRN-28-10: five blocks a stage, as WRN-34-10 has,
    and a linear layer that starts at 0; 46,160,474 parameters for 3 channels and 10 classes."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__(channels, classes, width, blocks=5, zero_head=True)
