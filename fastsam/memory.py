"""Whether tensors still lie in memory as they were seen, asked before every pass."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .interrupts import surely
from .space import NOWHERE, Slot, is_dense, same_layout

KNOWN = 16  # places of all gradients that are remembered


class Memory:
    """Parameters' and gradients' addresses, and their forms: dtypes, devices, shapes, strides and
    bits such as the negative one.

    Args:
        params, grads: plain tensors; None: no gradient.

    Attributes:
        w, g: the addresses, of gradients that are there.
        begins, ends: where each parameter's memory does, in order, a 0 before the ends.
        lengths: of the gradients' memory, in bytes.
        known: where gradients have lain apart from the parameters: allocators take turns.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]):
        there = present(grads)
        self.absent = absent(grads, there)
        self.w, self.g = addresses(params), addresses(there)
        owned = sorted((w, w + in_bytes(p)) for w, p in zip(self.w, params, strict=True)
                       if w and p.numel())
        self.begins = np.array([begin for begin, _ in owned])
        self.ends = np.array([0, *(end for _, end in owned)])  # of the i parameters before a place
        self.lengths = np.array([in_bytes(g) for g in there])
        self.known = set[tuple[int, ...]]()
        self.have_same_forms = forms([*params, *there])

    def gradients_now(self, params: Sequence[Tensor], grads: Sequence[Tensor | None],
                      ) -> list[int] | None:
        """The gradients' addresses now; None where it takes a closer look: something has another
        form, a parameter has moved, or a gradient lies where a parameter does, or nowhere."""
        there = present(grads)
        if (absent(grads, there) != self.absent or not self.have_same_forms(*params, *there)
                or addresses(params) != self.w):
            return None
        now = addresses(there)
        if now == self.g or (now.count(0) == self.g.count(0) and self.are_apart(now)):
            return now
        return None

    def are_apart(self, gradients: Sequence[int]) -> bool:
        """Whether gradients of the same forms at these addresses share no byte with a parameter."""
        places = tuple(gradients)
        if places in self.known:
            return True
        begins = np.array(gradients)
        before_its_end = np.searchsorted(self.begins, begins + self.lengths)
        if (begins < self.ends[before_its_end]).any():
            return False
        if len(self.known) == KNOWN:
            self.known.clear()
        self.known.add(places)
        return True


class TensorsCompared(Exception):
    """Two tensors that are not one."""


class OnlyThemselves(TorchFunctionMode):
    """Within it no tensor is like another, whatever their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TensorsCompared


ONLY_THEMSELVES = OnlyThemselves()


def same(now: Any, seen: Any) -> bool:
    """Whether two containers of containers are equal, and have the very same tensors. Python looks
    first whether two things are one: so this is one call, of a tenth of the time of asking each."""
    modes = torch._C._len_torch_function_stack()

    def leave() -> None:
        while torch._C._len_torch_function_stack() > modes:
            torch._C._pop_torch_function_stack()

    def compare() -> bool:
        try:
            torch._C._push_on_torch_function_stack(ONLY_THEMSELVES)
            return bool(now == seen)
        except Exception:  # of a comparison of someone else's, too
            return False

    return surely(compare, leave)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]


def is_part(view: Tensor, flat: Tensor, offset: int, stride: tuple[int, ...]) -> bool:
    """Whether a view begins at this element of a flat tensor, and goes on in these strides."""
    same = view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    return (same and has_storage(flat) and view.dtype == flat.dtype and not view.is_neg()
            and int(view.storage_offset()) == offset and view.stride() == stride)


def stretch(t: Tensor) -> int:
    """How many elements of memory t reaches over, gaps included."""
    ends = (s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
    return 1 + sum(ends) if t.numel() else 0


def in_bytes(t: Tensor) -> int:
    return stretch(t) * t.element_size()


def has_storage(t: Tensor) -> bool:
    """Whether all elements lie in the storage, which may be freed by `resize_`."""
    end = t.storage_offset() * t.element_size() + in_bytes(t)
    return not t.numel() or bool(end <= t.untyped_storage().nbytes())


def storage_at(t: Tensor) -> int | None:
    """Where a tensor's storage begins; None for one that has none of its own: sparse, nested or
    quantized ones keep what they are made of in other tensors."""
    try:
        return t.untyped_storage().data_ptr()
    except RuntimeError:
        return None


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
    # torch's own: elsewhere, called otherwise, or with a check of its own that fails
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):
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
        RuntimeError: it has another device, dtype or shape, its elements no longer fill one
            stretch of memory, as they are, or its storage was freed.
    """
    was = (slot.shape, slot.dtype, slot.saved.device)
    if (w.shape, w.dtype, w.device) != was or (slot.dense and not is_dense(w)):
        raise RuntimeError(
            f"a parameter of shape {tuple(slot.shape)}, {slot.dtype} on {slot.saved.device}, is "
            f"now {tuple(w.shape)} of strides {w.stride()}, {w.dtype} on {w.device}"
            f"{', with the negative bit' * w.is_neg()}: build the optimizer after the model has "
            "its final form")
    if not has_storage(w):
        raise RuntimeError(f"a parameter of shape {tuple(w.shape)} has lost its memory, whose "
                           f"storage has {w.untyped_storage().nbytes()} bytes: bring the weights "
                           "back first")
    return same_layout(w, slot.saved) if slot.dense else not is_dense(w)
