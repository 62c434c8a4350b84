"""The fused Triton kernels: dots, norm, climb and step, with the names and signatures of
fastsam.reference; and PGD's ascent steps, linf_step and l2_step."""

from .climb import climb
from .common import INTERPRETED, takes
from .norm import dots, norm
from .pgd import l2_step, linf_step
from .step import step

__all__ = ["INTERPRETED", "climb", "dots", "l2_step", "linf_step", "norm", "step",
           "takes"]
