"""What several test files share: the variants, their hyper-parameters, and the lockstep run."""

import torch

from fastsam import ASAM, SAM, FisherSAM, FriendlySAM, FullGradientSAM

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
    "fisher": (FisherSAM, dict(eta=0.8), dict(method="fisher", eta=0.8)),
    "fsam-cosine": (FriendlySAM, dict(projection="cosine"),
                    dict(method="fsam", projection="cosine")),
    "fsam-orthogonal": (FriendlySAM, dict(projection="orthogonal", convention="official"),
                        dict(method="fsam", projection="orthogonal", convention="official")),
    "sam-full": (FullGradientSAM, dict(part="full"), dict(method="full", projection="cosine")),
    "sam-noise": (FullGradientSAM, dict(part="noise", projection="orthogonal"),
                  dict(method="noise", projection="orthogonal")),
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
# The same for Adam and AdamW.
ADAM_GROUPS = [
    dict(rho=0.3, sigma=0.7, lmbda=0.6, lr=0.02, betas=(0.8, 0.97), eps=1e-3, weight_decay=0.1),
    dict(rho=0.9, sigma=1.2, lmbda=0.8, lr=0.005, betas=(0.0, 0.6), eps=1e-2, weight_decay=0.0),
    dict(rho=0.5, sigma=0.4, lmbda=0.3, lr=0.01, betas=(0.95, 0.999), eps=1e-4, weight_decay=0.3),
]
BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def deal(n: int, groups: list[dict]) -> list[dict]:
    """n parameters dealt to the groups in turn: the groups with "params" as indices."""
    dealt = [{"params": list(range(i, n, len(groups))), **group} for i, group in enumerate(groups)]
    return [group for group in dealt if group["params"]]


def build(params, groups: list[dict], name: str, backend: str, base: str = "sgd", **kwargs) -> SAM:
    """The optimizer of METHODS[name]; groups as the oracle takes them."""
    cls, own, _ = METHODS[name]
    groups = [{**g, "params": [params[i] for i in g["params"]]} for g in groups]
    return cls(groups, BASES[base], backend=backend, lr=0.1, **own, **kwargs)


def full_gradient(params) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(77)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in params]


class Course:
    """One optimizer in lockstep with its own oracle.

    Before every step the oracle takes over the optimizer's weights and state, so that what is
    compared is the error of one step, not of the whole course; being right at every step from the
    state the step before left is being right throughout.
    """

    NAMES = {"m": ("ema", "full_gradient"), "v": ("momentum_buffer", "exp_avg"),
             "u": ("exp_avg_sq",)}

    def __init__(self, params, groups: list[dict], name: str, backend: str, base: str = "sgd",
                 **kwargs):
        self.params = params
        self.opt = build(params, groups, name, backend, base, **kwargs)
        self.oracle = Oracle(params, groups, base=base, **METHODS[name][2])
        if "part" in METHODS[name][1]:
            G = full_gradient(params)
            self.opt.set_full_gradient([G[i] for group in groups for i in group["params"]])
            self.oracle.m = [exact(self.state(i, "m")) for i in range(len(params))]

    def state(self, i: int, letter: str):
        entry = self.opt.state.get(self.params[i], {})
        return next((entry[name] for name in self.NAMES[letter] if name in entry), None)

    def weight(self, i: int) -> torch.Tensor:
        """What the optimizer starts its next step from: the parameter, or its float32 master."""
        p = self.params[i]
        return self.opt.state.get(p, {}).get("master", p)

    def follow(self) -> None:
        for i in range(len(self.params)):
            self.oracle.w[i] = exact(self.weight(i))
            for letter in self.NAMES:
                own = getattr(self.oracle, letter)
                if own[i] is not None:
                    own[i] = exact(self.state(i, letter))

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
        """(what it is, the optimizer's tensor, the oracle's): weights, m, v and u."""
        for i, p in enumerate(self.params):
            yield f"w[{i}]", p.detach(), self.oracle.w[i]
            if not self.opt.is_perturbed and self.weight(i) is not p:
                yield f"master[{i}]", self.weight(i), self.oracle.w[i]
            for letter in self.NAMES:
                actual, expected = self.state(i, letter), getattr(self.oracle, letter)[i]
                if expected is not None:
                    assert actual is not None, f"{letter}[{i}] is missing"
                    yield f"{letter}[{i}]", actual, expected
                elif actual is not None:
                    yield f"{letter}[{i}]", actual, torch.zeros_like(exact(actual))
