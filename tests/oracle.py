"""SAM, ASAM and Friendly-SAM over SGD in float64, one parameter at a time.

Written from the papers' formulas and sharing no code with fastsam, to judge it. The gradients of
both passes are given, so nothing here depends on a model. With g the gradient, m its moving
average, T the scaling of ASAM, and ||.|| one norm over all parameters of all groups:

    SAM     w' = w + rho g / ||g||                      Foret et al. 2021
    ASAM    w' = w + rho T^2 g / ||T g||                Kwon et al. 2021; T = |w| for everything,
                                                        or |w| + eta for weights and 1 for biases
    F-SAM   w' = w + rho d / ||d||                      Li et al. 2024, d as in `_direction`
    F-ASAM  w' = w + rho T^2 d / ||T d||                T = |w|

then w = SGD(w, gradient at w'). 1e-12 is added to the norm, as in the public SAM classes.
"""

import math

import torch

NEUTRAL = dict(rho=0.05, sigma=1.0, lmbda=0.9, lr=1e-3, momentum=0.0, dampening=0.0,
               weight_decay=0.0, nesterov=False, perturb=True)


class Oracle:
    """The optimizer's exact course.

    Args:
        params: the parameters' tensors.
        groups: dicts with "params", indices into `params`, and any key of NEUTRAL.
        method: "sam", "asam", "fsam" or "fasam".
        convention: of Friendly-SAM, "algorithm1" (the paper) or "official" (its code).
        scale, eta: ASAM's T; "all" is |w|, "weights" is |w| + eta where there are two or more
            dimensions and 1 elsewhere.

    Attributes:
        w: the weights now, the moved ones between the two steps.
        m, v: moving average and momentum buffer per parameter; None where there is none yet.
        norm, skipped: ||T d|| of the last first step; the steps skipped so far.
    """

    def __init__(self, params, groups, method="sam", convention="algorithm1", scale="all",
                 eta=0.01):
        self.w = [exact(p) for p in params]
        self.h = [None] * len(params)
        for group in groups:
            for i in group["params"]:
                self.h[i] = {**NEUTRAL, **{k: x for k, x in group.items() if k != "params"}}
        self.method, self.convention, self.scale, self.eta = method, convention, scale, eta
        self.saved = {}
        self.m = [None] * len(params)
        self.v = [None] * len(params)
        self.norm, self.ok, self.skipped = None, True, 0

    def _T(self, w):
        if self.method in ("sam", "fsam"):
            return torch.ones_like(w)
        if self.method == "fasam" or self.scale == "all":
            return w.abs()
        return w.abs() + self.eta if w.ndim >= 2 else torch.ones_like(w)

    def _direction(self, i, g):
        """d_t and m_t of Friendly-SAM from g_t and m_{t-1}."""
        if self.method in ("sam", "asam"):
            return g, None
        s, l, m = self.h[i]["sigma"], self.h[i]["lmbda"], self.m[i]  # noqa: E741
        if self.convention == "algorithm1":
            m = l * (torch.zeros_like(g) if m is None else m) + (1 - l) * g
            return g - s * m, m
        if m is None:
            return g, g.clone()
        return g - s * m, l * m + (1 - l) * g

    def first_step(self, grads):
        d, m, T = {}, {}, {}
        for i, g in enumerate(grads):
            if g is not None and self.h[i]["perturb"]:
                d[i], m[i] = self._direction(i, exact(g))
                T[i] = self._T(self.w[i])
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
            if g is None:
                continue
            h = self.h[i]
            mu, tau = h["momentum"], h["dampening"]
            g = exact(g) + h["weight_decay"] * self.w[i]
            if mu != 0:
                v = self.v[i]
                self.v[i] = g.clone() if v is None else mu * v + (1 - tau) * g
                g = g + mu * self.v[i] if h["nesterov"] else self.v[i]
            self.w[i] = self.w[i] - h["lr"] * g

    def restore(self):
        for i, w in self.saved.items():
            self.w[i] = w
        self.saved = {}


def exact(t):
    return t.detach().to("cpu", torch.float64).clone()
