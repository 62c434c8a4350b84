"""GraphedStep: the same weights as the loop it stands for, with a graph on a GPU; and what the host
does around a graph, with a pretended one."""

import copy
import gc
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastsam import (
    ASAM,
    GSAM,
    SAM,
    FriendlySAM,
    FullGradientSAM,
    GraphedStep,
    LookSAM,
    MomentumSAM,
    PhaseError,
    freeze_bn_stats,
    graph,
)
from fastsam.graph import refuse_step_hooks, refuse_uncapturable, set_counts, state_of
from fastsam.hyper import COLUMN
from fastsam.passes import Climb
from fastsam.space import upload

from ..helpers.contract import assert_bits, backward, batch, bits, network

CASES = {
    "sam": lambda ps: SAM(ps, torch.optim.SGD, 0.08, lr=0.07, momentum=0.9),
    "fsam-adamw": lambda ps: FriendlySAM(ps, torch.optim.AdamW, 0.1, 0.7, 0.6, lr=0.01),
    "fsam-cosine": lambda ps: FriendlySAM(ps, torch.optim.SGD, 0.1, 0.7, 0.6, lr=0.05,
                                          projection="cosine"),
    "msam": lambda ps: MomentumSAM(ps, torch.optim.SGD, 0.3, lr=0.07, momentum=0.9),
    "gsam-adamw": lambda ps: GSAM(ps, torch.optim.AdamW, 0.1, 0.4, lr=0.01),
    "looksam": lambda ps: LookSAM(ps, torch.optim.SGD, 0.1, k=3, lr=0.07, momentum=0.9),
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
    if opt.climbs_first:
        opt.first_step()
    loss = cross_entropy(net(x), y)
    loss.backward()
    if opt.climbs_next and not opt.climbs_first:
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


def test_an_optimizer_of_another_model_is_said(device):
    """As of a closure that leaves no gradients; a model was built anew after its optimizer, say."""
    net, other = network(device), network(device)
    opt = CASES["fsam-adamw"](other.parameters())
    step = GraphedStep(net, cross_entropy, opt, batch(0, device))
    with pytest.warns(UserWarning, match="no gradient .* of this model") as said:
        for t in range(2):
            step(*batch(t, device))
    assert [w.filename for w in said if "no gradient" in str(w.message)] == [__file__]


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


@pytest.mark.parametrize("dtype, warns", [(torch.float16, True), (torch.bfloat16, False)])
def test_float16_without_a_scaler_is_said_once(dtype, warns, device):
    net = network(device)
    opt = CASES["sam"](net.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            GraphedStep(net, cross_entropy, opt, batch(0, device), autocast=dtype)
    assert len(caught) == warns
    assert not warns or caught[0].filename == __file__ and "bfloat16" in str(caught[0].message)


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


@pytest.mark.parametrize("case, failing", [("sam", 2), ("sam", 4), ("msam", 2), ("looksam", 2)])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_raises_gives_the_step_up(case, failing, error):
    """Without a graph; a capture is tested below. The next call takes the step."""
    net, twin = network("cpu"), network("cpu")
    opt, plain = CASES[case](net.parameters()), CASES[case](twin.parameters())
    calls = []

    def loss(output, y):
        calls.append(bits(net))
        if len(calls) == failing:
            raise error("(pretended)")
        return cross_entropy(output, y)

    step = GraphedStep(net, loss, opt, batch(0, "cpu"))
    same = GraphedStep(twin, cross_entropy, plain, batch(0, "cpu"))
    for t in range(3):
        w = bits(net)
        try:
            step(*batch(t, "cpu"))
        except error:
            assert not opt.is_perturbed and len(calls) == failing
            assert any(not torch.equal(p, q) for p, q in zip(calls[-1], w, strict=True))
            assert_bits(net, w)
            step(*batch(t, "cpu"))
        same(*batch(t, "cpu"))
        assert_bits(net, bits(twin))
    assert len(calls) > failing


def test_a_step_in_the_middle_of_another_is_refused_and_leaves_that_one(graphed):
    """A replay would save the moved weights as w."""
    for make in (GraphedStep, lambda net, loss, opt, sample: graphed(net, opt)):
        net = network("cpu")
        opt = reference(net.parameters())
        step = make(net, cross_entropy, opt, batch(0, "cpu"))
        step(*batch(0, "cpu"))
        backward(net, 0, "cpu")
        w = bits(net)
        opt.first_step()
        moved = bits(net)
        with pytest.raises(PhaseError, match="GraphedStep while the weights are perturbed"):
            step(*batch(0, "cpu"))
        assert opt.is_perturbed
        assert_bits(net, moved)
        opt.stash_grad()
        with pytest.raises(PhaseError, match="GraphedStep with gradients set aside"):
            step(*batch(0, "cpu"))
        assert_bits(net, w)
        opt.unstash_grad()
        opt.step()


@pytest.mark.parametrize("case", ["sam", "msam", "every third"])
def test_it_begins_and_ends_with_cleared_gradients(case, device):
    """So that the last, smaller batch may be the plain loop's."""
    net, twin = network(device), network(device)
    opt, plain = CASES[case](net.parameters()), CASES[case](twin.parameters())
    step = GraphedStep(net, cross_entropy, opt, batch(0, device))
    for t in range(3):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        step(*batch(t, device))
        assert all(p.grad is None for p in net.parameters())
        plain_step(twin, plain, *batch(t, device))
        assert_bits(net, bits(twin))


def accumulating_attack(model, x, y):
    x = x.detach().clone().requires_grad_()
    cross_entropy(model(x), y).backward()
    return (x + 0.03 * x.grad.sign()).detach()


@pytest.mark.parametrize("attack", [None, accumulating_attack])
def test_a_step_adds_to_no_gradients_that_were_there_before(attack, graphed):
    """Neither to those of its own last step, in an attack, nor to those of parameters that are not
    the optimizer's: a graph would add to them in memory that is freed one day."""
    for make in (GraphedStep, lambda net, loss, opt, sample, attack: graphed(
            net, opt, attack=attack)):
        net, there = network("cpu"), []
        net.register_forward_hook(lambda net, *_, there=there: there.append(
            any(p.grad is not None for p in net.parameters())))
        step = make(net, cross_entropy, reference(net.head.parameters()), batch(0, "cpu"),
                    attack=attack)
        for t in range(2):
            step(*batch(t, "cpu"))
        passes = 3 if attack else 2
        assert not any(there[::passes]) and not any(there[passes - 2::passes])
        assert net.conv.weight.grad is not None


def test_it_goes_when_its_last_owner_lets_it_go(device):
    """The optimizer, which it hears of loaded states from, keeps it not."""
    net = network(device)
    opt = CASES["sam"](net.parameters())
    step = GraphedStep(net, cross_entropy, opt, batch(0, device))
    step(*batch(0, device))
    gone = weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None
    opt.load_state_dict(opt.state_dict())


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


@pytest.mark.parametrize("wrong, said", [
    (lambda x, y: [(x, y)], "a tuple where .* 2 tensors"), (lambda x, y: [x], "a Tensor where"),
    (lambda x, y: [x, y, y], "a Tensor, a Tensor, a Tensor where"),
    (lambda x, y: [x.tolist(), y], "a list, a Tensor where"), (lambda x, y: [], "nothing where")])
def test_what_is_no_batch_is_refused_in_words(wrong, said, device):
    net = network(device)
    x, y = batch(0, device)
    step = GraphedStep(net, cross_entropy, CASES["sam"](net.parameters()), (x, y))
    with pytest.raises(ValueError, match=f"{said}.*step\\(x, y\\)"):
        step(*wrong(x, y))


@pytest.mark.parametrize("wrong", [
    lambda x, y: x, lambda x, y: {"x": x, "y": y}, lambda x, y: (), lambda x, y: (x, 3)])
def test_what_is_no_sample_is_refused_in_words(wrong, device):
    net = network(device)
    with pytest.raises(ValueError, match=r"sample is a \w+.*such as \(x, y\)"):
        GraphedStep(net, cross_entropy, CASES["sam"](net.parameters()), wrong(*batch(0, device)))


def test_an_output_may_hold_several_tensors(device):
    """As those of transformers' models do, and of networks with more than one head."""
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(device)

        def forward(self, x):
            logits = self.net(x)
            return {"logits": logits, "all": (logits, x), "name": "several"}

    model, (x, y) = Several(), batch(0, device)
    step = GraphedStep(model, lambda output, y: cross_entropy(output["logits"], y),
                       CASES["sam"](model.parameters()), (x, y))
    twin = network(device)
    plain_step(twin, CASES["sam"](twin.parameters()), x, y)
    step(x, y)
    assert_bits(model.net, bits(twin))
    assert step.output["logits"].shape == (12, 4) and step.output["name"] == "several"
    assert not step.output["logits"].requires_grad and not step.output["all"][0].requires_grad


def test_a_replay_is_told_to_autograd_and_autocast():
    """Neither sees what a graph writes."""
    net = nn.Linear(3, 3, bias=False)
    opt = reference(net.parameters())
    x = torch.ones(1, 3, requires_grad=True)
    loss = net(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x)
        with opt.replay():
            net.weight.data.mul_(2)
        assert torch.equal(net(x), 2 * before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_scheduler_takes_a_replay_for_a_step(recwarn):
    net = network("cpu")
    opt = reference(net.parameters())
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1) for o in (opt, opt.base_optimizer)]
    with opt.replay():
        pass
    for schedule in schedules:
        schedule.step()
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]


