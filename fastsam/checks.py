"""What the optimizers refuse: each an error that names the value and the way out."""

import difflib
import inspect
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .distributed import is_sharded
from .space import is_dense, local

INF = float("inf")
MAY_BE_TENSORS = ("rho", "sigma", "lmbda", "lr", "weight_decay")


def check_group(group: dict[str, Any]) -> None:
    """Refuse hyper-parameters of SAM's own that are out of range, by name and value. Values of
    tensors are on a device and not read."""
    check_number(group, "rho", 0, INF, "a finite radius of at least 0")
    check_number(group, "eta", 0, INF, "a finite number of at least 0")
    check_number(group, "sigma", -INF, INF, "a finite number, such as 1.0")
    check_number(group, "lmbda", 0, 1, "a factor in [0, 1), such as 0.9")
    check_number(group, "alpha", -INF, INF, "a finite number, such as 0.4")
    for name in ("adaptive", "perturb"):
        if group.get(name, True) not in (True, False):
            raise ValueError(f"{name}={group[name]!r} is neither True nor False")
    if group.get("scale", "all") not in ("all", "weights"):
        raise ValueError(f"scale={group['scale']!r} is unknown: use 'all' or 'weights'")


def check_groups(groups: Sequence[dict[str, Any]], base: str | None, along_v: bool) -> None:
    """Refuse values of SAM's, of a fused base, and of one whose momentum is to be climbed along."""
    for group in groups:
        check_group(group)
    if base:
        refuse_unfused(groups)
    if along_v:
        refuse_no_momentum(groups)


def refuse_no_momentum(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse SGD without momentum where the climb is along its momentum."""
    for group in groups:
        if group.get("perturb", True) and group.get("momentum", 1) == 0:
            raise ValueError("momentum=0 leaves nothing to climb along: give momentum, such as "
                             "0.9, or perturb=False to the group")


def check_number(group: dict[str, Any], name: str, low: float, high: float, wanted: str) -> None:
    """Refuse a number below `low`, one that is not below `high`, and what is no number."""
    x = group.get(name, low if low > -INF else 1)
    if isinstance(x, Tensor) and name in MAY_BE_TENSORS:
        if x.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(x.shape)}: use one of one "
                             "element")
    elif not isinstance(x, Real):
        raise ValueError(f"{name}={x!r} is not a number: use {wanted}")
    elif not (low <= x < high and x > -INF):
        raise ValueError(f"{name}={x} is out of range: use {wanted}")


def check_options(interval: int, start: int, masters: bool, fused: str | None, base: type) -> None:
    """Refuse options of the constructor that are out of range, by name and value."""
    if not isinstance(interval, Integral) or interval < 1:
        raise ValueError(f"interval={interval!r} is out of range: use 1 to climb at every step, "
                         "k to climb at every k-th")
    if not isinstance(start, Integral) or start < 0:
        raise ValueError(f"start={start!r} is out of range: use the number of plain steps before "
                         "the first climb, at least 0")
    if masters and not fused:
        raise ValueError(f"master_weights=True needs a fused base optimizer, not {base.__name__}: "
                         "use torch.optim.SGD, Adam or AdamW")


def check_base(kind: object, own: type, kwargs: dict[str, Any]) -> None:
    """Refuse a base optimizer that cannot be one, and arguments that nobody has.

    Raises:
        TypeError: it is no optimizer class, or an argument is unknown.
        ValueError: it needs a closure of its own (LBFGS), or is a SAM itself.
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise TypeError(f"base_optimizer={kind!r} is not an optimizer class: "
                        "pass the class, such as torch.optim.SGD, and its arguments by name")
    if hasattr(kind, "first_step"):
        raise ValueError(f"base_optimizer={kind.__name__} climbs itself: pass the optimizer that "
                         "is to take the step, such as torch.optim.SGD")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"base_optimizer={kind.__name__} calls a closure in every step, several "
                         "times: SAM takes optimizers that step with the gradients there are, "
                         "such as torch.optim.SGD")
    known = inspect.signature(kind.__init__).parameters
    if any(x.kind is inspect.Parameter.VAR_KEYWORD for x in known.values()):
        return
    mine = [*inspect.signature(own.__init__).parameters, "interval", "start", "master_weights",
            "backend"]
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, [*mine, *known], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name!r} is an argument of neither {own.__name__} nor "
                            f"{kind.__name__}{hint}")


