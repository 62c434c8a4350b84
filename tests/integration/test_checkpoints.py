"""Checkpoints: of every base optimizer, to and from torch's own and the public classes, of
schedules, counters, masters and the full gradient, and through torch.distributed.checkpoint.

`test_state.py` has the SGD family and the refusals.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastsam import SAM, FriendlySAM, FullGradientSAM, RhoScheduler

from ..helpers.contract import assert_bits, backward, batch, bits, network, two_passes
from ..helpers.variants import VARIANTS

BASES = {
    "sgd": (torch.optim.SGD, dict(lr=0.07, momentum=0.85, dampening=0.1, weight_decay=3e-3)),
    "adam": (torch.optim.Adam, dict(lr=0.01, betas=(0.8, 0.97), weight_decay=0.02)),
    "adamw": (torch.optim.AdamW, dict(lr=0.01, betas=(0.8, 0.97), weight_decay=0.1)),
    "nadam": (torch.optim.NAdam, dict(lr=0.01, momentum_decay=0.01)),
    "rmsprop": (torch.optim.RMSprop, dict(lr=0.01, momentum=0.7, centered=True)),
}
CASES = [("sam", "adamw", "reference"), ("sam", "nadam", "reference"),
         ("fisher", "adam", "reference"), ("fisher", "rmsprop", "reference"),
         ("fsam", "sgd", "reference"), ("fsam", "nadam", "reference"),
         ("fsam-orthogonal", "adamw", "reference"), ("fsam-orthogonal", "rmsprop", "reference"),
         ("fsam", "adamw", "triton"), ("fsam", "rmsprop", "triton")]
every_case = pytest.mark.parametrize("variant, base, backend", CASES)
both_backends = pytest.mark.parametrize("backend", ["reference", "triton"])


def build(net, variant: str, base: str, backend: str = "reference", **changes) -> SAM:
    of, (kind, hyper) = VARIANTS[variant], BASES[base]
    return of.cls(net.parameters(), kind, backend=backend,
                  **{**of.suits, **of.own, **hyper, **changes})


def trained(variant: str, base: str, backend: str, device, steps: int = 3, **changes):
    net = network(device)
    opt = build(net, variant, base, backend, **changes)
    for i in range(steps):
        two_passes(net, opt, i, device)
    return net, opt


def filed(*states):
    """What torch.save and torch.load make of them; tensors and plain types only."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fresh(variant: str, base: str, backend: str, device, **changes):
    """Other weights, and an optimizer of other values that has done nothing."""
    net = network(device)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    return net, build(net, variant, base, backend, **{"lr": 0.5, "rho": 3.0, **changes})


def assert_continues(net, opt, twin, other, device) -> None:
    for i in range(3, 6):
        two_passes(net, opt, i, device)
        two_passes(twin, other, i, device)
        assert_bits(twin, bits(net))
    assert_same_state(opt, other)


def assert_same_state(opt, other) -> None:
    mine, its = opt.state_dict(), other.state_dict()
    assert mine["param_groups"] == its["param_groups"]
    assert mine["state"].keys() == its["state"].keys()
    for i, entry in mine["state"].items():
        assert entry.keys() == its["state"][i].keys()
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(its["state"][i][name]))


def plain_step(net, opt, i: int, device) -> None:
    opt.zero_grad()
    backward(net, i, device)
    opt.step()


# ---- one process: files, copies, pickles


@every_case
@pytest.mark.parametrize("way", ["torch.save", "deepcopy", "pickle"])
def test_every_base_continues_bit_for_bit(variant, base, backend, device, way):
    net, opt = trained(variant, base, backend, device)
    if way == "torch.save":
        model_state, state = filed(net.state_dict(), opt.state_dict())
        twin, other = fresh(variant, base, backend, device)
        twin.load_state_dict(model_state)
        other.load_state_dict(state)
    elif way == "deepcopy":
        twin, other = copy.deepcopy((net, opt))
    else:
        twin, other = pickle.loads(pickle.dumps((net, opt)))
    assert not set(map(id, other.state.values())) & set(map(id, opt.state.values()))
    assert_continues(net, opt, twin, other, device)


