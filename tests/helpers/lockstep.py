"""One optimizer in lockstep with its own oracle."""

import torch

from fastsam import SAM

from .oracle import Oracle, exact
from .variants import ALL, BASES, VARIANTS, full_gradient


def build(params, groups: list[dict], name: str, backend: str, base: str = "sgd", **kwargs) -> SAM:
    """The optimizer of a variant; groups as the oracle takes them."""
    groups = [{**g, "params": [params[i] for i in g["params"]]} for g in groups]
    return ALL[name].cls(groups, BASES[base], backend=backend, lr=0.1, **ALL[name].own, **kwargs)


class Lockstep:
    """What runs beside an oracle: its `params`, `oracle`, and whether it `is_perturbed`.

    Before every step the oracle takes over the weights and the state, so that what is compared is
    the error of one step, not of the whole course; being right at every step from the state the
    step before left is being right throughout.
    """

    params: list[torch.nn.Parameter]
    oracle: Oracle
    is_perturbed: bool

    def state(self, i: int, letter: str) -> torch.Tensor | None:
        """m, v or u of a parameter."""
        raise NotImplementedError

    def weight(self, i: int) -> torch.Tensor:
        """What the next step starts from: the parameter, or its float32 master."""
        raise NotImplementedError

    def follow(self) -> None:
        """The oracle takes over the weights and the state."""
        for i in range(len(self.params)):
            self.oracle.w[i] = exact(self.weight(i))
            for letter in "mvu":
                own = getattr(self.oracle, letter)
                if own[i] is not None:
                    own[i] = exact(self.state(i, letter))

    def compared(self):
        """(what it is, the tensor here, the oracle's): weights, masters, m, v and u; state that
        has not begun is 0."""
        for i, p in enumerate(self.params):
            yield f"w[{i}]", p.detach(), self.oracle.w[i]
            if not self.is_perturbed and self.weight(i).dtype != p.dtype:
                yield f"master[{i}]", self.weight(i), self.oracle.w[i]
            for letter in "mvu":
                actual, expected = self.state(i, letter), getattr(self.oracle, letter)[i]
                if expected is not None:
                    assert actual is not None, f"{letter}[{i}] is missing"
                    yield f"{letter}[{i}]", actual, expected
                elif actual is not None:
                    yield f"{letter}[{i}]", actual, torch.zeros_like(exact(actual))


class Course(Lockstep):
    """A whole optimizer, of a name in VARIANTS."""

    NAMES = {"m": ("ema", "full_gradient"), "v": ("momentum_buffer", "exp_avg"),
             "u": ("exp_avg_sq",)}

    def __init__(self, params, groups: list[dict], name: str, backend: str, base: str = "sgd",
                 **kwargs):
        self.params = params
        self.opt = build(params, groups, name, backend, base, **kwargs)
        self.oracle = Oracle(params, groups, base=base, **VARIANTS[name].oracle)
        if "part" in VARIANTS[name].own:
            G = full_gradient(params)
            self.opt.set_full_gradient([G[i] for group in groups for i in group["params"]])
            self.oracle.m = [exact(self.state(i, "m")) for i in range(len(params))]

    @property
    def is_perturbed(self) -> bool:
        return self.opt.is_perturbed

    def state(self, i: int, letter: str) -> torch.Tensor | None:
        entry = self.opt.state.get(self.params[i], {})
        return next((entry[name] for name in self.NAMES[letter] if name in entry), None)

    def weight(self, i: int) -> torch.Tensor:
        p = self.params[i]
        return self.opt.state.get(p, {}).get("master", p)

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
