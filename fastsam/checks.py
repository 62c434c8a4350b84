"""What the optimizers refuse: each a ValueError that names the value and the way out."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .flat import is_dense


def check_group(group: dict, ema: str | None) -> None:
    """Refuse hyper-parameters of SAM's own that are out of range, by name and value."""
    rho = group["rho"]
    if not isinstance(rho, Tensor) and not 0 <= rho < float("inf"):
        raise ValueError(f"rho={rho} is out of range: use a finite radius of at least 0")
    if ema is None:
        return
    sigma, lmbda = group["sigma"], group["lmbda"]
    if not isinstance(sigma, Tensor) and not -float("inf") < sigma < float("inf"):
        raise ValueError(f"sigma={sigma} is out of range: use a finite number, such as 1.0")
    if not isinstance(lmbda, Tensor) and not 0 <= lmbda < 1:
        raise ValueError(f"lmbda={lmbda} is out of range: use a factor in [0, 1), such as 0.9")


def refuse_unusable(p: Tensor) -> None:
    """Refuse parameters that have no plain memory of real numbers."""
    if not p.is_floating_point():
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is {p.dtype}: "
                         "SAM takes real floating-point parameters (see torch.view_as_real)")
    if p.device.type == "meta" or p.layout is not torch.strided or is_traceable_wrapper_subclass(p):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is a {type(p).__name__} with "
                         f"layout {p.layout} on {p.device}: SAM takes plain dense tensors, not "
                         "sharded ones yet")


def refuse_shared(params: list[Tensor]) -> None:
    """Refuse two parameters over the same memory: saving the second would save the first moved."""
    stretches = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, p.device) for p in params
                       if p.numel() and is_dense(p))
    for (_, end, device), (start, _, other) in pairwise(stretches):
        if start < end and device == other:
            raise ValueError("two parameters share memory: tie weights by using one Parameter "
                             "twice in the model, not two over the same tensor")


def refuse_unfused(groups: list[dict]) -> None:
    """Refuse the options of torch.optim.SGD that the fused step does not have."""
    for group in groups:
        for name in ("maximize", "differentiable"):
            if group.get(name):
                raise ValueError(f"{name}=True is not supported by the fused SGD step: leave it "
                                 "out, or pass a subclass of torch.optim.SGD to run its own step")


def saved_ema(state: dict) -> Tensor | None:
    """F-SAM's m in a saved state: of this class, or of the published code ("momentum")."""
    return state.get("ema", state.get("momentum"))


def check_state(p: Tensor, state: dict) -> None:
    """Refuse a saved m or v that belongs to another parameter."""
    for value in (saved_ema(state), state.get("momentum_buffer")):
        if isinstance(value, Tensor) and value.shape != p.shape:
            raise ValueError(f"a saved state of shape {tuple(value.shape)} does not fit the "
                             f"parameter of shape {tuple(p.shape)}: load the state of this model")