def refuse_unusable(p: Tensor) -> None:
    """Refuse parameters that have no plain memory of real numbers of their own."""
    if is_lazy(p):
        raise ValueError("a parameter of a lazy module has no shape yet: run a forward pass of "
                         "the model before the optimizer is built")
    if not p.is_floating_point():
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is {p.dtype}: "
                         "SAM takes real floating-point parameters (see torch.view_as_real)")
    odd = is_traceable_wrapper_subclass(p) and not is_sharded(p)
    if p.device.type == "meta" or p.layout is not torch.strided or odd:
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is a {type(p).__name__} with "
                         f"layout {p.layout} on {p.device}: SAM takes plain dense tensors and "
                         "DTensors")


def refuse_twice(params: Sequence[Tensor]) -> None:
    """Refuse a parameter that is given twice."""
    seen = set[int]()
    for p in params:
        if id(p) in seen:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is given twice: give each "
                             "parameter once, in one group")
        seen.add(id(p))


def refuse_shared(params: Sequence[Tensor]) -> None:
    """Refuse two parameters over the same memory, and one over its own: saving the second element
    would save the first one moved."""
    with torch.no_grad():
        for near in neighbours([local(p) for p in params if p.numel()]):
            if len(near) == 1 and is_dense(near[0]):
                continue
            if all(map(is_dense, near)) or repeats(torch.cat([places(p) for p in near])):
                raise ValueError("two parameters share memory, or one shares it with itself: tie "
                                 "weights by using one Parameter twice in the model, not two "
                                 "over the same tensor")


def neighbours(memory: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors whose stretches of memory overlap, gaps included, together."""
    near: list[Tensor] = []
    device, reached = None, 0
    for p in sorted(memory, key=lambda p: (str(p.device), p.data_ptr())):
        if near and (p.device != device or p.data_ptr() >= reached):
            yield near
            near, reached = [], 0
        near.append(p)
        span = sum(s * (n - 1) for s, n in zip(p.stride(), p.shape, strict=True)) + 1
        device, reached = p.device, max(reached, p.data_ptr() + span * p.element_size())
    if near:
        yield near


def places(p: Tensor) -> Tensor:
    """The addresses of p's bytes."""
    where = torch.arange(p.element_size())
    for s, n in zip(p.stride(), p.shape, strict=True):
        where = (where[:, None] + s * p.element_size() * torch.arange(n)).flatten()
    return where + p.data_ptr()


def repeats(addresses: Tensor) -> bool:
    return len(addresses.unique()) < len(addresses)


def refuse_unfused(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse the options of torch's SGD, Adam and AdamW that the fused step does not have."""
    for group in groups:
        for name in ("maximize", "differentiable", "amsgrad"):
            if group.get(name):
                raise ValueError(f"{name}=True is not supported by the fused step: leave it out, "
                                 "or pass a subclass of the base optimizer to run its own step")
        for name in ("momentum", "dampening", "betas", "eps", "eta"):
            value = group.get(name)
            for x in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(x, Tensor):
                    raise ValueError(f"{name} is a tensor: use a number "
                                     f"({', '.join(MAY_BE_TENSORS)} may be tensors)")
        for name in ("lr", "weight_decay"):
            x = group.get(name)
            if isinstance(x, Tensor) and x.numel() != 1:
                raise ValueError(f"{name} is a tensor of shape {tuple(x.shape)}: use one of one "
                                 "element")
