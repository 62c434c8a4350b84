"""fastsam: fused sharpness-aware minimization for PyTorch."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

_kernels = Path(__file__).resolve().parent.parent / "kernels"
if not (Path(__file__).parent / "kernels").exists() and (_kernels / "triton").exists():
    # a checkout: kernels/ lies beside fastsam/, and nothing else there is a part of it
    _spec: Any = spec_from_file_location("fastsam.kernels", _kernels / "__init__.py",
                                         submodule_search_locations=[str(_kernels)])
    kernels = sys.modules["fastsam.kernels"] = module_from_spec(_spec)
    _spec.loader.exec_module(kernels)

from .batchnorm import freeze_bn_stats  # noqa: E402
from .graph import GraphedStep  # noqa: E402
from .optimizer import SAM  # noqa: E402
from .phase import PhaseError  # noqa: E402
from .schedule import RhoScheduler  # noqa: E402
from .variants import (  # noqa: E402
    ASAM,
    GSAM,
    FisherSAM,
    FriendlySAM,
    FullGradientSAM,
    LookSAM,
    MomentumSAM,
)
from .version import __version__  # noqa: E402

__all__ = ["ASAM", "GSAM", "SAM", "FisherSAM", "FriendlySAM", "FullGradientSAM", "GraphedStep",
           "LookSAM", "MomentumSAM", "PhaseError", "RhoScheduler", "__version__", "freeze_bn_stats"]
