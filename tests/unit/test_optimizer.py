"""The public front: phases, closures, misuse, groups, schedulers, reports."""

import copy
import math
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fastsam
from fastsam import ASAM, SAM, FriendlySAM, FullGradientSAM, PhaseError, RhoScheduler

from ..helpers.contract import (
    assert_bits,
    backward,
    base_of,
    batch,
    bits,
    build,
    network,
    optimizer,
    pytest_generate_tests,  # noqa: F401
    trained,
    two_passes,
)
from ..helpers.variants import VARIANTS

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
    cls, hyper = base_of(variant)
    base = cls(twin.parameters(), **hyper)
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


def test_bad_arguments_are_refused_by_name_and_value(device):
    p, double = [nn.Parameter(torch.ones(3))], torch.ones(3, dtype=torch.float64, device=device)
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
        "float64": lambda: SAM([nn.Parameter(double)], torch.optim.SGD, backend="triton", lr=0.1),
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
    lr = base_of(variant)[1]["lr"] / 4
    assert opt.param_groups[0]["lr"] == opt.base_optimizer.param_groups[0]["lr"] == lr
    w = bits(net)
    opt.param_groups[0]["lr"] = 0.0
    two_passes(net, opt, 3, device)
    assert_bits(net, w)


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook,
                                      register_optimizer_step_post_hook])
def test_global_hooks_see_a_step(variant, backend, device, register):
    net, seen = network(device), []
    opt = build(net, variant, backend)
    two_passes(net, opt, 0, device)
    handle = register(lambda optimizer, *_: seen.append(optimizer))
    try:
        two_passes(net, opt, 1, device)
    finally:
        handle.remove()
    two_passes(net, opt, 2, device)
    base = opt.base_optimizer  # is seen too, where it takes its own step
    assert [x for x in seen if x is not base] == [opt] and len(seen) <= 2


@pytest.mark.parametrize("everyones", [False, True])
def test_a_hook_that_a_closure_registers_sees_its_step_as_in_torch(everyones):
    def seen_by(build) -> list:
        p = torch.nn.Parameter(torch.ones(3))
        opt, seen, handles = build([p]), [], []
        registers = [register_optimizer_step_pre_hook, register_optimizer_step_post_hook] if (
            everyones) else [opt.register_step_pre_hook, opt.register_step_post_hook]

        def closure():
            if not handles:
                handles.extend(register(lambda one, *_, name=name: one is opt and seen.append(name))
                               for register, name in zip(registers, ("pre", "post"), strict=True))
            opt.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        try:
            opt.step(closure)
            opt.step(closure)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    expected = seen_by(lambda params: torch.optim.SGD(params, lr=0.1))
    assert expected == ["post", "pre", "post"]
    assert seen_by(lambda params: SAM(params, torch.optim.SGD, lr=0.1)) == expected


def test_the_profiler_sees_a_step(variant, backend, device):
    net = network(device)
    opt = build(net, variant, backend)
    two_passes(net, opt, 0, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        two_passes(net, opt, 1, device)
    name = f"Optimizer.step#{type(opt).__name__}.step"
    assert [event.count for event in profile.key_averages() if event.key == name] == [1]


@pytest.mark.parametrize("on", [False, True])
def test_a_step_leaves_grad_mode_as_it_was(variant, backend, device, on):
    net = network(device)
    opt = build(net, variant, backend)
    backward(net, 0, device)
    with torch.set_grad_enabled(on):
        opt.first_step()
        with pytest.raises(PhaseError):
            opt.first_step()
        opt.restore()
        opt.step()
        assert torch.is_grad_enabled() is on
    assert torch.is_grad_enabled()
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())


def test_a_group_added_in_mid_training_trains(variant, backend, device):
    net = network(device)
    opt = optimizer([net.conv.weight, net.bn.weight], variant, backend)
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


