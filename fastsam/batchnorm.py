"""BatchNorm statistics, and other buffers, that the second pass must not touch."""

import warnings
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any, TypeGuard, TypeVar, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from typing_extensions import Self

F = TypeVar("F", bound=Callable[..., Any])
TORCHS = _BatchNorm.forward, nn.SyncBatchNorm.forward
Own = tuple[nn.Module, str, Tensor]  # a layer, the name of a buffer of its own, and the buffer


class freeze_bn_stats(ContextDecorator):
    """Keep every BatchNorm's running statistics as they are inside the `with` block.

    Put it around the second pass: the statistics then come from the first pass alone, and rho=0
    equals the base optimizer, buffers (`num_batches_tracked` too) included. Where the backward
    computes parts of the forward again (gradient checkpointing), the backward belongs inside the
    block too. The layers go on normalising with the batch's own statistics. Covers torch's
    BatchNorms, SyncBatchNorm and the lazy ones included, and any other layer with buffers of its
    own named `running_...`, such as InstanceNorm with track_running_stats or a BatchNorm with
    another forward: inside the block it works on copies of its buffers. Blocks may nest.

    Args:
        model: the module whose BatchNorm layers are frozen; also what `as` gives.
        all_buffers: every other buffer of the model works on a copy inside the block too, and is
            afterwards as it was: spectral norm's vectors, the observers of quantization-aware
            training, averages of layers of someone's own. Costs a copy of them for the block's
            time. Default False.

    A call without `with` freezes nothing and warns.

    Raises:
        TypeError: what is given is no module.
    """

    def __init__(self, model: nn.Module, *, all_buffers: bool = False):
        if not isinstance(model, nn.Module):
            raise TypeError(f"freeze_bn_stats takes the model, not a {type(model).__name__}")
        self.used = False
        self.model, self.all_buffers = model, all_buffers
        self.blocks: list[tuple[list[_BatchNorm], list[Own]]] = []

    def __enter__(self) -> nn.Module:
        self.used = True
        frozen, others = chosen(self.model, self.all_buffers)
        self.blocks.append((frozen, others))
        for norm in frozen:
            norm.track_running_stats = False  # no update at all: 0 * inf cannot reach the buffers
        copies = dict[Tensor, Tensor]()  # one for a buffer that several layers share
        for layer, name, buffer in others:
            if buffer not in copies:
                copies[buffer] = buffer.clone()
            setattr(layer, name, copies[buffer])
        return self.model

    def __exit__(self, *_: object) -> None:
        frozen, others = self.blocks.pop()
        for norm in frozen:
            norm.track_running_stats = True
        for layer, name, buffer in others:  # itself, uncopied: a backward may still need the other
            setattr(layer, name, buffer)

    def _recreate_cm(self) -> Self:
        """What a call of a decorated function enters."""
        return type(self)(self.model, all_buffers=self.all_buffers)

    def __call__(self, func: F) -> F:
        self.used = True
        return super().__call__(func)

    def __del__(self) -> None:
        if not getattr(self, "used", True):
            warnings.warn("freeze_bn_stats(model) was called and never entered, so it froze "
                          "nothing: write `with freeze_bn_stats(model):` around the second pass",
                          stacklevel=2)


def heeds_its_flag(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether without `track_running_stats` it leaves its statistics alone, and nothing else
    changes: what a forward of someone's own makes of the flag nobody knows."""
    return isinstance(layer, _BatchNorm) and getattr(layer.forward, "__func__", None) in TORCHS


def chosen(model: nn.Module, all_buffers: bool) -> tuple[list[_BatchNorm], list[Own]]:
    """The BatchNorm layers to freeze, and the buffers that work on copies."""
    frozen, others = list[_BatchNorm](), list[Own]()
    for layer in model.modules():
        if heeds_its_flag(layer) and layer.track_running_stats and not is_lazy(
                cast(Tensor, layer.running_mean)):
            frozen.append(layer)
        names = layer._buffers.keys()  # a scripted layer's buffers are no iterable themselves
        running = any(name.startswith("running_") for name in names)
        if all_buffers or (running and not heeds_its_flag(layer)):
            others += [(layer, name, b) for name, b in layer._buffers.items()
                       if b is not None and not is_lazy(b)]
    return frozen, others
