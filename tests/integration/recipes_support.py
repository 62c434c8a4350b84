"""What the recipes are held against: SAM written out per parameter, with nothing of fastsam's."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "recipes"


def code_of(page: Path) -> str:
    """The page's python blocks, every line at its own line number, all others blank."""
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        if fence:
            inside = line == "```python"
        kept.append(line if inside and not fence else "")
    return "\n".join(kept) + "\n"


def execute(page: Path, module: ModuleType) -> None:
    exec(compile(code_of(page), page, "exec"), module.__dict__)


def sam_gradient(model: nn.Module, loss: Callable[[], Tensor], rho: float,
                 ascent: Callable[[], Tensor] | None = None) -> list[Tensor]:
    """The gradient of `loss` at w + rho g / ||g||, with g that of `ascent` (default: loss) at w.

    Weights and buffers are afterwards as the first pass left them.
    """
    params = list(model.parameters())
    first = torch.autograd.grad((ascent or loss)(), params)
    saved = copy.deepcopy(model.state_dict())
    norm = sum(g.square().sum() for g in first).sqrt()
    with torch.no_grad():
        for p, g in zip(params, first, strict=True):
            p.add_(rho * g / norm)
    sharp = torch.autograd.grad(loss(), params)
    model.load_state_dict(saved)
    return list(sharp)


def descend(model: nn.Module, base: Optimizer, gradients: Iterable[Tensor]) -> None:
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g
    base.step()


def sam_step(model: nn.Module, base: Optimizer, loss: Callable[[], Tensor], rho: float,
             ascent: Callable[[], Tensor] | None = None) -> None:
    descend(model, base, sam_gradient(model, loss, rho, ascent))


def assert_same(model: nn.Module, expected: nn.Module, tolerance: float = 1e-9) -> None:
    """Every weight and buffer agrees, to the last bit where the tolerance is 0."""
    state, wanted = model.state_dict(), expected.state_dict()
    assert [k.rpartition("_orig_mod.")[2] for k in state] == list(wanted)
    for (name, value), other in zip(state.items(), wanted.values(), strict=True):
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance,
                                   msg=lambda m, name=name: f"{name}: {m}")