@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.Adagrad])
@pytest.mark.parametrize("name", VARIANTS)
def test_another_base_optimizer_takes_its_own_step(name, base, device):
    """Bit for bit; one sets its state up at its first step, the other in its constructor."""
    net, twin = network(device), network(device)
    cls, own, *_ = VARIANTS[name]
    build = partial(cls, list(net.parameters()), base, lr=1e-3, rho=0.0, **own)
    opt, plain = build(), base(twin.parameters(), lr=1e-3)
    if cls is FullGradientSAM:
        opt.set_full_gradient(bits(net))
    for i in range(5):
        if i == 3:
            state = copy.deepcopy(opt.state_dict())
            opt = build()
            opt.load_state_dict(state)
        two_passes(net, opt, i, device)
        plain.zero_grad()
        backward(twin, i, device)
        plain.step()
        assert_bits(net, bits(twin))


def test_the_memory_report_counts_every_table_of_a_thousand_tensors():
    params = [nn.Parameter(torch.ones(1)) for _ in range(1000)]
    opt = SAM(params, torch.optim.SGD, lr=0.1, backend="reference")
    other = opt.memory_report()["other"]
    step_counts, scalings, layout, addresses = 2 * 4, 2 * 4, 3 * 8, 4 * 8
    assert other - 1000 * (step_counts + scalings + layout + addresses) in range(1, 2**16)
    opt.spaces[0].blocks(1024)
    assert opt.memory_report()["other"] == other + 1000 * 2 * 4


def test_reports_say_what_runs_and_what_it_keeps(device):
    net = network(device)
    opt = build(net, "fsam", "reference")
    report = opt.backend_report()
    assert report["backend"] == "reference" and report["why"] == "asked for"
    assert report["fused_base"] is True and "748 parameters" in report["spaces"][0]
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


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)],
                         ids=["wide first", "narrow first"])
@pytest.mark.parametrize("huge", [1e20, math.nan])
def test_a_norm_that_overflows_in_one_dtype_skips_the_step_in_all(backend, device, dtypes, huge):
    """1e20 squared is finite in float64, and not in float32."""
    if backend == "triton":
        pytest.skip("its kernels take no float64")
    params = [nn.Parameter(torch.ones(2, dtype=dtype, device=device)) for dtype in dtypes]
    opt = FriendlySAM(params, torch.optim.SGD, rho=0.1, lr=0.1, backend=backend)
    for half in opt.first_step, opt.second_step:
        for p in params:
            p.grad = torch.full_like(p, huge if p.dtype == torch.float64 else 1.0)
        half()
    assert opt.skipped_steps == 1 and not math.isfinite(opt.last_grad_norm)
    for p in params:
        assert torch.equal(p, torch.ones_like(p)) and not opt.state[p]["ema"].any()


def test_restore_gives_up_what_was_set_aside(backend, device):
    """Also that a climb was not finite, and that there was a GradScaler."""
    net = network(device)
    opt = build(net, "fsam", backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    for i in range(2):
        scaler.scale(backward(net, i, device))
        net.head.bias.grad[0] = torch.inf
        opt.first_step(zero_grad=True, scaler=scaler)
        backward(net, i, device)
        opt.stash_grad()
    w = bits(net)
    opt.restore()
    assert_bits(net, w)
    opt.state_dict()
    with pytest.raises(PhaseError, match="nothing set aside"):
        opt.unstash_grad()
    backward(net, 2, device)
    opt.step()
    assert opt.skipped_steps == 0
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), w, strict=True))


# ---- steps that do not climb, another batch for the ascent, several ascents for one step


@pytest.mark.parametrize("interval, start, climbing", [
    (1, 0, "1111111"), (3, 0, "1001001"), (1, 2, "0011111"), (2, 3, "0001010")])
@pytest.mark.interpreted(interval=[2])
def test_interval_and_start_say_which_steps_climb(backend, device, interval, start, climbing):
    """Through closures, in a loop of one's own, and after loading; the rest are plain steps."""
    net, twin, third = (network(device) for _ in range(3))
    opt = build(net, "fsam", backend, interval=interval, start=start)
    own = build(twin, "fsam", backend, interval=interval, start=start)
    plain = build(third, "fsam", backend)
    for i, climbs in enumerate(climbing):
        if i == 4:
            state = copy.deepcopy(opt.state_dict())
            opt = build(net, "fsam", backend, interval=interval, start=start)
            opt.load_state_dict(state)
        assert opt.climbs_next == own.climbs_next == (climbs == "1"), i
        calls = []
        opt.step(lambda i=i, calls=calls: (calls.append(i), backward(net, i, device))[1])
        assert len(calls) == 1 + int(climbs)
        if own.climbs_next:
            backward(twin, i, device)
            own.first_step(zero_grad=True)
        backward(twin, i, device)
        own.step()
        own.zero_grad()
        backward(third, i, device)
        if climbs == "1":
            plain.first_step(zero_grad=True)
            backward(third, i, device)
        plain.step()
        plain.zero_grad()
        assert_bits(net, bits(third))
        assert_bits(twin, bits(third))


