"""fastsam: fused sharpness-aware minimization for PyTorch."""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "climb.py").exists():  # a checkout: kernels/ lies beside fastsam/
    __path__.append(str(_root))

from .batchnorm import freeze_bn_stats  # noqa: E402
from .graph import GraphedStep  # noqa: E402
from .optimizer import SAM, PhaseError  # noqa: E402
from .schedule import RhoScheduler  # noqa: E402
from .variants import ASAM, FisherSAM, FriendlySAM, FullGradientSAM  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = ["ASAM", "SAM", "FisherSAM", "FriendlySAM", "FullGradientSAM", "GraphedStep",
           "PhaseError", "RhoScheduler", "__version__", "freeze_bn_stats"]
