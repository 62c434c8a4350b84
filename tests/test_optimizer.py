"""The public contract: invariants, phases, closures, state, misuse. Every class and backend."""

import copy
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam
from fastsam import ASAM, SAM, FriendlySAM, PhaseError, freeze_bn_stats

HYPER = dict(lr=0.07, momentum=0.85, dampening=0.1, weight_decay=3e-3)
CLASSES = {
    "sam": (SAM, dict(rho=0.08)),
    "asam-all": (ASAM, dict(rho=1.5)),
    "asam-weights": (ASAM, dict(rho=0.4, scale="weights", eta=0.02)),
    "fsam": (FriendlySAM, dict(rho=0.1, sigma=0.7, lmbda=0.6)),
    "fsam-official": (FriendlySAM, dict(rho=0.1, sigma=0.7, lmbda=0.6, convention="official")),
    "fasam": (FriendlySAM, dict(rho=1.2, sigma=0.7, lmbda=0.6, adaptive=True)),
}
# Every class on the reference; on the kernels, which test_kernels.py covers, one of each mode.
CASES = ([(variant, "reference") for variant in CLASSES]
         + [(variant, "triton") for variant in ("sam", "fasam", "fsam-official")])


def pytest_generate_tests(metafunc):
    if {"variant", "backend"} <= set(metafunc.fixturenames):
        metafunc.parametrize("variant, backend", CASES)
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["reference", "triton"])


