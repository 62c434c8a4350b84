"""What fits fastsam into other people's trainers. Each name imports its framework when it is first
used, and only its own.

- `SAMTrainer`: the Trainer of transformers.
- `SAMModule`: a LightningModule, for Lightning's automatic optimisation.
- `both_passes`: the passes of a loop with Accelerate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accelerate import both_passes
    from .lightning import SAMModule
    from .transformers import SAMTrainer

HOMES = {"SAMTrainer": "transformers", "SAMModule": "lightning", "both_passes": "accelerate"}

__all__ = ["SAMModule", "SAMTrainer", "both_passes"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
