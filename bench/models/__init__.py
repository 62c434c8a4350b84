"""Image classifiers that take [0, 1] images, normalise them inside, and return logits.

Parameter counts and initialisations are the publications' and their code's; an architecture has a
file of its own.
"""

from collections.abc import Sequence

from torch import nn

from bench.models.airbench import Airbench, AirbenchReLU
from bench.models.layers import Normalize
from bench.models.library import NAMES, library_model
from bench.models.preactresnet import PreActResNet18
from bench.models.pyramidnet import PyramidNet110
from bench.models.resnet import ResNet18
from bench.models.smallconv import SmallConv
from bench.models.vgg import VGG16BN
from bench.models.wideresnet import FSAMWideResNet, WRN28x10
from bench.spelling import meant

FULL_WIDTH = 64
MODELS = {  # (channels, classes, width) -> network
    "preactresnet18": PreActResNet18,
    "smallconv": SmallConv,
    "resnet18": ResNet18,
    "vgg16bn": VGG16BN,
    "wrn28-10": WRN28x10,
    "wrn28-10-fsam": FSAMWideResNet,
    "pyramidnet110": PyramidNet110,
    "airbench": Airbench,
    "airbench-relu": AirbenchReLU,
}


def build_model(
    name: str,
    width: int,
    channels: int,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> nn.Sequential:
    """Return normalisation followed by the network, freshly initialised from torch's global seed.

    name: a key of MODELS, "resnet50", "deit-small", "torchvision:NAME" or "timm:NAME". width: 64
    is the published network, other values scale the channels of those of MODELS (smallconv: the
    first layer's channels). mean, std: one value per input channel, in [0, 1] pixel units. The
    model maps (B, channels, H, W) images in [0, 1] to (B, classes) logits. Raises ValueError for
    an unknown name, a width below 1, and another width than 64 of a library's network.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if name in MODELS:
        return nn.Sequential(Normalize(mean, std), MODELS[name](channels, classes, width))
    if name not in NAMES and not name.startswith(("torchvision:", "timm:")):
        raise ValueError(
            f"unknown model {name!r}{meant(name, [*MODELS, *NAMES])}; choose one of "
            f"{', '.join([*MODELS, *NAMES])}, torchvision:NAME or timm:NAME"
        )
    if width != FULL_WIDTH:
        raise ValueError(
            f"{name!r} has one width and cannot be built with {width}; pass --width {FULL_WIDTH}"
        )
    return nn.Sequential(Normalize(mean, std), library_model(name, channels, classes))
