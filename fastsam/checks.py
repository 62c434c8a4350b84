"""What the optimizers refuse: each a ValueError that names the value and the way out."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .distributed import is_sharded
from .flat import is_dense, local


def check_group(group: dict) -> None:
    """Refuse hyper-parameters of SAM's own that are out of range, by name and value."""
    rho = group["rho"]
    if not isinstance(rho, Tensor) and not 0 <= rho < float("inf"):
        raise ValueError(f"rho={rho} is out of range: use a finite radius of at least 0")
    eta = group.get("eta", 0)
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta={eta} is out of range: use a finite number of at least 0")
    sigma, lmbda = group.get("sigma", 1), group.get("lmbda", 0)
    if not isinstance(sigma, Tensor) and not -float("inf") < sigma < float("inf"):
        raise ValueError(f"sigma={sigma} is out of range: use a finite number, such as 1.0")
    if not isinstance(lmbda, Tensor) and not 0 <= lmbda < 1:
        raise ValueError(f"lmbda={lmbda} is out of range: use a factor in [0, 1), such as 0.9")


def check_options(interval: int, start: int, masters: bool, fused: str | None, base: type) -> None:
    """Refuse options of the constructor that are out of range, by name and value."""
    if interval < 1:
        raise ValueError(f"interval={interval} is out of range: use 1 to climb at every step, "
                         "k to climb at every k-th")
    if start < 0:
        raise ValueError(f"start={start} is out of range: use the number of plain steps before "
                         "the first climb, at least 0")
    if masters and not fused:
        raise ValueError(f"master_weights=True needs a fused base optimizer, not {base.__name__}: "
                         "use torch.optim.SGD, Adam or AdamW")


def refuse_unusable(p: Tensor) -> None:
    """Refuse parameters that have no plain memory of real numbers."""
    if not p.is_floating_point():
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is {p.dtype}: "
                         "SAM takes real floating-point parameters (see torch.view_as_real)")
    odd = is_traceable_wrapper_subclass(p) and not is_sharded(p)
    if p.device.type == "meta" or p.layout is not torch.strided or odd:
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is a {type(p).__name__} with "
                         f"layout {p.layout} on {p.device}: SAM takes plain dense tensors and "
                         "DTensors")


def refuse_shared(params: list[Tensor]) -> None:
    """Refuse two parameters over the same memory: saving the second would save the first moved.
    Of one with gaps, which may interleave with another, the first element is looked at."""
    with torch.no_grad():
        params = [local(p) for p in params]
    stretches = sorted(
        (p.data_ptr(), p.data_ptr() + (p.nbytes if is_dense(p) else p.element_size()), p.device)
        for p in params if p.numel())
    for (_, end, device), (start, _, other) in pairwise(stretches):
        if start < end and device == other:
            raise ValueError("two parameters share memory: tie weights by using one Parameter "
                             "twice in the model, not two over the same tensor")


def refuse_unfused(groups: list[dict]) -> None:
    """Refuse the options of torch's SGD, Adam and AdamW that the fused step does not have."""
    for group in groups:
        for name in ("maximize", "differentiable", "amsgrad"):
            if group.get(name):
                raise ValueError(f"{name}=True is not supported by the fused step: leave it out, "
                                 "or pass a subclass of the base optimizer to run its own step")
        for name in ("momentum", "dampening", "betas", "eps"):
            value = group.get(name)
            for x in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(x, Tensor):
                    raise ValueError(f"{name} is a tensor: use a number (rho, sigma, lmbda, lr "
                                     "and weight_decay may be tensors)")
