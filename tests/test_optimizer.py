"""The public front: phases, closures, misuse, groups, schedulers, reports."""

import copy
import warnings
import weakref

import pytest
import torch
from torch import nn

import fastsam
from fastsam import ASAM, SAM, FriendlySAM, FullGradientSAM, PhaseError

from .contract import (
    CLASSES,
    HYPER,
    assert_bits,
    backward,
    bits,
    build,
    network,
    pytest_generate_tests,  # noqa: F401
    trained,
    two_passes,
)

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
        warnings.simplefilter("error", UserWarning)
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


# ---- other base optimizers, reports


@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.RMSprop])
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
    for name in ("backup", "ema", "base"):
        assert 4 * numel <= kept[name] < 4 * numel + 8 * 64
    assert fastsam.__version__


@pytest.mark.parametrize("twin", [lambda t: t[:, ::2], lambda t: t[:, ::3], lambda t: t])
def test_parameters_with_gaps_over_the_same_memory_are_refused(twin):
    table = torch.randn(4, 6)
    p, q = nn.Parameter(table[:, ::2]), nn.Parameter(twin(table))
    with pytest.raises(ValueError, match="share memory"):
        SAM([p, q], torch.optim.SGD, lr=0.1)
    SAM([p, nn.Parameter(table[:, 1::2])], torch.optim.SGD, lr=0.1)  # interleaved, not shared


@pytest.mark.parametrize("projection", ["cosine", "orthogonal"])
def test_a_bad_gradient_is_a_skip_even_where_the_full_gradient_is_zero(backend, device, projection):
    p = nn.Parameter(torch.ones(3, device=device))
    opt = FullGradientSAM([p], torch.optim.SGD, "full", rho=0.1, projection=projection, lr=0.1,
                          backend=backend)
    opt.set_full_gradient([None])
    for g, skips in ((1.0, 0), (float("inf"), 1), (float("nan"), 2)):
        p.grad = torch.full_like(p, g)
        opt.first_step(zero_grad=True)
        assert (p == 1).all()
        opt.second_step()
        assert opt.skipped_steps == skips