def test_what_a_graph_of_someone_else_s_would_bring_anew_is_refused(monkeypatch):
    """The copy would be a part of the graph, and bring today's rates at every replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    table = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"CUDA graph.*GraphedStep.*capture\(\)"):
        upload([1, 2], table)


def test_tables_that_change_during_a_capture_are_uploaded_after_it(device):
    """A copy from the host's memory cannot be part of a graph that is replayed later."""
    net = network(device)
    opt = CASES["sam"](net.parameters())
    plain_step(net, opt, *batch(0, device))
    with opt.capture() as tables:
        assert all(t.late for t in tables)
        cross_entropy(net(batch(0, device)[0]), batch(0, device)[1]).backward()
        opt.first_step()
        assert not tables[0].w.any() and not tables[0].g1.any()
    (space,) = opt.spaces
    assert tables[0].w.tolist() == [p.data_ptr() for p in space.params]
    assert tables[0].g1.tolist() == [p.grad.data_ptr() for p in space.params]


# ---- around a graph: captures and replays as the host sees them


class Pretended:
    """A graph on the CPU, of steps by the reference: a capture changes no tensor, a replay takes
    the step and counts nothing."""

    step: GraphedStep
    captures = 0

    @contextmanager
    def capture(self, graph, **how):
        graph.owner = self
        kept = [(t, t.detach().clone()) for t in state_of(self.step.model, self.step.optimizer)]
        try:
            yield
        finally:
            with torch.no_grad():
                for t, value in kept:
                    t.copy_(value)
            Pretended.captures += 1


