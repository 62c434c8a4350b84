"""The one table of variants, from which every test that goes over the family reads them, with the
hyper-parameters that suit all. A new variant is a row: of VARIANTS where its whole difference is
the climb, of RELATIVES where its step is another than SAM's too."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam import (
    ASAM,
    GSAM,
    SAM,
    FisherSAM,
    FriendlySAM,
    FullGradientSAM,
    LookSAM,
    MomentumSAM,
)


class Variant(NamedTuple):
    """One of the family.

    Attributes:
        cls, own: the class, and the arguments that make it this variant.
        oracle: the arguments of `oracle.Oracle`; None: its mathematics are in test_relatives.py.
        suits: radius and the like for the small network of the optimizer's contract.
        exempt: the contract's tests that do not hold for it.
    """

    cls: type[SAM]
    own: dict[str, Any]
    oracle: dict[str, Any] | None
    suits: dict[str, Any]
    exempt: tuple[str, ...] = ()


def friendly(oracle: dict, rho: float = 0.1, **own: Any) -> Variant:
    return Variant(FriendlySAM, own, oracle, dict(rho=rho, sigma=0.7, lmbda=0.6))


OFFICIAL = dict(convention="official")
ORTHOGONAL = dict(projection="orthogonal")
WEIGHTS = dict(scale="weights", eta=0.03)
VARIANTS = {
    "sam": Variant(SAM, {}, dict(method="sam"), dict(rho=0.08)),
    "asam-all": Variant(ASAM, {}, dict(method="asam"), dict(rho=1.5)),
    "asam-weights": Variant(ASAM, WEIGHTS, dict(method="asam", **WEIGHTS), dict(rho=0.4)),
    "fisher": Variant(FisherSAM, dict(eta=0.8), dict(method="fisher", eta=0.8), dict(rho=0.1)),
    "fsam": friendly(dict(method="fsam")),
    "fsam-official": friendly(dict(method="fsam", **OFFICIAL), **OFFICIAL),
    "fasam": friendly(dict(method="fasam"), rho=1.2, adaptive=True),
    "fasam-official": friendly(dict(method="fasam", **OFFICIAL), rho=1.2, adaptive=True,
                               **OFFICIAL),
    "fsam-cosine": friendly(dict(method="fsam", projection="cosine"), projection="cosine"),
    "fsam-orthogonal": friendly(dict(method="fsam", **ORTHOGONAL, **OFFICIAL), **ORTHOGONAL,
                                **OFFICIAL),
    "sam-full": Variant(FullGradientSAM, dict(part="full"),
                        dict(method="full", projection="cosine"), dict(rho=0.1)),
    "sam-noise": Variant(FullGradientSAM, dict(part="noise", **ORTHOGONAL),
                         dict(method="noise", **ORTHOGONAL), dict(rho=0.1)),
}
# over SGD, Adam and AdamW only; here a first gradient, or none, decides, or another base steps
STASHED = "test_a_stashed_climb_that_was_not_finite_skips_the_step"
RELATIVES = {
    "msam": Variant(MomentumSAM, {}, None, dict(rho=0.2), exempt=(
        "test_a_gradient_that_is_not_finite_skips_the_step",
        "test_an_exception_in_the_second_pass_restores",
        "test_grad_scaler_is_divided_out_and_backs_off",
        "test_a_gradient_in_only_one_pass_is_handled",
        "test_an_ascent_closure_climbs_by_another_batch",
        "test_closure_runs_twice_and_returns_the_first_loss", STASHED)),
    "gsam": Variant(GSAM, {}, None, dict(rho=0.1, alpha=0.3), exempt=(STASHED,)),
    "looksam": Variant(LookSAM, dict(k=1), None, dict(rho=0.1, alpha=0.6), exempt=(STASHED,)),
}
ALL = {**VARIANTS, **RELATIVES}

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


def full_gradient(params) -> list[Tensor]:
    """What SAM-full and SAM-noise are given."""
    generator = torch.Generator().manual_seed(77)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in params]