def test_an_ascent_closure_climbs_by_another_batch(variant, backend, device):
    """SAM-db: the climb from batch 5's gradient, the descent from batch i's at w + e."""
    net, twin = network(device), network(device)
    opt, manual = build(net, variant, backend), build(twin, variant, backend)
    for i in range(2):
        loss = opt.step(lambda i=i: backward(net, i, device), lambda: backward(net, 5, device))
        first = backward(twin, 5, device)
        manual.first_step(zero_grad=True)
        backward(twin, i, device)
        manual.second_step(zero_grad=True)
        assert_bits(net, bits(twin))
        assert loss.item() == first.item()
    with pytest.raises(ValueError, match="needs a closure"):
        opt.step(ascent_closure=lambda: None)
    assert_bits(net, bits(twin))


def gradient_at(params, i: int, device) -> list[torch.Tensor]:
    """The gradient of batch i's loss in float64, for weights given in the order of Net's."""
    net = network(device).double()
    x, y = batch(i, device)
    state = dict(zip([name for name, _ in net.named_parameters()], params, strict=True))
    leaves = {name: p.detach().double().requires_grad_() for name, p in state.items()}
    loss = cross_entropy(torch.func.functional_call(net, leaves, (x.double(),)), y)
    return list(torch.autograd.grad(loss, list(leaves.values())))


def test_stashed_gradients_are_m_sharpness(backend, device):
    """w - lr sum_k grad L_k(w + rho g_k / ||g_k||), the climbs one by one and from the same w."""
    net = network(device)
    opt = build(net, "sam", backend, rho=0.4, lr=0.05, momentum=0.0, dampening=0.0,
                weight_decay=0.0)
    w = [p.double() for p in bits(net)]
    total = [torch.zeros_like(p) for p in w]
    for k in range(3):
        g = gradient_at(w, k, device)
        norm = torch.stack([x.norm() for x in g]).norm()
        moved = [p + 0.4 * x / norm for p, x in zip(w, g, strict=True)]
        total = [a + x for a, x in zip(total, gradient_at(moved, k, device), strict=True)]
        backward(net, k, device)
        opt.first_step(zero_grad=True)
        backward(net, k, device)
        opt.stash_grad()
        assert not opt.is_perturbed and all(p.grad is None for p in net.parameters())
        assert_bits(net, [p.float() for p in w])
    for call in (opt.step, opt.state_dict):
        with pytest.raises(PhaseError, match="set aside"):
            call()
    opt.unstash_grad()
    opt.step()
    for p, q, a in zip(net.parameters(), w, total, strict=True):
        torch.testing.assert_close(p.detach(), (q - 0.05 * a).float(), rtol=1e-5, atol=1e-6)


def test_a_stashed_climb_that_was_not_finite_skips_the_step(variant, backend, device):
    net = network(device)
    opt = build(net, variant, backend)
    two_passes(net, opt, 0, device)
    w = bits(net)
    for k in range(3):
        backward(net, k, device)
        if k == 1:
            net.head.bias.grad[0] = torch.nan
        opt.first_step(zero_grad=True)
        backward(net, k, device)
        opt.stash_grad()
    opt.unstash_grad()
    opt.step()
    assert opt.skipped_steps == 1
    assert_bits(net, w)
    two_passes(net, opt, 3, device)
    assert opt.skipped_steps == 1
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), w, strict=True))


# ---- schedules, and hyper-parameters that are tensors