class Graph:
    def replay(self):
        step = self.owner.step
        counts = [group["sam_steps"] for group in step.optimizer.param_groups]
        step._graphs[step.optimizer.climbs_next].loss.copy_(step._eager())
        set_counts(step.optimizer, counts)


@pytest.fixture
def graphed(monkeypatch):
    """Makes a GraphedStep of CPU tensors that takes its device for a GPU."""
    pretended, stream = Pretended(), SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(Pretended, "captures", 0)
    for name, value in {
        "CUDAGraph": Graph, "graph": pretended.capture, "Stream": lambda: stream,
        "current_stream": lambda: stream, "stream": nullcontext, "device": nullcontext,
        "get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def make(net, opt, loss=cross_entropy, **how) -> GraphedStep:
        pretended.step = GraphedStep(net, loss, opt, batch(0, "cpu"), **how)
        pretended.step.device = torch.device("cuda")
        return pretended.step

    monkeypatch.setattr(torch, "autocast", lambda *how, **more: nullcontext())
    monkeypatch.setattr(graph, "refuse_uncapturable", refuse_step_hooks)
    return make


def reference(ps, cls=SAM, **own):
    return cls(ps, torch.optim.SGD, backend="reference", lr=0.07, **own)


def test_a_graph_is_captured_once_for_each_kind_of_step(graphed):
    ours, theirs = network("cpu"), network("cpu")
    opt, plain = (reference(net.parameters(), rho=0.08, momentum=0.9, interval=2, start=1)
                  for net in (ours, theirs))
    step = graphed(ours, opt)
    for t in range(5):
        schedule(opt, t)
        schedule(plain, t)
        x, y = batch(t, "cpu")
        assert torch.equal(step(x, y), plain_step(theirs, plain, x, y))
        assert_bits(ours, bits(theirs))
        assert opt.param_groups[0]["sam_steps"] == t + 1
        assert all(p.grad is None for p in ours.parameters())
    assert Pretended.captures == 2


@pytest.mark.parametrize("change", [
    dict(momentum=0.9), dict(adaptive=False), dict(eta=0.5), dict(perturb=False)], ids=str)
def test_what_the_kernels_branch_on_makes_another_graph_at_once(change, graphed):
    net = network("cpu")
    opt = reference(net.parameters(), ASAM, scale="weights")
    step = graphed(net, opt)
    for captures in (1, 1, 2, 2):
        opt.param_groups[0].update(change if captures == 2 else {})
        schedule(opt, captures)
        step(*batch(0, "cpu"))
        assert Pretended.captures == captures


def test_a_layer_in_evaluation_makes_another_graph(graphed):
    """Also one that came with a new head."""
    net = network("cpu")
    opt = reference(net.parameters())
    step = graphed(net, opt)

    def captures() -> int:
        step(*batch(0, "cpu"))
        return Pretended.captures

    assert captures() == 1
    net.bn.eval()
    assert [captures(), captures()] == [2, 2]
    net.bn.train()
    assert captures() == 3
    net.head = nn.Sequential(net.head, nn.Dropout(0.0))
    opt.param_groups[0]["params"].append(nn.Parameter(torch.ones(1)))
    assert captures() == 4
    net.head[1].eval()
    assert captures() == 5


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_step_hooks_which_no_replay_would_call_are_refused(register, graphed):
    """Before the construction, and between calls; a removed one is forgotten."""
    net = network("cpu")
    opt = reference(net.parameters())
    step = graphed(net, opt)
    step(*batch(0, "cpu"))
    calls, w = [], bits(net)
    hook = getattr(opt, register)(lambda *given: calls.append(1))
    with pytest.raises(ValueError, match="SAM has step hooks, which a graph .*: remove them"):
        step(*batch(0, "cpu"))
    assert_bits(net, w)
    with pytest.raises(ValueError, match="step hooks"):
        refuse_uncapturable(opt)
    hook.remove()
    step(*batch(0, "cpu"))
    assert Pretended.captures == 1 and not calls


def test_a_frozen_layer_makes_another_graph_and_stays(graphed):
    net = network("cpu")
    step = graphed(net, reference(net.parameters(), momentum=0.9))
    step(*batch(0, "cpu"))
    net.conv.weight.requires_grad_(False)
    before = net.conv.weight.clone()
    step(*batch(1, "cpu"))
    assert Pretended.captures == 2 and torch.equal(net.conv.weight, before)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_buffer_or_a_weight_of_others_that_was_replaced_makes_another_graph(frozen, graphed):
    """The old one would go on with their freed memory."""
    net = network("cpu")
    net.conv.weight.requires_grad_(not frozen)
    step = graphed(net, reference([p for p in net.parameters() if p is not net.conv.weight]))
    step(*batch(0, "cpu"))
    net.bn.running_mean = torch.ones_like(net.bn.running_mean)
    step(*batch(1, "cpu"))
    assert Pretended.captures == 2
    net.conv.weight.data = net.conv.weight.detach().clone()
    step(*batch(2, "cpu"))
    assert Pretended.captures == 3
    step(*batch(3, "cpu"))
    assert Pretended.captures == 3


def test_the_state_of_a_reordered_parameter_is_shown_in_its_new_order(graphed):
    net = network("cpu")
    opt = reference(net.parameters(), momentum=0.9)
    step = graphed(net, opt)
    step(*batch(0, "cpu"))
    net.to(memory_format=torch.channels_last)
    step(*batch(1, "cpu"))
    shown, slot = opt.state[net.conv.weight]["momentum_buffer"], opt.spaces[0].slots
    (own,) = (s.v for s in slot if s.param is net.conv.weight)
    assert shown.stride() == own.stride() == net.conv.weight.stride()
    assert torch.equal(shown, own) and Pretended.captures == 2


def test_warm_ups_leave_parameters_of_the_loss_alone(graphed):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, output, target):
            return cross_entropy(self.scale * output, target)

    net, twin, loss, same = network("cpu"), network("cpu"), Scaled(), Scaled()
    opt = reference([*net.parameters(), *loss.parameters()])
    plain = reference([*twin.parameters(), *same.parameters()])
    graphed(net, opt, loss)(*batch(0, "cpu"))
    x, y = batch(0, "cpu")
    same(twin(x), y).backward()
    plain.first_step(zero_grad=True)
    with freeze_bn_stats(twin):
        same(twin(x), y).backward()
    plain.second_step()
    assert_bits(net, bits(twin))
    assert torch.equal(loss.scale, same.scale)


