"""VGG16-BN for small images (Simonyan & Zisserman 2015, with BatchNorm; as in F-SAM)."""

from torch import Tensor, nn

from bench.models.layers import he_normal

POOL = 0
LAYERS = (1, 1, POOL, 2, 2, POOL, 4, 4, 4, POOL, 8, 8, 8, POOL, 8, 8, 8, POOL)  # in widths


class VGG16BN(nn.Module):
    """13 3x3 convolutions with bias, BN and ReLU, five poolings, three linear layers with dropout
    before the first two; 15,253,578 parameters for 3 channels and 10 classes.

    width: channels of the first convolution.
    """

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = channels
        for factor in LAYERS:
            if factor == POOL:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))  # 8x8 images end as one pixel, too
                continue
            c_out = factor * width
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
            c_in = c_out
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(c_in, c_in), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(c_in, c_in), nn.ReLU(),
            nn.Linear(c_in, classes),
        )  # fmt: skip
        he_normal(self, "fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))
