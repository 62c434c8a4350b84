"""What several test files share: the variants, their hyper-parameters, and the lockstep run."""

import torch

from fastsam import ASAM, SAM, FriendlySAM

from .oracle import Oracle, exact

METHODS = {  # name: the class, its arguments, the oracle's arguments
    "sam": (SAM, {}, dict(method="sam")),
    "asam-all": (ASAM, {}, dict(method="asam")),
    "asam-weights": (ASAM, dict(scale="weights", eta=0.03),
                     dict(method="asam", scale="weights", eta=0.03)),
    "fsam": (FriendlySAM, {}, dict(method="fsam")),
    "fsam-official": (FriendlySAM, dict(convention="official"),
                      dict(method="fsam", convention="official")),
    "fasam": (FriendlySAM, dict(adaptive=True), dict(method="fasam")),
    "fasam-official": (FriendlySAM, dict(adaptive=True, convention="official"),
                       dict(method="fasam", convention="official")),
}
# Nothing neutral, nothing shared: momentum with dampening, Nesterov, and no momentum at all.
GROUPS = [
    dict(rho=0.3, sigma=0.7, lmbda=0.6, lr=0.07, momentum=0.9, dampening=0.2, weight_decay=0.02,
         nesterov=False),
    dict(rho=0.9, sigma=1.2, lmbda=0.8, lr=0.03, momentum=0.8, dampening=0.0, weight_decay=0.0,
         nesterov=True),
    dict(rho=0.5, sigma=0.4, lmbda=0.3, lr=0.11, momentum=0.0, dampening=0.0, weight_decay=0.05,
         nesterov=False),
]


def deal(n: int, groups: list[dict]) -> list[dict]:
    """n parameters dealt to the groups in turn: the groups with "params" as indices."""
    dealt = [{"params": list(range(i, n, len(groups))), **group} for i, group in enumerate(groups)]
    return [group for group in dealt if group["params"]]


def build(params, groups: list[dict], name: str, backend: str, **kwargs) -> SAM:
    """The optimizer of METHODS[name] over SGD; groups as the oracle takes them."""
    cls, own, _ = METHODS[name]
    groups = [{**g, "params": [params[i] for i in g["params"]]} for g in groups]
    return cls(groups, torch.optim.SGD, backend=backend, lr=0.1, **own, **kwargs)


class Course:
    """One optimizer in lockstep with its own oracle.

    Before every step the oracle takes over the optimizer's weights and state, so that what is
    compared is the error of one step, not of the whole course; being right at every step from the
    state the step before left is being right throughout.
    """

    def __init__(self, params, groups: list[dict], name: str, backend: str):
        self.params = params
        self.opt = build(params, groups, name, backend)
        self.oracle = Oracle(params, groups, **METHODS[name][2])

    def state(self, i: int, key: str):
        return self.opt.state.get(self.params[i], {}).get(key)

    def follow(self) -> None:
        for i, p in enumerate(self.params):
            self.oracle.w[i] = exact(p)
            for own, key in ((self.oracle.m, "ema"), (self.oracle.v, "momentum_buffer")):
                if own[i] is not None:
                    own[i] = exact(self.state(i, key))

    def first_step(self, grads) -> None:
        self.follow()
        self._set(grads)
        self.opt.first_step(zero_grad=True)
        self.oracle.first_step(grads)

    def second_step(self, grads) -> None:
        self._set(grads)
        self.opt.second_step(zero_grad=True)
        self.oracle.second_step(grads)

    def _set(self, grads) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g

    def compared(self):
        """(what it is, the optimizer's tensor, the oracle's): weights, m and v."""
        for i, p in enumerate(self.params):
            yield f"w[{i}]", p.detach(), self.oracle.w[i]
            for what, key, expected in (("m", "ema", self.oracle.m[i]),
                                        ("v", "momentum_buffer", self.oracle.v[i])):
                actual = self.state(i, key)
                if expected is not None:
                    assert actual is not None, f"{what}[{i}] is missing"
                    yield f"{what}[{i}]", actual, expected
                elif actual is not None:
                    yield f"{what}[{i}]", actual, torch.zeros_like(exact(actual))