@pytest.mark.parametrize("failing", range(8), ids=lambda i: f"forward {i + 1}")
def test_a_step_that_cannot_be_captured_changes_nothing(failing, graphed):
    """Three warm-ups and the capture, of two forward passes each; the loop goes on without it."""
    net, twin = network("cpu"), network("cpu")
    opt, plain = (reference(n.parameters(), momentum=0.9) for n in (net, twin))
    plain_step(net, opt, *batch(0, "cpu"))
    plain_step(twin, plain, *batch(0, "cpu"))
    w, buffers = bits(net), [b.clone() for b in net.buffers()]
    state = [{k: x.clone() for k, x in opt.state[p].items()} for p in net.parameters()]
    calls = []

    def read_by_the_host(module, args, output):
        calls.append(1)
        if len(calls) == failing + 1:
            raise RuntimeError("operation not permitted when stream is capturing")

    hook = net.head.register_forward_hook(read_by_the_host)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphed(net, opt)(*batch(1, "cpu"))
    hook.remove()
    assert not opt.is_perturbed and opt.param_groups[0]["sam_steps"] == 1
    assert_bits(net, w)
    assert all(torch.equal(b, c) for b, c in zip(net.buffers(), buffers, strict=True))
    for p, entry in zip(net.parameters(), state, strict=True):
        assert p.grad is None
        assert all(torch.equal(opt.state[p][k], x) for k, x in entry.items())
    opt.restore()
    assert_bits(net, w)
    for n, o in ((net, opt), (twin, plain)):
        plain_step(n, o, *batch(2, "cpu"))
    assert_bits(net, bits(twin))


