"""torch.amp.GradScaler, whose loss scale and overflow flags stay on the device."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer


def inverse_scale(scaler: Any, optimizer: Optimizer) -> Tensor:
    """1 / the loss scale of an enabled GradScaler, on its device.

    Raises:
        ValueError: the scaler has scaled nothing yet, or has unscaled already.
    """
    if scaler._get_scale_async() is None:
        raise ValueError("the scaler has not scaled a loss yet: call scaler.scale(loss).backward() "
                         "before first_step(scaler=scaler)")
    if scaler._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY:
        raise ValueError("scaler.unscale_ before first_step would divide the scale out twice: "
                         "leave it out; first_step(scaler=scaler) does it on the device")
    return 1 / scaler._get_scale_async()


def report_overflow(scaler: Any, optimizer: Optimizer, ok: Tensor) -> None:
    """Let an overflow of a first pass (`ok` is 0), too, make the scaler back off at update()."""
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for device, found_inf in found.items():
        found_inf.logical_or_(ok.to(device, non_blocking=True) == 0)


def unscale(params: Sequence[Tensor], scale: Tensor) -> None:
    """Divide the loss scale out of the gradients, for a base that knows nothing of it."""
    for p in params:
        if p.grad is not None:
            p.grad.div_(scale)
