"""Whether tensors still lie in memory as they were seen, asked before every pass."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

try:  # torch.compile's check of many tensors in one call: a tenth of the time of asking each
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None


class Memory:
    """Parameters' and gradients' addresses, dtypes, devices, shapes, strides and bits such as the
    negative one, as they are now.

    Args:
        params, grads: plain tensors; None: no gradient.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]):
        there = present(grads)
        self.absent = absent(grads, there)
        self.addresses = [*map(Tensor.data_ptr, params), *map(Tensor.data_ptr, there)]
        self.have_same_forms = forms([*params, *there])

    def is_as_seen(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
        there = present(grads)
        return (absent(grads, there) == self.absent and self.have_same_forms(*params, *there)
                and [*map(Tensor.data_ptr, params), *map(Tensor.data_ptr, there)]
                == self.addresses)


def present(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [g for g in grads if g is not None]


def absent(grads: Sequence[Tensor | None], there: Sequence[Tensor]) -> list[int]:
    """The places without a gradient."""
    if len(there) == len(grads):
        return []
    return [i for i, g in enumerate(grads) if g is None]


def forms(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that tells whether as many tensors have the forms that these have."""
    if TensorGuards is not None:
        try:
            return TensorGuards(*tensors, dynamic_dims_sizes=[[*t.shape] for t in tensors],
                                dynamic_dims_strides=[[*t.stride()] for t in tensors]).check
        except Exception:  # internal to torch, it may change
            pass
    seen = [form(t) for t in tensors]
    return lambda *now: [form(t) for t in now] == seen


def form(t: Tensor) -> tuple:
    stride = t.stride() if t.layout is torch.strided else None
    return type(t), t.layout, t.dtype, t.device, t.shape, stride, t.is_neg()
