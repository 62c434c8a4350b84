"""Base optimizers of other people's: how each is built, its steps alone, and its steps in SAM."""

import io
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_optimizer
import timm.optim
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from .drawn import give

SHAPES = [(6, 4), (5,), (3, 2, 2, 2)]
MATRICES = [(6, 4), (4, 6)]
MOMENTUM = ("sgd", "sgdc", "sgdw", "csgdc", "csgdw", "nesterov", "nesterovw", "nlarc", "nlars")
USE_MUON = ("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon")
GPU = ("bnb", "fused")  # how timm's names begin that need bitsandbytes or apex


class Foreign(NamedTuple):
    """How to build one of a library's optimizers.

    Attributes:
        kind: its class, or one with arguments bound.
        shapes: of parameters that it takes.
        groups: keys of the first group, with an lr of its own, and of the second.
        hyper: the arguments for both.
        takes_model: it is built from a module.
    """

    kind: Callable[..., Optimizer]
    shapes: Sequence[tuple] = SHAPES
    groups: tuple[dict, dict] = ({"lr": 0.02}, {})
    hyper: dict[str, Any] = {"lr": 0.01}
    takes_model: bool = False

    def build(self, params: Sequence[Parameter]) -> Optimizer:
        seed(0)
        if self.takes_model:
            return self.kind(nn.ParameterList(params), **self.hyper)
        first, second = self.groups
        return self.kind([{"params": params[:1], **first}, {"params": params[1:], **second}],
                         **self.hyper)

    def weights(self) -> list[Parameter]:
        generator = torch.Generator().manual_seed(3)
        return [Parameter(torch.randn(shape, generator=generator)) for shape in self.shapes]


def class_of(library: str, name: str, bound: bool = True) -> Any:
    if library == "torch":
        return getattr(torch.optim, name)
    if library == "timm":
        return timm.optim.get_optimizer_class(name, bind_defaults=bound)
    return pytorch_optimizer.load_optimizer(name)


def foreign(library: str, name: str) -> Foreign:
    case = Foreign(class_of(library, name))
    if (library, name) == ("torch", "Muon") or name in ("lorarite", "spectralsphere"):
        return case._replace(shapes=MATRICES)
    if library == "pytorch_optimizer" and name in USE_MUON:
        return case._replace(groups=({"lr": 0.02, "use_muon": True}, {"use_muon": False}))
    if library == "timm" and name in MOMENTUM:
        return case._replace(hyper={"lr": 0.01, "momentum": 0.9})
    if name == "ranger21":
        return case._replace(hyper={"lr": 0.01, "num_iterations": 100})
    return case._replace(takes_model=name == "adammini")


def names_of(library: str) -> list[str]:
    """What a library has, whatever that is today."""
    if library == "torch":
        return [name for name, x in vars(torch.optim).items() if isinstance(x, type)
                and issubclass(x, Optimizer) and x is not Optimizer]
    if library == "timm":
        return [name for name in timm.optim.list_optimizers() if not name.startswith(GPU)]
    return pytorch_optimizer.get_supported_optimizers()


def gradients(params: Sequence[Tensor], i: int) -> list[Tensor]:
    """The gradient of step i's function, at the weights as they are."""
    with torch.no_grad():
        return [0.3 * torch.sin(3 * p + i + 0.7 * k) + 0.1 * p for k, p in enumerate(params)]


def seed(i: int) -> None:
    """Some draw random numbers in a step."""
    torch.manual_seed(i)
    random.seed(i)
    np.random.seed(i)


def step_alone(params: Sequence[Tensor], base: Optimizer, grads: Sequence[Tensor], i: int) -> None:
    give(params, grads)
    seed(i)
    base.step()


def step_wrapped(params: Sequence[Tensor], opt: Any, i: int) -> list[Tensor]:
    """Both passes.

    Returns:
        The gradients at w + e.
    """
    give(params, gradients(params, i))
    opt.first_step(zero_grad=True)
    second = gradients(params, i)
    give(params, second)
    seed(i)
    opt.second_step()
    return second


def filed(state: dict, weights_only: bool = True) -> dict:
    """What torch.save and torch.load make of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def is_plain(state: dict) -> bool:
    """Whether torch.load takes a state with weights_only=True."""
    try:
        filed(state)
    except Exception:
        return False
    return True


def differences(x: Any, y: Any, where: str = "") -> list[str]:
    """Where y is not x, to the bit. Dictionaries in y may hold more."""
    if isinstance(x, dict) and isinstance(y, dict):
        missing = [f"{where}[{k!r}] is missing" for k in x.keys() - y.keys()]
        return missing + [d for k in x.keys() & y.keys()
                          for d in differences(x[k], y[k], f"{where}[{k!r}]")]
    if isinstance(x, (list, tuple, deque)) and type(x) is type(y) and len(x) == len(y):
        return [d for i, (a, b) in enumerate(zip(x, y, strict=True))
                for d in differences(a, b, f"{where}[{i}]")]
    if type(x).__module__.startswith("pytorch_optimizer") and type(x) is type(y):
        return differences(vars(x), vars(y), where)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        same = x.dtype == y.dtype and x.shape == y.shape and bool(
            ((x == y) | (x.isnan() & y.isnan())).all())
    else:
        same = type(x) is type(y) and bool(np.all(x == y))
    return [] if same else [f"{where}: {x} and {y}"]