def test_a_rho_schedule_multiplies_each_group_s_own_rho(device):
    ps = [nn.Parameter(torch.randn(5, device=device)) for _ in range(3)]
    tensor = torch.tensor(0.3, device=device)
    opt = SAM([dict(params=[ps[0]], rho=0.2), dict(params=[ps[1]], rho=tensor)], torch.optim.SGD,
              lr=0.1, backend="reference")
    schedule = RhoScheduler(opt, lambda step: 1 / (1 + step))
    for step in range(1, 4):
        schedule.step()
        assert opt.param_groups[0]["rho"] == pytest.approx(0.2 / (1 + step))
        assert opt.param_groups[1]["rho"] is tensor
        assert float(tensor) == pytest.approx(0.3 / (1 + step))
    before = ps[0].detach().clone()
    ps[0].grad = torch.ones_like(ps[0])
    opt.first_step()
    assert float((ps[0].detach() - before).norm()) == pytest.approx(0.2 / 4, rel=1e-5)
    opt.restore()
    opt.add_param_group(dict(params=[ps[2]], rho=0.7))
    other = RhoScheduler(opt, lambda step: 2.0)
    assert [float(g["rho"]) for g in opt.param_groups] == pytest.approx([0.1, 0.15, 1.4])
    other.load_state_dict(schedule.state_dict())
    assert other.last_step == 3
    assert [float(g["rho"]) for g in opt.param_groups] == pytest.approx([0.4, 0.6, 1.4])


def test_a_rho_schedule_takes_groups_that_come_later():
    """From their own rho on, also where a state knows more groups or fewer."""
    def scheduled() -> tuple[SAM, RhoScheduler]:
        opt = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=0.8, lr=0.1)
        return opt, RhoScheduler(opt, lambda step: 0.5**step)

    def add(opt: SAM) -> None:
        opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], rho=0.4))

    opt, schedule = scheduled()
    schedule.step()
    early = schedule.state_dict()
    add(opt)
    schedule.step()
    assert schedule.get_last_rho() == [0.2, 0.1]
    late = schedule.state_dict()
    schedule.load_state_dict(early)
    assert schedule.get_last_rho() == [0.4, 0.2]
    opt, schedule = scheduled()
    schedule.load_state_dict(late)
    add(opt)
    schedule.step()
    assert schedule.get_last_rho() == [0.1, 0.05]


def test_a_later_group_that_shares_the_tensor_of_a_schedule_has_its_initial_rho():
    """As one has that takes its rho from the defaults."""
    opt = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=torch.tensor(0.8), lr=0.1)
    schedule = RhoScheduler(opt, lambda step: 0.5**step)
    schedule.step()
    opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))]))
    opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], rho=torch.tensor(0.4)))
    schedule.step()
    assert [float(rho) for rho in schedule.get_last_rho()] == pytest.approx([0.2, 0.2, 0.1])


def test_a_rho_schedule_that_is_refused_stays_where_it_was():
    opt = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=0.8, lr=0.1)
    factors = [1.0, -1.0, 0.25]
    schedule = RhoScheduler(opt, lambda step: factors[step])
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=r"rho_lambda\(1\) = -1.0"):
        schedule.step()
    with pytest.raises(ValueError, match=r"rho_lambda\(1\) = -1.0"):
        schedule.load_state_dict(dict(last_step=1, base_rhos=[9.0]))
    assert schedule.state_dict() == before and opt.param_groups[0]["rho"] == 0.8
    factors[1] = 0.5
    schedule.step()
    assert opt.param_groups[0]["rho"] == 0.4


def test_a_rho_schedule_refuses_what_it_cannot_do():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="SGD has a group without rho"):
        RhoScheduler(torch.optim.SGD([p], lr=0.1), lambda step: 1.0)
    opt = SAM([p], torch.optim.SGD, lr=0.1)
    for bad in (-1.0, float("inf"), float("nan"), None, "1"):
        with pytest.raises(ValueError, match=r"rho_lambda\(0\) = "):
            RhoScheduler(opt, lambda step, bad=bad: bad)
    assert opt.param_groups[0]["rho"] == 0.05


