"""A network that is fast to train (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds"), by width.

From there: the layout, the whitening first layer and the identities that the convolutions start
from. Not from there: BatchNorm has its usual momentum and a trained scale, nothing scales the
logits, and the whitening layer's bias is trained to the end.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.layers import conv

KERNEL = 2
SMALLEST = 5e-4  # added to the variances, so that the faintest directions are not blown up
AT_A_TIME = 500


class Whitening(nn.Module):
    """A convolution with 2x2 patches' principal directions, scaled to variance 1, and their
    negatives. The directions are not trained: they are a buffer, set once by `fit`, that travels in
    the state_dict. The bias is trained.
    """

    directions: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        n = channels * KERNEL**2
        v = nn.init.orthogonal_(torch.empty(n, n)).view(n, channels, KERNEL, KERNEL)
        self.register_buffer("directions", torch.cat([v, -v]))
        self.bias = nn.Parameter(torch.zeros(2 * n))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the directions from images, (N, C, H, W)."""
        n = self.directions[0].numel()
        total, products, count = x.new_zeros(n).double(), x.new_zeros(n, n).double(), 0
        for part in x.split(AT_A_TIME):
            patches = F.unfold(part, KERNEL).transpose(0, 1).flatten(1).double()
            total, products = total + patches.sum(1), products + patches @ patches.T
            count += patches.shape[1]
        mean = total / count
        variances, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
        w = (vectors / (variances.clamp_min(0) + SMALLEST).sqrt()).T
        self.directions.copy_(torch.cat([w, -w]).view_as(self.directions))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.directions, self.bias)


class Group(nn.Module):
    """3x3 convolution, 2x2 pooling, BN, activation, 3x3 convolution, BN, activation."""

    def __init__(self, c_in: int, c_out: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c_out, 3), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv(c_out, c_out, 3), nn.BatchNorm2d(c_out)
        self.activation = activation
        for layer in (self.conv1, self.conv2):
            nn.init.dirac_(layer.weight.data[: layer.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.bn1(pooled(self.conv1(x))))
        return self.activation(self.bn2(self.conv2(h)))


def pooled(h: Tensor) -> Tensor:
    """Return the maxima of 2x2 pixels; one pixel, of an 8x8 image, stays."""
    return F.max_pool2d(h, 2) if min(h.shape[2:]) > 1 else h


class Airbench(nn.Module):
    """Whitening, three groups of N, 4N and 4N channels, the maximum of each channel, a linear
    layer; N = 64 as published.

    width: N.
    """

    def __init__(
        self, channels: int, classes: int, width: int = 64,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:  # fmt: skip
        super().__init__()
        self.whitening, self.activation = Whitening(channels), activation
        widths = [len(self.whitening.bias), width, 4 * width, 4 * width]
        self.groups = nn.Sequential(
            *(Group(a, b, activation) for a, b in zip(widths, widths[1:], strict=False))
        )
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.groups(self.activation(self.whitening(x)))
        return self.head(h.amax(dim=(2, 3)))


class AirbenchReLU(Airbench):
    """The same with ReLU, which a CPU computes faster and attacks' gradients do not fade in."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__(channels, classes, width, F.relu)