def test_a_replay_without_the_full_gradient_of_its_capture_is_refused(graphed):
    net = network("cpu")
    opt = reference(net.parameters(), FullGradientSAM, part="full")
    step = graphed(net, opt)
    opt.set_full_gradient([torch.ones_like(p) for p in net.parameters()])
    step(*batch(0, "cpu"))
    opt.state.clear()
    w = bits(net)
    with pytest.raises(PhaseError, match="without a full gradient"), opt.replay():
        pytest.fail("a replay")
    with pytest.raises(PhaseError, match="without a full gradient"):
        step(*batch(0, "cpu"))
    assert_bits(net, w)
    assert opt.param_groups[0]["sam_steps"] == 1


def test_an_eager_step_between_replays_leaves_a_graphs_tables_alone():
    net = network("cpu")
    opt = reference(net.parameters())
    cross_entropy(net(batch(0, "cpu")[0]), batch(0, "cpu")[1]).backward()
    with pytest.raises(RuntimeError, match="not permitted"), opt.capture() as tables:
        opt.first_step()
        raise RuntimeError("operation not permitted when stream is capturing")
    held = tables[0].g1.clone()
    assert held.all() and not opt.is_perturbed
    plain_step(net, opt, *batch(1, "cpu"))
    assert torch.equal(tables[0].g1, held)


