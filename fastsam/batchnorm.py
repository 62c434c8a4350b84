"""BatchNorm statistics that the second pass must not touch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy


@contextmanager
def freeze_bn_stats(model: nn.Module) -> Iterator[nn.Module]:
    """Keep every BatchNorm's running statistics as they are inside the `with` block.

    Put it around the second pass: the statistics then come from the first pass alone, and rho=0
    equals the base optimizer, buffers (`num_batches_tracked` too) included. The layers go on
    normalising with the batch's own statistics. Covers every subclass of torch's BatchNorm,
    SyncBatchNorm and the lazy ones included, and any other layer with buffers of its own named
    `running_...`, such as InstanceNorm with track_running_stats: inside the block it works on
    copies of its buffers. Blocks may nest.

    Args:
        model: the module whose BatchNorm layers are frozen; also what `as` gives.
    """
    frozen, others = [], []
    for layer in model.modules():
        if not isinstance(layer, _BatchNorm):
            others += [(layer, name, buffer) for name, buffer in own_statistics(layer)]
        elif layer.track_running_stats and not is_lazy(cast(Tensor, layer.running_mean)):
            frozen.append(layer)
    for layer in frozen:
        layer.track_running_stats = False  # no update at all: 0 * inf cannot reach the buffers
    for layer, name, buffer in others:
        setattr(layer, name, buffer.clone())
    try:
        yield model
    finally:
        for layer in frozen:
            layer.track_running_stats = True
        for layer, name, buffer in others:  # itself, uncopied: a backward may still need the other
            setattr(layer, name, buffer)


def own_statistics(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers, by name, of a layer that keeps running statistics; none of any other."""
    buffers = layer._buffers
    if not buffers or not any(name.startswith("running_") for name, _ in buffers.items()):
        return []
    return [(name, b) for name, b in buffers.items() if b is not None and not is_lazy(b)]
