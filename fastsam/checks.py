"""What the optimizers refuse: each an error that names the value and the way out."""

import difflib
import inspect
from collections.abc import Collection, Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .distributed import is_sharded
from .memory import stretch
from .space import is_dense, local

INF = float("inf")
MAY_BE_TENSORS = ("rho", "sigma", "lmbda", "lr", "weight_decay")

UNFIT = {  # classes, in lower case, whose step() does not show why they cannot be a base
    "alig": "needs a closure's loss in every step",
    "sparseadam": "takes sparse gradients only, which have no perturbation here",
    "adahessian": "differentiates gradients again, in a graph of weights that have moved",
    "sophiah": "differentiates gradients again, in a graph of weights that have moved",
    "lomo": "steps during backward, at the perturbed weights",
    "adalomo": "steps during backward, at the perturbed weights",
    "samwrapper": "climbs itself, with a closure in every step",  # heavyball's
}


def check_group(group: dict[str, Any], own: Collection[str]) -> None:
    """Refuse hyper-parameters of SAM's own that are out of range, by name and value. Values of
    tensors are on a device and not read.

    Args:
        own: the names that are this class's; others, such as Scion's `scale`, are the base's.
    """
    group = {name: group[name] for name in own if name in group}
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


def check_groups(groups: Sequence[dict[str, Any]], own: Collection[str], base: str | None,
                 along_v: bool, mode: str | None) -> None:
    """Refuse values of SAM's, of a fused base, and of one whose momentum is to be climbed along;
    and ASAM's scaling where the class has no such form."""
    for group in groups:
        check_group(group, own)
        if (along_v or mode == "looksam") and group.get("adaptive"):
            raise ValueError(f"adaptive={group['adaptive']!r} in a group, where the class has no "
                             "adaptive form: leave it out, or use ASAM")
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
    x: Any = group.get(name, low if low > -INF else 1)
    if isinstance(x, Tensor):
        refuse_no_number(name, x)
    elif not is_number(x):
        raise ValueError(f"{name}={x!r} is not a number: use {wanted}")
    elif not (low <= x < high and x > -INF):
        raise ValueError(f"{name}={x} is out of range: use {wanted}")