class Net(nn.Module):
    """Convolution, BatchNorm and a linear layer: every kind of parameter, few tensors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().flatten(1))


def network(device) -> Net:
    torch.manual_seed(1)
    return Net().to(device)


def batch(i: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    x = torch.randn(12, 3, 4, 4, generator=generator)
    return x.to(device), torch.randint(4, (12,), generator=generator).to(device)


def build(net, variant: str, backend: str, **changes) -> SAM:
    cls, kwargs = CLASSES[variant]
    return cls(net.parameters(), torch.optim.SGD, backend=backend,
               **{**HYPER, **kwargs, **changes})


def backward(net, i: int, device) -> torch.Tensor:
    x, y = batch(i, device)
    loss = cross_entropy(net(x), y)
    loss.backward()
    return loss


def two_passes(net, opt, i: int, device) -> None:
    backward(net, i, device)
    opt.first_step(zero_grad=True)
    with freeze_bn_stats(net):
        backward(net, i, device)
    opt.second_step(zero_grad=True)


def bits(net) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_bits(net, expected) -> None:
    for p, q in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p, q)


# ---- invariant 1: the weights come back bit for bit


def test_restore_gives_the_weights_back(variant, backend, device):
    net = network(device)
    opt = build(net, variant, backend)
    two_passes(net, opt, 0, device)
    w = bits(net)
    backward(net, 1, device)
    opt.first_step()
    assert opt.is_perturbed
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), w, strict=True))
    opt.restore()
    assert not opt.is_perturbed
    assert_bits(net, w)
    opt.restore()  # a second time is harmless
    assert_bits(net, w)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_skips_the_step(variant, backend, device, bad):
    net = network(device)
    opt = build(net, variant, backend)
    two_passes(net, opt, 0, device)
    w, state = bits(net), copy.deepcopy(opt.state_dict()["state"])
    backward(net, 1, device)
    net.head.bias.grad[1] = bad
    opt.first_step(zero_grad=True)
    assert_bits(net, w)
    backward(net, 1, device)
    opt.second_step()
    assert_bits(net, w)
    assert opt.skipped_steps == 1
    for i, entry in opt.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, state[i][name]), name
    two_passes(net, opt, 2, device)
    assert opt.skipped_steps == 1
    assert all(p.isfinite().all() for p in net.parameters())


def test_an_exception_in_the_second_pass_restores(variant, backend, device):
    net = network(device)
    opt = build(net, variant, backend)
    w, calls = bits(net), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        opt.zero_grad()
        return backward(net, 0, device)

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert not opt.is_perturbed
    assert_bits(net, w)


@pytest.mark.parametrize("which", [1, 2])
def test_an_exception_inside_the_climb_restores(backend, device, which, monkeypatch):
    w = [nn.Parameter(torch.randn(5, device=device)),
         nn.Parameter(torch.randn(5, device=device, dtype=torch.bfloat16))]
    opt = SAM(w, torch.optim.SGD, rho=0.3, lr=0.1, backend=backend)
    before = [p.detach().clone() for p in w]
    climb, calls = opt._backend.climb, []

    def failing(*args):
        calls.append(1)
        if len(calls) == which:
            raise torch.cuda.OutOfMemoryError("made up")
        climb(*args)

    monkeypatch.setattr(opt._backend, "climb", failing)
    for p in w:
        p.grad = torch.ones_like(p)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        opt.first_step()
    assert not opt.is_perturbed
    assert all(torch.equal(p, q) for p, q in zip(w, before, strict=True))


def test_second_step_starts_from_the_saved_weights(variant, backend, device):
    net = network(device)
    opt = build(net, variant, backend, lr=0.0)
    w = bits(net)
    for i in range(3):
        two_passes(net, opt, i, device)
    assert_bits(net, w)


# ---- invariant 2: no storage is replaced


def test_storages_stay_where_they_are(variant, backend, device):
    net = network(device)
    opt = build(net, variant, backend)
    before = [(p.data_ptr(), p.untyped_storage().data_ptr()) for p in net.parameters()]
    for i in range(3):
        two_passes(net, opt, i, device)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    two_passes(net, opt, 3, device)
    assert before == [(p.data_ptr(), p.untyped_storage().data_ptr()) for p in net.parameters()]


# ---- invariant 3: no host synchronisation


class NoSync(TorchDispatchMode):
    """Fails on every read of a device value by the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
                    torch.ops.aten.nonzero.default, torch.ops.aten.equal.default):
            raise AssertionError(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        sources = [a for a in args if isinstance(a, torch.Tensor)]
        if (isinstance(result, torch.Tensor) and result.device.type == "cpu"
                and any(a.device.type != "cpu" for a in sources)):
            raise AssertionError(f"{func} copies from the device to the host")
        return result


def test_no_host_sync_inside_a_step(variant, backend, device):
    net = network(device)
    opt = build(net, variant, backend)
    two_passes(net, opt, 0, device)
    for i in range(1, 3):
        opt.param_groups[0].update(lr=0.05 / i, rho=0.1 / i)
        backward(net, i, device)
        with NoSync():
            opt.first_step(zero_grad=True)
        backward(net, i, device)
        with NoSync():
            opt.second_step(zero_grad=True)


def test_the_sync_detector_detects(device):
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        torch.ones((), device=device).item()


# ---- invariant 4: rho = 0 is the base optimizer


@pytest.mark.parametrize("nesterov", [False, True])
def test_rho_zero_is_the_base_optimizer_with_its_buffers(variant, backend, device, nesterov):
    changes = dict(rho=0.0, dampening=0.0 if nesterov else 0.1, nesterov=nesterov)
    net, twin = network(device), network(device)
    opt = build(net, variant, backend, **changes)
    base = torch.optim.SGD(twin.parameters(), **{**HYPER, "dampening": changes["dampening"],
                                                 "nesterov": nesterov})
    for i in range(6):
        two_passes(net, opt, i, device)
        base.zero_grad()
        backward(twin, i, device)
        base.step()
        for (name, a), (_, b) in zip(net.state_dict().items(), twin.state_dict().items(),
                                     strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-7, msg=name)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(opt.state[p]["momentum_buffer"],
                                       base.state[q]["momentum_buffer"], rtol=1e-4, atol=1e-6)
    assert int(net.bn.num_batches_tracked) == 6


def test_freeze_bn_stats_keeps_the_buffers_and_nests():
    net = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.SyncBatchNorm(3),
                        nn.LazyBatchNorm1d())
    x = torch.randn(8, 3)
    net[2](x), net[0](x)
    before = copy.deepcopy(net.state_dict())
    with freeze_bn_stats(net), freeze_bn_stats(net):
        net[2](net[0](x * torch.inf))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    net[0](x)
    assert int(net[0].num_batches_tracked) == 2


# ---- phases, closures, misuse (invariant 8)


