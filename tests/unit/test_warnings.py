"""What would train something else is said: once, where the user wrote it."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastsam import ASAM, SAM, FisherSAM, FriendlySAM, LookSAM, MomentumSAM

BASES = {"SGD": torch.optim.SGD, "RMSprop": torch.optim.RMSprop}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


def training(base, kind=SAM, **options):
    """A model, its optimizer and a function that computes the gradients."""
    model = nn.Linear(4, 3)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))

    def backward():
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return model, kind(model.parameters(), base, lr=0.01, **options), backward


def said(steps, step):
    """The warnings of that many steps, as (message, file)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(steps):
            step(i)
    return [(str(w.message), w.filename) for w in caught]


def test_steps_without_a_climb_are_said_once_at_the_tenth(base):
    model, opt, backward = training(base)

    def step(i):
        opt.zero_grad()
        backward()
        opt.step()

    assert said(9, step) == []
    ((message, file),) = said(50, step)
    assert message.startswith("10 steps without a climb are plain steps of the base optimizer")
    assert file == __file__


def test_without_a_climb_through_a_scheduler_and_a_scaler_too():
    model, opt, backward = training(torch.optim.SGD)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(i):
        opt.zero_grad()
        scaler.scale(backward())
        scaler.step(opt)
        scaler.update()
        schedule.step()

    ((message, file),) = said(20, step)
    assert "without a climb" in message and file == __file__


@pytest.mark.parametrize("stashed", [False, True])
@pytest.mark.parametrize("kind, depends", [
    (SAM, False), (ASAM, False), (FriendlySAM, True), (FisherSAM, True)])
def test_a_climb_that_depends_on_a_loss_scale_nobody_told_it_is_said(base, kind, depends, stashed):
    model, opt, backward = training(base, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(told):
        opt.zero_grad()
        scaler.scale(backward())
        opt.first_step(zero_grad=True, scaler=scaler if told else None)
        scaler.scale(backward())
        if stashed:
            opt.stash_grad()
            opt.unstash_grad()
        scaler.step(opt)
        scaler.update()

    assert said(2, lambda i: step(told=True)) == []
    messages = said(2, lambda i: step(told=False))
    assert len(messages) == depends
    for message, file in messages:
        assert "first_step(scaler=scaler)" in message and file == __file__


def test_what_does_not_depend_on_the_loss_scale_says_nothing():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for kind, options in (MomentumSAM, dict(momentum=0.9)), (LookSAM, dict(k=2)):
        model, opt, backward = training(torch.optim.SGD, kind, **options)

        def step(i, opt=opt, backward=backward):
            if opt.climbs_next:
                if not opt.climbs_first:
                    scaler.scale(backward())
                opt.first_step(zero_grad=True)
            scaler.scale(backward())
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

        assert said(4, step) == []


@pytest.mark.parametrize("options, climbs", [
    (dict(start=30), lambda i: i >= 30),
    (dict(interval=12), lambda i: i % 12 == 0),
    ({}, lambda i: i == 9),
])
def test_steps_that_are_meant_to_be_plain_are_not_said(base, options, climbs):
    model, opt, backward = training(base, **options)

    def step(i):
        backward()
        if climbs(i):
            opt.first_step(zero_grad=True)
            backward()
        opt.step()
        opt.zero_grad()

    assert said(40, step) == []


def test_the_steps_of_distributed_checkpointing_are_not_said(base):
    """It calls step() on gradients of zero, to have the state there: a few times at most."""
    model, opt, backward = training(base)

    def step(i):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
        opt.zero_grad()

    assert said(2, step) == []


@pytest.mark.parametrize("closure", [lambda backward: torch.tensor(1.0), lambda backward: None],
                         ids=["a loss without backward", "nothing"])
def test_a_closure_that_leaves_no_gradients_is_said_and_changes_nothing(base, closure):
    model, opt, backward = training(base)
    before = copy.deepcopy(model.state_dict())
    ((message, file),) = said(5, lambda i: opt.step(lambda: closure(backward)))
    assert message.startswith("the closure left no gradients") and file == __file__
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_an_ascent_closure_that_leaves_no_gradients_is_said():
    model, opt, backward = training(torch.optim.SGD)
    ((message, _),) = said(3, lambda i: opt.step(backward, ascent_closure=lambda: None))
    assert message.startswith("the closure left no gradients")


@pytest.mark.parametrize("zero_grad, message", [
    (True, "second_step with no gradients only returns to the weights"),
    (False, "second_step with the gradients of the first pass"),
])
@pytest.mark.parametrize("kind", [SAM, FriendlySAM])
def test_a_forgotten_second_backward_is_said(base, kind, zero_grad, message):
    model, opt, backward = training(base, kind)

    def step(i):
        backward()
        opt.first_step(zero_grad=zero_grad)
        opt.second_step(zero_grad=True)

    ((text, file),) = said(4, step)
    assert text.startswith(message) and file == __file__


def test_a_loop_as_it_should_be_says_nothing(base):
    model, opt, backward = training(base)

    def step(i):
        backward()
        opt.first_step(zero_grad=True)
        backward()
        opt.second_step(zero_grad=True)
        opt.step(backward)

    assert said(12, step) == []


def test_every_optimizer_says_it_for_itself():
    for _ in range(2):
        _, opt, _ = training(torch.optim.SGD)
        assert len(said(2, lambda i, opt=opt: opt.step(lambda: None))) == 1


def test_a_second_gradient_set_by_hand_is_a_second_pass(base):
    """Such as a clipped one, or of another library's making."""
    model, opt, backward = training(base)

    def step(i):
        backward()
        opt.first_step()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.second_step(zero_grad=True)

    assert said(3, step) == []