def test_what_leaves_the_kernels_is_refused_before_another_capture(graphed, monkeypatch):
    """Such as a group of float64, with which all of the optimizer goes by the reference."""
    net = network("cpu")
    opt = reference(net.parameters())
    step = graphed(net, opt)
    step(*batch(0, "cpu"))
    monkeypatch.setattr(graph, "refuse_uncapturable", refuse_uncapturable)
    step(*batch(0, "cpu"))
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    w = bits(net)
    with pytest.raises(ValueError, match="learning rate would stay in a graph"):
        step(*batch(0, "cpu"))
    assert_bits(net, w)
    assert Pretended.captures == 1


def test_what_a_graph_cannot_hold_is_refused():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="'reference' .asked for.* learning rate would stay"):
        refuse_uncapturable(reference([p]))
    with pytest.raises(ValueError, match="RMSprop takes a step of its own"):
        refuse_uncapturable(SAM([p], torch.optim.RMSprop, lr=0.1))


@pytest.mark.parametrize("again", ["micro-batch", "step"])
def test_a_second_pass_of_a_kind_in_one_capture_is_refused(again):
    """At a replay all passes of a kind would read the gradients of the last."""
    net = network("cpu")
    opt, w, kept = reference(net.parameters()), bits(net), []

    def one_pass(i: int) -> None:
        backward(net, i, "cpu")
        kept.extend(p.grad for p in net.parameters())

    with pytest.raises(RuntimeError, match="one step, with one climb"), opt.capture():
        one_pass(0)
        opt.first_step(zero_grad=True)
        one_pass(0)
        if again == "step":
            opt.second_step(zero_grad=True)
            w = bits(net)
        else:
            opt.stash_grad()
        one_pass(1)
        opt.first_step()
    assert_bits(net, w)
    assert not opt.is_perturbed


# ---- what a graph has no launch for


