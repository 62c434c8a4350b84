"""A base optimizer that exists already: methods of its own, a step that someone has changed, what
another of our optimizers around it has left in its groups, and one that is itself a wrapper."""

import copy
import functools
import gc
import pickle
import types
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from fastsam import (
    ASAM,
    GSAM,
    SAM,
    FisherSAM,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    PhaseError,
)
from fastsam.choose import BACKENDS

G = torch.tensor([3.0, 4.0])


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, 2.0]))


def two_passes(p, opt) -> None:
    p.grad = G.clone()
    opt.first_step(zero_grad=True)
    p.grad = G.clone()
    opt.second_step(zero_grad=True)


# ---- methods of its own


class TwoModes(torch.optim.SGD):
    """Evaluates elsewhere than it trains, as schedule-free does; by how much, `rho` says."""

    def __init__(self, params, lr=0.1, rho=0.5):
        super().__init__(params, lr)
        self.defaulted = True
        self.defaults["rho"] = rho
        for group in self.param_groups:  # all that torch copies of an optimizer
            group.update(rho=rho, training=True, calls=0)

    def _move(self, training: bool) -> None:
        for group in self.param_groups:
            group["calls"] += 1
            if training != group["training"]:
                for p in group["params"]:
                    p.data.add_(group["rho"] if training else -group["rho"])
            group["training"] = training

    def train(self):
        self._move(True)

    def eval(self):
        self._move(False)

    def step(self, closure=None):
        assert self.param_groups[0]["training"]
        return super().step(closure)

    def where(self, shift: float, *, times: int = 1) -> list:
        """The weights."""
        return [p + times * shift for group in self.param_groups for p in group["params"]]


def test_a_trainer_finds_a_bases_train_and_eval_and_only_what_is_there():
    p = parameter()
    opt = SAM.wrap(TwoModes([p]), rho=0.0)
    assert callable(opt.train) and callable(opt.eval) and opt.where.__doc__ == "The weights."
    for name in ("_move", "defaulted", "nothing"):  # its methods, not its attributes
        assert not hasattr(opt, name), name
    assert not any(hasattr(SAM([parameter()], torch.optim.SGD, lr=0.1), name)
                   for name in ("train", "eval", "sync_lookahead"))
    torch.testing.assert_close(opt.where(2.0, times=3), [p + 6])


@pytest.mark.parametrize("cls", [SAM, FriendlySAM])
def test_its_modes_change_the_weights_as_without_sam(cls):
    """`rho` is a key of both: the base's value is its own inside its methods."""
    p, q = parameter(), parameter()
    opt, alone = cls.wrap(TwoModes([p]), rho=0.0), TwoModes([q])
    for _ in range(3):
        opt.train()
        alone.train()
        two_passes(p, opt)
        q.grad = G.clone()
        alone.step()
        assert torch.equal(p, q)
        opt.eval()
        alone.eval()
        assert torch.equal(p, q)
    assert opt.param_groups[0]["rho"] == 0.0 and opt.param_groups[0]["base_rho"] == 0.5


def test_its_methods_see_groups_that_were_replaced():
    p, q = parameter(), parameter()
    opt = SAM.wrap(TwoModes([dict(params=[p]), dict(params=[q])]), rho=0.0)
    opt.param_groups = [dict(opt.param_groups[0])]
    opt.eval()
    assert torch.equal(p, parameter() - 0.5) and torch.equal(q, parameter())
    opt.state_dict()
    opt.train()
    assert torch.equal(p, parameter())


class Odd(SAM):
    @property
    def failing(self):
        return self.now


def test_what_is_missing_inside_a_property_is_named():
    with pytest.raises(AttributeError, match="'now'"):
        _ = Odd([parameter()], torch.optim.SGD, lr=0.1).failing


