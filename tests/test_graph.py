"""GraphedStep: the same weights as the loop it stands for, with a graph on a GPU."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastsam import SAM, FriendlySAM, GraphedStep, freeze_bn_stats
from fastsam.flat import Space

from .contract import assert_bits, batch, bits, network

CASES = {
    "sam": lambda ps: SAM(ps, torch.optim.SGD, 0.08, lr=0.07, momentum=0.9),
    "fsam-adamw": lambda ps: FriendlySAM(ps, torch.optim.AdamW, 0.1, 0.7, 0.6, lr=0.01),
    "fsam-cosine": lambda ps: FriendlySAM(ps, torch.optim.SGD, 0.1, 0.7, 0.6, lr=0.05,
                                          projection="cosine"),
    "every third": lambda ps: SAM(ps, torch.optim.SGD, 0.08, lr=0.07, interval=3, start=2),
}


def attack(model, x, y):
    """One step of FGSM."""
    x = x.detach().clone().requires_grad_()
    g, = torch.autograd.grad(cross_entropy(model(x), y), x)
    return (x + 0.03 * g.sign()).detach()


def plain_step(net, opt, x, y, attack=None) -> torch.Tensor:
    """The loop of GraphedStep's docstring, written out."""
    x = x if attack is None else attack(net, x, y)
    opt.zero_grad()
    loss = cross_entropy(net(x), y)
    loss.backward()
    if opt.climbs_next:
        opt.first_step(zero_grad=True)
        with freeze_bn_stats(net):
            cross_entropy(net(x), y).backward()
        opt.second_step()
    else:
        opt.step()
    return loss.detach()


def schedule(opt, t: int) -> None:
    for group in opt.param_groups:
        group["lr"], group["rho"] = 0.05 / (1 + t), 0.02 * (1 + t)


@pytest.mark.parametrize("attacked", [None, attack], ids=["clean", "attacked"])
@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_the_loop_does(case, attacked, device):
    ours, theirs = network(device), network(device)
    opt, plain = CASES[case](ours.parameters()), CASES[case](theirs.parameters())
    step = GraphedStep(ours, cross_entropy, opt, batch(0, device), attack=attacked)
    for t in range(8):
        schedule(opt, t)
        schedule(plain, t)
        x, y = batch(t, device)
        loss = step(x, y)
        assert torch.equal(loss, plain_step(theirs, plain, x, y, attacked))
        assert_bits(ours, bits(theirs))
        for b, c in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert torch.equal(b, c)
        assert opt.param_groups[0]["sam_steps"] == t + 1


def test_it_goes_on_from_a_loaded_state(device):
    ours, theirs = network(device), network(device)
    opt, plain = CASES["fsam-adamw"](ours.parameters()), CASES["fsam-adamw"](theirs.parameters())
    step = GraphedStep(ours, cross_entropy, opt, batch(0, device))
    for t in range(3):
        step(*batch(t, device))
        plain_step(theirs, plain, *batch(t + 10, device))
    ours.load_state_dict(theirs.state_dict())
    opt.load_state_dict(plain.state_dict())
    for t in range(3):
        step(*batch(t, device))
        plain_step(theirs, plain, *batch(t, device))
        assert_bits(ours, bits(theirs))


def test_the_losses_it_returns_stay(device):
    net = network(device)
    step = GraphedStep(net, cross_entropy, CASES["sam"](net.parameters()), batch(0, device))
    first = step(*batch(0, device))
    before = first.clone()
    step(*batch(1, device))
    assert torch.equal(first, before) and step.output.shape == (12, 4)


def test_autocast_is_around_both_passes(device):
    net = network(device)
    seen = []
    net.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    step = GraphedStep(net, cross_entropy, CASES["sam"](net.parameters()), batch(0, device),
                       autocast=torch.bfloat16)
    step(*batch(0, device))
    assert len(seen) >= 2 and set(seen) == {torch.bfloat16}


def test_what_it_refuses(device):
    net = network(device)
    x, y = batch(0, device)
    with pytest.raises(ValueError, match="SGD: GraphedStep takes an optimizer of fastsam"):
        GraphedStep(net, cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1), (x, y))
    step = GraphedStep(net, cross_entropy, CASES["sam"](net.parameters()), (x, y))
    with pytest.raises(ValueError, match="drop_last"):
        step(x[:5], y[:5])
    with pytest.raises(ValueError, match="float64"):
        step(x.double(), y)


def test_tables_that_change_during_a_capture_are_uploaded_after_it(device):
    """A copy from the host's memory cannot be part of a graph that is replayed later."""
    p = torch.nn.Parameter(torch.ones(4, device=device))
    space = Space([(p, None, 0)])
    space.slots[0].g1 = torch.ones(4, device=device)
    space.addresses("g1")
    other = space.slots[0].g1 = torch.ones(4, device=device)
    space.late_uploads = []
    table = space.addresses("g1")
    assert table.tolist() != [other.data_ptr()]
    (values, target), = space.late_uploads
    space.late_uploads = None
    space._upload(values, target)
    assert target is table and table.tolist() == [other.data_ptr()]