@every_case
def test_a_state_is_itself_after_a_round_trip(variant, base, backend, device):
    """Before the first step, too, and of a parameter that never had a gradient."""
    for steps in (0, 2):
        net, opt = network(device), None
        net.head.bias.requires_grad_(False)
        opt = build(net, variant, base, backend)
        for i in range(steps):
            two_passes(net, opt, i, device)
        _, other = fresh(variant, base, backend, device)
        other.load_state_dict(*filed(opt.state_dict()))
        assert_same_state(opt, other)


@both_backends
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_master_weights_continue_bit_for_bit(backend, base, device, optimizer_first):
    half = network(device).bfloat16()
    data = [t.bfloat16() if t.is_floating_point() else t for t in batch(0, device)]

    def steps(net, opt, n):
        for _ in range(n):
            for step in (opt.first_step, opt.second_step):
                nn.functional.cross_entropy(net(data[0]), data[1]).backward()
                step(zero_grad=True)

    opt = build(half, "fsam", base, backend, rho=3.0, lr=1e-3, master_weights=True)
    steps(half, opt, 3)
    model_state, state = filed(half.state_dict(), opt.state_dict())
    master = state["state"][0]["master"]
    assert master.dtype == torch.float32 and not torch.equal(master, master.bfloat16().float())
    twin = network(device).bfloat16()
    other = build(twin, "fsam", base, backend, rho=2.0, lr=0.5, master_weights=True)
    for load in sorted((twin.load_state_dict, other.load_state_dict),
                       key=lambda f: (f == other.load_state_dict) != optimizer_first):
        load(model_state if load == twin.load_state_dict else state)
    for _ in range(3):
        steps(half, opt, 1)
        steps(twin, other, 1)
        assert_bits(twin, bits(half))
    assert_same_state(opt, other)


@both_backends
def test_masters_that_a_state_lacks_start_at_the_weights(backend, device):
    net, opt = trained("sam", "sgd", backend, device)
    twin = network(device).bfloat16()
    twin.load_state_dict(net.state_dict())
    other = build(twin, "sam", "sgd", backend, master_weights=True)
    other.load_state_dict(opt.state_dict())
    for i, p in enumerate(twin.parameters()):
        assert torch.equal(other.state_dict()["state"][i]["master"], p.float())


@pytest.mark.parametrize("stop", range(7))
def test_interval_and_start_go_on_where_they_stopped(stop, device):
    """start=2, interval=3: the climbs are at the steps 2, 5 and 8, wherever a run was resumed."""
    def run(net, opt, first, last):
        climbs = []
        for i in range(first, last):
            assert opt.param_groups[0]["sam_steps"] == i
            passes = []

            def closure(i=i, passes=passes):
                passes.append(i)
                return backward(net, i, device)

            opt.step(closure)
            climbs += [i] if len(passes) == 2 else []
        return climbs

    schedule = dict(interval=3, start=2)
    net, twin = network(device), network(device)
    opt = build(net, "fsam", "adamw", **schedule)
    assert run(net, opt, 0, stop) == [i for i in (2, 5, 8) if i < stop]
    model_state, state = filed(net.state_dict(), opt.state_dict())
    twin.load_state_dict(model_state)
    other = build(twin, "fsam", "adamw", **schedule)
    other.load_state_dict(state)
    expected = [i for i in (2, 5, 8) if i >= stop]
    assert run(net, opt, stop, 10) == run(twin, other, stop, 10) == expected
    assert_bits(twin, bits(net))


