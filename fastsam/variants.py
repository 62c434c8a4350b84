"""ASAM and Friendly-SAM: SAM with another scaling, or another direction, of the climb."""

from collections.abc import Iterable

from torch.optim import Optimizer

from .optimizer import SAM


class ASAM(SAM):
    """Adaptive SAM (Kwon et al. 2021): w' = w + rho T^2 g / ||T g||.

    Two forms are in use, with different radii. `scale="all"`: T = |w| for every parameter, the
    form of the common public SAM class and of the F-SAM paper (rho 2 on CIFAR-10, 4 on
    CIFAR-100). `scale="weights"`: the authors' form, T = |w| + eta for weights and T = 1 for
    biases and normalisation shifts (rho 0.5 on CIFAR-10, 1 on CIFAR-100).

    Args:
        params, base_optimizer, backend, **kwargs: as `SAM`. For "weights", a parameter is a weight
            when its name contains "weight" if named parameters are given, else when it has at
            least two dimensions.
        rho: default 2.0 for "all", 0.5 for "weights".
        scale: "all" (default) or "weights".
        eta: added to |w| in the "weights" form; at least 0. Default 0.01.

    Raises:
        ValueError: as `SAM`; an unknown scale; a negative eta.
    """

    def __init__(self, params: Iterable, base_optimizer: type[Optimizer],
                 rho: float | None = None, scale: str = "all", eta: float = 0.01, *,
                 backend: str | None = None, **kwargs):
        if scale not in ("all", "weights"):
            raise ValueError(f"scale={scale!r} is unknown: use 'all' or 'weights'")
        if not 0 <= eta < float("inf"):
            raise ValueError(f"eta={eta} is out of range: use a finite number of at least 0")
        rho = (2.0 if scale == "all" else 0.5) if rho is None else rho
        own = dict(rho=rho, adaptive=True, scale=scale, eta=eta)
        self._build(params, base_optimizer, own, backend, kwargs)


class FriendlySAM(SAM):
    """Friendly-SAM (Li et al. 2024): climbs along the batch noise d = g - sigma m.

    m is an exponential moving average of the gradients, the estimate of the full gradient.
    `convention="algorithm1"` follows the paper: m = lmbda m + (1 - lmbda) g first, from m = 0,
    then d = g - sigma m. `convention="official"` follows the published code: d = g - sigma m with
    the m of the step before, from m = g with the first d = g. With sigma = 1 the two give the
    same direction for the same m.

    Args:
        params, base_optimizer, backend, **kwargs: as `SAM`.
        rho: radius, at least 0. Default 0.05.
        sigma: share of m that is removed; finite. Default 1.0.
        lmbda: averaging factor, in [0, 1). Default 0.9.
        adaptive: F-ASAM, ASAM's scaling T = |w| of d. Default False.
        convention: "algorithm1" (default) or "official".

    Group keys as `SAM`'s, and `sigma`, `lmbda`.

    Raises:
        ValueError: as `SAM`; sigma or lmbda out of range; an unknown convention.
    """

    def __init__(self, params: Iterable, base_optimizer: type[Optimizer], rho: float = 0.05,
                 sigma: float = 1.0, lmbda: float = 0.9, adaptive: bool = False, *,
                 convention: str = "algorithm1", backend: str | None = None, **kwargs):
        if convention not in ("algorithm1", "official"):
            raise ValueError(f"convention={convention!r} is unknown: "
                             "use 'algorithm1' or 'official'")
        self._ema = convention
        own = dict(rho=rho, sigma=sigma, lmbda=lmbda, adaptive=adaptive)
        self._build(params, base_optimizer, own, backend, kwargs)
