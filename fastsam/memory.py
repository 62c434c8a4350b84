"""Whether tensors still lie in memory as they were seen, asked before every pass."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .space import NOWHERE, Slot, is_dense, same_layout


class Memory:
    """Parameters' and gradients' addresses, and their forms: dtypes, devices, shapes, strides and
    bits such as the negative one.

    Args:
        params, grads: plain tensors; None: no gradient.

    Attributes:
        w, g: the addresses, of gradients that are there.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]):
        there = present(grads)
        self.absent = absent(grads, there)
        self.w, self.g = addresses(params), addresses(there)
        self.have_same_forms = forms([*params, *there])

    def has_forms_of(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
        there = present(grads)
        return absent(grads, there) == self.absent and self.have_same_forms(*params, *there)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]


def present(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [g for g in grads if g is not None]


def absent(grads: Sequence[Tensor | None], there: Sequence[Tensor]) -> list[int]:
    """The places without a gradient."""
    if len(there) == len(grads):
        return []
    return [i for i, g in enumerate(grads) if g is None]


def forms(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that tells whether as many tensors have the forms that these have."""
    try:  # torch.compile's check of many tensors in one call: a tenth of the time of asking each
        from torch._C._dynamo.guards import TensorGuards

        sizes: list = [[*t.shape] for t in tensors]
        strides: list = [[*t.stride()] for t in tensors]
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes,
                            dynamic_dims_strides=strides).check
    except Exception:  # internal to torch, it may change
        seen = [form(t) for t in tensors]
        return lambda *now: [form(t) for t in now] == seen


def form(t: Tensor) -> tuple:
    stride = t.stride() if t.layout is torch.strided else None
    return type(t), t.layout, t.dtype, t.device, t.shape, stride, t.is_neg()


def table_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """The column of addresses of tensors."""
    return [0 if t is None else t.data_ptr() or NOWHERE for t in tensors]


def lies_as(w: Tensor, slot: Slot) -> bool:
    """Whether a parameter's memory has the order that its slot was made for.

    Raises:
        RuntimeError: it has another device, dtype or shape, or its elements no longer fill one
            stretch of memory.
    """
    was = (slot.shape, slot.dtype, slot.saved.device)
    if (w.shape, w.dtype, w.device) != was or (slot.dense and not is_dense(w)):
        raise RuntimeError(
            f"a parameter of shape {tuple(slot.shape)}, {slot.dtype} on {slot.saved.device}, is "
            f"now {tuple(w.shape)} of strides {w.stride()}, {w.dtype} on {w.device}: build the "
            "optimizer after the model has its final form")
    return same_layout(w, slot.saved) if slot.dense else not is_dense(w)