def test_while_perturbed_only_train_may_be_called_and_changes_nothing():
    p = parameter()
    opt = SAM.wrap(TwoModes([p]), rho=0.1)
    p.grad = G.clone()
    opt.first_step()
    moved, calls = p.detach().clone(), opt.param_groups[0]["calls"]
    opt.train()
    for call in (opt.eval, lambda: opt.where(1.0)):
        with pytest.raises(PhaseError, match="second_step"):
            call()
    assert torch.equal(p, moved) and opt.param_groups[0]["calls"] == calls and opt.is_perturbed
    p.grad = G.clone()
    opt.second_step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.7, 1.6]))


class OfSamples(torch.optim.SGD):
    """Steps with gradients that it collects beside `.grad`, as opacus' DPOptimizer does."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.collected = []

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = sum(self.collected)
        return super().step(closure)

    def zero_grad(self, set_to_none=True):
        self.collected.clear()
        super().zero_grad(set_to_none)


class WithoutAFlag(OfSamples):
    def zero_grad(self):
        self.collected.clear()


class ThatPassesOn(OfSamples):
    def zero_grad(self, *args, **kwargs):
        super().zero_grad(*args, **kwargs)


@pytest.mark.parametrize("kind", [OfSamples, WithoutAFlag, ThatPassesOn])
@pytest.mark.parametrize("closed", [True, False])
def test_what_a_bases_own_zero_grad_clears_is_cleared(kind, closed):
    p = parameter()
    base = kind([p])
    opt = SAM.wrap(base, rho=0.1)

    def backward():
        p.grad = G.clone()
        base.collected.append(p.grad)

    if closed:
        opt.step(backward)
    else:
        backward()
        opt.first_step(zero_grad=True)
        backward()
        opt.second_step()
    torch.testing.assert_close(p.detach(), parameter() - 0.1 * G)
    opt.zero_grad(set_to_none=False)
    assert not base.collected and p.grad is not None and not p.grad.any()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(
    pickle.dumps(x))], ids=["copy", "deepcopy", "pickle"])
def test_a_copy_finds_its_own_bases(copied):
    opt = SAM.wrap(TwoModes([parameter()]), rho=0.1)
    twin = copied(opt)
    twin.eval()
    assert not twin.param_groups[0]["training"]
    assert opt.param_groups[0]["training"] == (copied is not copy.copy)
    assert not hasattr(object.__new__(SAM), "train")


# ---- another step


def clipped(base):
    """A habit: loggers and clippers replace `step`."""
    step = base.step

    def patched(closure=None):
        for p in base.param_groups[0]["params"]:
            p.grad.clamp_(-0.1, 0.1)
        return step(closure)

    return patched


def bound(base):
    return types.MethodType(lambda self, closure=None: None, base)


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("patch", [clipped, bound])
def test_a_fused_base_that_is_given_another_step_is_refused_by_name(patch, perturbed):
    p = parameter()
    base = torch.optim.SGD([p], lr=0.1)
    opt = SAM.wrap(base, rho=0.1)
    p.grad = G.clone()
    if perturbed:
        opt.first_step()
    before = p.detach().clone()
    base.step = patch(base)
    if patch is bound:  # a scheduler may have been built after it
        torch.optim.lr_scheduler.StepLR(base, 1)
    with pytest.raises(ValueError, match="was given another step.*subclass"):
        opt.step()
    assert torch.equal(p, before) and opt.is_perturbed == perturbed
    with pytest.raises(ValueError, match="was given another step"):
        SAM.wrap(base, rho=0.1)
    del base.step
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.7, 1.6]))


def wrapping(base):
    inner = base.step.__func__

    @functools.wraps(inner)
    def outer(self, closure=None):
        return inner(self, closure)

    return types.MethodType(outer, base)


def test_a_step_that_is_wrapped_is_another_and_its_own_put_back_is_not():
    """Accelerate puts it back after a step with a scaler."""
    base = torch.optim.SGD([parameter()], lr=0.1)
    own = base.step
    base.step = wrapping(base)
    with pytest.raises(ValueError, match="was given another step"):
        SAM.wrap(base)
    base.step = own
    SAM.wrap(base)


class Clipping(torch.optim.SGD):
    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        super().step(closure)


def test_a_fused_base_that_gets_another_class_is_refused_by_name():
    """As detectron2 gives one to an optimizer that is to clip."""
    p = parameter()
    base = torch.optim.SGD([p], lr=0.1)
    opt = SAM.wrap(base, rho=0.1)
    p.grad = G.clone()
    before = p.detach().clone()
    base.__class__ = Clipping
    with pytest.raises(ValueError, match="became a Clipping"):
        opt.step()
    assert torch.equal(p, before)
    two_passes(p, SAM.wrap(base, rho=0.1))
    torch.testing.assert_close(p.detach(), before - 0.1 * G / G.norm())


def test_a_base_that_is_not_fused_takes_the_step_that_it_was_given():
    p = parameter()
    base = TwoModes([p], lr=1.0)
    base.step = clipped(base)
    two_passes(p, SAM.wrap(base, rho=0.1))
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, 1.9]))


@pytest.mark.parametrize("before", [True, False])
def test_the_step_that_a_scheduler_counts_is_none_of_these(before):
    p = parameter()
    base = torch.optim.SGD([p], lr=0.1)
    if before:
        torch.optim.lr_scheduler.StepLR(base, 1)
    opt = SAM.wrap(base, rho=0.1)
    torch.optim.lr_scheduler.StepLR(base, 1)
    two_passes(p, opt)
    torch.testing.assert_close(p.detach(), torch.tensor([0.7, 1.6]))


# ---- what another of ours has left


def radius(p, opt) -> float:
    p.grad = G.clone()
    opt.first_step()
    opt.restore()
    return opt.last_radius


def of_a_loaded_state(base, other):
    base.load_state_dict(other.base_optimizer.state_dict())


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("first, second, own", [
    (dict(rho=0.05), ASAM, dict(rho=2.0)), (dict(rho=0.05), ASAM, {}),
    (dict(rho=0.05), SAM, dict(rho=0.5)), (dict(rho=0.05, adaptive=True), SAM, dict(rho=0.5)),
    (dict(rho=torch.tensor(0.3)), SAM, dict(rho=0.5))])
def test_a_new_wrap_has_its_own_values_where_another_was_around_the_base(first, second, own,
                                                                         loaded):
    """A cell of a notebook that is run again, or the next phase of a training."""
    fresh = second.wrap(torch.optim.SGD([parameter()], lr=0.1), **own)
    p = parameter()
    base = torch.optim.SGD([p], lr=0.1)
    if loaded:
        base.load_state_dict(SAM.wrap(torch.optim.SGD([parameter()], lr=0.1),
                                      **first).base_optimizer.state_dict())
    else:
        SAM.wrap(base, **first)
        gc.collect()
    opt = second.wrap(base, **own)
    for name in fresh.param_groups[0].keys() - {"params"}:
        assert opt.param_groups[0][name] == fresh.param_groups[0][name], name
    assert radius(p, opt) == radius(fresh.param_groups[0]["params"][0], fresh)


def test_what_the_user_gave_one_group_stays_and_so_does_the_count_of_steps():
    p, q = parameter(), parameter()
    base = torch.optim.SGD([dict(params=[p], rho=0.3), dict(params=[q], perturb=False)], lr=0.1)
    first = SAM.wrap(base, rho=0.05)
    q.grad = G.clone()
    two_passes(p, first)
    opt = SAM.wrap(base, rho=0.7, start=2)
    assert [group["rho"] for group in opt.param_groups] == [0.3, 0.05]
    assert [group["perturb"] for group in opt.param_groups] == [True, False]
    assert [group["sam_steps"] for group in opt.param_groups] == [1, 1] and not opt.climbs_next


def test_a_bases_own_key_of_the_same_name_stays_its_own():
    p = parameter()
    base = torch.optim.Adadelta([p], rho=0.8)
    SAM.wrap(base, rho=0.05)
    opt = SAM.wrap(base, rho=0.5)
    assert opt.param_groups[0]["rho"] == 0.5 and opt.param_groups[0]["base_rho"] == 0.8


@pytest.mark.parametrize("cls", [ASAM, FisherSAM])
def test_an_adaptive_class_stays_so_with_the_state_of_one_that_is_not(cls):
    """It would go on as plain SAM. A group of one's own may be so."""
    p = parameter()
    opt = cls([dict(params=[p], adaptive=False)], torch.optim.SGD, lr=0.1, rho=0.2)
    assert radius(p, opt) == pytest.approx(0.2)
    other = SAM([parameter()], torch.optim.SGD, lr=0.1, rho=0.05)
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["adaptive"] is False
    opt = cls([p], torch.optim.SGD, lr=0.1)
    opt.load_state_dict(other.state_dict())
    assert opt.param_groups[0]["adaptive"] is True and opt.param_groups[0]["rho"] == 0.05


