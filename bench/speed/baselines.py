"""What fastsam is timed beside: SAM and Friendly-SAM as public classes write them, one parameter
after another in plain PyTorch, written from the formulas."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class PerParameterSAM:
    """SAM (Foret et al. 2021): w' = w + rho g / ||g||; or ASAM (Kwon et al. 2021) with T = |w|:
    w' = w + rho T^2 g / ||T g||.

    A few operations a parameter: clone w, scale the gradient, add it; the norm is the norm of the
    parameters' norms. The base optimizer steps at the restored weights.

    A step is first_step (before the pass where it `climbs_first`; only where it `climbs_next`) and
    second_step.

    Args:
        params: parameters, with their gradients in `.grad` before each of the two steps.
        base_optimizer: a torch optimizer class; **kwargs are its arguments.
        rho: radius. adaptive: T = |w| instead of 1.
        compiled: run both steps through torch.compile.
    """

    climbs_first, climbs_next = False, True

    def __init__(
        self,
        params: Iterable[Tensor],
        base_optimizer: type[Optimizer],
        rho: float,
        adaptive: bool = False,
        compiled: bool = False,
        **kwargs: Any,
    ) -> None:
        self.params = list(params)
        self.rho, self.adaptive = rho, adaptive
        self.base_optimizer = base_optimizer(self.params, **kwargs)
        self.state: dict[str, list[Tensor]] = {"saved": [], "ema": []}
        if compiled:
            self.first_step = torch.compile(self.first_step, dynamic=False)
            self.second_step = torch.compile(self.second_step, dynamic=False)

    def directions(self) -> list[Tensor]:
        return [p.grad for p in self.params]

    @torch.no_grad()
    def first_step(self) -> None:
        """Save w and climb to w'."""
        ds = self.directions()
        pairs = list(zip(self.params, ds, strict=True))
        norms = [(p.abs() * d if self.adaptive else d).norm() for p, d in pairs]
        scale = self.rho / (torch.stack(norms).norm() + 1e-12)
        self.state["saved"] = [p.clone() for p in self.params]
        for p, d in pairs:
            p.add_(p.square() * d * scale if self.adaptive else d * scale)

    @torch.no_grad()
    def second_step(self) -> None:
        """Return to w, if it climbed, and let the base optimizer step."""
        for p, w in zip(self.params, self.state["saved"], strict=bool(self.state["saved"])):
            p.copy_(w)
        self.base_optimizer.step()
        self.state["saved"] = []


class PerParameterFriendlySAM(PerParameterSAM):
    """Friendly-SAM (Li et al. 2024) in the published code's order: d = g - sigma m with the m of
    the step before, then m = lmbda m + (1 - lmbda) g; at the first step d = g and m = g.

    Args: as PerParameterSAM's, and sigma and lmbda.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        base_optimizer: type[Optimizer],
        rho: float,
        sigma: float,
        lmbda: float,
        **kwargs: Any,
    ) -> None:
        self.sigma, self.lmbda = sigma, lmbda
        super().__init__(params, base_optimizer, rho, **kwargs)

    def directions(self) -> list[Tensor]:
        gs = [p.grad for p in self.params]
        if not self.state["ema"]:
            self.state["ema"] = [g.clone() for g in gs]
            return gs
        ds = []
        for g, m in zip(gs, self.state["ema"], strict=True):
            ds.append(g - self.sigma * m)
            m.mul_(self.lmbda).add_(g, alpha=1 - self.lmbda)
        return ds


def why_not_compile(device: torch.device) -> str | None:
    """Return why torch.compile does not work here, such as a missing C++ compiler; else None.

    Also makes torch.compile raise, rather than run uncompiled, when it has compiled one function
    too often: every peer is compiled for itself.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # whatever the toolchain says
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def pytorch_optimizer_classes() -> tuple[type, type] | None:
    """Return pytorch_optimizer's SAM and FriendlySAM; None where it cannot be imported."""
    try:
        from pytorch_optimizer import SAM, FriendlySAM
    except ImportError:
        return None
    return SAM, FriendlySAM
