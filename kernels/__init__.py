"""The fused Triton kernels: dots, norm, climb and step, with the names and signatures of
fastsam.reference; and PGD's ascent steps, linf_step and l2_step."""

if __name__ == "fastsam.kernels":
    from .climb import climb
    from .common import INTERPRETED
    from .dots import dots
    from .norm import norm
    from .pgd import l2_step, linf_step
    from .step import step

    __all__ = ["INTERPRETED", "climb", "dots", "l2_step", "linf_step", "norm", "step"]
else:  # a checkout on sys.path makes this `import kernels`, others' name too: offer nothing
    __all__, __path__, __file__ = [], [], None
