"""Around a call: torch's hooks, where there are any, and what keeps the call out of autograd's and
the tracer's sight. torch's own decorators for this cost each step more of the host's time."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo as untraced  # the public one imports dynamo at once
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim import optimizer as torchs

P = ParamSpec("P")
Result = TypeVar("Result")

__all__ = ["seen", "unseen", "untraced"]


def seen(step: Callable[P, Result]) -> Callable[P, Result]:
    """A step within torch's hooks and its profiler's record, where there are any."""
    recorded = Optimizer.profile_hook_step(step)

    @wraps(recorded)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        optimizer: Any = args[0]
        if has_onlookers(optimizer):
            return recorded(*args, **kwargs)
        result = step(*args, **kwargs)
        for hook in (*optimizer._optimizer_step_post_hooks.values(),  # that came while it ran
                     *torchs._global_optimizer_post_hooks.values()):
            hook(optimizer, args, kwargs)
        return result

    return call


def has_onlookers(optimizer: Any) -> bool:
    """Whether a step of this optimizer has hooks, or is being profiled."""
    return bool(profiler._is_profiler_enabled or optimizer._optimizer_step_pre_hooks
                or optimizer._optimizer_step_post_hooks or torchs._global_optimizer_pre_hooks
                or torchs._global_optimizer_post_hooks)


def unseen(func: Callable[P, Result]) -> Callable[P, Result]:
    """`torch.no_grad()`, which makes two objects for each call, and untraced."""
    @untraced
    @wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        was = torch.is_grad_enabled()
        try:
            try:
                torch._C._set_grad_enabled(False)
                return func(*args, **kwargs)
            finally:
                torch._C._set_grad_enabled(was)
        finally:  # also where a Ctrl-C comes before that
            torch._C._set_grad_enabled(was)

    return call