@pytest.mark.parametrize("cls", [MomentumSAM, LookSAM])
@pytest.mark.parametrize("way", ["group", "edit", "load"])
def test_a_class_that_has_no_adaptive_form_refuses_an_adaptive_group(way, cls):
    p = parameter()
    hyper = dict(lr=0.1, momentum=0.9)
    if way == "group":
        with pytest.raises(ValueError, match="adaptive=True in a group.*ASAM"):
            cls([dict(params=[p], adaptive=True)], torch.optim.SGD, **hyper)
        return
    opt = cls([p], torch.optim.SGD, **hyper)
    other = ASAM([parameter()], torch.optim.SGD, **hyper)
    p.grad = G.clone()
    with pytest.raises(ValueError, match="adaptive=True in a group.*ASAM"):
        if way == "edit":
            opt.param_groups[0]["adaptive"] = True
            opt.first_step()
        else:
            opt.load_state_dict(other.state_dict())
    assert torch.equal(p, parameter())


def test_the_dicts_of_another_of_ours_give_a_new_one_no_values():
    p = parameter()
    groups = [dict(params=[p])]
    SAM(groups, torch.optim.SGD, lr=0.1, rho=0.05)
    opt = ASAM(groups, torch.optim.SGD, lr=0.2, rho=2.0)
    assert opt.param_groups[0]["rho"] == 2.0 and opt.param_groups[0]["adaptive"] is True
    assert opt.param_groups[0]["lr"] == 0.1, "as in torch, whose own it is"
    assert groups[0]["rho"] == 0.05