@both_backends
@pytest.mark.parametrize("base", ["sgd", "nadam"])
def test_the_full_gradient_is_part_of_the_state(backend, base, device):
    def sam_full(net):
        kind, hyper = BASES[base]
        return FullGradientSAM(net.parameters(), kind, "full", rho=0.2, backend=backend, **hyper)

    net = network(device)
    opt = sam_full(net)
    opt.set_full_gradient([torch.randn_like(p) for p in net.parameters()])
    for i in range(3):
        two_passes(net, opt, i, device)
    model_state, state = filed(net.state_dict(), opt.state_dict())
    twin = network(device)
    twin.load_state_dict(model_state)
    other = sam_full(twin)
    other.load_state_dict(state)
    copied, pickled = copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))
    for i in range(3, 6):
        two_passes(net, opt, i, device)
        for n, o in ((twin, other), copied, pickled):
            two_passes(n, o, i, device)
            assert_bits(n, bits(net))
    plain = BASES[base][0](network(device).parameters(), **BASES[base][1])
    other.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="without a full gradient"):
        other.first_step()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("scheduler_first", [False, True])
def test_a_rho_schedule_continues(device, as_tensor, scheduler_first):
    def factor(step):
        return 1 / (1 + step)

    def radius():
        return torch.tensor(0.4) if as_tensor else 0.4

    net, twin = network(device), network(device)
    opt = build(net, "sam", "sgd", rho=radius())
    schedule = RhoScheduler(opt, factor)
    for i in range(3):
        two_passes(net, opt, i, device)
        schedule.step()
    model_state, state, schedule_state = filed(net.state_dict(), opt.state_dict(),
                                               schedule.state_dict())
    twin.load_state_dict(model_state)
    other = build(twin, "sam", "sgd", rho=7 * radius())
    resumed = RhoScheduler(other, factor)
    if scheduler_first:
        resumed.load_state_dict(schedule_state)
    other.load_state_dict(state)
    if not scheduler_first:
        resumed.load_state_dict(schedule_state)
    for i in range(3, 6):
        assert float(other.param_groups[0]["rho"]) == pytest.approx(0.4 / (1 + i))
        for n, o, s in ((net, opt, schedule), (twin, other, resumed)):
            two_passes(n, o, i, device)
            s.step()
        assert_bits(twin, bits(net))


# ---- hooks


@pytest.mark.parametrize("base", ["adamw", "nadam"])
def test_hooks_see_the_whole_state_once(device, base):
    own = {"ema", "ema_steps"} if base == "adamw" else {"sam_ema", "sam_ema_steps"}
    ema = min(own)
    names = {*own, "exp_avg", "exp_avg_sq", "step"}
    seen = []

    def post(optimizer, state):
        seen.append(("post", {*state["state"][0]}))
        state["state"][0]["note"] = 7
        return {**state, "note": 8}

    opt = build(network(device), "fsam", base)
    opt.register_state_dict_post_hook(post)
    opt.state_dict()
    assert own <= seen[0][1]  # before the base has a state, too
    net, opt = trained("fsam", base, "reference", device)
    opt.register_state_dict_pre_hook(lambda optimizer: seen.append(("pre", optimizer is opt)))
    opt.register_state_dict_post_hook(post)
    seen.clear()
    state = opt.state_dict()
    assert [name for name, _ in seen] == ["pre", "post"] and names <= seen[1][1]
    assert state["note"] == 8 and state["state"][0].pop("note") == 7
    assert "note" not in opt.state[net.conv.weight]

    def shift(optimizer, state):
        seen.append(("load pre", names <= state["state"][0].keys()))
        entries = {i: {**x, ema: x[ema] + 1, "exp_avg": x["exp_avg"] + 2}
                   for i, x in state["state"].items()}
        return {**state, "state": entries}

    twin, other = fresh("fsam", base, "reference", device)
    other.register_load_state_dict_pre_hook(shift)
    other.register_load_state_dict_post_hook(
        lambda optimizer: seen.append(("load post", optimizer.state_dict()["state"][0][ema])))
    seen.clear()
    other.load_state_dict(state)
    loaded = other.state_dict()["state"]
    assert [name for name, _ in seen] == ["load pre", "load post"] and seen[0][1]
    for i, entry in opt.state_dict()["state"].items():
        assert torch.equal(loaded[i][ema], entry[ema] + 1)
        assert torch.equal(loaded[i]["exp_avg"], entry["exp_avg"] + 2)
    assert torch.equal(seen[1][1], loaded[0][ema])


