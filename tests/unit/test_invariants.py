"""The invariants of a step: exact return, fixed storage, no host sync, rho = 0, precision."""

import copy
import os
import sys
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam
from fastsam import SAM, FriendlySAM, PhaseError, freeze_bn_stats, kernels
from fastsam.choose import MODULES

from ..helpers.contract import (
    HYPER,
    assert_bits,
    backward,
    base_of,
    batch,
    bits,
    build,
    network,
    pytest_generate_tests,  # noqa: F401
    two_passes,
)

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
    backend = import_module(MODULES[backend])
    climb, calls = backend.climb, []

    def failing(*args):
        calls.append(1)
        if len(calls) == which:
            raise torch.cuda.OutOfMemoryError("made up")
        return climb(*args)

    monkeypatch.setattr(backend, "climb", failing)
    for p in w:
        p.grad = torch.ones_like(p)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        opt.first_step()
    assert not opt.is_perturbed
    assert all(torch.equal(p, q) for p, q in zip(w, before, strict=True))


def interrupted_at(line: int, call) -> bool:
    """Call, with a Ctrl-C before the numbered line of what fastsam and torch's wrappers execute;
    whether there are as many."""
    left = line
    folders = [Path(module.__file__).parent for module in (fastsam, kernels, torch.optim)]
    ours = (*(f"{folder}{os.sep}" for folder in folders), torch.utils._contextlib.__file__)

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.startswith(ours):
            return None
        left -= event == "line"
        if left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    tracer = sys.gettrace()
    with torch.enable_grad():  # a Ctrl-C before torch's own __exit__ leaves its mode behind
        sys.settrace(trace)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(tracer)
            assert torch._C._len_torch_function_stack() == 0, f"a mode is left behind at {line}"
    return False


@pytest.mark.parametrize("chosen, by_hand, masters", [
    ("numba", False, False), ("numba", True, True), ("reference", False, True),
    ("reference", True, False)])
def test_an_interrupt_at_any_line_of_a_step_leaves_the_weights(chosen, by_hand, masters):
    """lr = 0: wherever it comes, they are as before; between two calls, after restore()."""
    dtypes = [torch.float32, torch.bfloat16] if masters else [torch.float32]
    ps = [nn.Parameter(torch.randn(5, dtype=dtype)) for dtype in dtypes]
    opt = FriendlySAM(ps, torch.optim.SGD, rho=0.5, lr=0.0, momentum=0.9, backend=chosen,
                      master_weights=masters)
    assert interrupt_every_line(ps, opt, by_hand) > 300


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("chosen", ["numba", "reference"])
def test_an_interrupt_at_any_line_leaves_averages_with_their_counts(chosen, by_hand):
    """Adam divides by 1 - beta^count; of gradients that are 1 the averages are that."""
    ps, betas = [nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3))], (0.995, 0.999)
    opt = SAM(ps, torch.optim.Adam, rho=0.5, lr=0.0, betas=betas, backend=chosen)

    def look(line):
        for p in ps:
            count, averages = float(opt.state[p]["step"]), ("exp_avg", "exp_avg_sq")
            for beta, name in zip(betas, averages, strict=True):
                expected = torch.full_like(p, 1 - beta ** count)
                torch.testing.assert_close(opt.state[p][name], expected, rtol=1e-5, atol=0,
                                           msg=f"{name} at line {line}")

    assert interrupt_every_line(ps, opt, by_hand, look) > 250


class Turns(torch.optim.Adadelta):
    """Changes its own rho in every step, and back in the next."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["rho"] = 1 - group["rho"]


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_interrupt_at_any_line_leaves_each_its_own_value_of_a_shared_key(by_hand):
    ps = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))]
    groups = [{"params": ps[:1]}, {"params": ps[1:], "rho": 0.1, "base_rho": 0.75}]
    opt = FriendlySAM(groups, Turns, rho=0.5, base_rho=0.875, lr=0.0, backend="reference")

    def look(line):
        for group, rho, theirs in zip(opt.param_groups, (0.5, 0.1), (0.875, 0.75), strict=True):
            assert group["rho"] == rho and group["base_rho"] in (theirs, 1 - theirs), line

    assert interrupt_every_line(ps, opt, by_hand, look) > 500


class Stateless(torch.optim.SGD):
    """Without momentum, what is kept of a parameter is SAM's alone, and put aside in a step."""


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_interrupt_at_any_line_leaves_what_is_kept_beside_a_base(by_hand):
    ps = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))]
    opt = FriendlySAM(ps, Stateless, rho=0.5, lr=0.0, backend="reference")

    def look(line):
        assert all(opt.state[p]["sam_ema"].any() for p in ps), line

    assert interrupt_every_line(ps, opt, by_hand, look) > 500