@pytest.mark.parametrize("name", ["fsam", "fsam on adam", "fsam on adamw"])
def test_tensors_as_hyper_parameters_are_numbers_on_the_device(name, backend, device):
    """Bit for bit, and a value written into one counts from the next step on."""
    net, twin = network(device), network(device)
    values = dict(rho=0.2, sigma=0.7, lmbda=0.6, lr=0.03, weight_decay=0.1)
    tensors = {k: torch.tensor(x, device=device) for k, x in values.items()}
    opt, plain = build(net, name, backend), build(twin, name, backend)
    opt.param_groups[0].update(tensors)
    for i in range(4):
        for k, x in values.items():
            tensors[k].fill_(x / (1 + i))
            plain.param_groups[0][k] = float(tensors[k])
        two_passes(net, opt, i, device)
        two_passes(twin, plain, i, device)
        torch.testing.assert_close(bits(net), bits(twin), rtol=1e-6, atol=1e-7)
    assert all(opt.param_groups[0][k] is x for k, x in tensors.items())


@pytest.mark.parametrize("base, name", [
    (torch.optim.SGD, "maximize"), (torch.optim.SGD, "differentiable"),
    (torch.optim.Adam, "maximize"), (torch.optim.Adam, "differentiable"),
    (torch.optim.Adam, "amsgrad"), (torch.optim.AdamW, "maximize"),
    (torch.optim.AdamW, "differentiable"), (torch.optim.AdamW, "amsgrad")])
def test_what_the_fused_step_lacks_is_refused_by_name(base, name):
    """In the arguments, in a group, in a group that is added, and in a state that is loaded."""
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    for call in (lambda: SAM([p], base, lr=0.1, **{name: True}),
                 lambda: SAM([{"params": [p], name: True}], base, lr=0.1),
                 lambda: SAM.wrap(base([p], lr=0.1, **{name: True}))):
        with pytest.raises(ValueError, match=f"{name}=True is not supported"):
            call()
    opt = SAM([p], base, lr=0.1)
    with pytest.raises(ValueError, match=f"{name}=True is not supported"):
        opt.add_param_group({"params": [q], name: True})
    with pytest.raises(ValueError, match=f"{name}=True is not supported"):
        opt.load_state_dict(base([p], lr=0.1, **{name: True}).state_dict())
    own = type("Own", (base,), {})  # a subclass runs its own step
    SAM([p], own, lr=0.1, **{name: True})


def test_betas_that_are_tensors_are_refused_by_name():
    p = nn.Parameter(torch.ones(2))
    opt = SAM([p], torch.optim.AdamW, lr=0.1)
    with pytest.raises(ValueError, match="betas is a tensor"):
        opt.add_param_group(dict(params=[nn.Parameter(torch.ones(1))],
                                 betas=(torch.tensor(0.9), torch.tensor(0.99))))


# ---- the full gradient


