"""A network of seconds that has learnt scikit-learn's digits, for what attacks trained ones."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import build_model


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images, (N, 1, 8, 8) in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(bunch.target).long()


@lru_cache(maxsize=1)
def model() -> nn.Module:
    """Trained on all but the last 297 images; in eval mode."""
    torch.manual_seed(0)
    x, y = (part[:1500] for part in digits())
    net = build_model("smallconv", 8, 1, 10, [0.3], [0.38])
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for index in torch.randperm(len(x)).split(50):
            F.cross_entropy(net(x[index]), y[index]).backward()
            opt.step()
            opt.zero_grad()
    return net.eval()


def held_out(n: int) -> tuple[Tensor, Tensor]:
    """n of the last 297 images that the model gets right, and labels."""
    x, y = (part[1500:] for part in digits())
    net = model()
    with torch.no_grad():
        right = (net(x).argmax(1) == y).nonzero().squeeze(1)
    return x[right[:n]], y[right[:n]]
