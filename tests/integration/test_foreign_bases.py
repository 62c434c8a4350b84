"""Every base optimizer of torch.optim, and other people's, in `wrap` beside itself alone."""

import random

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW

pytest.importorskip("timm", reason="its optimizers are what is tried")
pytest.importorskip("pytorch_optimizer", reason="its optimizers are what is tried")

import pytorch_optimizer
import timm.optim

from fastsam import ASAM, SAM, FisherSAM, FriendlySAM

from ..helpers.bases import (
    SHAPES,
    Foreign,
    class_of,
    differences,
    filed,
    foreign,
    is_plain,
    names_of,
    step_alone,
    step_wrapped,
)

REFUSED = {  # by name, at construction
    "torch": ("LBFGS", "SparseAdam"),
    "timm": ("adahessian",),
    "pytorch_optimizer": ("adahessian", "adalomo", "alig", "bsam", "lbfgs", "lomo", "sophiah"),
}
LONG = ("kron", "kronc", "kronw", "spectralsphere")  # compiled, or seconds a step
NEEDS = {"demo": "einops"}
FUSED = (SGD, Adam, AdamW)
WAYS = [(SAM, 0.0), (SAM, 0.5), (FriendlySAM, 0.5)]


def taken(library: str) -> list[tuple[str, str]]:
    return [(library, name) for name in names_of(library) if name not in REFUSED[library]]


def drawn(n: int) -> list[tuple[str, str]]:
    """Some of timm's and pytorch_optimizer's, the same every time for the same libraries, and
    those that have been trouble."""
    trouble = [("pytorch_optimizer", name) for name in (
        "adadelta", "amos", "conda", "madgrad", "ranger21", "scion", "splus")]
    others = [x for x in taken("timm") + taken("pytorch_optimizer")
              if x not in trouble and x[1] not in (*LONG, *NEEDS)]
    return sorted(trouble + random.Random(5).sample(others, n - len(trouble)))