def test_the_measured_full_gradient_is_that_of_the_mean_loss_over_all_examples(device):
    """Also with an uneven last batch."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(device)
    x, y = torch.randn(23, 6, device=device), torch.randint(3, (23,), device=device)
    opt = FullGradientSAM(net.parameters(), torch.optim.SGD, "noise", lr=0.1)
    with pytest.raises(PhaseError, match="without a full gradient"):
        opt.first_step()
    batches = [(x[i:i + 8], y[i:i + 8]) for i in range(0, 23, 8)]
    assert [len(b[0]) for b in batches] == [8, 8, 7]
    net[0].weight.grad = torch.ones_like(net[0].weight)  # must not get in
    w = bits(net)
    with torch.no_grad():
        opt.measure_full_gradient(batches, lambda b: (cross_entropy(net(b[0]), b[1]), len(b[0])))
    expected = torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))
    for p, g in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(opt.state[p]["full_gradient"], g, rtol=1e-5, atol=1e-7)
        assert p.grad is None
    assert_bits(net, w)
    with pytest.raises(ValueError, match="batches is empty"):
        opt.measure_full_gradient([], lambda b: None)
    for loss in (lambda b: net(b[0]).mean(), lambda b: (net(b[0]).mean(), 12, 3), lambda b: None):
        with pytest.raises(TypeError, match=r"loss returned a .*\(mean loss, number of examples\)"):
            opt.measure_full_gradient(batches, loss)


@pytest.mark.parametrize("dtype, g, n", [(torch.bfloat16, 1.0, 1), (torch.float16, 100.0, 1000)])
def test_a_full_gradient_of_16_bit_weights_is_summed_up_in_float32(dtype, g, n):
    """bfloat16 stops at 256 + 1, and float16 has no 100,000."""
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    opt = FullGradientSAM([p], torch.optim.SGD, "full", lr=0.1)
    opt.measure_full_gradient([g] * 300, lambda x: ((p * x).sum(), n))
    assert opt.state[p]["full_gradient"].tolist() == [g, g]


@pytest.mark.parametrize("fault", ["a batch", "a freed gradient"])
def test_a_measurement_that_fails_leaves_no_part_of_it(fault):
    p = nn.Parameter(torch.ones(2))
    opt = FullGradientSAM([p], torch.optim.SGD, "full", lr=0.1)
    opt.set_full_gradient([torch.tensor([3.0, 4.0])])

    def loss(x):
        if x == 2.0 and fault == "a batch":
            raise RuntimeError("no data")
        if x == 2.0:
            p.grad = torch.ones(2)
            p.grad.untyped_storage().resize_(0)
            return (p * 0).sum().detach().requires_grad_(), 1
        return (p * x).sum(), 1

    with pytest.raises((RuntimeError, ValueError), match="no data|freed"):
        opt.measure_full_gradient([1.0, 2.0], loss)
    left = p.grad is not None  # which may have no memory to be shown
    assert not left and opt.state[p]["full_gradient"].tolist() == [3.0, 4.0]


def test_set_full_gradient_takes_grad_or_a_list_and_refuses_what_does_not_fit(backend, device):
    net = network(device)
    opt = build(net, "sam-full", backend)
    backward(net, 0, device)
    gradients = [p.grad.clone() for p in net.parameters()]
    opt.set_full_gradient()
    for p, g in zip(net.parameters(), gradients, strict=True):
        assert torch.equal(opt.state[p]["full_gradient"], g) and torch.equal(p.grad, g)
    opt.set_full_gradient([None, *gradients[1:]])
    assert not opt.state[net.conv.weight]["full_gradient"].any()
    for bad, match in ((gradients[:-1], "4 gradients for 5 parameters"),
                       (gradients[::-1], "a gradient of shape")):
        with pytest.raises(ValueError, match=match):
            opt.set_full_gradient(bad)
    opt.first_step()
    with pytest.raises(PhaseError):
        opt.set_full_gradient(gradients)
    opt.restore()
    assert torch.equal(opt.state[net.head.bias]["full_gradient"], gradients[-1])


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("part", ["full", "noise"])
def test_a_full_gradient_that_is_gone_from_the_state_is_missed(part, base, device):
    """Cleared, seen by another call in between or not; or never there, before a save or a copy."""
    net = network(device)
    G = [torch.randn_like(p) for p in net.parameters()]

    def build_full(model):
        return FullGradientSAM(model.parameters(), base, part, lr=0.01)

    def is_missed(opt, model=net):
        w = bits(model)
        backward(model, 0, device)
        with pytest.raises(PhaseError, match="without a full gradient"):
            opt.first_step()
        assert_bits(model, w)

    opt = build_full(net)
    twin = build_full(copy.deepcopy(net))
    twin.load_state_dict(opt.state_dict())
    is_missed(opt)
    is_missed(twin)
    for model, other in (copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))):
        is_missed(other, model)
    for look in (lambda: None, opt.state_dict, lambda: opt.spaces, lambda: copy.deepcopy(opt)):
        opt.set_full_gradient(G)
        two_passes(net, opt, 0, device)
        opt.state.clear()
        look()
        is_missed(opt)
        twin.load_state_dict(opt.state_dict())
        is_missed(twin)
    opt.set_full_gradient(G)
    two_passes(net, opt, 1, device)


def test_a_full_gradient_in_the_state_is_one_whoever_put_it_there(device):
    """By hand; into a loaded state; of a parameter alone, beside which the others have 0."""
    def build_full(net):
        return FullGradientSAM(net.parameters(), torch.optim.SGD, "full", rho=0.3, lr=0.01)

    net, twin = network(device), network(device)
    opt, other = build_full(net), build_full(twin)
    G = [torch.randn_like(net.conv.weight), *[None] * 4]
    assert not any("full_gradient" in entry for entry in opt.state.values())
    opt.state[net.conv.weight]["full_gradient"] = G[0].clone()
    other.set_full_gradient(G)
    for i in range(2):
        two_passes(net, opt, i, device)
        two_passes(twin, other, i, device)
        assert_bits(net, bits(twin))
    assert not opt.state[net.head.bias]["full_gradient"].any()
    opt.state.pop(net.head.bias)  # begins anew, at 0
    opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2, device=device))]))
    two_passes(net, opt, 2, device)
    assert torch.equal(opt.state[net.conv.weight]["full_gradient"], G[0])


def test_a_pre_hook_may_unwrap_the_state_that_has_the_full_gradient(device):
    p = nn.Parameter(torch.ones(3, device=device))
    opt = FullGradientSAM([p], torch.optim.SGD, "full", lr=0.1)
    opt.set_full_gradient([torch.ones(3, device=device)])
    state = copy.deepcopy(opt.state_dict())
    opt.state.clear()
    opt.register_load_state_dict_pre_hook(lambda opt, wrapped: wrapped["opt"])
    opt.load_state_dict({"opt": state})
    p.grad = torch.ones_like(p)
    opt.first_step()
    assert opt.last_radius > 0


def test_a_wrapper_with_copied_attributes_shares_the_full_gradient(device):
    """Lightning's."""
    p = nn.Parameter(torch.ones(3, device=device))
    opt = FullGradientSAM([p], torch.optim.SGD, "full", lr=0.1)
    wrapper = object.__new__(type("Wrapped", (FullGradientSAM,), {}))
    wrapper.__dict__ = {k: x for k, x in opt.__dict__.items() if k != "step"}
    wrapper.set_full_gradient([torch.ones_like(p)])
    p.grad = torch.ones_like(p)
    opt.first_step()
    assert wrapper.is_perturbed


