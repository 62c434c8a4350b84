"""A pass's gradients: those that can be read where they are, and copies of the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import distributed
from .memory import has_storage, in_bytes
from .space import Slot, local, same_layout

PLAIN = {Tensor, torch.nn.Parameter}
SIXTEEN_BITS = {torch.bfloat16, torch.float16}


def only(takes_part: Sequence[bool] | None, grads: Sequence[Tensor | None],
         ) -> Sequence[Tensor | None]:
    """The gradients of those that take part; of all, for None."""
    if takes_part is None or all(takes_part):
        return grads
    return [g if taken else None for g, taken in zip(grads, takes_part, strict=True)]


def refuse_freed(grads: Sequence[Tensor | None]) -> None:
    """Refuse gradients whose storage was freed, which nobody could read."""
    for g in [local(g) for g in grads if g is not None]:
        if (g.layout is torch.strided and (type(g) in PLAIN or g.device.type == "cpu")
                and not has_storage(g)):
            raise ValueError(f"a gradient of shape {tuple(g.shape)} has lost its memory, whose "
                             "storage was freed: clear it (zero_grad)")


def readable(slot: Slot, g: Tensor) -> Tensor:
    """A gradient in the order of its parameter's memory: itself, or a copy.

    Raises:
        ValueError: it is sparse, complex, freed, or of another shape.
    """
    g = local(distributed.placed_like(slot.param, g))
    if g.layout is not torch.strided:
        raise ValueError(f"a gradient of shape {tuple(g.shape)} has layout {g.layout}: use "
                         "dense gradients (sparse=False in torch.nn.Embedding)")
    if g.shape != slot.shape or not g.is_floating_point():
        raise ValueError(f"a gradient of shape {tuple(g.shape)} and {g.dtype} is no gradient of a "
                         f"parameter of shape {tuple(slot.shape)}: clear it (zero_grad)")
    refuse_freed([g])
    if g.dtype == torch.float64 != slot.dtype:
        raise ValueError(f"a gradient of float64 for a parameter of {slot.dtype}, whose step is "
                         "computed in float32: use float64 parameters, or p.grad.float()")
    is_memory = type(g) in PLAIN and not g.is_neg() and (
        g.data_ptr() or not g.numel())
    if is_memory and g.device == slot.saved.device and same_layout(g, slot.saved):
        return g
    dtype = g.dtype
    copied = torch.empty_like(slot.saved, dtype=dtype, memory_format=torch.preserve_format)
    copied.copy_(g)
    return copied


def in_one_dtype(grads: list[Tensor | None], acc: torch.dtype,
                 ) -> tuple[list[Tensor | None], torch.dtype]:
    """Gradients as kernels read them, and their dtype: all in one, their own where they share one
    that is no wider than the arithmetic `acc`."""
    dtypes = {g.dtype for g in grads if g is not None}
    if len(dtypes) == 1 and (acc in dtypes or (acc == torch.float32 and dtypes <= SIXTEEN_BITS)):
        return grads, dtypes.pop()
    return [None if g is None else g.to(acc) for g in grads], acc


def out_of(params: Sequence[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients, with copies of those that lie in the memory of parameters, which a pass
    writes while it reads them."""
    memory = [local(p) for p in params]
    storages = {w.untyped_storage().data_ptr() for w in memory if w.numel()}
    return [g.clone() if g is not None and g.untyped_storage().data_ptr() in storages
            and any(overlap(g, w) for w in memory) else g for g in grads]


def overlap(t: Tensor, u: Tensor) -> bool:
    """Whether their stretches of memory have a byte in common."""
    ends = [x.data_ptr() + in_bytes(x) for x in (t, u)]
    return max(t.data_ptr(), u.data_ptr()) < min(ends)