# ---- torch's own optimizers and the public classes


@pytest.mark.parametrize("base, backend", [*((base, "reference") for base in BASES),
                                           ("sgd", "triton"), ("adamw", "triton")])
@pytest.mark.parametrize("way", ["load", "wrap"])
def test_a_torch_optimizer_is_continued(base, backend, device, way):
    """With rho = 0 and both passes: what torch's own would have done."""
    kind, hyper = BASES[base]
    theirs = network(device)
    torchs = kind(theirs.parameters(), **hyper)
    for i in range(3):
        plain_step(theirs, torchs, i, device)
    ours = copy.deepcopy(theirs)
    if way == "load":
        opt = build(ours, "fsam", base, backend, lr=0.5, rho=0.0)
        opt.load_state_dict(*filed(torchs.state_dict()))
    else:
        inner = kind(ours.parameters(), **hyper)
        inner.load_state_dict(copy.deepcopy(torchs.state_dict()))
        opt = FriendlySAM.wrap(inner, rho=0.0, backend=backend)
    for i in range(3, 7):
        plain_step(theirs, torchs, i, device)
        two_passes(ours, opt, i, device)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("base, flags, backend", [
    ("sgd", {}, "reference"), ("sgd", dict(foreach=True), "triton"),
    ("adam", {}, "reference"), ("adam", dict(foreach=True), "reference"),
    ("adamw", dict(fused=True), "reference"), ("adamw", dict(foreach=True), "triton"),
    ("nadam", {}, "reference"), ("rmsprop", dict(foreach=True), "reference")])