def test_closure_runs_twice_and_returns_the_first_loss(variant, backend, device):
    net, twin = network(device), network(device)
    opt, manual = build(net, variant, backend), build(twin, variant, backend)
    for i in range(3):
        losses = []

        def closure(i=i, losses=losses):
            losses.append(backward(net, i, device))
            return losses[-1]

        first = opt.step(closure)
        assert len(losses) == 2 and first is losses[0]
        backward(twin, i, device)
        manual.first_step(zero_grad=True)
        backward(twin, i, device)
        manual.second_step(zero_grad=True)
        assert_bits(net, bits(twin))


def test_step_without_closure_is_a_base_step_or_the_second_step(variant, backend, device):
    net, twin = network(device), network(device)
    opt = build(net, variant, backend)
    base = torch.optim.SGD(twin.parameters(), **HYPER)
    for i in range(3):
        for n, o in ((net, opt), (twin, base)):
            o.zero_grad()
            backward(n, i, device)
            o.step()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    opt.first_step()
    opt.step()
    assert not opt.is_perturbed


def test_phase_errors_leave_the_weights_alone(backend, device):
    net = network(device)
    opt = build(net, "fsam", backend)
    with pytest.raises(PhaseError, match="second_step without a first_step"):
        opt.second_step()
    backward(net, 0, device)
    w = bits(net)
    opt.first_step()
    moved = bits(net)
    state = build(network(device), "fsam", backend).state_dict()
    for call in (opt.first_step, opt.state_dict, lambda: opt.step(lambda: None),
                 lambda: opt.load_state_dict(state), lambda: copy.deepcopy(opt),
                 lambda: opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))]))):
        with pytest.raises(PhaseError, match="while the weights are perturbed"):
            call()
    assert_bits(net, moved)
    opt.restore()
    assert_bits(net, w)


@pytest.mark.parametrize("missing", ["first", "second", "both"])
def test_a_gradient_in_only_one_pass_is_handled(variant, backend, device, missing):
    net = network(device)
    opt = build(net, variant, backend)
    for i in range(3):
        w = net.head.weight.detach().clone()
        backward(net, i, device)
        if missing in ("first", "both"):
            net.head.weight.grad = None
        opt.first_step(zero_grad=True)
        assert torch.equal(net.head.weight, w) == (missing in ("first", "both"))
        backward(net, i, device)
        if missing in ("second", "both"):
            net.head.weight.grad = None
        opt.second_step(zero_grad=True)
        assert torch.equal(net.head.weight, w) == (missing in ("second", "both"))


def test_no_gradient_at_all_is_a_quiet_step(variant, backend, device):
    net = network(device)
    opt = build(net, variant, backend)
    w = bits(net)
    opt.first_step()
    opt.second_step()
    assert_bits(net, w)
    assert opt.skipped_steps == 0


def test_bad_arguments_are_refused_by_name_and_value():
    p = [nn.Parameter(torch.ones(3))]
    for match, call in {
        "rho=-0.1": lambda: SAM(p, torch.optim.SGD, rho=-0.1, lr=0.1),
        "rho=nan": lambda: SAM(p, torch.optim.SGD, rho=float("nan"), lr=0.1),
        "lmbda=1.0": lambda: FriendlySAM(p, torch.optim.SGD, lmbda=1.0, lr=0.1),
        "sigma=inf": lambda: FriendlySAM(p, torch.optim.SGD, sigma=float("inf"), lr=0.1),
        "eta=-1": lambda: ASAM(p, torch.optim.SGD, eta=-1, lr=0.1),
        "scale='some'": lambda: ASAM(p, torch.optim.SGD, scale="some", lr=0.1),
        "convention='x'": lambda: FriendlySAM(p, torch.optim.SGD, convention="x", lr=0.1),
        "backend='cuda'": lambda: SAM(p, torch.optim.SGD, backend="cuda", lr=0.1),
        "empty parameter list": lambda: SAM([], torch.optim.SGD, lr=0.1),
        "maximize=True": lambda: SAM(p, torch.optim.SGD, maximize=True, lr=0.1),
        "complex64": lambda: SAM([torch.ones(2, dtype=torch.complex64).requires_grad_()],
                                 torch.optim.SGD, lr=0.1),
        "float64": lambda: SAM([nn.Parameter(torch.ones(3).double())], torch.optim.SGD,
                               backend="triton", lr=0.1),
        "learning rate": lambda: SAM(p, torch.optim.SGD, lr=-1),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="not an optimizer class"):
        SAM(p, 0.1)
    sgd = torch.optim.SGD(p, lr=0.1)
    for call in (lambda: SAM(p, sgd), lambda: SAM.wrap(sgd, lr=0.5)):
        with pytest.raises(TypeError, match="use SAM.wrap"):
            call()
    with pytest.raises(ValueError, match="rho=-1"):
        SAM.wrap(sgd, rho=-1)
    assert SAM.wrap(sgd, rho=0.1).param_groups[0]["rho"] == 0.1
    with pytest.raises(ValueError, match="rho=-1"):
        SAM([dict(params=p, rho=-1)], torch.optim.SGD, lr=0.1)