def test_groups_of_two_ages_have_the_new_ones_values():
    p, q, r = parameter(), parameter(), parameter()
    base = torch.optim.SGD([p], lr=0.1)
    SAM.wrap(base, rho=0.05)
    base.add_param_group(dict(params=[q]))
    base.add_param_group(dict(params=[r], rho=0.3))
    opt = SAM.wrap(base, rho=0.5)
    assert [group["rho"] for group in opt.param_groups] == [0.5, 0.5, 0.3]


def test_a_shared_key_that_groups_differ_in_stays_too():
    p, q = parameter(), parameter()
    base = torch.optim.Adadelta([dict(params=[p]), dict(params=[q])], rho=0.8)
    SAM.wrap(base, rho=0.05).param_groups[0]["rho"] = 0.3
    opt = SAM.wrap(base, rho=0.7)
    assert [group["rho"] for group in opt.param_groups] == [0.3, 0.05]
    assert [group["base_rho"] for group in opt.param_groups] == [0.8, 0.8]


class Trust(torch.optim.SGD):
    """Has an `eta` of its own, as LARS has."""

    def __init__(self, params, lr=0.1, eta=0.5):
        super().__init__(params, lr)
        self.defaults["eta"] = eta
        for group in self.param_groups:
            group.setdefault("eta", eta)

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * group["eta"] * p.grad)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("first", [ASAM, FisherSAM])
def test_a_key_that_another_class_shared_with_the_base_is_the_bases_again(first, loaded):
    p = parameter()
    base = Trust([p])
    old = first.wrap(base)
    if loaded:
        opt = SAM.wrap(Trust([p], eta=0.1), rho=0.0)
        opt.load_state_dict(old.state_dict())
        opt.param_groups[0].update(rho=0.0)
    else:
        opt = SAM.wrap(base, rho=0.0)
    assert opt.param_groups[0]["eta"] == 0.5 and "base_eta" not in opt.param_groups[0]
    two_passes(p, opt)
    torch.testing.assert_close(p.detach(), torch.tensor([0.85, 1.8]))


