"""BatchNorm statistics that the second pass must not touch."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy


@contextmanager
def freeze_bn_stats(model: nn.Module) -> Iterator[nn.Module]:
    """Keep every BatchNorm's running statistics as they are inside the `with` block.

    Put it around the second pass: the statistics then come from the first pass alone, and rho=0
    equals the base optimizer, buffers (`num_batches_tracked` too) included. The layers go on
    normalising with the batch's own statistics. Covers every subclass of torch's BatchNorm,
    SyncBatchNorm and the lazy ones included; blocks may nest.

    Args:
        model: the module whose BatchNorm layers are frozen; also what `as` gives.
    """
    frozen = [layer for layer in model.modules()
              if isinstance(layer, _BatchNorm) and layer.track_running_stats
              and not is_lazy(layer.running_mean)]
    for layer in frozen:
        layer.track_running_stats = False  # no update at all: 0 * inf cannot reach the buffers
    try:
        yield model
    finally:
        for layer in frozen:
            layer.track_running_stats = True
