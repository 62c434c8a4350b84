"""The fused kernels: `fastsam.kernels.triton` for GPUs and `fastsam.kernels.cpu`, with the
functions of `fastsam.reference`. Who chooses a backend imports it; nothing is imported here."""

if __name__ != "fastsam.kernels":
    # a checkout on sys.path makes this `import kernels`, others' name too: offer nothing
    __all__, __path__, __file__ = [], [], None  # type: ignore[assignment]