class Launches:
    """Numba's kernels in Triton's place, which find addresses and hyper-parameters in the same
    tables. While `graph` is a list, what would be launched is put there and not done.

    Attributes:
        done: the names of what was launched outside of a graph.
    """

    def __init__(self, step: GraphedStep, kernels):
        self.step_, self.kernels, self.backward = step, kernels, step._backward
        self.graph, self.done = None, []

    def launch(self, name: str, p, *others):
        if self.graph is None:
            self.done.append(name)
            return getattr(self.kernels, name)(p, *others)
        # as a graph: it has addresses, and keeps no tensor
        p = p._replace(g=[None if g is None else True for g in p.g])
        self.graph.append((name, torch.no_grad()(lambda: getattr(self.kernels, name)(p, *others))))
        return Climb.of(p)

    def norm(self, p):
        self.launch("norm", p)

    def climb(self, p, sums):
        return self.launch("climb", p, sums)

    def step(self, p, climb):
        self.launch("step", p, climb)

    def one_pass(self, x, y):
        loss, output = self.backward(x, y)
        if self.graph is not None:
            net = self.step_.model
            grads = [p.grad for p in net.parameters()]

            def again():
                new = cross_entropy(net(x), y)
                for g, values in zip(grads, torch.autograd.grad(new, net.parameters()),
                                     strict=True):
                    g.copy_(values)
                loss.copy_(new.detach())

            self.graph.append(("pass", again))
        return loss, output

    @contextmanager
    def capture(self, graph, **how):
        buffers = [(b, b.clone()) for b in self.step_.model.buffers()]
        self.graph = graph.launches = []
        try:
            yield
        finally:
            self.graph = None
            for b, value in buffers:
                b.copy_(value)


class HeldGraph:
    def replay(self):
        for _, do in self.launches:
            do()


@pytest.fixture
def launched(graphed, monkeypatch):
    """Makes a GraphedStep whose graphs hold launches, and those."""
    kernels = pytest.importorskip("fastsam.kernels.cpu", reason="needs numba")

    def make(net, opt) -> tuple[GraphedStep, Launches]:
        step = graphed(net, opt)
        launches = Launches(step, kernels)
        monkeypatch.setattr(step, "_backward", launches.one_pass)
        monkeypatch.setattr(torch.cuda, "graph", launches.capture)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", HeldGraph)
        monkeypatch.setattr(opt._phase.layout, "backend", launches)
        return step, launches

    return make


def momentum_sam(net, **own) -> MomentumSAM:
    return MomentumSAM(net.parameters(), torch.optim.SGD, rho=0.3, backend="numba", lr=0.05,
                       momentum=0.9, **own)


def beside_a_loop(launched, event, **own) -> tuple[GraphedStep, Launches]:
    """Six steps of a graph and of a loop that takes every norm itself, with the same bits;
    event(net, opt, t) comes before each."""
    net, twin = network("cpu"), network("cpu")
    opt, plain = momentum_sam(net, **own), momentum_sam(twin, **own)
    step, launches = launched(net, opt)
    for t in range(6):
        for n, o in ((net, opt), (twin, plain)):
            event(n, o, t)
        plain._phase.layout.keep_norm(None)
        loss = step(*batch(t, "cpu"))
        assert torch.equal(loss, plain.step(lambda t=t: backward(twin, t, "cpu")))
        assert_bits(net, bits(twin))
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(opt.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])
        assert opt.param_groups[0]["sam_steps"] == plain.param_groups[0]["sam_steps"]
        assert opt.last_radius == plain.last_radius
    return step, launches


def test_a_graph_of_momentum_sam_is_two_launches_and_hands_its_norm_on(launched):
    """lr and rho are data: they change at every step, and the graph stays."""
    step, launches = beside_a_loop(launched, lambda net, opt, t: schedule(opt, t))
    (captured,) = step._graphs.values()
    assert [name for name, _ in captured.graph.launches] == ["climb", "pass", "step"]
    warm_ups = ["norm", "climb", "step"] + 2 * ["climb", "step"]
    assert launches.done == [*warm_ups, "norm"], "v is as before the warm-ups, whose norm is gone"


def test_a_graph_of_momentum_sam_climbs_along_what_others_make_of_v(launched):
    def event(net, opt, t):
        v = opt.state[net.head.bias]["momentum_buffer"]
        if t == 2:
            v.mul_(0.5)
        elif t == 3:
            opt.state[net.head.bias]["momentum_buffer"] = torch.full_like(v, 0.3)
        elif t == 4:
            v.data.add_(1.0)
            torch.autograd.graph.increment_version(v)
        elif t == 5:
            opt.step(lambda: backward(net, 9, "cpu"))  # an eager one

    step, launches = beside_a_loop(launched, event)
    assert len(step._graphs) == 1 and launches.done[-5:] == ["norm"] * 3 + ["climb", "step"]


