"""The devices that this machine and this torch have."""

import torch


def usable_device(name: str) -> torch.device:
    """Return the device, or raise ValueError when this machine or this torch does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        first_line = str(e).strip().splitlines()[0]
        raise ValueError(
            f"device {name!r} cannot be used here ({first_line}); try --device cpu"
        ) from e
    return device
