"""The rest of the family: SAM with another scaling, or another direction, of the climb."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import params_of
from .distributed import placed_like
from .gradients import refuse_freed
from .layout import Method
from .optimizer import FUSED, SAM, Loss
from .phase import PhaseError
from .space import local

Batch = TypeVar("Batch")


class ASAM(SAM):
    """Adaptive SAM (Kwon et al. 2021): w' = w + rho T^2 g / ||T g||.

    Two forms are in use, with different radii. `scale="all"`: T = |w| for every parameter, the
    form of the common public SAM class and of the F-SAM paper (rho 2 on CIFAR-10, 4 on
    CIFAR-100). `scale="weights"`: the authors' form, T = |w| + eta for weights and T = 1 for
    biases and normalisation shifts (rho 0.5 on CIFAR-10, 1 on CIFAR-100).

    Args:
        params, base_optimizer, **kwargs: as `SAM`. For "weights", a parameter is a weight when
            its name contains "weight" if named parameters are given, else when it has at least
            two dimensions.
        rho: default 2.0 for "all", 0.5 for "weights".
        scale: "all" (default) or "weights"; a group key too.
        eta: added to |w| in the "weights" form, at least 0; a group key too. Default 0.01.

    Raises:
        ValueError: as `SAM`; an unknown scale; a negative eta.
    """

    def __init__(self, params: Iterable[Any], base_optimizer: type[Optimizer],
                 rho: float | None = None, scale: str = "all", eta: float = 0.01,
                 **kwargs: Any):
        if scale not in ("all", "weights"):
            raise ValueError(f"scale={scale!r} is unknown: use 'all' or 'weights'")
        rho = (2.0 if scale == "all" else 0.5) if rho is None else rho
        if "adaptive" in kwargs:
            raise TypeError("ASAM is adaptive: leave adaptive= out, or use SAM for adaptive=False")
        own = dict(rho=rho, adaptive=True, scale=scale, eta=eta)
        self._build(params, base_optimizer, own, Method(), **kwargs)


class FisherSAM(SAM):
    """FisherSAM (Kim et al. 2022): w' = w + rho F^-1 g / sqrt(g^T F^-1 g).

    F is diagonal, F^-1 = 1 / (1 + eta f), with f = g^2 of the minibatch gradient g, the form in
    use (the exact empirical Fisher would average the squares of per-example gradients). In the
    terms of ASAM, T^2 = F^-1. Where the gradient's root mean square is far below 1 / sqrt(eta),
    as in most networks, this is numerically SAM. In float32 an entry above 1.8e19, whose square
    overflows, counts as zero.

    Args:
        params, base_optimizer, **kwargs: as `SAM`.
        rho: radius, at least 0. Default 0.1.
        eta: weight of the Fisher diagonal, at least 0; a group key too. Default 1.0.

    Raises:
        ValueError: as `SAM`; a negative eta.
    """

    def __init__(self, params: Iterable[Any], base_optimizer: type[Optimizer], rho: float = 0.1,
                 eta: float = 1.0, **kwargs: Any):
        self._build(params, base_optimizer, dict(rho=rho, adaptive=True, eta=eta),
                    Method(scales_with="gradient"), **kwargs)


class FriendlySAM(SAM):
    """Friendly-SAM (Li et al. 2024): climbs along the batch noise d = g - sigma m.

    m is an exponential moving average of the gradients, the estimate of the full gradient.
    `convention="algorithm1"` follows the paper: m = lmbda m + (1 - lmbda) g first, from m = 0,
    then d = g - sigma m. `convention="official"` follows the published code: d = g - sigma m with
    the m of the step before, from m = g with the first d = g. With sigma = 1 the two give the
    same direction for the same m; for another sigma, Algorithm 1 with sigma goes where the
    official code goes with sigma lmbda / (1 - sigma (1 - lmbda)), if sigma (1 - lmbda) < 1.

    `projection` multiplies sigma: with nothing ("constant", eq. 12), with cos(m, g) ("cosine",
    eq. 11), or with <g, m> / <m, m> ("orthogonal"), which for sigma = 1 leaves d orthogonal to m.
    The last two cost one more pass over g and m.

    Args:
        params, base_optimizer, **kwargs: as `SAM`.
        rho: radius, at least 0. Default 0.05.
        sigma: share of m that is removed; finite. Default 1.0.
        lmbda: averaging factor, in [0, 1). Default 0.9.
        adaptive: F-ASAM, ASAM's scaling T = |w| of d. Default False.
        convention: "algorithm1" (default) or "official".
        projection: "constant" (default), "cosine" or "orthogonal".

    Group keys as `SAM`'s, and `sigma`, `lmbda`.

    Raises:
        ValueError: as `SAM`; sigma or lmbda out of range; an unknown convention or projection.
    """

    def __init__(self, params: Iterable[Any], base_optimizer: type[Optimizer], rho: float = 0.05,
                 sigma: float = 1.0, lmbda: float = 0.9, adaptive: bool = False, *,
                 convention: str = "algorithm1", projection: str = "constant", **kwargs: Any):
        if convention not in ("algorithm1", "official"):
            raise ValueError(f"convention={convention!r} is unknown: "
                             "use 'algorithm1' or 'official'")
        if projection not in ("constant", "cosine", "orthogonal"):
            raise ValueError(f"projection={projection!r} is unknown: "
                             "use 'constant', 'cosine' or 'orthogonal'")
        own = dict(rho=rho, sigma=sigma, lmbda=lmbda, adaptive=adaptive)
        method = Method(convention, None if projection == "constant" else projection)
        self._build(params, base_optimizer, own, method, **kwargs)


class MomentumSAM(SAM):
    """Momentum-SAM (Becker et al. 2024): climbs along the momentum, against its direction.

        w' = w - rho v / ||v||
        v, w = base(w, g(w'))                           SGD with momentum, Adam or AdamW

    v is SGD's momentum buffer or Adam's first moment, as the step before left it; at the first
    step it is 0 and nothing climbs. The climb needs no gradient, so a step has one forward and
    backward pass, and `first_step` comes before it:

        opt.first_step(); loss.backward(); opt.second_step(zero_grad=True)

    `step(closure)` calls the closure once, at w'. Between steps the weights are w, which is what
    is evaluated and saved; the authors' code leaves them at w' and has a call that moves them
    back. Weight decay is the base optimizer's, at w; the authors' SGD takes it at w', and their
    AdamW decays after the step instead of before. Frozen parameters do not climb; others do along
    their v, whether this pass gives them a gradient or not. The pass moves BatchNorm's statistics:
    it is not to be frozen.

    ||v|| is left by the step that made v, and taken anew where v has changed since as far as torch
    counts it (`Tensor._version`): in place, through views, by replacing or loading it. Writes that
    torch does not count, through `.data`, NumPy, DLPack, or torch.distributed's all_reduce and
    broadcast, are climbed along, but by the old length, once; after them
    `torch.autograd.graph.increment_version(opt.state[p]["momentum_buffer"])` tells.

    Args:
        params, base_optimizer, **kwargs: as `SAM`; the base is SGD with momentum, Adam or AdamW.
        rho: radius, at least 0. Default 3.0, as in its authors' code for
            CIFAR-100 and ImageNet.

    Raises:
        ValueError: as `SAM`; another base; momentum=0 in a group that climbs.
    """

    climbs_first = True

    def __init__(self, params: Iterable[Any], base_optimizer: type[Optimizer], rho: float = 3.0,
                 **kwargs: Any):
        if "adaptive" in kwargs:
            raise TypeError("Momentum-SAM has no adaptive form: leave adaptive= out")
        refuse_other_bases(base_optimizer, type(self))
        self._build(params, base_optimizer, dict(rho=rho, adaptive=False),
                    Method(along_v=True), **kwargs)

    def first_step(self, zero_grad: bool = False, scaler: Any = None) -> None:
        """Climb from w to w - rho v / ||v||, before the forward pass, and save w.

        A v of 0 moves nothing. A v that is not finite moves nothing and makes the coming second
        step a counted skip.

        Args:
            zero_grad: clear the gradients of the step before. Default False.
            scaler: the `torch.amp.GradScaler` that will scale the loss, if any; the pass ends in
                `scaler.step(opt); scaler.update()`, with or without it here.

        Raises:
            PhaseError: called twice without a second step or `restore()`.
            ValueError, RuntimeError: as `SAM.first_step`.
        """
        super().first_step(zero_grad, scaler)

    def _check_closures(self, closure: Any, ascent_closure: Any) -> None:
        if ascent_closure is not None:
            raise TypeError("Momentum-SAM climbs without a pass: leave ascent_closure out")
        super()._check_closures(closure, None)

    def _climbing_step(self, closure: Callable[[], Loss], ascent_closure: Callable[[], Loss],
                       ) -> Loss:
        return self._climb_and_step(closure, zero_grad=False)

    def local_first_pass(self, model: Any) -> NoReturn:
        """Momentum-SAM has no first pass. Raises PhaseError."""
        raise PhaseError("Momentum-SAM has no first pass: its only one is averaged over ranks")


class GSAM(SAM):
    """GSAM (Zhuang et al. 2022): descends the surrogate gap, too.

        w' = w + rho g / ||g||
        h  = g - <g, g'> / ||g'||^2 g'                  g = g(w), g' = g(w')
        w  = base(w, g' - alpha h)

    h is g's part orthogonal to g', along which the gap between the loss at w' and the loss at w
    falls without the loss at w' changing, to first order. Inner product and norm are over all
    parameters. A parameter that has a gradient in one of the two passes only is stepped with it
    as by SAM. A second gradient that is not finite, of what climbed, makes the step a counted skip.

    In the paper rho follows the learning rate: see `RhoScheduler`.

    Args:
        params, base_optimizer, **kwargs: as `SAM`; the base is SGD, Adam or AdamW.
        rho: radius, at least 0. Default 0.05.
        alpha: share of h; finite. Default 0.4, of the authors' CIFAR example.
        adaptive: ASAM's scaling T = |w| of the climb. Default False.

    Group keys as `SAM`'s, and `alpha`.

    Raises:
        ValueError: as `SAM`; alpha out of range; another base.
    """

    def __init__(self, params: Iterable[Any], base_optimizer: type[Optimizer], rho: float = 0.05,
                 alpha: float = 0.4, adaptive: bool = False, **kwargs: Any):
        refuse_other_bases(base_optimizer, type(self))
        own = dict(rho=rho, alpha=alpha, adaptive=adaptive)
        self._build(params, base_optimizer, own, Method("gsam"), **kwargs)

    def stash_grad(self) -> NoReturn:
        """Not for GSAM, which needs both gradients of a step. Raises PhaseError."""
        refuse_micro_batches(self)

    def local_first_pass(self, model: Any) -> NoReturn:
        """Not for GSAM, whose step depends on the first gradient: ranks with gradients of their
        own would take steps of their own. Raises PhaseError."""
        refuse_micro_batches(self)


class LookSAM(SAM):
    """LookSAM (Liu et al. 2022): takes from k steps ago what the climb adds to the gradient.

    Every k-th step is SAM's, and keeps the part of its gradient that is orthogonal to g:

        w'  = w + rho g / ||g||
        g_v = g' - <g', g> / ||g||^2 g                  g = g(w), g' = g(w')
        w   = base(w, g')

    the steps between have one pass, and approximate g' with it:

        w   = base(w, g + alpha ||g|| / ||g_v|| g_v)

    Inner product and norms are over all parameters, as in the paper; some implementations take
    them tensor by tensor, which is another method. Where g' is parallel to g, up to rounding, g_v
    is 0 and nothing is added; a parameter without one of both gradients keeps its g_v.
    `step(closure)` sees to the passes; a loop of its own asks `climbs_next`, and calls `step()`
    alone where it is False. Before the first climb (`start`) steps are the base optimizer's. A
    gradient that is not finite, of what climbs, makes the step a counted skip.

    Args:
        params, base_optimizer, **kwargs: as `SAM`; the base is SGD, Adam or AdamW.
        rho: radius, at least 0. Default 0.05.
        alpha: length of what is added, in lengths of g; finite. Default 0.7.
        k: every k-th step climbs, as `interval` of `SAM`. Default 5.

    Group keys as `SAM`'s, and `alpha`. g_v is in the state, under `g_v`.

    Raises:
        ValueError: as `SAM`; alpha or k out of range; another base.
    """

    def __init__(self, params: Iterable[Any], base_optimizer: type[Optimizer], rho: float = 0.05,
                 alpha: float = 0.7, k: int = 5, **kwargs: Any):
        for name, way in (("adaptive", "leave adaptive= out"), ("interval", "use k=")):
            if name in kwargs:
                raise TypeError(f"LookSAM has no {name}: {way}")
        if not isinstance(k, Integral) or k < 1:
            raise ValueError(f"k={k!r} is out of range: use the number of steps from one climb to "
                             "the next, such as 5")
        refuse_other_bases(base_optimizer, type(self))
        own = dict(rho=rho, alpha=alpha, adaptive=False)
        self._build(params, base_optimizer, own, Method("looksam"), interval=k, **kwargs)

    def stash_grad(self) -> NoReturn:
        """Not for LookSAM, which needs both gradients of a step. Raises PhaseError."""
        refuse_micro_batches(self)

    def local_first_pass(self, model: Any) -> NoReturn:
        """Not for LookSAM, whose g_v would be another one on every rank. Raises PhaseError."""
        refuse_micro_batches(self)


def refuse_micro_batches(optimizer: SAM) -> NoReturn:
    raise PhaseError(f"{type(optimizer).__name__} needs both gradients of the whole batch: use "
                     "SAM for climbs by parts of it")


def refuse_other_bases(base: object, own: type[SAM]) -> None:
    """Refuse a base that is not fused, into whose step this class could not reach.

    Raises:
        ValueError: an optimizer other than torch's SGD, Adam and AdamW.
    """
    kind = type(base) if isinstance(base, Optimizer) else base
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind not in FUSED:
        raise ValueError(f"base_optimizer={kind.__name__} takes a step of its own, which "
                         f"{own.__name__} cannot change: use torch.optim.SGD, Adam or AdamW")


class FullGradientSAM(SAM):
    """The analysis variants of the F-SAM paper's section 4, which need the full gradient G.

    `part="full"` is SAM-full, which climbs along the batch gradient's part along G,
    d = c G; `part="noise"` is SAM-noise, which climbs along the rest, d = g - c G. c is
    cos(G, g) as printed in the paper (`projection="cosine"`), with which the rest is orthogonal
    to G only if ||g|| = ||G||, or <g, G> / <G, G> ("orthogonal"). SAM-db, the third variant, is
    `SAM.step(closure, ascent_closure)`.

    Args:
        params, base_optimizer, **kwargs: as `SAM`.
        part: "full" or "noise".
        rho: radius, at least 0. Default 0.05.
        projection: "cosine" (default) or "orthogonal".

    Raises:
        ValueError: as `SAM`; an unknown part or projection.
    """

    def __init__(self, params: Iterable[Any], base_optimizer: type[Optimizer], part: str,
                 rho: float = 0.05, *, projection: str = "cosine", **kwargs: Any):
        if part not in ("full", "noise"):
            raise ValueError(f"part={part!r} is unknown: use 'full' or 'noise'")
        if projection not in ("cosine", "orthogonal"):
            raise ValueError(f"projection={projection!r} is unknown: use 'cosine' or 'orthogonal'")
        self._build(params, base_optimizer, dict(rho=rho, adaptive=False),
                    Method(part, projection), **kwargs)

    def first_step(self, zero_grad: bool = False, scaler: Any = None) -> None:
        """As `SAM.first_step`. Raises PhaseError without a full gradient."""
        self._need_full_gradient("first_step")
        super().first_step(zero_grad, scaler)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """As `SAM.replay`. Raises PhaseError without a full gradient."""
        if self.climbs_next:
            self._need_full_gradient("a replay")
        with super().replay():
            yield

    def _need_full_gradient(self, call: str) -> None:
        if not self._follow().shown.has_m:
            raise PhaseError(f"{call} without a full gradient: call set_full_gradient or "
                             "measure_full_gradient first")

    @torch.no_grad()
    def set_full_gradient(self, gradients: Iterable[Tensor | None] | None = None) -> None:
        """Set G, which stays until it is set again. It is in the state, under `full_gradient`: a
        saved one is loaded, and one that is cleared is gone.

        Args:
            gradients: one per parameter in the order of the groups, None for 0; by default those
                in `.grad`, which stay there.

        Raises:
            ValueError: another number of gradients, or another shape, than the parameters'; one
                whose storage was freed.
            PhaseError: while perturbed.
        """
        self._phase.need(False, "set_full_gradient")
        params = params_of(self._join_containers())
        gradients = [p.grad for p in params] if gradients is None else list(gradients)
        if len(gradients) != len(params):
            raise ValueError(f"{len(gradients)} gradients for {len(params)} parameters: "
                             "give one, or None, for each")
        for p, g in zip(params, gradients, strict=True):
            if g is not None and g.shape != p.shape:
                raise ValueError(f"a gradient of shape {tuple(g.shape)} for a parameter of shape "
                                 f"{tuple(p.shape)}: give them in the order of the groups")
        refuse_freed(gradients)
        slots = {slot.param: slot for space in self.spaces for slot in space.slots}
        for p, g in zip(params, gradients, strict=True):
            slots[p].m.zero_() if g is None else slots[p].m.copy_(
                local(placed_like(p, g)))
        layout = self._phase.layout
        if not layout.shown.has_m:
            layout.shown.show_m(True)
            layout.show(self.state)

    def measure_full_gradient(self, batches: Iterable[Batch],
                              loss: Callable[[Batch], tuple[Tensor, int]]) -> None:
        """Set G to the gradient of the mean loss over all examples of `batches`, at w. Costs a
        forward and backward pass over them; clears `.grad`. BatchNorm's statistics move as in any
        forward pass in training mode (see `freeze_bn_stats`).

        Args:
            batches: an iterable, such as a DataLoader.
            loss: called with each batch; returns (mean loss of the batch, number of examples).

        Raises:
            TypeError: a loss that returns something else.
            ValueError: no batches.
            PhaseError: while perturbed.
        """
        self._phase.need(False, "measure_full_gradient")
        self.zero_grad()
        try:
            self.set_full_gradient(self._mean_gradients(batches, loss))
        finally:
            self.zero_grad()

    def _mean_gradients(self, batches: Iterable[Batch],
                        loss: Callable[[Batch], tuple[Tensor, int]]) -> list[Tensor | None]:
        """Summed up in no less than float32: in 16 bits, a sum soon is too large to grow."""
        total, sums = 0, dict[Tensor, Tensor]()
        for batch in batches:
            with torch.enable_grad():
                mean, n = mean_and_number(loss(batch))
                mean.backward()
            total += n
            params = params_of(self._join_containers())
            refuse_freed([p.grad for p in params])
            for p in params:
                if p.grad is not None:
                    g = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32)) * n
                    sums[p] = sums[p].add_(g) if p in sums else g
                    p.grad = None
        if total == 0:
            raise ValueError("batches is empty: give an iterable that can be walked again")
        return [sums[p] / total if p in sums else None
                for p in params_of(self._join_containers())]


def mean_and_number(returned: Any) -> tuple[Tensor, int]:
    """What a loss returned to `measure_full_gradient`. TypeError: it is no such pair."""
    if not (isinstance(returned, (tuple, list)) and len(returned) == 2):
        raise TypeError(f"loss returned a {type(returned).__name__}: return (mean loss, number of "
                        "examples) of the batch")
    return returned[0], returned[1]