def test_a_graph_of_a_plain_step_leaves_no_norm(launched):
    """Both kinds of step have a graph; each climb after a plain step takes the norm before it."""
    step, launches = beside_a_loop(launched, lambda net, opt, t: None, interval=2)
    kinds = {climbs: [name for name, _ in captured.graph.launches]
             for climbs, captured in step._graphs.items()}
    assert kinds == {True: ["climb", "pass", "step"], False: ["pass", "step"]}
    assert launches.done[-2:] == ["norm", "norm"]


def test_a_graph_of_momentum_sam_goes_on_from_a_loaded_state(launched):
    def event(net, opt, t):
        if t == 3:
            state = copy.deepcopy(opt.state_dict())
            for entry in state["state"].values():
                entry["momentum_buffer"].mul_(2)
            opt.load_state_dict(state)

    beside_a_loop(launched, event)


def scaled_step(net, opt, i: int, overflows: bool) -> None:
    """A step of the plain loop with a GradScaler; one that overflows is skipped."""
    scaler, (x, y) = torch.amp.GradScaler("cpu", init_scale=1024.0), batch(i, "cpu")
    opt.zero_grad()
    for do in (lambda: opt.first_step(zero_grad=True, scaler=scaler), lambda: scaler.step(opt)):
        loss = scaler.scale(cross_entropy(net(x), y))
        (loss * torch.inf if overflows else loss).backward()
        do()
    scaler.update()


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("scaled", [0, 2], ids=["before the capture", "between replays"])
def test_a_graph_does_not_go_on_with_the_scale_of_an_eager_step(scaled, overflows, launched):
    """Nor with its overflow, which would skip every step."""
    net, twin = network("cpu"), network("cpu")
    opt, plain = (SAM(n.parameters(), torch.optim.SGD, 0.08, backend="numba", lr=0.07)
                  for n in (net, twin))
    step, _ = launched(net, opt)
    for t in range(4):
        if t == scaled:
            for n, o in ((net, opt), (twin, plain)):
                scaled_step(n, o, 9, overflows)
        step(*batch(t, "cpu"))
        plain_step(twin, plain, *batch(t, "cpu"))
        assert_bits(net, bits(twin))
    assert opt.skipped_steps == plain.skipped_steps == overflows


def test_a_graph_with_a_scaler_leaves_its_overflow_to_no_eager_step():
    """Captured by hand."""
    net, twin = network("cpu"), network("cpu")
    opt, plain = reference(net.parameters()), reference(twin.parameters())
    with opt.capture():
        scaled_step(net, opt, 0, False)
    twin.load_state_dict(net.state_dict())
    with opt.replay():
        opt.spaces[0].cells.found_inf.fill_(1)  # as a graph does
    plain_step(net, opt, *batch(1, "cpu"))
    plain_step(twin, plain, *batch(1, "cpu"))
    assert_bits(net, bits(twin))


def test_a_replay_by_hand_brings_what_a_scheduler_changed():
    """Also one that does not climb."""
    opt = reference(network("cpu").parameters(), interval=2)
    for t in range(2):
        schedule(opt, t)
        with opt.replay():
            assert float(opt._phase.layout.spaces[0].hyper[0, COLUMN["lr"]]) == (
                torch.tensor(opt.param_groups[0]["lr"]).item())


@pytest.mark.parametrize("call", ["capture", "replay"])
def test_a_graph_in_the_middle_of_an_eager_step_is_refused(call):
    """Its climb would save the moved weights."""
    net = network("cpu")
    opt = reference(net.parameters())
    backward(net, 0, "cpu")
    opt.first_step()
    with pytest.raises(PhaseError, match=f"{call} while the weights are perturbed"):
        getattr(opt, call)().__enter__()
    opt.restore()
