"""The SAM family over SGD, Adam and AdamW in float64, one parameter at a time.

Written from the papers' formulas and sharing no code with fastsam, to judge it. The gradients of
both passes are given, so nothing here depends on a model. With g the gradient, m its moving
average, G the full gradient, T a scaling, and ||.|| one norm over all parameters of all groups:

    SAM     w' = w + rho g / ||g||                      Foret et al. 2021
    ASAM    w' = w + rho T^2 g / ||T g||                Kwon et al. 2021; T = |w| for everything,
                                                        or |w| + eta for weights and 1 for biases
    Fisher  w' = w + rho F^-1 g / sqrt(g^T F^-1 g)      Kim et al. 2022; F = 1 + eta g^2
    F-SAM   w' = w + rho d / ||d||                      Li et al. 2024, d as in `_direction`
    F-ASAM  w' = w + rho T^2 d / ||T d||                T = |w|
    full    w' = w + rho d / ||d||, d = c G             Li et al. 2024, section 4
    noise   the same with d = g - c G
    MSAM    w' = w - rho v / ||v||                      Becker et al. 2024; v the base's momentum

then w = base(w, gradient at w'). 1e-12 is added to the norm, as in the public SAM classes.
"""

import math
from fractions import Fraction

import torch

NEUTRAL = dict(rho=0.05, sigma=1.0, lmbda=0.9, lr=1e-3, momentum=0.0, dampening=0.0,
               weight_decay=0.0, nesterov=False, perturb=True, betas=(0.9, 0.999), eps=1e-8)


def exact(t):
    return t.detach().to("cpu", torch.float64).clone()


