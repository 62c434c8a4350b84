"""What fits fastsam into other people's trainers. Each name imports its framework when it is first
used, and only its own.

- `SAMTrainer`: the Trainer of transformers.
- `SAMModule`: a LightningModule, for Lightning's automatic optimisation.
- `both_passes`: the passes of a loop with Accelerate.
"""

from importlib import import_module
from typing import Any

HOMES = {"SAMTrainer": "transformers", "SAMModule": "lightning", "both_passes": "accelerate"}

__all__ = ["SAMModule", "SAMTrainer", "both_passes"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