def check_containers(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse groups that are no dicts, parameters that can be walked once only, and numbers of
    steps that are none."""
    for group in groups:
        if not isinstance(group, dict):
            raise ValueError(f"a parameter group is a {type(group).__name__}: use a dict, or "
                             "add_param_group")
        if not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"a group's 'params' is a {type(group.get('params')).__name__}: use "
                             "a list of parameters")
        steps = group.get("sam_steps", 0)
        if type(steps) is not int and not isinstance(steps, Integral) and not (
                isinstance(steps, Tensor) and steps.numel() == 1):
            raise ValueError(f"sam_steps={steps!r} is no number of steps: use an integer, such "
                             "as 0")


def steps_of(groups: Sequence[dict[str, Any]]) -> int:
    """How many steps were taken; a group that someone else made may not know."""
    check_containers(groups)
    return int(max([group.get("sam_steps", 0) for group in groups], default=0))


def params_of(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    check_containers(groups)
    return [p for group in groups for p in group["params"]]


def names_of(group: dict[str, Any]) -> Sequence[str | None]:
    """The names of a group's parameters. Names that do not keep up with the parameters are none,
    as nothing but ASAM's weights asks for them."""
    params, names = group["params"], group.get("param_names") or []
    if len(names) == len(params):
        return names
    if names and group.get("scale") == "weights":
        raise ValueError(f"a group's 'param_names' has {len(names)} names for {len(params)} "
                         "parameters, and scale='weights' goes by names: change both lists")
    return [None] * len(params)


def check_call(zero_grad: object, scaler: object = None) -> None:
    """Refuse a loss, a closure or a scaler where a step takes a flag, and what is no GradScaler."""
    if hasattr(zero_grad, "is_enabled"):
        raise TypeError(f"zero_grad is a {type(zero_grad).__name__}: call "
                        "first_step(scaler=scaler), and scaler.step(optimizer) as the second step")
    if callable(zero_grad) or isinstance(zero_grad, Tensor):
        raise TypeError(f"zero_grad is a {type(zero_grad).__name__}: use True or False; a loss "
                        "goes through loss.backward() before, a closure into step(closure)")
    if scaler is not None and not hasattr(scaler, "is_enabled"):
        raise TypeError(f"scaler is a {type(scaler).__name__}: use a torch.amp.GradScaler")


def check_closures(closure: object, ascent_closure: object) -> None:
    """Refuse closures that cannot be called, and the ascent's alone."""
    for name, f in (("closure", closure), ("ascent_closure", ascent_closure)):
        if f is not None and not callable(f):
            raise TypeError(f"{name} is a {type(f).__name__}, not a function: after "
                            "loss.backward() call first_step() and second_step(), or pass a "
                            "function that computes the loss and calls backward")
    if closure is None and ascent_closure is not None:
        raise ValueError("step(ascent_closure=...) needs a closure for the second pass")


def is_number(x: object) -> bool:
    return isinstance(x, Real)  # which has no order for a type checker


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


def check_base(params: object, kind: Any, own: type, kwargs: dict[str, Any]) -> None:
    """Refuse a model for its parameters, a base optimizer that cannot be one, and arguments that
    nobody has.

    Raises:
        TypeError: it is no optimizer class, or an argument is unknown.
        ValueError: it needs a closure of its own (LBFGS) or is UNFIT, or is a SAM itself.
    """
    if isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList):
        raise TypeError(f"params is a {type(params).__name__}: pass its parameters()")
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise TypeError(f"base_optimizer={kind!r} is not an optimizer class: "
                        "pass the class, such as torch.optim.SGD, and its arguments by name")
    if hasattr(kind, "first_step"):
        raise ValueError(f"base_optimizer={kind.__name__} climbs itself: pass the optimizer that "
                         "is to take the step, such as torch.optim.SGD")
    for cls in kind.__mro__:
        if cls.__name__.lower() in UNFIT:
            raise ValueError(f"base_optimizer={kind.__name__} {UNFIT[cls.__name__.lower()]}: SAM "
                             "takes optimizers that step with the gradients there are, such as "
                             "torch.optim.SGD")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"base_optimizer={kind.__name__} calls a closure in every step: SAM takes "
                         "optimizers that step with the gradients there are, such as "
                         "torch.optim.SGD")
    known = inspect.signature(kind).parameters
    if any(x.kind is inspect.Parameter.VAR_KEYWORD for x in known.values()):
        return
    mine = [*inspect.signature(own).parameters, "interval", "start", "master_weights",
            "backend"]
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, [*mine, *known], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name!r} is an argument of neither {own.__name__} nor "
                            f"{kind.__name__}{hint}")


def refuse_fleeting(base: Optimizer) -> None:
    """Refuse a base whose groups or state are made anew whenever somebody asks, as torchao's
    CPUOffloadOptimizer and hivemind's do, or are not there: none could be shared with it."""
    for name in ("param_groups", "state"):
        once, again = (getattr(base, name, None) for _ in range(2))
        if once is None or once is not again:
            does = f"has no {name}" if once is None else f"makes its {name} anew at each access"
            raise ValueError(f"base_optimizer={type(base).__name__} {does}, where SAM and its base "
                             "share theirs: use an optimizer that keeps them, such as the one "
                             "inside it")


def refuse_arguments_of_existing(params: object, base: Optimizer, own: type,
                                 kwargs: dict[str, Any]) -> None:
    """Refuse parameters and arguments for a base optimizer that exists and has its own.

    Raises:
        TypeError: there are such arguments.
        ValueError: see `refuse_fleeting`.
    """
    refuse_fleeting(base)
    if kwargs or params is not base.param_groups:
        raise TypeError(f"an existing {type(base).__name__} has its parameters and arguments: "
                        f"use {own.__name__}.wrap(optimizer, rho=...)")


