"""What every network here is made of."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """x -> (x - mean) / std per channel; mean and std travel in the state_dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


def he_normal(net: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Draw every convolution's weights from N(0, 2/n) (He et al. 2015); biases become 0.

    mode: "fan_in" for n = kernel area times input channels, "fan_out" for output channels.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