def interrupt_every_line(ps, opt, by_hand, look=lambda line: None) -> int:
    """Interrupt a step at each of its lines in turn, and see what it leaves.

    Returns:
        The number of lines.
    """
    def closure():
        for p in ps:
            p.grad = torch.ones_like(p)

    def step():
        if by_hand:
            closure()
            opt.first_step()
            closure()
            opt.second_step()
        else:
            opt.step(closure)

    for _ in range(2):
        step()
    w, line = [p.detach().clone() for p in ps], 1
    while interrupted_at(line, step):
        look(line)
        if by_hand:
            opt.restore()
        assert all(map(torch.equal, ps, w)) and not opt.is_perturbed, line
        line += 1
    assert all(map(torch.equal, ps, w))
    return line


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adadelta])
@pytest.mark.parametrize("what", ["save", "load"])
def test_an_interrupt_at_any_line_of_a_save_or_load_leaves_the_hooks(what, base):
    p = nn.Parameter(torch.ones(2))
    opt = SAM([p], base, lr=0.0, backend="reference")
    ran, saved = [], copy.deepcopy(opt.state_dict())
    opt.register_state_dict_pre_hook(lambda *_: ran.append("save"))
    opt.register_state_dict_post_hook(lambda *_: ran.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda *_: ran.append("load"))
    opt.register_load_state_dict_post_hook(lambda *_: ran.append("loaded"))
    call = opt.state_dict if what == "save" else lambda: opt.load_state_dict(saved)
    hooks = {name: x for name, x in vars(opt).items() if name.endswith("_hooks")}
    line = 1
    while interrupted_at(line, call):
        assert all(vars(opt)[name] is x for name, x in hooks.items()), line
        line += 1
    assert line > (60 if what == "save" else 300)
    ran.clear()
    opt.load_state_dict(opt.state_dict())
    assert ran == ["save", "saved", "load", "loaded"]


class Keeps(torch.optim.Adadelta):
    """Keeps a dict of its own of a group that is added."""

    def add_param_group(self, param_group):
        super().add_param_group(dict(param_group))


@pytest.mark.parametrize("base", [torch.optim.SGD, Keeps])
def test_an_interrupt_at_any_line_of_an_added_group_leaves_no_part_of_it(base):
    """It is whole and among the groups, or as it was and the next step does not know of it."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    line, interrupted = 0, True
    while interrupted:
        line += 1
        group = {"params": [q], "rho": 0.25, "lr": 0.5}
        was, opt = dict(group), SAM([p], base, rho=0.5, lr=0.0, backend="reference")
        interrupted = interrupted_at(line, partial(opt.add_param_group, group))
        added = len(opt.param_groups) == 2
        assert added or interrupted
        assert (group == was) == (not added or base is Keeps), line
        assert [g["rho"] for g in opt.param_groups] == [0.5, 0.25][:1 + added], line
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        opt.state_dict()
        opt.step()
    assert line > 300


def test_a_zero_grad_that_raises_leaves_the_weights(backend, device):
    class Raising(SAM):
        def zero_grad(self, set_to_none=True):
            raise RuntimeError("no")

    p = nn.Parameter(torch.ones(5, device=device))
    opt = Raising([p], torch.optim.SGD, lr=0.1, backend=backend)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="no"):
        opt.first_step(zero_grad=True)
    assert not opt.is_perturbed and torch.equal(p, torch.ones_like(p))


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
    """But where the base is not fused, whose steps are skipped from the host."""
    net = network(device)
    opt = build(net, variant, backend)
    two_passes(net, opt, 0, device)
    for i in range(1, 3):
        opt.param_groups[0].update(lr=0.05 / i, rho=0.1 / i)
        backward(net, i, device)
        with NoSync():
            opt.first_step(zero_grad=True)
        backward(net, i, device)
        with NoSync() if opt.backend_report()["fused_base"] else nullcontext():
            opt.second_step(zero_grad=True)


def test_the_sync_detector_detects(device):
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        torch.ones((), device=device).item()


# ---- invariant 4: rho = 0 is the base optimizer


def assert_rho_zero_is(base, twin, net, opt, device) -> None:
    """opt, with rho 0, takes the base optimizer's steps: weights, buffers and state."""
    for i in range(6):
        two_passes(net, opt, i, device)
        base.zero_grad()
        backward(twin, i, device)
        base.step()
        for (name, a), (_, b) in zip(net.state_dict().items(), twin.state_dict().items(),
                                     strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-7, msg=name)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            for name, value in base.state[q].items():
                torch.testing.assert_close(opt.state[p][name].to(value), value, rtol=1e-4,
                                           atol=1e-6, msg=name)
    assert int(net.bn.num_batches_tracked) == 6


def test_rho_zero_is_the_base_optimizer_with_its_buffers(variant, backend, device):
    net, twin = network(device), network(device)
    base, hyper = base_of(variant)
    assert_rho_zero_is(base(twin.parameters(), **hyper), twin, net,
                       build(net, variant, backend, rho=0.0), device)


def test_rho_zero_is_sgd_with_nesterov_momentum(backend, device):
    net, twin = network(device), network(device)
    changes = dict(dampening=0.0, nesterov=True)
    base = torch.optim.SGD(twin.parameters(), **{**HYPER, **changes})
    assert_rho_zero_is(base, twin, net, build(net, "fsam", backend, rho=0.0, **changes), device)


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


# ---- mixed precision


def test_autocast_does_not_train_on_stale_weights(backend, device):
    net, twin = network(device), network(device)
    opt, other = build(net, "sam", backend, rho=5.0), build(twin, "sam", backend, rho=5.0)
    with torch.autocast(device.type, torch.bfloat16):
        two_passes(net, opt, 0, device)
    for phase in ("first", "second"):
        with torch.autocast(device.type, torch.bfloat16):
            x, y = batch(0, device)
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
    scaler.step(opt)
    w = bits(net)
    with pytest.raises(ValueError, match=r"call scaler.update\(\)"):
        opt.first_step(scaler=scaler)
    assert_bits(net, w)
    scaler.update()
    opt.first_step(scaler=scaler)


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