# ---- drop-in: positional arguments, groups, schedulers, hooks


def test_the_public_sam_class_arguments_fit(device):
    net = network(device)
    sam = SAM(net.parameters(), torch.optim.SGD, 0.07, True, lr=0.1, momentum=0.9)
    assert sam.param_groups[0]["rho"] == 0.07 and sam.param_groups[0]["adaptive"] is True
    assert sam.param_groups is sam.base_optimizer.param_groups
    fsam = FriendlySAM(net.parameters(), torch.optim.SGD, 0.07, 0.5, 0.8, False, lr=0.1)
    assert [fsam.param_groups[0][k] for k in ("rho", "sigma", "lmbda")] == [0.07, 0.5, 0.8]


def test_schedulers_work_without_warnings_and_hooks_fire_once(variant, backend, device):
    net = network(device)
    opt = build(net, variant, backend)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
        for i in range(2):
            two_passes(net, opt, i, device)
            scheduler.step()
    assert calls == ["pre", "post"] * 2
    assert opt.param_groups[0]["lr"] == opt.base_optimizer.param_groups[0]["lr"] == 0.07 / 4
    w = bits(net)
    opt.param_groups[0]["lr"] = 0.0
    two_passes(net, opt, 3, device)
    assert_bits(net, w)


def test_a_group_added_in_mid_training_trains(variant, backend, device):
    net = network(device)
    cls, kwargs = CLASSES[variant]
    opt = cls([net.conv.weight, net.bn.weight], torch.optim.SGD, backend=backend,
              **HYPER, **kwargs)
    two_passes(net, opt, 0, device)
    opt.add_param_group(dict(params=[net.head.weight], lr=0.01, rho=0.3))
    assert opt.base_optimizer.param_groups[1]["rho"] == 0.3
    w = bits(net)
    two_passes(net, opt, 1, device)
    moved = [n for (n, p), q in zip(net.named_parameters(), w, strict=True)
             if not torch.equal(p, q)]
    assert moved == ["conv.weight", "bn.weight", "head.weight"]


@pytest.mark.parametrize("bad", [dict(rho=-1.0), dict(maximize=True), "shared"])
def test_a_refused_group_leaves_the_optimizer_usable(backend, device, bad):
    net, opt = trained("sam", backend, device)
    if bad == "shared":
        group = dict(params=[nn.Parameter(net.conv.weight.detach()[2:])])
    else:
        group = dict(params=[nn.Parameter(torch.ones(2, device=device))], **bad)
    with pytest.raises(ValueError):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1
    two_passes(net, opt, 3, device)
    opt.load_state_dict(opt.state_dict())


def test_hyper_parameters_may_change_their_kind(backend, device):
    net, twin = network(device), network(device)
    opt = build(net, "sam", backend, lr=torch.tensor(0.07))
    other = build(twin, "sam", backend)
    for i, (lr, adaptive) in enumerate([(None, False), (0.0, False), (0.03, True)]):
        for n, o in ((net, opt), (twin, other)):
            if lr is not None:
                o.param_groups[0].update(lr=lr, adaptive=adaptive)
            w = bits(n)
            two_passes(n, o, i, device)
        torch.testing.assert_close(bits(net), bits(twin), rtol=1e-6, atol=1e-7)
        if lr == 0.0:
            assert_bits(net, w)
    fresh = build(network(device), "sam", backend, adaptive=True, lr=0.03)
    backward(net, 9, device)
    for p, q in zip(fresh.param_groups[0]["params"], net.parameters(), strict=True):
        with torch.no_grad():
            p.copy_(q)
        p.grad = q.grad.clone()
    opt.first_step()
    fresh.first_step()
    assert_bits(net, fresh.param_groups[0]["params"])


