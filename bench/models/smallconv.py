"""Ours: a network of seconds, for tests and for scikit-learn's digits."""

from torch import Tensor, nn

from bench.models.layers import conv


class SmallConv(nn.Module):
    """Three 3x3 convolutions with BatchNorm, the last two of stride 2; for 8x8 to 32x32 images.

    width: channels of the first.
    """

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