def refuse_unusable(p: Tensor) -> None:
    """Refuse parameters that have no plain memory of real numbers of their own."""
    if not isinstance(p, Tensor):
        raise ValueError(f"a group's 'params' has a {type(p).__name__} in it: use parameters")
    if is_lazy(p):
        raise ValueError("a parameter of a lazy module has no shape yet: run a forward pass of "
                         "the model before the optimizer is built")
    if not p.is_floating_point():
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is {p.dtype}: "
                         "SAM takes real floating-point parameters (see torch.view_as_real)")
    odd = isinstance(p, FakeTensor) or (is_traceable_wrapper_subclass(p) and not is_sharded(p))
    if p.is_inference():
        raise ValueError(f"a parameter of shape {tuple(p.shape)} was made in inference mode and "
                         "cannot be trained: make the model outside of it, or clone the parameter")
    if p.device.type == "meta" or p.layout is not torch.strided or odd:
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is a {type(p).__name__} with "
                         f"layout {p.layout} on {p.device}: SAM takes plain dense tensors and "
                         "DTensors")
    if not (p.is_leaf or p.retains_grad):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is the result of a computation: "
                         "no gradient comes to it; use the leaf, such as an nn.Parameter")


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
            if all(map(is_dense, near)) or repeats(torch.cat([byte_addresses(p) for p in near])):
                raise ValueError("two parameters share memory, or one shares it with itself: tie "
                                 "weights by using one Parameter twice in the model, not two "
                                 "over the same tensor; take one that was replaced, as "
                                 "weight_norm does, out of the groups")


def neighbours(memory: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors whose stretches of memory overlap, gaps included, together."""
    near: list[Tensor] = []
    device, reached = None, 0
    for p in sorted(memory, key=lambda p: (str(p.device), p.data_ptr())):
        if near and (p.device != device or p.data_ptr() >= reached):
            yield near
            near, reached = [], 0
        near.append(p)
        device, reached = p.device, max(reached, p.data_ptr() + stretch(p) * p.element_size())
    if near:
        yield near


def byte_addresses(p: Tensor) -> Tensor:
    """The addresses of p's bytes."""
    where = torch.arange(p.element_size(), device="cpu")
    for s, n in zip(p.stride(), p.shape, strict=True):
        where = (where[:, None] + s * p.element_size() * torch.arange(n, device="cpu")).flatten()
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
        for name in ("lr", "momentum", "dampening", "weight_decay", "eps", "eta"):
            if name in group:
                refuse_no_number(name, group[name])
        if "betas" in group:
            refuse_no_betas(group["betas"])


def refuse_changed_step(base: Optimizer, fused: Collection[type[Optimizer]]) -> None:
    """Refuse step hooks of a base optimizer whose step the kernels take, another class than these,
    and a step that someone has put in place of its own, as torch's schedulers do, too: nobody would
    call them."""
    if type(base) not in fused:
        raise ValueError(f"the base became a {type(base).__name__}, whose step() a fused step does "
                         "not call: change its class before the optimizer around it is built")
    step = vars(base).get("step")
    counted = getattr(step, "_wrapped_by_lr_sched", False)
    own = getattr(step, "__wrapped__" if counted else "__func__", None)
    if step is not None and own is not type(base).step:
        raise ValueError(f"the base {type(base).__name__} was given another step(), which a fused "
                         "step does not call: give it to the optimizer around it, or pass a "
                         "subclass of the base to run its own step")
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        raise ValueError(f"the base {type(base).__name__} has step hooks, which a fused step does "
                         "not call: register them on the optimizer around it, or pass a subclass "
                         "of the base to run its own step")


def refuse_no_number(name: str, x: object) -> None:
    """Refuse what is no number, and tensors where the kernels branch on the value or of more than
    one element."""
    if isinstance(x, Tensor):
        if name not in MAY_BE_TENSORS:
            raise ValueError(f"{name} is a tensor: use a number "
                             f"({', '.join(MAY_BE_TENSORS)} may be tensors)")
        if x.numel() != 1 or x.is_complex() or x.device.type == "meta":
            raise ValueError(f"{name} is a tensor of shape {tuple(x.shape)}, {x.dtype}, on "
                             f"{x.device}: use a real one of one element")
    elif not isinstance(x, Real):
        raise ValueError(f"{name}={x!r} is not a number: use one, such as 0.1")


def refuse_no_betas(betas: Any) -> None:
    """Refuse what is no pair of numbers in [0, 1)."""
    pair = [*betas] if isinstance(betas, Collection) else []
    for x in pair:
        refuse_no_number("betas", x)
    if len(pair) != 2 or not all(0 <= x < 1 for x in pair):
        raise ValueError(f"betas={betas!r} is out of range: use two numbers in [0, 1), such as "
                         "(0.9, 0.999)")
