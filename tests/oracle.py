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

then w = base(w, gradient at w'). 1e-12 is added to the norm, as in the public SAM classes.
"""

import math

import torch

NEUTRAL = dict(rho=0.05, sigma=1.0, lmbda=0.9, lr=1e-3, momentum=0.0, dampening=0.0,
               weight_decay=0.0, nesterov=False, perturb=True, betas=(0.9, 0.999), eps=1e-8)


class Oracle:
    """The optimizer's exact course.

    Args:
        params: the parameters' tensors.
        groups: dicts with "params", indices into `params`, and any key of NEUTRAL.
        method: "sam", "asam", "fisher", "fsam", "fasam", "full" or "noise".
        convention: of Friendly-SAM, "algorithm1" (the paper) or "official" (its code).
        projection: what sigma is multiplied with: 1 ("constant"), the cosine of m and g
            ("cosine"), or <g, m> / <m, m> ("orthogonal").
        scale, eta: ASAM's T; "all" is |w|, "weights" is |w| + eta where there are two or more
            dimensions and 1 elsewhere. eta is FisherSAM's too.
        base: "sgd", "adam" or "adamw".

    Attributes:
        w: the weights now, the moved ones between the two steps.
        m, v, u: moving average (or full gradient), momentum buffer or Adam's first moment, and
            Adam's second, per parameter; None where there is none yet. t counts Adam's steps.
        norm, skipped: ||T d|| of the last first step; the steps skipped so far.
    """

    def __init__(self, params, groups, method="sam", convention="algorithm1", scale="all",
                 eta=0.01, projection="constant", base="sgd"):
        self.w = [exact(p) for p in params]
        self.h = [None] * len(params)
        for group in groups:
            for i in group["params"]:
                self.h[i] = {**NEUTRAL, **{k: x for k, x in group.items() if k != "params"}}
        self.method, self.convention, self.scale, self.eta = method, convention, scale, eta
        self.projection, self.base = projection, base
        self.saved = {}
        self.m = [None] * len(params)
        self.v = [None] * len(params)
        self.u = [None] * len(params)
        self.t = [0] * len(params)
        self.norm, self.ok, self.skipped = None, True, 0

    def _T(self, w, g):
        if self.method == "fisher":
            return (1 + self.eta * g * g) ** -0.5
        if self.method not in ("asam", "fasam"):
            return torch.ones_like(w)
        if self.method == "fasam" or self.scale == "all":
            return w.abs()
        return w.abs() + self.eta if w.ndim >= 2 else torch.ones_like(w)

    def _averages(self, grads):
        """(the m that is projected with, the m of the next step) of every parameter that climbs."""
        pairs = {}
        for i, g in grads.items():
            l, m = self.h[i]["lmbda"], self.m[i]  # noqa: E741
            if self.method not in ("fsam", "fasam"):
                pairs[i] = (m, m)
            elif self.convention == "algorithm1":
                new = l * (torch.zeros_like(g) if m is None else m) + (1 - l) * g
                pairs[i] = (new, new)
            elif m is None:
                pairs[i] = (torch.zeros_like(g), g.clone())
            else:
                pairs[i] = (m, l * m + (1 - l) * g)
        return pairs

    def _share(self, grads, averages):
        """What sigma is multiplied with."""
        if self.projection == "constant":
            return 1.0
        gm = sum(float((g * averages[i][0]).sum()) for i, g in grads.items())
        gg = sum(float((g * g).sum()) for g in grads.values())
        mm = sum(float((averages[i][0] ** 2).sum()) for i in grads)
        if gg == 0 or mm == 0:
            return 0.0
        return gm / math.sqrt(gg * mm) if self.projection == "cosine" else gm / mm

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
        g = {i: exact(g) for i, g in enumerate(grads) if g is not None and self.h[i]["perturb"]}
        d, m = self._directions(g)
        T = {i: self._T(self.w[i], g[i]) for i in d}
        self.norm = math.sqrt(sum(float(((T[i] * d[i]) ** 2).sum()) for i in d))
        self.ok = math.isfinite(self.norm)
        self.saved = {i: self.w[i].clone() for i in d}
        if self.ok:
            for i in d:
                self.w[i] = self.w[i] + self.h[i]["rho"] * T[i] ** 2 * d[i] / (self.norm + 1e-12)
                self.m[i] = m[i]

    def second_step(self, grads):
        self.restore()
        if not self.ok:
            self.skipped, self.ok = self.skipped + 1, True
            return
        for i, g in enumerate(grads):
            if g is not None:
                (self._sgd if self.base == "sgd" else self._adam)(i, exact(g))

    def _sgd(self, i, g):
        h = self.h[i]
        mu, tau = h["momentum"], h["dampening"]
        g = g + h["weight_decay"] * self.w[i]
        if mu != 0:
            v = self.v[i]
            self.v[i] = g.clone() if v is None else mu * v + (1 - tau) * g
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
        zero = torch.zeros_like(w)
        self.v[i] = beta1 * (zero if self.v[i] is None else self.v[i]) + (1 - beta1) * g
        self.u[i] = beta2 * (zero if self.u[i] is None else self.u[i]) + (1 - beta2) * g ** 2
        self.t[i] += 1
        v, u = self.v[i] / (1 - beta1 ** self.t[i]), self.u[i] / (1 - beta2 ** self.t[i])
        self.w[i] = w - lr * v / (u.sqrt() + h["eps"])

    def restore(self):
        for i, w in self.saved.items():
            self.w[i] = w
        self.saved = {}


def exact(t):
    return t.detach().to("cpu", torch.float64).clone()