def test_parameters_that_lost_their_form_are_refused(backend, device):
    ps = [nn.Parameter(torch.randn(6, 8, device=device)) for _ in range(2)]
    opt = SAM(ps, torch.optim.SGD, lr=0.1, backend=backend)
    ps[0].data = torch.randn(6, 16, device=device)[:, ::2]
    with pytest.raises(RuntimeError, match="final form"):
        opt.first_step()
    ps[0].data = ps[1].data
    with pytest.raises(ValueError, match="share memory"):
        opt.first_step()
    assert not opt.is_perturbed


def test_a_long_average_keeps_its_precision(backend, device):
    w = nn.Parameter(torch.randn(64, device=device))
    opt = FriendlySAM([w], torch.optim.SGD, rho=0.1, lmbda=0.9999, lr=0.1, backend=backend)
    generator = torch.Generator().manual_seed(3)
    m, plain = torch.zeros(64, dtype=torch.float64), torch.zeros(64)
    for _ in range(4):
        g = torch.randn(64, generator=generator)
        m, plain = 0.9999 * m + (1 - 0.9999) * g, 0.9999 * plain + (1 - 0.9999) * g
        w.grad = g.to(device)
        opt.first_step()
        opt.restore()
    error = (opt.state[w]["ema"].cpu() - m).norm() / m.norm()
    assert error <= 2 * (plain - m).norm() / m.norm() + 1e-7


def test_perturb_false_neither_climbs_nor_counts(backend, device):
    net = network(device)
    groups = [dict(params=net.head.parameters(), perturb=False),
              dict(params=[*net.conv.parameters(), *net.bn.parameters()])]
    opt = SAM(groups, torch.optim.SGD, rho=0.1, lr=0.1, backend=backend)
    backward(net, 0, device)
    norm = torch.stack([p.grad.norm() for p in groups[1]["params"]]).norm()
    head = net.head.weight.detach().clone()
    opt.first_step()
    assert torch.equal(net.head.weight, head)
    assert opt.last_grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert opt.last_radius == pytest.approx(0.1, rel=1e-4)
    opt.second_step()
    assert not torch.equal(net.head.weight, head)


def test_last_radius_is_what_bfloat16_left_of_it(device):
    w = nn.Parameter(torch.randn(4096, device=device, dtype=torch.bfloat16))
    opt = SAM([w], torch.optim.SGD, rho=0.01, lr=0.1)
    w.grad = torch.randn_like(w)
    before = w.detach().float()
    opt.first_step()
    realised = (w.detach().float() - before).norm()
    assert opt.last_radius == pytest.approx(float(realised), rel=1e-5)


def test_the_first_gradient_is_let_go_after_the_climb(backend, device):
    net = network(device)
    opt = build(net, "fsam", backend)
    backward(net, 0, device)
    gradients = [weakref.ref(p.grad) for p in net.parameters()]
    opt.first_step(zero_grad=True)
    assert [ref() for ref in gradients] == [None] * len(gradients)


def test_a_parameter_that_changed_its_dtype_is_refused(backend, device):
    net = network(device)
    opt = build(net, "sam", backend)
    net.double()
    with pytest.raises(RuntimeError, match="build the optimizer after"):
        opt.first_step()


# ---- invariant 6: saving and loading


def trained(variant, backend, device, steps: int = 3):
    net = network(device)
    opt = build(net, variant, backend)
    for i in range(steps):
        two_passes(net, opt, i, device)
    return net, opt


@pytest.mark.parametrize("way", ["torch.save", "deepcopy", "pickle"])
def test_save_load_continue_is_bit_equal(variant, backend, device, way):
    net, opt = trained(variant, backend, device)
    twin = network(device)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save([net.state_dict(), opt.state_dict()], file)
        file.seek(0)
        model_state, state = torch.load(file, weights_only=True)
        twin.load_state_dict(model_state)
        other = build(twin, variant, backend, lr=0.5, momentum=0.1)
        other.load_state_dict(state)
    elif way == "deepcopy":
        twin, other = copy.deepcopy((net, opt))
    else:
        twin, other = pickle.loads(pickle.dumps((net, opt)))
    assert other.state_dict()["state"][0]["momentum_buffer"].abs().sum() > 0
    for i in range(3, 6):
        two_passes(net, opt, i, device)
        two_passes(twin, other, i, device)
        assert_bits(net, bits(twin))