def stepped(cls, base, times=2):
    opt = cls.wrap(base)
    for _ in range(times):
        (p,) = opt.param_groups[0]["params"]
        p.grad = G.clone()
        if opt.climbs_next:
            opt.first_step()
            p.grad = 0.9 * G
        opt.step()
    return opt


CLASSES = [SAM, ASAM, FisherSAM, FriendlySAM, MomentumSAM, GSAM, LookSAM]


@pytest.mark.parametrize("second", CLASSES)
@pytest.mark.parametrize("first", CLASSES)
def test_what_a_class_saves_over_a_former_one_is_its_own(first, second):
    """And a fresh one of it takes that."""
    base = torch.optim.SGD([parameter()], lr=0.1, momentum=0.9)
    stepped(first, base)
    opt = stepped(second, base)
    fresh = stepped(second, torch.optim.SGD([parameter()], lr=0.1, momentum=0.9))
    saved, right = opt.state_dict(), fresh.state_dict()
    assert saved["param_groups"][0].keys() == right["param_groups"][0].keys()
    assert saved["state"][0].keys() == right["state"][0].keys()
    fresh.load_state_dict(copy.deepcopy(saved))
    opt.load_state_dict(copy.deepcopy(right))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "pickle"])
def test_entries_that_are_no_parameters_are_copied_too(copied):
    opt = SAM([parameter()], torch.optim.SGD, lr=0.1)
    opt.state["epoch"], opt.state["k"] = 3, torch.tensor(2.0)
    assert copied(opt).state["epoch"] == 3


def test_a_pickle_of_a_version_that_wrote_shared_keys_otherwise_is_read():
    opt = SAM([parameter()], torch.optim.Adadelta, rho=0.1)
    opt._traits = opt._traits._replace(shared=("base_rho",))
    (p,) = (twin := copy.deepcopy(opt)).param_groups[0]["params"]
    two_passes(p, twin)
    assert twin.param_groups[0]["rho"] == 0.1 and twin.param_groups[0]["base_rho"] == 0.9


# ---- a wrapper


class Around(torch.optim.Optimizer):
    """As PostLocalSGDOptimizer: it has an optimizer, and never calls torch's constructor."""

    def __init__(self, inner):
        self.optim, self.param_groups, self.steps = inner, inner.param_groups, 0

    @property
    def state(self):
        return self.optim.state

    def step(self, closure=None):
        self.steps += 1
        return self.optim.step(closure)

    def state_dict(self):
        return self.optim.state_dict() | {"steps": self.steps}

    def load_state_dict(self, state_dict):
        self.optim.load_state_dict({k: x for k, x in state_dict.items() if k != "steps"})
        self.steps = state_dict["steps"]


def test_a_wrapper_that_torch_never_set_up_may_be_a_base():
    p, q = parameter(), parameter()
    opt = SAM.wrap(Around(torch.optim.Adadelta([p], lr=0.5, rho=0.8)), rho=0.1)
    twin = SAM.wrap(torch.optim.Adadelta([q], lr=0.5, rho=0.8), rho=0.1)
    for i in range(4):
        two_passes(p, opt)
        two_passes(q, twin)
        assert torch.equal(p, q)
        if i == 1:
            state = copy.deepcopy(opt.state_dict())
            opt = SAM.wrap(Around(torch.optim.Adadelta([p], lr=0.1)), rho=0.3)
            opt.load_state_dict(state)
    assert opt.param_groups[0]["rho"] == 0.1 and opt.base_optimizer.steps == 4