# ---- 16-bit weights that round the climb away


def climb_often(opt, w, closure: bool = False) -> None:
    def gradients():
        w.grad = torch.randn_like(w)

    for _ in range(9):
        if closure:
            opt.step(gradients)
        else:
            gradients()
            opt.first_step(zero_grad=True)
            opt.restore()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("cls", [SAM, FullGradientSAM])
def test_a_climb_that_rounding_eats_is_said_once_and_where(cls, closure, backend, device):
    w = nn.Parameter(torch.ones(4096, device=device, dtype=torch.bfloat16))
    own = {"part": "full"} if cls is FullGradientSAM else {}
    opt = cls([w], torch.optim.SGD, rho=0.01, lr=1e-6, backend=backend, **own)
    if own:
        opt.set_full_gradient([torch.randn_like(w)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        climb_often(opt, w, closure)
    eaten = [x for x in caught if "rounded away" in str(x.message)]
    assert len(eaten) == 1 and eaten[0].category is UserWarning
    assert "moved by 0 where a radius of 0.01 was wanted" in str(eaten[0].message)
    assert eaten[0].filename == __file__


def test_what_is_said_of_rounding_may_be_an_error_and_moves_nothing(backend, device):
    w = nn.Parameter(torch.ones(4096, device=device, dtype=torch.bfloat16))
    opt = SAM([w], torch.optim.SGD, rho=0.01, lr=0.1, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="rounded away"):
            climb_often(opt, w)
        assert not opt.is_perturbed and torch.equal(w, torch.ones_like(w))
        climb_often(opt, w)


@pytest.mark.parametrize("dtype, rho, masters", [
    (torch.float32, 1e-6, False), (torch.bfloat16, 0.01, True), (torch.bfloat16, 30.0, False),
    (torch.float16, 0.3, False)])
def test_a_climb_that_is_realised_is_no_warning(backend, device, dtype, rho, masters):
    w = nn.Parameter(torch.ones(4096, device=device, dtype=dtype))
    opt = SAM([w], torch.optim.SGD, rho=rho, lr=0.1, backend=backend, master_weights=masters)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        climb_often(opt, w)


# ---- groups added in mid-training; models that share, drop and convert parameters


def test_an_added_group_shares_the_launches_and_leaves_the_state_alone(variant, backend, device):
    net = network(device)
    opt = optimizer([net.conv.weight, net.head.weight], variant, backend)
    for i in range(2):
        two_passes(net, opt, i, device)
    places = [(p.data_ptr(), opt.state[p]) for p in (net.conv.weight, net.head.weight)]
    before = copy.deepcopy(opt.state_dict()["state"])
    opt.add_param_group(dict(params=[net.head.bias, net.bn.weight], lr=0.01))
    assert len(opt.backend_report()["spaces"]) == 1
    assert opt.backend_report()["spaces"][0].startswith("4 tensors")
    after = opt.state_dict()["state"]
    for i, entry in before.items():
        assert all(torch.equal(after[i][name], value) for name, value in entry.items())
    for p, (place, state) in zip((net.conv.weight, net.head.weight), places, strict=True):
        assert p.data_ptr() == place and opt.state[p] is state


class Droppable(nn.Module):
    """A residual block that is left out when told so, and an output layer tied to the input."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.drop = False

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x if self.drop else x + self.block(x).tanh())


@pytest.mark.parametrize("drops", [(False, True), (True, False), (True, True)])
def test_stochastic_depth_may_drop_a_block_in_either_pass(backend, device, drops):
    """A dropped block does not climb in the one, and is not updated in the other."""
    torch.manual_seed(5)
    net = Droppable().to(device)
    opt = build(net, "fsam", backend, rho=0.5)
    tokens = torch.arange(7, device=device)
    for dropped_first, dropped_second in (drops, (False, False), drops):
        w = bits(net.block)
        ema = opt.state[net.block.weight]["ema"].clone()
        net.drop = dropped_first
        cross_entropy(net(tokens), tokens.flip(0)).backward()
        opt.first_step(zero_grad=True)
        if dropped_first:
            assert_bits(net.block, w)
            assert torch.equal(opt.state[net.block.weight]["ema"], ema)
        net.drop = dropped_second
        cross_entropy(net(tokens), tokens.flip(0)).backward()
        opt.second_step(zero_grad=True)
        assert dropped_second == all(torch.equal(p, q) for p, q in
                                     zip(net.block.parameters(), w, strict=True))


def test_tied_weights_stay_tied_and_climb_once(backend, device):
    torch.manual_seed(6)
    net = Droppable().to(device)
    opt = build(net, "sam", backend, rho=0.5)
    assert net.head.weight is net.embedding.weight
    assert opt.backend_report()["spaces"][0].startswith("3 tensors")
    tokens = torch.arange(7, device=device)
    cross_entropy(net(tokens), tokens.flip(0)).backward()
    w, g = net.head.weight.detach().clone(), net.head.weight.grad.clone()
    opt.first_step()
    torch.testing.assert_close(net.embedding.weight.detach(), w + 0.5 * g / opt.last_grad_norm,
                               rtol=1e-5, atol=1e-6)
    opt.second_step()
    assert net.head.weight is net.embedding.weight
    twice = [net.head.weight, net.embedding.weight]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, of a duplicate
        with pytest.raises(ValueError, match="share memory|more than one"):
            SAM([dict(params=twice[:1]), dict(params=twice[1:])], torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("make, match", [
    (lambda: torch.ones(3, 3).to_sparse(), "layout torch.sparse_coo"),
    (lambda: torch.ones(3, dtype=torch.complex64), "complex64.*view_as_real"),
    (lambda: torch.ones(3, device="meta"), "on meta"),
    (lambda: FakeTensorMode().from_tensor(torch.ones(3)), "FakeTensor")])
def test_parameters_without_plain_real_memory_are_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        SAM([make().requires_grad_()], torch.optim.SGD, lr=0.1)
    opt = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=match):
        opt.add_param_group(dict(params=[make().requires_grad_()]))
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_converted_after_construction_is_refused_at_every_step(backend, device, dtype):
    net, opt = trained("fsam", backend, device)
    net.to(dtype)
    w = bits(net)
    x, y = batch(3, device)
    cross_entropy(net(x.to(dtype)), y).backward()
    for call in (opt.first_step, opt.step):
        with pytest.raises(RuntimeError, match="build the optimizer after"):
            call()
        assert not opt.is_perturbed
        assert_bits(net, w)
    net.float()
    two_passes(net, opt, 3, device)