def test_a_pickled_optimizer_is_whole(backend, device):
    """A schedule, a skip, a restore and its state, not only the next weights."""
    net, opt = trained("fsam", backend, device)
    twin, other = pickle.loads(pickle.dumps((net, opt)))
    for n, o in ((net, opt), (twin, other)):
        o.param_groups[0]["lr"] = 0.01
        backward(n, 3, device)
        n.head.bias.grad[0] = torch.nan
        o.first_step()
        o.second_step(zero_grad=True)
        two_passes(n, o, 4, device)
        backward(n, 5, device)
        w = bits(n)
        o.first_step()
        o.restore()
        assert_bits(n, w)
        assert o.skipped_steps == 1
    assert_bits(net, bits(twin))
    for i, entry in opt.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, other.state_dict()["state"][i][name]), name


def test_a_state_of_another_model_changes_nothing(backend, device):
    net, opt = trained("fsam", backend, device)
    before = copy.deepcopy(opt.state_dict())
    for key, value, match in (("ema", torch.ones(3), "does not fit"),
                              ("momentum_buffer", torch.ones(1, 1), "does not fit")):
        state = copy.deepcopy(before)
        state["param_groups"][0]["lr"] = 9.0
        state["state"][0][key] = value
        with pytest.raises(ValueError, match=match):
            opt.load_state_dict(state)
    maximizing = torch.optim.SGD(network(device).parameters(), lr=9.0, maximize=True)
    with pytest.raises(ValueError, match="maximize=True"):
        opt.load_state_dict(maximizing.state_dict())
    fewer = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=9.0)
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(fewer.state_dict())
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(x, after["state"][i][k]) for i, entry in before["state"].items()
               for k, x in entry.items())


def test_group_keys_that_a_state_lacks_stay(device):
    ps = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = SAM([dict(params=[ps[0]], rho=0.3), dict(params=[ps[1]], perturb=False)],
              torch.optim.SGD, lr=0.1)
    plain = torch.optim.SGD([dict(params=[ps[0]]), dict(params=[ps[1]])], lr=0.5)
    opt.load_state_dict(plain.state_dict())
    assert [g["lr"] for g in opt.param_groups] == [0.5, 0.5]
    assert opt.param_groups[0]["rho"] == 0.3 and opt.param_groups[1]["perturb"] is False


def test_the_published_fsam_state_keeps_its_average(device):
    net, opt = trained("fsam-official", "reference", device)
    state = opt.state_dict()
    published = {i: {"old_p": x["ema"], "momentum": x["ema"]} for i, x in state["state"].items()}
    other = build(network(device), "fsam-official", "reference")
    other.load_state_dict({**state, "state": published})
    for i, entry in other.state_dict()["state"].items():
        assert torch.equal(entry["ema"], state["state"][i]["ema"]) and entry["ema_steps"] == 1


def test_a_torch_sgd_state_is_taken_over(backend, device):
    net, twin = network(device), network(device)
    base = torch.optim.SGD(twin.parameters(), **HYPER)
    for i in range(2):
        base.zero_grad()
        backward(twin, i, device)
        base.step()
    net.load_state_dict(twin.state_dict())
    opt = build(net, "sam", backend)
    opt.load_state_dict(base.state_dict())
    assert opt.param_groups[0]["rho"] == 0.08
    wrapped = copy.deepcopy(twin)
    inner = torch.optim.SGD(wrapped.parameters(), **HYPER)
    inner.load_state_dict(base.state_dict())
    outer = SAM.wrap(inner, rho=0.08, backend=backend)
    for i in range(2, 4):
        two_passes(net, opt, i, device)
        two_passes(wrapped, outer, i, device)
        assert_bits(net, bits(wrapped))


def test_the_public_class_state_with_old_p_is_tolerated(backend, device):
    net, opt = trained("sam", backend, device)
    state = opt.state_dict()
    state["state"] = {0: {"old_p": torch.zeros(1)}}
    opt.load_state_dict(state)
    assert "old_p" not in opt.state_dict()["state"][0]


