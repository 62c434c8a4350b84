"""A schedule for rho, as torch's schedulers are for the learning rate."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .checks import is_number


class RhoScheduler:
    """Sets every group's rho to its initial rho times `rho_lambda(step)`, like LambdaLR.

    Args:
        optimizer: any optimizer of this package; its groups' rho now is the initial one, and that
            of a group that is added later is what it has at the next `step`. A rho that is a
            tensor is written in place, for all groups that share it.
        rho_lambda: maps the number of `step` calls so far (0 at construction) to a factor of at
            least 0.

    Raises:
        ValueError: a group without rho; a factor below 0 or not finite, at `step` and
            `load_state_dict` too, which then change nothing.
    """

    def __init__(self, optimizer: Optimizer, rho_lambda: Callable[[int], float]):
        if any("rho" not in group for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has a group without rho: "
                             "use an optimizer of fastsam")
        self.optimizer, self.rho_lambda = optimizer, rho_lambda
        self._set(0, [])

    def step(self) -> None:
        """Go on by one: call it once per optimizer step (or epoch), after it."""
        self._set(self.last_step + 1, self.base_rhos)

    def _set(self, step: int, base_rhos: list[float]) -> None:
        factor = self.rho_lambda(step)
        fits = is_number(factor) or isinstance(factor, Tensor)
        if not (fits and 0 <= factor < float("inf")):
            raise ValueError(f"rho_lambda({step}) = {factor!r} is out of range: "
                             "return a finite factor of at least 0")
        groups = self.optimizer.param_groups
        tensors = {id(group["rho"]): rho for group, rho in zip(groups, base_rhos, strict=False)
                   if isinstance(group["rho"], Tensor)}  # which later groups may share
        new = [tensors.get(id(group["rho"]), float(group["rho"]))
               for group in groups[len(base_rhos):]]
        self.last_step, self.base_rhos = step, base_rhos + new
        for group, rho in zip(groups, self.base_rhos, strict=False):  # a state may know more
            if isinstance(group["rho"], Tensor):
                group["rho"].fill_(rho * factor)
            else:
                group["rho"] = rho * factor
        self._last_rho = [group["rho"].clone() if isinstance(group["rho"], Tensor) else
                          group["rho"] for group in groups]

    def get_last_rho(self) -> list[float | Tensor]:
        """Every group's rho as it was last set here, as `get_last_lr` of torch's schedulers; a copy
        of one that is a tensor."""
        return [rho.clone() if isinstance(rho, Tensor) else rho for rho in self._last_rho]

    def state_dict(self) -> dict[str, Any]:
        """How far the schedule is, and the initial radii; not the function."""
        return {"last_step": self.last_step, "base_rhos": list(self.base_rhos)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Groups that it does not know keep their initial rho.
        """
        loaded = list(state_dict["base_rhos"])
        self._set(state_dict["last_step"], loaded + self.base_rhos[len(loaded):])
