"""The image classifiers of torchvision and timm, freshly initialised: nothing is downloaded."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bench.spelling import meant

NAMES = {"resnet50": "torchvision:resnet50", "deit-small": "timm:deit_small_patch16_224"}
DROP_PATH = {"deit_small_patch16_224": 0.1}  # as DeiT was trained, and F-SAM's code does


class Fitted(nn.Module):
    """A network behind images of its kind: grey ones in three channels, and of its own size.

    size: (H, W) that the network demands, None where it takes any.
    """

    def __init__(self, net: nn.Module, grey: bool, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.net, self.grey, self.size = net, grey, size

    def forward(self, x: Tensor) -> Tensor:
        if self.grey:
            x = x.expand(-1, 3, -1, -1)
        if self.size is not None and x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        return self.net(x)


def library_model(name: str, channels: int, classes: int) -> nn.Module:
    """Return the classifier that "torchvision:NAME", "timm:NAME", or a key of NAMES stands for.

    Raises ValueError for a library that is not installed, for a name it does not have, and for
    channels that the network cannot take.
    """
    library, _, name = NAMES.get(name, name).partition(":")
    return {"torchvision": from_torchvision, "timm": from_timm}[library](name, channels, classes)


def from_torchvision(name: str, channels: int, classes: int) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as e:
        raise ValueError(f"{name!r} needs torchvision ({e}); pip install torchvision") from e
    # in training these two return auxiliary logits as well
    known = set(models.list_models(module=models)) - {"googlenet", "inception_v3"}
    if name not in known:
        raise ValueError(
            f"unknown model 'torchvision:{name}'{meant(name, known)}; choose one of "
            f"{', '.join(sorted(known))}"
        )
    if channels not in (1, 3):
        raise ValueError(
            f"torchvision's {name!r} takes images of 1 or 3 channels, not of {channels}; choose "
            "preactresnet18 or another network of this program"
        )
    net = models.get_model(name, weights=None, num_classes=classes)
    side = getattr(net, "image_size", None)  # the vision transformers'
    return Fitted(net, channels == 1, None if side is None else (side, side))


def from_timm(name: str, channels: int, classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as e:
        raise ValueError(f"'timm:{name}' needs timm ({e}); pip install timm") from e
    if not timm.is_model(name):
        raise ValueError(f"unknown model 'timm:{name}'; timm.list_models() names those there are")
    own: dict[str, Any] = {"drop_path_rate": DROP_PATH[name]} if name in DROP_PATH else {}
    own |= dict(num_classes=classes, in_chans=channels)
    net: Any = timm.create_model(name, pretrained=False, **own)
    demands_size = net.pretrained_cfg.get("fixed_input_size", False)
    return Fitted(net, False, tuple(net.pretrained_cfg["input_size"][1:]) if demands_size else None)