def test_torchs_own_optimizer_continues_ours(base, flags, backend, device):
    net, opt = trained("fsam", base, backend, device)
    theirs = copy.deepcopy(net)
    state, = filed(opt.state_dict())
    for group in state["param_groups"]:
        group.update(flags)
    torchs = BASES[base][0](theirs.parameters(), lr=0.5)
    torchs.load_state_dict(state)
    for i in range(3, 7):
        plain_step(net, opt, i, device)
        plain_step(theirs, torchs, i, device)
        for p, q in zip(net.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


class PublicSAM(torch.optim.Optimizer):
    """The class that most code copies, in its steps: state[p] holds old_p, and for the published
    F-SAM momentum, the average; the base optimizer's state is not in it."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, average=False, **kwargs):
        super().__init__(params, dict(rho=rho, adaptive=adaptive, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.average = average

    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old_p"] = p.data.clone()
            if self.average:
                self.state[p]["momentum"] = p.grad.clone()
            p.data = p + self.param_groups[0]["rho"] * p.grad

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("average", [False, True])
def test_a_state_of_the_public_classes_continues(device, base, average):
    """Where they stopped: their weights, groups and average, and a base that starts anew."""
    kind, hyper = BASES[base]
    net = network(device)
    public = PublicSAM(net.parameters(), kind, rho=0.3, average=average, **hyper)
    for i in range(2):
        backward(net, i, device)
        public.first_step()
        public.step()
        public.zero_grad()
    model_state, state = filed(net.state_dict(), public.state_dict())
    twin, anew = network(device), network(device)
    for n in (twin, anew):
        n.load_state_dict(model_state)
    variant = "fsam-orthogonal" if average else "sam"
    opt, expected = build(twin, variant, base, lr=9.0), build(anew, variant, base, rho=0.3)
    opt.load_state_dict(state)
    assert opt.param_groups[0]["rho"] == 0.3 and opt.param_groups[0]["lr"] == hyper["lr"]
    if average:
        saved = expected.state_dict()
        saved["state"] = {i: {"ema": entry["momentum"], "ema_steps": torch.tensor(1)}
                          for i, entry in state["state"].items()}
        expected.load_state_dict(saved)
    for i in range(2, 5):
        two_passes(twin, opt, i, device)
        two_passes(anew, expected, i, device)
        assert_bits(twin, bits(anew))
    assert "old_p" not in opt.state_dict()["state"][0]


class Lion(torch.optim.Optimizer):
    """A base of someone else's whose state is called as the published F-SAM calls its average."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.1)
                p.sub_(momentum.sign(), alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("cls", [SAM, FriendlySAM])
def test_a_base_that_calls_its_state_momentum_keeps_it(device, cls):
    net = network(device)
    opt = cls(net.parameters(), Lion, rho=0.3, lr=0.02)
    for i in range(3):
        two_passes(net, opt, i, device)
    twin = copy.deepcopy(net)
    other = cls(twin.parameters(), Lion, rho=0.1, lr=0.5)
    other.load_state_dict(*filed(opt.state_dict()))
    assert_continues(net, opt, twin, other, device)


# ---- torch.distributed.checkpoint, of plain parameters in one process


def dcp_files(net, opt, twin, other, folder) -> None:
    saved = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, opt)}
    dcp.save(saved, checkpoint_id=folder, no_dist=True)
    state = {"model": get_model_state_dict(twin), "optim": get_optimizer_state_dict(twin, other)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(twin, state["model"])
    set_optimizer_state_dict(twin, other, state["optim"])


def dcp_state(net, opt, twin, other, **options) -> None:
    options = StateDictOptions(**options)
    state = copy.deepcopy(get_optimizer_state_dict(net, opt, options=options))
    set_model_state_dict(twin, get_model_state_dict(net))
    set_optimizer_state_dict(twin, other, state, options=options)


@every_case
@pytest.mark.parametrize("way", ["files", "state", "flat"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_continues_bit_for_bit(variant, base, backend, device, way,
                                                        tmp_path):
    net, opt = trained(variant, base, backend, device)
    twin, other = fresh(variant, base, backend, device)
    if way == "files":
        dcp_files(net, opt, twin, other, tmp_path)
    else:
        dcp_state(net, opt, twin, other, flatten_optimizer_state_dict=way == "flat")
    assert_continues(net, opt, twin, other, device)


class Plain(torch.optim.Optimizer):
    """A base without any state, of someone else's."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("base", [torch.optim.SGD, Plain])
@pytest.mark.parametrize("cls", [SAM, FriendlySAM])
def test_taking_a_distributed_state_changes_nothing(device, base, cls):
    """Where `state` is empty, torch takes a step to fill it, with lr = 0."""
    net = network(device)
    opt = cls(net.parameters(), base, rho=0.2, lr=0.05, interval=2)
    twin, other = copy.deepcopy((net, opt))
    for i in range(5):
        for n, o in ((net, opt), (twin, other)):
            o.step(lambda n=n, i=i: backward(n, i, device))
            o.zero_grad()
        before = opt.param_groups[0]["sam_steps"]
        get_optimizer_state_dict(net, opt)
        assert opt.param_groups[0]["sam_steps"] == before == i + 1
        assert_bits(net, bits(twin))


@pytest.mark.parametrize("base, counted", [("sgd", 0), ("adamw", 0), ("nadam", 1)])
def test_taking_a_distributed_state_first_counts_where_it_takes_a_step(base, counted):
    """For the state of a base that is not fused; a loaded state counts as it did."""
    def fresh():
        net = network("cpu")
        cls, hyper = BASES[base]
        return net, SAM(net.parameters(), cls, interval=2, **hyper)

    net, opt = fresh()
    get_optimizer_state_dict(net, opt)
    assert opt.param_groups[0]["sam_steps"] == counted and opt.climbs_next is (counted == 0)
    two_passes(net, opt, 0, "cpu")
    state = get_optimizer_state_dict(net, opt)
    net, opt = fresh()
    set_optimizer_state_dict(net, opt, copy.deepcopy(state))
    assert opt.param_groups[0]["sam_steps"] == counted + 1


def test_a_distributed_state_while_perturbed_is_refused(device):
    net, opt = trained("sam", "sgd", "reference", device, momentum=0.0, dampening=0.0)
    backward(net, 3, device)
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="state_dict while the weights are perturbed"):
        get_optimizer_state_dict(net, opt)
    assert opt.is_perturbed