class Several(torch.optim.Optimizer):
    """As torchao's CPUOffloadOptimizer: an optimizer for each parameter, and no groups of its
    own."""

    def __init__(self, params, lr=0.1):
        params = [p for x in params for p in (x["params"] if isinstance(x, dict) else [x])]
        self.optims = [torch.optim.SGD([p], lr) for p in params]

    @property
    def param_groups(self):
        return [group for optim in self.optims for group in optim.param_groups]

    def step(self, closure=None):
        for optim in self.optims:
            optim.step()


class Keeps(Several):
    """Has groups of its own, which the several share no list with, as heavyball's SplitOpt."""

    param_groups = None

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        torch.optim.Optimizer.__init__(self, [p for o in self.optims for g in o.param_groups
                                              for p in g["params"]], {})

    def state_dict(self):
        return {"optims": [optim.state_dict() for optim in self.optims]}

    def load_state_dict(self, state_dict):
        for optim, state in zip(self.optims, state_dict["optims"], strict=True):
            optim.load_state_dict(state)


@pytest.mark.parametrize("cls", [SAM, FriendlySAM])
def test_a_load_that_fails_in_one_of_several_changes_none(cls):
    p, q = parameter(), parameter()
    opt = cls.wrap(Keeps([p, q]), rho=0.0)
    state = copy.deepcopy(opt.state_dict())
    for optim in state["base_optimizer"]["optims"]:
        optim["param_groups"][0]["lr"] = 7.0
    wrong = copy.deepcopy(state)
    wrong["base_optimizer"]["optims"][1]["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match="size of optimizer's group"):
        opt.load_state_dict(wrong)
    assert [x.param_groups[0]["lr"] for x in opt.base_optimizer.optims] == [0.1, 0.1]
    opt.load_state_dict(state)
    two_passes(p, opt)
    torch.testing.assert_close(p.detach(), parameter() - 7 * G)


class CopiesItsState(torch.optim.RMSprop):
    @property
    def state(self):
        return dict(self.kept)

    @state.setter
    def state(self, kept):
        self.kept = kept


class HasNoState(Several):
    param_groups = None

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.param_groups = self.optims[0].param_groups


@pytest.mark.parametrize("kind, what", [
    (Several, "makes its param_groups anew"), (CopiesItsState, "makes its state anew"),
    (HasNoState, "has no state")])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_base_without_groups_and_state_to_share_is_refused_by_name(kind, what, wrapped):
    p = parameter()
    group = dict(params=[p])
    with pytest.raises(ValueError, match=f"{kind.__name__} {what}.*one inside"):
        SAM.wrap(kind([p]), rho=0.1) if wrapped else SAM([group], kind, rho=0.1)
    assert group.keys() == {"params"}


# ---- another process's


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("base, shared", [(torch.optim.Adam, False), (torch.optim.RMSprop, True)])
def test_a_state_in_another_processes_memory_is_not_silently_ones_own(base, shared, backend):
    """A process that is spawned gets it so. What a base that is not fused keeps stays shared."""
    p = parameter().share_memory_()
    opt = SAM([p], base, lr=0.1, backend=backend)
    two_passes(p, opt)
    sent = ForkingPickler.dumps(opt)
    if shared:
        there = pickle.loads(sent)
    else:
        with pytest.warns(UserWarning, match="memory that processes share.*subclass of the base"):
            there = pickle.loads(sent)
    (q,) = there.param_groups[0]["params"]
    two_passes(q, there)
    assert torch.equal(p, q)
    assert (float(opt.state[p]["step"]) == 2) == shared


class SavesOtherGroups(torch.optim.SGD):
    def state_dict(self):
        return {"state": {}, "param_groups": [], "inner": super().state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["inner"])


def test_a_base_that_saves_another_number_of_groups_is_saved_whole():
    def stepped(opt, p):
        p.grad = G.clone()
        opt.step()

    p, q = parameter(), parameter()
    opt, other = (SAM([w], SavesOtherGroups, lr=0.1, momentum=0.9) for w in (p, q))
    stepped(opt, p)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():
        q.copy_(p)
    for one, w in ((opt, p), (other, q)):
        stepped(one, w)
    assert torch.equal(p, q)
