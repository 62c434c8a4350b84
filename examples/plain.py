"""A plain training loop: SGD, SAM or Friendly-SAM on CIFAR-10.

    python examples/plain.py --method fsam --data .data

`--data` is where torchvision finds (or with `--download` puts) CIFAR-10. Without it the loop trains
on scikit-learn's digits, and where these are missing too on images that it makes.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from fastsam import SAM, FriendlySAM, freeze_bn_stats


def cifar10(folder, download):
    from torchvision.datasets import CIFAR10

    parts = [CIFAR10(folder, train=train, download=download) for train in (True, False)]
    return "CIFAR-10", [(torch.from_numpy(part.data).permute(0, 3, 1, 2) / 255,
                         torch.tensor(part.targets)) for part in parts]


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels, order = torch.from_numpy(data.target), torch.randperm(len(data.target))
    train, test = order[:1400], order[1400:]
    return "scikit-learn's digits", [(images[i], labels[i]) for i in (train, test)]


def made():
    labels = torch.randint(10, (2000,))
    images = torch.randn(10, 3, 8, 8)[labels] + 2 * torch.randn(2000, 3, 8, 8)
    return "made images", [(images[:1600], labels[:1600]), (images[1600:], labels[1600:])]


def load(folder, download):
    """CIFAR-10, else digits, else made images: the first that is there."""
    torch.manual_seed(0)
    if folder or download:
        return cifar10(folder or ".data", download)
    try:
        return digits()
    except ImportError:
        return made()


def network(channels, classes=10, width=32):
    def block(a, b, stride):
        conv = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU())

    return nn.Sequential(
        block(channels, width, 1), block(width, 2 * width, 2), block(2 * width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))


def optimizer(method, params):
    base = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)
    if method == "sgd":
        return torch.optim.SGD(params, **base)
    if method == "sam":
        return SAM(params, torch.optim.SGD, rho=0.1, **base)
    return FriendlySAM(params, torch.optim.SGD, rho=0.1, lmbda=0.6, **base)


def shifted(x, by):
    """The images, all shifted by the same few pixels."""
    dx, dy = torch.randint(2 * by + 1, (2,)).tolist()
    h, w = x.shape[2:]
    return pad(x, (by,) * 4)[:, :, dx:dx + h, dy:dy + w]


def step(model, opt, x, y):
    loss = cross_entropy(model(x), y)
    loss.backward()
    if isinstance(opt, SAM):
        opt.first_step(zero_grad=True)
        with freeze_bn_stats(model):
            cross_entropy(model(x), y).backward()
    opt.step()
    opt.zero_grad()
    return loss.detach()


@torch.no_grad()
def accuracy(model, x, y):
    model.eval()
    right = sum((model(a).argmax(1) == b).sum()
                for a, b in zip(x.split(500), y.split(500), strict=True))
    model.train()
    return 100 * right.item() / len(y)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["sgd", "sam", "fsam"], default="fsam")
    parser.add_argument("--data", help="folder of CIFAR-10, as torchvision keeps it")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 (170 MB)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="two epochs of 512 images")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, ((x, y), test) = load(args.data, args.download)
    if args.quick:
        x, y, args.epochs = x[:512], y[:512], 2
    print(f"{args.method} on {name}: {len(x)} images, on {device}")
    x, y, test = x.to(device), y.to(device), [t.to(device) for t in test]
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x, test[0] = (x - mean) / std, (test[0] - mean) / std
    model = network(x.shape[1]).to(device)
    opt = optimizer(args.method, model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, 0.1, args.epochs * (len(x) // args.batch), cycle_momentum=False)
    for epoch in range(args.epochs):
        begin, losses = time.perf_counter(), []
        for batch in torch.randperm(len(x), device=device).split(args.batch):
            if len(batch) == args.batch:
                losses.append(step(model, opt, shifted(x[batch], by=1), y[batch]))
                schedule.step()
        print(f"epoch {epoch + 1:2}  loss {torch.stack(losses).mean():.3f}  test accuracy "
              f"{accuracy(model, *test):.1f} %  {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
