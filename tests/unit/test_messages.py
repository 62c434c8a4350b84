"""What a user reads: misuse is named with its value and the way out, and `repr` says what runs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastsam import ASAM, SAM, FisherSAM, FriendlySAM, FullGradientSAM, PhaseError

SGD = torch.optim.SGD


def p():
    return [nn.Parameter(torch.ones(3))]


def again(make):
    """The call of a method of an optimizer that exists."""
    return lambda: make(SAM(p(), SGD, lr=0.1))


def perturbed(call):
    """The same between the two steps."""
    return again(lambda o: (o.first_step(), call(o)))


def twice():
    q = p()
    return SAM([q[0], q[0]], SGD, lr=0.1)


def twice_in_two_groups():
    q = p()
    return SAM([dict(params=q), dict(params=[nn.Parameter(torch.ones(1)), *q])], SGD, lr=0.1)


def over_one_tensor():
    t = torch.ones(3)
    return SAM([nn.Parameter(t), nn.Parameter(t)], SGD, lr=0.1)


def loss():
    return torch.tensor(1.0)


class SAMWrapper(SGD):
    """As heavyball's, whose step() refuses to run without a closure."""


MISUSE = {
    # misspelt and misplaced arguments
    "rh0": (TypeError, "'rh0'.*neither SAM nor SGD.*'rho'", lambda: SAM(p(), SGD, rh0=0.1, lr=1)),
    "momentun": (TypeError, "'momentun'.*'momentum'", lambda: SAM(p(), SGD, momentun=0.9, lr=1)),
    "lambda": (TypeError, "'lambd'.*'lmbda'", lambda: FriendlySAM(p(), SGD, lambd=0.9, lr=1)),
    "scale of SAM": (TypeError, "'scale'.*neither SAM", lambda: SAM(p(), SGD, scale="all", lr=1)),
    "projection of SAM": (TypeError, "'projection'.*neither SAM",
                          lambda: SAM(p(), SGD, projection="cosine", lr=1)),
    "how a class is built": (TypeError, "'mode' is an argument of neither FriendlySAM nor SGD",
                             lambda: FriendlySAM(p(), SGD, mode="official", lr=1)),
    "betas of SGD": (TypeError, "'betas'.*SGD", lambda: SAM(p(), SGD, betas=(0.9, 0.9), lr=1)),
    "nothing near": (TypeError, "'zzz' is an argument of neither FisherSAM nor SGD$",
                     lambda: FisherSAM(p(), SGD, zzz=1, lr=1)),
    "intervall": (TypeError, "'intervall'.*'interval'", lambda: SAM(p(), SGD, intervall=2, lr=1)),
    "adaptive ASAM": (TypeError, "ASAM is adaptive", lambda: ASAM(p(), SGD, adaptive=True, lr=1)),
    "base argument to wrap": (TypeError, "wrap", lambda: SAM.wrap(SGD(p(), lr=1), lr=0.5)),
    # values
    "rho in words": (ValueError, "rho='0.05' is not a number",
                     lambda: SAM(p(), SGD, rho="0.05", lr=1)),
    "rho is None": (ValueError, "rho=None", lambda: SAM(p(), SGD, rho=None, lr=1)),
    "rho is the base's place": (ValueError, "rho=-1", lambda: SAM(p(), SGD, -1, lr=1)),
    "adaptive in words": (ValueError, "adaptive='yes'",
                          lambda: SAM(p(), SGD, adaptive="yes", lr=1)),
    "part": (ValueError, "part='all'", lambda: FullGradientSAM(p(), SGD, "all", lr=1)),
    # what is no optimizer, and what is no parameter
    "wrap of a class": (TypeError, "wrap takes an optimizer that exists.*SAM\\(params",
                        lambda: SAM.wrap(SGD)),
    "wrap of parameters": (TypeError, "wrap takes an optimizer", lambda: FriendlySAM.wrap(p())),
    "wrap of what looks like one": (
        TypeError, "a torch.optim.Optimizer, not namespace",
        lambda: SAM.wrap(SimpleNamespace(param_groups=[{"params": p()}], step=print))),
    "wrap of a SAM": (ValueError, "climbs itself", again(SAM.wrap)),
    "wrap of heavyball's SAM": (ValueError, "SAMWrapper climbs itself.*such as torch.optim.SGD",
                                lambda: SAM.wrap(SAMWrapper(p(), lr=1))),
    "an instance": (TypeError, "use SAM.wrap", lambda: SAM(p(), SGD(p(), lr=1))),
    "no class": (TypeError, "not an optimizer class", lambda: SAM(p(), 0.1)),
    "a name": (TypeError, "'sgd' is not an optimizer class", lambda: SAM(p(), "sgd", lr=1)),
    "a function": (TypeError, "not an optimizer class", lambda: SAM(p(), lambda ps: SGD(ps, 0.1))),
    "a SAM class": (ValueError, "climbs itself", lambda: SAM(p(), SAM, lr=1)),
    "LBFGS": (ValueError, "LBFGS calls a closure", lambda: SAM(p(), torch.optim.LBFGS, lr=1)),
    "twice": (ValueError, "given twice", twice),
    "twice in two groups": (ValueError, "more than one parameter group|given twice",
                            twice_in_two_groups),
    "over one tensor": (ValueError, "share memory.*one Parameter twice", over_one_tensor),
    "one tensor": (TypeError, "iterable of Tensors", lambda: SAM(p()[0], SGD, lr=1)),
    "a module": (TypeError, "Linear.*parameters\\(\\)", lambda: SAM(nn.Linear(2, 2), SGD, lr=1)),
    "no parameters": (ValueError, "empty parameter list", lambda: SAM([], SGD, lr=1)),
    "an empty group": (ValueError, "no parameters", lambda: SAM([dict(params=[])], SGD, lr=1)),
    "lazy": (ValueError, "lazy module.*forward pass",
             lambda: SAM(nn.LazyLinear(3).parameters(), SGD, lr=1)),
    # calls
    "step(loss)": (TypeError, "closure is a Tensor.*first_step", again(lambda o: o.step(loss()))),
    "step(ascent_closure)": (ValueError, "ascent_closure",
                             again(lambda o: o.step(ascent_closure=loss))),
    "step(loss, loss)": (TypeError, "ascent_closure is a Tensor",
                         again(lambda o: o.step(loss, loss()))),
    "first_step(loss)": (TypeError, "zero_grad is a Tensor",
                         again(lambda o: o.first_step(loss()))),
    "first_step(closure)": (TypeError, "zero_grad is a function",
                            again(lambda o: o.first_step(loss))),
    "first_step(scaler)": (TypeError, "zero_grad is a GradScaler.*scaler=scaler", again(
        lambda o: o.first_step(torch.amp.GradScaler("cpu")))),
    "second_step(scaler)": (TypeError, "zero_grad is a GradScaler.*scaler.step", perturbed(
        lambda o: o.second_step(torch.amp.GradScaler("cpu")))),
    "first_step(scaler=1024)": (TypeError, "scaler is a float",
                                again(lambda o: o.first_step(scaler=1024.0))),
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_named(name):
    error, match, call = MISUSE[name]
    with pytest.raises(error, match=match):
        call()


def test_second_step_of_something_else_is_named_and_leaves_the_weights_perturbed():
    q = p()
    opt = SAM(q, SGD, lr=0.1)
    q[0].grad = torch.ones(3)
    opt.first_step()
    moved = q[0].detach().clone()
    with pytest.raises(TypeError, match="zero_grad is a Tensor"):
        opt.second_step(loss())
    assert opt.is_perturbed and torch.equal(q[0], moved)
    opt.restore()
    assert torch.equal(q[0], torch.ones(3))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_repr_says_what_runs(base):
    text = repr(FriendlySAM(p(), base, lr=0.1, interval=3, start=5))
    for part in ("FriendlySAM (", f"base={base.__name__}", "backend='reference'", "interval=3",
                 "start=5", "rho: 0.05", "lr: 0.1"):
        assert part in text, part
    assert "interval" not in repr(SAM(p(), base, lr=0.1))
    assert "master_weights=True" in repr(SAM(
        [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], SGD, lr=0.1, master_weights=True))


def test_repr_of_what_is_broken_or_perturbed_still_says_something():
    q = p()
    opt = SAM(q, SGD, lr=0.1)
    q[0].grad = torch.ones(3)
    opt.first_step()
    assert "base=SGD" in repr(opt)
    opt.restore()
    opt.param_groups[0]["rho"] = float("nan")
    assert "rho: nan" in repr(opt)


def test_a_second_step_where_none_climbed_says_what_a_plain_step_is():
    opt = SAM(p(), SGD, interval=2, start=1, lr=0.1)
    with pytest.raises(PhaseError, match=r"climbs_next.*step\(\) alone"):
        opt.second_step()