class Oracle:
    """The optimizer's exact course.

    Args:
        params: the parameters' tensors.
        groups: dicts with "params", indices into `params`, and any key of NEUTRAL, "adaptive"
            (whether T is not 1), "scale" and "eta".
        method: "sam", "asam", "fisher", "fsam", "fasam", "full", "noise" or "msam".
        convention: of Friendly-SAM, "algorithm1" (the paper) or "official" (its code).
        projection: what sigma is multiplied with: 1 ("constant"), the cosine of m and g
            ("cosine"), or <g, m> / <m, m> ("orthogonal").
        scale, eta: ASAM's T; "all" is |w|, "weights" is |w| + eta where there are two or more
            dimensions and 1 elsewhere. eta is FisherSAM's too.
        base: "sgd", "adam" or "adamw".
        number: what a tensor becomes before it is computed with; `exact` is float64.

    Attributes:
        w: the weights now, the moved ones between the two steps.
        m, v, u: moving average (or full gradient), momentum buffer or Adam's first moment, and
            Adam's second, per parameter; None where there is none yet.
        climbs, t: how often each parameter's m and v were updated.
        is_weight: per parameter, whether "weights" scales it.
        norm, size: ||T d|| of the last first step, as a float and as a number.
        skipped: the steps skipped so far.
    """

    def __init__(self, params, groups, method="sam", convention="algorithm1", scale="all",
                 eta=0.01, projection="constant", base="sgd", number=exact):
        self.method, self.convention, self.projection = method, convention, projection
        self.base, self.number = base, number
        self.neutral = {**NEUTRAL, "adaptive": method in ("asam", "fasam", "fisher"),
                        "scale": scale, "eta": eta}
        self.w, self.m, self.v, self.u, self.h = [], [], [], [], []
        self.climbs, self.t, self.is_weight = [], [], []
        self.saved = {}
        self.norm, self.size, self.ok, self.skipped = None, None, True, 0
        of = {i: group for group in groups for i in group["params"]}
        for i, p in enumerate(params):
            self.extend([p], of[i])

    def extend(self, params, group):
        """More parameters, all of one group."""
        for p in params:
            self.w.append(self.number(p))
            for own in (self.m, self.v, self.u):
                own.append(None)
            for counts in (self.climbs, self.t):
                counts.append(0)
            self.is_weight.append(p.ndim >= 2)
            self.h.append({**self.neutral, **{k: x for k, x in group.items() if k != "params"}})

    def _T(self, i, g):
        h, w = self.h[i], self.w[i]
        if not h["adaptive"]:
            return 1.0
        if self.method == "fisher":
            return (1 + h["eta"] * g * g) ** -0.5
        if h["scale"] == "all":
            return abs(w)
        return abs(w) + h["eta"] if self.is_weight[i] else 1.0

    def _averages(self, grads):
        """(the m that is projected with, the m of the next step) of every parameter that climbs."""
        pairs = {}
        for i, g in grads.items():
            l, m = self.h[i]["lmbda"], self.m[i]  # noqa: E741
            if self.method not in ("fsam", "fasam"):
                pairs[i] = (m, m)
            elif self.convention == "algorithm1":
                new = (1 - l) * g if m is None else l * m + (1 - l) * g
                pairs[i] = (new, new)
            elif m is None:
                pairs[i] = (0 * g, g)
            else:
                pairs[i] = (m, l * m + (1 - l) * g)
        return pairs

    def _share(self, grads, averages):
        """What sigma is multiplied with."""
        if self.projection == "constant":
            return 1.0
        gm = sum((g * averages[i][0]).sum() for i, g in grads.items())
        gg = sum((g * g).sum() for g in grads.values())
        mm = sum((averages[i][0] ** 2).sum() for i in grads)
        if float(gg) == 0 or float(mm) == 0:
            return 0 * gm
        return gm / (gg * mm) ** 0.5 if self.projection == "cosine" else gm / mm

    def _directions(self, grads):
        """d and the next m of every parameter that climbs."""
        averages = self._averages(grads)
        c = self._share(grads, averages)
        d = {}
        for i, g in grads.items():
            m = averages[i][0]
            if self.method == "full":
                d[i] = c * m
            elif self.method == "noise":
                d[i] = g - c * m
            elif self.method in ("fsam", "fasam"):
                d[i] = g - self.h[i]["sigma"] * c * m
            else:
                d[i] = g
        return d, {i: pair[1] for i, pair in averages.items()}

    def first_step(self, grads):
        if self.method == "msam":
            grads = [0 * w if v is None else -v for w, v in zip(self.w, self.v, strict=True)]
        g = {i: self.number(g) for i, g in enumerate(grads)
             if g is not None and self.h[i]["perturb"]}
        d, m = self._directions(g)
        T = {i: self._T(i, g[i]) for i in d}
        self.size = norm = sum(((T[i] * d[i]) ** 2).sum() for i in d) ** 0.5
        self.norm = float(norm)
        self.ok = math.isfinite(self.norm)
        self.saved = {i: self.w[i] for i in d}
        if self.ok:
            for i in d:
                self.w[i] = self.w[i] + self.h[i]["rho"] * T[i] ** 2 * d[i] / (norm + 1e-12)
                self.m[i] = m[i]
                self.climbs[i] += 1

    def second_step(self, grads, found_inf=False):
        self.restore()
        if found_inf or not self.ok:
            self.skipped, self.ok = self.skipped + 1, True
            return
        for i, g in enumerate(grads):
            if g is not None:
                (self._sgd if self.base == "sgd" else self._adam)(i, self.number(g))

    def _sgd(self, i, g):
        h = self.h[i]
        mu, tau = h["momentum"], h["dampening"]
        g = g + h["weight_decay"] * self.w[i]
        if mu != 0:
            v = self.v[i]
            self.v[i] = g if v is None else mu * v + (1 - tau) * g
            self.t[i] += 1
            g = g + mu * self.v[i] if h["nesterov"] else self.v[i]
        self.w[i] = self.w[i] - h["lr"] * g

    def _adam(self, i, g):
        """Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2."""
        h, w = self.h[i], self.w[i]
        (beta1, beta2), lr, wd = h["betas"], h["lr"], h["weight_decay"]
        if self.base == "adamw":
            w = w - lr * wd * w
        else:
            g = g + wd * w
        v, u = (0.0, 0.0) if self.v[i] is None else (self.v[i], self.u[i])
        self.v[i] = beta1 * v + (1 - beta1) * g
        self.u[i] = beta2 * u + (1 - beta2) * g ** 2
        self.t[i] += 1
        c1, c2 = (float(1 - Fraction(beta) ** self.t[i]) for beta in (beta1, beta2))
        v, u = self.v[i] / c1, self.u[i] / c2
        self.w[i] = w - lr * v / (u ** 0.5 + h["eps"])

    def forget(self, i):
        """The state of parameter i begins anew."""
        self.m[i] = self.v[i] = self.u[i] = None
        self.climbs[i] = self.t[i] = 0

    def restore(self):
        for i, w in self.saved.items():
            self.w[i] = w
        self.saved = {}