# ---- other base optimizers, reports


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop])
def test_another_base_optimizer_takes_its_own_step(variant, backend, device, base):
    net, twin = network(device), network(device)
    cls, kwargs = CLASSES[variant]
    opt = cls(net.parameters(), base, backend=backend, lr=1e-3, **{**kwargs, "rho": 0.0})
    plain = base(twin.parameters(), lr=1e-3)
    for i in range(4):
        two_passes(net, opt, i, device)
        plain.zero_grad()
        backward(twin, i, device)
        plain.step()
        assert_bits(net, bits(twin))
    other = cls(net.parameters(), base, backend=backend, lr=1e-3, **{**kwargs, "rho": 0.0})
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    two_passes(net, other, 4, device)
    plain.zero_grad()
    backward(twin, 4, device)
    plain.step()
    assert_bits(net, bits(twin))


def test_reports_say_what_runs_and_what_it_keeps(device):
    net = network(device)
    opt = build(net, "fsam", "reference")
    report = opt.backend_report()
    assert report["backend"] == "reference" and report["why"] == "asked for"
    assert report["fused_base"] is True and "packed" in report["spaces"][0]
    kept = opt.memory_report()
    numel = sum(p.numel() for p in net.parameters())
    for name in ("backup", "ema", "momentum"):
        assert 4 * numel <= kept[name] < 4 * numel + 8 * 64
    assert fastsam.__version__


# ---- mixed precision


def test_autocast_does_not_train_on_stale_weights(backend):
    net, twin = network("cpu"), network("cpu")
    opt, other = build(net, "sam", backend, rho=5.0), build(twin, "sam", backend, rho=5.0)
    with torch.autocast("cpu", torch.bfloat16):
        two_passes(net, opt, 0, "cpu")
    for phase in ("first", "second"):
        with torch.autocast("cpu", torch.bfloat16):
            x, y = batch(0, "cpu")
            loss = cross_entropy(twin(x), y)
        loss.backward()
        getattr(other, f"{phase}_step")(zero_grad=True)
    assert_bits(net, bits(twin))


def test_grad_scaler_is_divided_out_and_backs_off(variant, backend, device):
    net, twin = network(device), network(device)
    opt, plain = build(net, variant, backend), build(twin, variant, backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1000)
    for i in range(3):
        for phase in ("first", "second"):
            x, y = batch(i, device)
            scaler.scale(cross_entropy(net(x), y)).backward()
            if phase == "first":
                opt.first_step(zero_grad=True, scaler=scaler)
            else:
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
            backward(twin, i, device)
            getattr(plain, f"{phase}_step")(zero_grad=True)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    w = bits(net)
    backward(net, 4, device)
    net.head.bias.grad[0] = torch.inf
    opt.first_step(zero_grad=True, scaler=scaler)
    x, y = batch(4, device)
    scaler.scale(cross_entropy(net(x), y)).backward()  # finite: only the first pass overflowed
    scaler.step(opt)
    scaler.update()
    assert_bits(net, w)
    assert opt.skipped_steps == 1 and scaler.get_scale() == 512.0


def test_grad_scaler_misuse_is_refused(backend, device):
    net = network(device)
    opt = build(net, "fsam", backend)
    w = bits(net)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    backward(net, 0, device)
    with pytest.raises(ValueError, match="has not scaled a loss"):
        opt.first_step(scaler=scaler)
    scaler.scale(torch.zeros((), device=device))
    scaler.unscale_(opt)
    with pytest.raises(ValueError, match="twice"):
        opt.first_step(scaler=scaler)
    scaler.update()
    opt.first_step(scaler=scaler)
    with pytest.raises(PhaseError, match="scaler.step"):
        opt.second_step()
    opt.restore()
    with pytest.raises(PhaseError, match="closure"):
        scaler.step(opt, lambda: None)
    assert_bits(net, w)


def test_a_disabled_grad_scaler_does_nothing(backend, device):
    net, twin = network(device), network(device)
    opt, plain = build(net, "fsam", backend), build(twin, "fsam", backend)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    backward(net, 0, device)
    opt.first_step(zero_grad=True, scaler=scaler)
    scaler.scale(backward(net, 0, device))
    scaler.step(opt)
    for phase in (plain.first_step, plain.second_step):
        backward(twin, 0, device)
        phase(zero_grad=True)
    assert_bits(net, bits(twin))