def as_alone(opt: SAM, state: dict) -> dict:
    """A saved state of SAM's as the base alone would have saved it; ours may be in it too."""
    if "base_optimizer" in state:  # in a form of its own
        return state["base_optimizer"]
    groups = [{**group, **{key: group["base_" + key] for key in opt._traits.shared}}
              for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def assert_beside_itself(case: Foreign, cls: type, rho: float) -> None:
    """Eight steps in SAM give what the base alone makes of the second gradients, state and groups
    included, to the bit; saved and loaded in the middle too. Fused bases: within rounding."""
    params, theirs = case.weights(), case.weights()
    opt, base = cls.wrap(case.build(params), rho=rho), case.build(theirs)
    fused = type(opt.base_optimizer) in FUSED

    def step(i: int) -> None:
        second = step_wrapped(params, opt, i)
        assert opt.last_radius == pytest.approx(rho, rel=1e-5)
        step_alone(theirs, base, second, i)
        for p, q in zip(params, theirs, strict=True):
            torch.testing.assert_close(p, q, **(dict(rtol=2e-6, atol=2e-7) if fused else
                                                dict(rtol=0, atol=0)))

    for i in range(4):
        step(i)
    alone = base.state_dict()
    plain = is_plain(alone)
    saved = filed(opt.state_dict(), plain)
    if fused:
        saved["state"] = alone["state"]
    assert not differences(filed(alone, plain), as_alone(opt, saved))
    if fused:
        saved = filed(opt.state_dict())
    params, theirs = ([Parameter(p.detach().clone()) for p in ps] for ps in (params, theirs))
    opt, base = cls.wrap(case.build(params), rho=0.1), case.build(theirs)
    base.load_state_dict(filed(alone, plain))
    opt.load_state_dict(saved)
    for i in range(4, 8):
        step(i)


@pytest.mark.parametrize("library, name", taken("torch") + drawn(25))
def test_a_base_does_in_wrap_what_it_does_alone(library, name):
    for cls, rho in WAYS:
        assert_beside_itself(foreign(library, name), cls, rho)


@pytest.mark.long
@pytest.mark.parametrize("library, name", [x for x in taken("timm") + taken("pytorch_optimizer")
                                           if x not in drawn(25)])
def test_every_other_base_does_so_too(library, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name == "distributedmuon":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for cls, rho in WAYS:
            assert_beside_itself(foreign(library, name), cls, rho)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("library, name", [(k, name) for k in REFUSED for name in REFUSED[k]])
def test_a_base_that_cannot_be_one_is_refused_at_construction(library, name):
    kind = class_of(library, name, bound=False)
    with pytest.raises(ValueError, match=f"base_optimizer={kind.__name__} "):
        FriendlySAM([Parameter(torch.ones(3))], kind, lr=0.1)
    own = type("Renamed", (kind,), {})
    with pytest.raises(ValueError, match="base_optimizer=Renamed "):
        SAM([Parameter(torch.ones(3))], own)


# ---- names that both have


def test_each_keeps_its_own_value_of_a_name_that_both_have():
    params, theirs = ([Parameter(torch.ones(3)), Parameter(torch.ones(2))] for _ in range(2))
    groups = [{"params": params[:1], "base_rho": 0.7}, {"params": params[1:], "rho": 0.2}]
    opt = SAM(groups, torch.optim.Adadelta, rho=0.05, base_rho=0.8, lr=0.3)
    base = torch.optim.Adadelta([{"params": theirs[:1], "rho": 0.7}, {"params": theirs[1:]}],
                                rho=0.8, lr=0.3)
    assert [group["rho"] for group in opt.param_groups] == [0.05, 0.2]
    assert [group["base_rho"] for group in opt.param_groups] == [0.7, 0.8]
    for i in range(3):
        step_alone(theirs, base, step_wrapped(params, opt, i), i)
        assert not differences([p.detach() for p in theirs], [p.detach() for p in params])
    again = SAM.wrap(opt.base_optimizer, rho=0.3)
    assert [group["base_rho"] for group in again.param_groups] == [0.7, 0.8]
    more, its = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    again.add_param_group({"params": [more], "base_rho": 0.6})
    base.add_param_group({"params": [its], "rho": 0.6})
    step_alone([*theirs, its], base, step_wrapped([*params, more], again, 5), 5)
    assert torch.equal(more, its)


SHARED = {"scion": dict(scale=0.7), "conda": dict(scale=0.7), "splus": {}, "adadelta": {}}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("cls, own", [(SAM, dict(adaptive=True)), (ASAM, dict(scale="weights")),
                                      (FisherSAM, dict(eta=0.3)), (FriendlySAM, {})])
def test_every_variant_over_bases_with_names_like_ours(name, cls, own):
    """SAM's climb is the same over any base, and the base's step that of the base alone."""
    case = Foreign(class_of("pytorch_optimizer", name), hyper={"lr": 0.01, **SHARED[name]})
    params, theirs, plain = case.weights(), case.weights(), case.weights()
    opt, base = cls.wrap(case.build(params), rho=0.5, **own), case.build(theirs)
    over_sgd = cls(plain, torch.optim.SGD, rho=0.5, lr=0.0, backend="reference", **own)
    first = step_wrapped(params, opt, 0)
    assert not differences(first, step_wrapped(plain, over_sgd, 0))
    step_alone(theirs, base, first, 0)
    assert not differences([p.detach() for p in theirs], [p.detach() for p in params])


class OursByName(torch.optim.Optimizer):
    """A base all of whose group keys and state have names of ours, and other shapes and types."""

    def __init__(self, params, lr=0.1, sigma="a", eta=-3.0, scale=-1.0, lmbda=7.0, adaptive="no",
                 perturb="never"):
        super().__init__(params, dict(lr=lr, sigma=sigma, eta=eta, scale=scale, lmbda=lmbda,
                                      adaptive=adaptive, perturb=perturb))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert (group["sigma"], group["perturb"], group["adaptive"]) == ("a", "never", "no")
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(ema=torch.zeros(()), momentum_buffer=torch.zeros(7),
                                 exp_avg=[1, 2], master=torch.zeros(2, 2), step="first")
                state["ema"] += p.grad.norm()
                p.sub_(p.grad * state["ema"], alpha=group["lr"])


@pytest.mark.parametrize("cls", [SAM, ASAM, FisherSAM, FriendlySAM])
def test_a_base_whose_names_are_all_ours_keeps_them(cls):
    case = Foreign(OursByName)
    if cls in (SAM, FriendlySAM):
        assert_beside_itself(case, cls, 0.5)
    params, theirs = case.weights(), case.weights()
    opt, base = cls.wrap(case.build(params), rho=0.5), case.build(theirs)
    for i in range(3):
        step_alone(theirs, base, step_wrapped(params, opt, i), i)
        assert not differences([p.detach() for p in theirs], [p.detach() for p in params])
    assert opt.param_groups[0]["perturb"] is True
    assert opt.param_groups[0]["base_perturb"] == "never"


class SavesLess(torch.optim.Adadelta):
    """Keeps in its groups what it does not save, as heavyball's optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["_made_by"] = type(self)
        return super().step(closure)

    def state_dict(self):
        state = super().state_dict()
        state["param_groups"] = [{k: x for k, x in group.items() if not k.startswith("_")}
                                 for group in state["param_groups"]]
        return state


@pytest.mark.parametrize("cls", [SAM, FriendlySAM])
def test_what_a_base_leaves_out_of_its_saved_groups_stays_out(cls):
    """With it torch.load(weights_only=True) would refuse the file."""
    case = Foreign(SavesLess)
    assert_beside_itself(case, cls, 0.5)
    params = case.weights()
    opt = cls.wrap(case.build(params), rho=0.5)
    step_wrapped(params, opt, 0)
    state = filed(opt.state_dict())
    assert "_made_by" not in state["param_groups"][0]
    assert "_made_by" in opt.param_groups[0]
    opt.load_state_dict(state)
    assert [(g["rho"], g["base_rho"]) for g in opt.param_groups] == [(0.5, 0.9)] * 2


class Moded(torch.optim.SGD):
    """A base with an argument that a class of ours is built with."""

    def __init__(self, params, lr=0.1, mode="min", projection=None):
        super().__init__(params, lr=lr)
        self.given = mode, projection


def test_a_base_gets_arguments_that_only_the_inside_has_too():
    opt = SAM([torch.ones(2, requires_grad=True)], Moded, mode="max", projection="all")
    assert opt.base_optimizer.given == ("max", "all")


# ---- states of the base alone, and bases around bases


@pytest.mark.parametrize("name", ["splus", "novograd", "adadelta", "madgrad"])
def test_the_state_of_a_base_alone_is_continued(name):
    case = foreign("pytorch_optimizer", name)
    theirs = case.weights()
    base = case.build(theirs)
    for i in range(3):
        step_alone(theirs, base, [torch.full_like(p, 0.1 + i) for p in theirs], i)
    params = [Parameter(p.detach().clone()) for p in theirs]
    opt = FriendlySAM.wrap(case.build(params), rho=0.0)
    opt.load_state_dict(filed(base.state_dict()))
    assert opt.param_groups[0]["rho"] == 0.0
    assert not any(entry["sam_ema"].any() for entry in opt.state.values()
                   if isinstance(entry, dict) and "sam_ema" in entry)
    for i in range(3, 6):
        step_alone(theirs, base, step_wrapped(params, opt, i), i)
        assert not differences([p.detach() for p in theirs], [p.detach() for p in params])


AROUND = {
    "timm's Lookahead": lambda base: timm.optim.Lookahead(base, k=2),
    "Lookahead": lambda base: pytorch_optimizer.Lookahead(base, k=2),
    "ScheduleFreeWrapper": lambda base: trains(pytorch_optimizer.ScheduleFreeWrapper(base)),
    "Magma": pytorch_optimizer.load_optimizer("magma"),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adadelta])
@pytest.mark.parametrize("cls, rho", WAYS)
def test_a_base_around_another_base(name, inner, cls, rho):
    case = Foreign(lambda groups, lr: AROUND[name](inner(groups, lr=lr)), SHAPES)
    assert_beside_itself(case, cls, rho)


def trains(opt):
    opt.train()
    return opt


@pytest.mark.parametrize("name", AROUND)
def test_the_state_of_a_base_around_another_is_continued(name):
    case = Foreign(lambda groups, lr: AROUND[name](torch.optim.Adadelta(groups, lr=lr)), SHAPES)
    theirs = case.weights()
    base = case.build(theirs)
    for i in range(3):
        step_alone(theirs, base, [torch.full_like(p, 0.1 + i) for p in theirs], i)
    params = [Parameter(p.detach().clone()) for p in theirs]
    opt = SAM.wrap(case.build(params), rho=0.1)
    opt.load_state_dict(filed(base.state_dict()))
    assert [(g["rho"], g["base_rho"]) for g in opt.param_groups] == [(0.1, 0.9)] * 2
    for i in range(3, 6):
        step_alone(theirs, base, step_wrapped(params, opt, i), i)
        assert not differences([p.detach() for p in theirs], [p.detach() for p in params])


def test_groups_and_state_may_be_replaced_where_a_base_has_none_of_its_own():
    """Magma shows its inner optimizer's."""
    p = Parameter(torch.ones(3))
    opt = SAM.wrap(AROUND["Magma"](torch.optim.SGD([p], lr=0.1, momentum=0.9)), rho=0.1)
    opt.param_groups = [dict(group, lr=0.0) for group in opt.param_groups]
    opt.state = type(opt.state)(dict)
    step_wrapped([p], opt, 0)
    assert torch.equal(p, torch.ones(3))
    assert opt.base_optimizer.optimizer.state is opt.state
