"""Gradients and parameters of any dtype, bits and layout: read as what they are, in place or
through a copy, or refused by name before a weight changes."""

import pytest
import torch
from torch import nn

from fastsam import SAM, FriendlySAM
from fastsam.gradients import readable

from ..helpers.beside import RHO, Beside, close
from ..helpers.gradients import give

pytestmark = pytest.mark.filterwarnings("ignore:second_step with the gradients of the first pass")


class Subclass(torch.Tensor):
    pass


def negative_bit(g):
    return torch._neg_view(-g)


def conjugate(g):
    """As autograd leaves the imaginary part's gradient of torch.complex(re, im).conj()."""
    return torch.complex(torch.zeros_like(g), -g).conj().imag


def zero_tensor(g):
    return torch._efficientzerotensor(g.shape)


def expanded(g):
    return g.flatten()[0].expand(g.shape)


def transposed(g):
    return g.t().contiguous().t()


def with_gaps(g):
    wide = torch.full((*g.shape[:-1], 2 * g.shape[-1]), torch.nan)
    return wide[..., ::2].copy_(g)


def misaligned(g):
    bucket = torch.full((g.numel() + 3,), torch.nan)
    return bucket[1:1 + g.numel()].view(g.shape).copy_(g)


def with_a_graph(g):
    return 2 * (g / 2).requires_grad_()


def that_requires_grad(g):
    return g.clone().requires_grad_()


def of_a_subclass(g):
    return g.as_subclass(Subclass)


def of_inference_mode(g):
    with torch.inference_mode():
        return g.clone()


def a_parameter(g):
    return nn.Parameter(g.clone())


FORMS = [negative_bit, conjugate, zero_tensor, expanded, transposed, with_gaps, misaligned,
         with_a_graph, that_requires_grad, of_a_subclass, of_inference_mode, a_parameter]
DTYPES = [torch.float16, torch.bfloat16]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters():
    return [nn.Parameter(normal(3, 4, seed=1)), nn.Parameter(normal(5, seed=2))]


def assert_step(opt, params, first, second):
    """w + rho g / ||g||, then w - 0.1 g', where the gradients are what float64 says they are."""
    w = [p.detach().double() for p in params]
    exact = [[g.detach().as_subclass(torch.Tensor).double() for g in grads]
             for grads in (first, second)]
    for p, g in zip(params, first, strict=True):
        give(p, g)
    opt.first_step()
    norm = torch.stack([g.norm() for g in exact[0]]).norm()
    for p, v, g in zip(params, w, exact[0], strict=True):
        torch.testing.assert_close(p.detach().double(), v + RHO * g / norm, rtol=2e-5,
                                   atol=2e-6)
    for p, g in zip(params, second, strict=True):
        give(p, g)
    opt.second_step()
    for p, v, g in zip(params, w, exact[1], strict=True):
        torch.testing.assert_close(p.detach().double(), v - 0.1 * g, rtol=2e-5, atol=2e-6)


def assert_half(opt, params, w, second):
    """One half of a step with rho = 50 and lr = 0.1, from w, by the gradients as they are now."""
    g = [p.grad.clone() for p in params]
    if second:
        opt.second_step()
        expected = [x - 0.1 * y for x, y in zip(w, g, strict=True)]
    else:
        opt.first_step()
        norm = torch.stack([y.norm() for y in g]).norm()
        expected = [x + 50 * y / norm for x, y in zip(w, g, strict=True)]
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_a_gradient_is_what_torch_says_it_is(form, backend):
    params = parameters()
    opt = SAM(params, torch.optim.SGD, rho=RHO, lr=0.1, backend=backend)
    for t in range(2):
        first = [form(normal(3, 4, seed=3 + t)), normal(5, seed=4 + t)]
        second = [form(normal(3, 4, seed=5 + t)), normal(5, seed=6 + t)]
        assert_step(opt, params, first, second)


@pytest.mark.parametrize("form", [negative_bit, conjugate], ids=lambda f: f.__name__)
def test_the_sign_of_one_element_with_and_without_the_bit(form, backend):
    """The same address and strides, one bit apart."""
    p = nn.Parameter(torch.full((1,), 2.0))
    opt = SAM([p], torch.optim.SGD, rho=RHO, lr=0.1, backend=backend)
    g = torch.ones(1)
    assert_step(opt, [p], [form(g)], [form(g)])
    assert_step(opt, [p], [g], [torch._neg_view(g)])
    assert_step(opt, [p], [torch._neg_view(g)], [g])


def test_autograds_negative_bit():
    re, im = (nn.Parameter(torch.full((1,), 2.0)) for _ in range(2))
    opt = SAM([re, im], torch.optim.SGD, rho=0.0, lr=0.1, backend="reference")
    for step in (opt.first_step, opt.second_step):
        opt.zero_grad()
        (torch.complex(re, im).conj() * torch.complex(torch.zeros(1), torch.ones(1))).real.sum(
            ).backward()
        step()
    close(im, torch.full((1,), 1.9), "im")


def forms_in_turn():
    g = normal(3, 4, seed=9)
    return [[g, g.clone()], [g.clone(), None], [g.clone(), g.half()], [transposed(g), g],
            [g.bfloat16(), negative_bit(g)], [expanded(g), g.half()], [g, g]]


def test_gradients_may_change_their_form_from_step_to_step(backend):
    p = nn.Parameter(normal(3, 4, seed=1), requires_grad=False)
    q = nn.Parameter(p.detach().clone())
    opt = SAM([p], torch.optim.SGD, rho=RHO, lr=0.1, momentum=0.9, backend=backend)
    plain = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for first, second in forms_in_turn():
        give(p, first)
        opt.first_step()
        give(p, second)
        q.grad = None if second is None else second.float().clone()
        opt.second_step()
        plain.step()
        close(p, q, "p")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_gradient_of_another_dtype_is_read_in_its_own(dtype, mixed, backend):
    params = parameters()
    opt = SAM(params, torch.optim.SGD, rho=RHO, lr=0.1, backend=backend)
    other = torch.float32 if mixed else dtype
    for t in range(2):
        first = [normal(3, 4, seed=3 + t).to(dtype), normal(5, seed=4 + t).to(other)]
        second = [normal(3, 4, seed=5 + t).to(dtype), normal(5, seed=6 + t).to(other)]
        assert_step(opt, params, first, second)


@pytest.mark.parametrize("dtype, masters, base", [
    (torch.float32, False, torch.optim.SGD), (torch.float32, False, torch.optim.RMSprop),
    (torch.bfloat16, False, torch.optim.SGD), (torch.bfloat16, True, torch.optim.SGD)], ids=str)
def test_float64_gradients_of_narrower_weights_are_refused(dtype, masters, base, backend):
    """As by torch's fused optimizers: the step's arithmetic is float32, and would lose 1e300 and
    1e-300. All of them, or one among others."""
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2)]
    opt = SAM(params, base, rho=RHO, lr=0.1, master_weights=masters, backend=backend)

    def grads(*dtypes):
        for p, d in zip(params, dtypes, strict=True):
            give(p, torch.ones(3, dtype=d))

    for wide in ((torch.float64, torch.float64), (dtype, torch.float64)):
        grads(*wide)
        with pytest.raises(ValueError, match="float64 for a parameter of .*float32"):
            opt.first_step()
        assert all(torch.equal(p, torch.ones_like(p)) for p in params) and not opt.is_perturbed
    if base is torch.optim.SGD:
        grads(dtype, dtype)
        opt.first_step()
        grads(torch.float64, dtype)
        with pytest.raises(ValueError, match="float64"):
            opt.second_step()
        opt.restore()
        assert all(torch.equal(p, torch.ones_like(p)) for p in params)


@pytest.mark.parametrize("size", [1e5, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_gradients_of_16_bit_weights_keep_range_and_bits(size, dtype, backend):
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    opt = SAM([p], torch.optim.SGD, rho=0.5, lr=0.01 / size, backend=backend)
    give(p, torch.full((4,), size))
    opt.first_step()
    assert opt.last_grad_norm == pytest.approx(2 * size, rel=1e-6)
    close(p, torch.full((4,), 1.25, dtype=dtype), "moved")
    give(p, torch.full((4,), 10 * size))
    opt.second_step()
    assert opt.skipped_steps == 0
    close(p, torch.tensor(0.9).to(dtype).expand(4), "p")


def test_masters_keep_the_bits_of_a_float32_gradient(backend):
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = SAM([p], torch.optim.SGD, rho=0.0, lr=0.1, master_weights=True, backend=backend)
    give(p, torch.full((4,), 1.001))
    opt.first_step()
    opt.second_step()
    close(opt.state[p]["master"], torch.full((4,), 0.8999), "master")


def test_the_average_reads_a_gradient_in_its_own_dtype(backend):
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = FriendlySAM([p], torch.optim.SGD, rho=0.1, lmbda=0.5, lr=0.1, backend=backend)
    give(p, torch.full((4,), 1.001))
    opt.first_step()
    opt.restore()
    assert torch.equal(opt.state[p]["ema"], torch.full((4,), 0.5 * 1.001))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_the_first_pass_is_guarded_and_the_second_is_the_bases(value, backend):
    pair = Beside("sgd", backend)
    pair.step()
    opt, params = pair.ours.opt, pair.ours.params
    w = [p.detach().clone() for p in params]
    bad = pair.gradients(3)
    bad[0][0, 0] = value
    pair.set(pair.ours, bad)
    opt.first_step()
    pair.set(pair.ours, pair.gradients(4))
    opt.second_step()
    assert opt.skipped_steps == 1
    assert all(torch.equal(p, v) for p, v in zip(params, w, strict=True))
    pair.climb()
    for side in (pair.ours, pair.torch):
        pair.set(side, bad)
    opt.second_step()
    pair.torch.opt.step()
    assert opt.skipped_steps == 1 and not params[0].isfinite().all()
    for p, q in zip(params, pair.torch.params, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("start", [0, 7, 9, 40, -3])
@pytest.mark.parametrize("known", [0, 2])
@pytest.mark.parametrize("second", [False, True])
def test_a_gradient_inside_another_parameters_memory_is_read_before_that_moves(
        start, known, second, backend):
    """At its start, within it, up to its end, over its end, and over its start."""
    n = 64
    whole = torch.randn(3 * n, generator=torch.Generator().manual_seed(1))
    params = [nn.Parameter(normal(n, seed=2)), nn.Parameter(whole[n:2 * n + 9])]
    opt = SAM(params, torch.optim.SGD, rho=50.0, lr=0.1, backend=backend)

    def give_own():
        for i, p in enumerate(params):
            p.grad = normal(len(p), seed=5 + i)

    for _ in range(known):
        for call in (opt.first_step, opt.second_step):
            give_own()
            call()
    if second:
        give_own()
        opt.first_step()
        w = [p.detach() - 50 * p.grad / torch.cat([q.grad for q in params]).norm() for p in params]
    else:
        w = [p.detach().clone() for p in params]
    give_own()
    params[0].grad = whole[n + start:2 * n + start]
    assert_half(opt, params, w, second)


# ---- parameters with the negative bit


def minus_two() -> nn.Parameter:
    p = nn.Parameter(torch.tensor([1 + 2j]).conj().imag)
    assert p.is_neg() and p.item() == -2
    return p


def test_a_parameter_with_the_negative_bit_is_the_references(backend):
    p, q = minus_two(), minus_two()
    if backend != "reference":
        with pytest.raises(ValueError, match="negative bit"):
            SAM([p], torch.optim.SGD, lr=0.1, backend=backend)
        backend = None
    opt = SAM([p], torch.optim.SGD, rho=0.5, lr=0.1, weight_decay=0.5, backend=backend)
    plain = torch.optim.SGD([q], lr=0.1, weight_decay=0.5)
    for g in (1.0, -0.3):
        give(p, torch.full((1,), g))
        opt.first_step()
        give(p, torch.full((1,), g))
        give(q, torch.full((1,), g))
        opt.second_step()
        plain.step()
        close(p, q, "p")


def test_a_parameter_that_gets_the_negative_bit_is_refused_where_kernels_run(backend):
    p = nn.Parameter(torch.ones(3))
    opt = SAM([p], torch.optim.SGD, lr=0.1, backend=backend)
    p.grad = torch.ones(3)
    opt.step()
    p.data = torch._neg_view(p.data)
    for call in (opt.first_step, opt.step):
        with pytest.raises(RuntimeError, match="negative bit"):
            call()
    p.data = p.data.resolve_neg()
    opt.step()
    close(p, torch.full((3,), -1.0), "p")


# ---- refused


def sparse(p):
    p.grad = torch.ones(3, 4).to_sparse()


def complex_numbers(p):
    give(p, torch.ones(3, 4, dtype=torch.complex64))


def integers(p):
    give(p, torch.ones(3, 4, dtype=torch.int32))


def shorter(p):
    p.grad.data = p.grad.data[:2]


def reshaped(p):
    p.grad.data = p.grad.data.view(4, 3)


def longer(p):
    p.grad.data = torch.ones(6, 4)


def of_other_numbers_of_rows_and_columns(p):
    p.grad.data = torch.ones(40).as_strided((6, 2), (4, 1))


def freed(p):
    p.grad.untyped_storage().resize_(0)


BAD = [sparse, complex_numbers, integers, shorter, reshaped, longer, freed,
       of_other_numbers_of_rows_and_columns]


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("second", [False, True])
def test_what_is_no_gradient_is_refused_before_a_weight_changes(spoil, second, backend):
    params = parameters()
    opt = SAM(params, torch.optim.SGD, rho=RHO, lr=0.1, momentum=0.9, backend=backend)

    def good():
        for p in params:
            p.grad = torch.ones_like(p)

    good()
    opt.first_step()
    opt.second_step()
    w = [p.detach().clone() for p in params]
    if second:
        opt.first_step()
    moved = [p.detach().clone() for p in params]
    spoil(params[0])
    for call in ([opt.step] if second else [opt.first_step, opt.step]):
        with pytest.raises(ValueError, match="gradient of shape"):
            call()
        assert opt.is_perturbed == second
        assert all(torch.equal(p, v) for p, v in zip(params, moved, strict=True))
    opt.restore()
    assert all(torch.equal(p, v) for p, v in zip(params, w, strict=True))
    params[0].grad = None
    good()
    opt.first_step()
    opt.second_step()


# ---- the parameters' own memory


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("move", [
    lambda t: t.clone(), lambda t: t.t().contiguous().t(), lambda t: misaligned(t)],
    ids=["other memory", "other strides", "misaligned"])
def test_moved_memory_is_followed_in_either_half_of_a_step(move, perturbed, backend):
    params, twins = parameters(), parameters()
    opt = SAM(params, torch.optim.SGD, rho=RHO, lr=0.1, momentum=0.9, backend=backend)
    plain = torch.optim.SGD(twins, lr=0.1, momentum=0.9)
    for t in range(4):
        grads = [normal(3, 4, seed=t), normal(5, seed=9 + t)]
        for p, q, g in zip(params, twins, grads, strict=True):
            p.grad, q.grad = g, g.clone()
        if t == 2 and not perturbed:
            params[0].data = move(params[0].data)
        opt.first_step()
        if t == 2 and perturbed:
            params[0].data = move(params[0].data)
        opt.second_step()
        plain.step()
        for p, q in zip(params, twins, strict=True):
            close(p, q, f"step {t}")


def first_rows(t):
    return t[:2]


def as_it_stands_in_other_columns(t):
    return t.view(4, 3)


def of_the_same_strides(t):
    return t.as_strided((1, 12), (4, 1))


def in_double(t):
    return t.double()


def gapped(t):
    return t.repeat(1, 2)[:, ::2]


@pytest.mark.parametrize("change", [first_rows, as_it_stands_in_other_columns,
                                    of_the_same_strides, in_double, gapped],
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize("perturbed", [False, True])
def test_a_parameter_of_another_form_is_refused_and_the_others_come_back(change, perturbed,
                                                                         backend):
    params = parameters()
    opt = SAM(params, torch.optim.SGD, rho=RHO, lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    opt.second_step()
    w = [p.detach().clone() for p in params]
    if perturbed:
        opt.first_step()
    was, now = params[0].data, change(params[0].data)
    params[0].data = now
    moved = [p.detach().clone() for p in params]
    for call in ([opt.step] if perturbed else [opt.first_step, opt.step]):
        with pytest.raises(RuntimeError, match="final form"):
            call()
        assert all(torch.equal(p, v) for p, v in zip(params, moved, strict=True))
    if perturbed and now.shape != w[0].shape:
        with pytest.raises(RuntimeError, match="cannot go back"):
            opt.restore()
    else:
        opt.restore()
        assert not perturbed or torch.equal(params[0].float(), w[0])
    assert not opt.is_perturbed and torch.equal(params[1], w[1])
    params[0].data = was
    opt.restore()


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_gradient_whose_storage_was_freed_is_refused_on_any_device(where):
    """Reading it would end the process on a CPU, and the context on a GPU; "meta" stands for that
    here."""
    slot = SAM([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1).spaces[0].slots[0]
    g = torch.ones(3, device=where)
    g.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="lost its memory"):
        readable(slot, g)


@pytest.mark.parametrize("size", [0, 20])
@pytest.mark.parametrize("perturbed", [False, True])
def test_a_parameter_whose_storage_was_freed_is_refused(perturbed, size, backend):
    """As some do to save memory between steps."""
    params = parameters()
    opt = SAM(params, torch.optim.SGD, rho=RHO, lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    opt.second_step()
    w = params[1].detach().clone()
    if perturbed:
        opt.first_step()
    params[0].untyped_storage().resize_(size)
    moved = params[1].detach().clone()
    with pytest.raises(RuntimeError, match="lost its memory"):
        (opt.step if perturbed else opt.first_step)()
    assert torch.equal(params[1], moved)
    if perturbed:
        with pytest.raises(RuntimeError, match=r"\(3, 4\), freed\); all others are at w"):
            opt.restore()
    assert torch.equal(params[1], w)


def test_memory_that_comes_to_overlap_is_refused():
    whole = torch.zeros(12)
    a, b = nn.Parameter(whole[0:8:2]), nn.Parameter(whole[1:9:2])
    opt = SAM([a, b], torch.optim.SGD, rho=RHO, lr=0.1)
    for p in (a, b):
        p.grad = torch.ones(4)
    opt.first_step()
    opt.second_step()
    for wrong in (whole[2:10:2], whole[0:1].expand(4), whole[1:3].as_strided((4,), (0,)),
                  whole.as_strided((4,), (0,), 1)):
        b.data = wrong
        before = whole.clone()
        with pytest.raises(ValueError, match="share memory"):
            opt.first_step()
        assert not opt.is_perturbed and torch.equal(whole, before)


@pytest.mark.parametrize("make", [
    lambda t: [t[0:8:2], t[2:10:2]], lambda t: [t[0:8], t[4:12]], lambda t: [t[:1].expand(4)],
    lambda t: [t.as_strided((3, 3), (1, 1))], lambda t: [t[0:8], t[3]],
    lambda t: [t.view(3, 4)[:, :2], t.view(3, 4)[:, 1:]]])
def test_overlapping_parameters_are_refused(make):
    with pytest.raises(ValueError, match="share memory"):
        SAM([nn.Parameter(t) for t in make(torch.zeros(12))], torch.optim.SGD, lr=0.1)


def test_parameters_without_gradient_without_elements_and_without_dimensions(backend):
    params = [nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(0, 3)),
              nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(1, 1))]
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    for _ in range(2):
        for p in params[1:]:
            p.grad = torch.ones_like(p)
        opt.first_step()
        opt.second_step()
    assert torch.equal(params[0], torch.ones(3))
    close(params[2], torch.tensor(1.8), "0-dim")
    close(params[3], torch.full((1, 1), 0.8), "1 x 1")


LARGE = 300_000  # more than one thread's


def itself(params):
    params[0].grad = params[0].data


def the_other(params):
    params[0].grad = params[1].data


def a_part_of_the_other(params):
    params[0].grad = params[1].data.flatten()[7:7 + LARGE]


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("alias, known", [(itself, False), (itself, True), (the_other, False),
                                          (the_other, True), (a_part_of_the_other, False)])
def test_a_gradient_in_the_memory_of_weights_is_read_before_they_move(known, alias, second):
    """Whichever block a thread takes first. known: other gradients have been read before."""
    wide = alias is a_part_of_the_other
    params = [nn.Parameter(normal(LARGE, seed=s) if not wide or s == 0 else
                           normal(LARGE + 9, seed=s)) for s in range(2)]
    opt = SAM(params, torch.optim.SGD, rho=50.0, lr=0.1, backend="numba")
    for p in params:
        p.grad = normal(*p.shape, seed=7)
    if known:
        opt.first_step()
        opt.second_step()
    w = [p.detach().clone() for p in params]
    if second:
        opt.first_step()
    alias(params)
    assert_half(opt, params, w, second)


@pytest.mark.parametrize("start, overlap", [(1, False), (2, True)])
def test_a_users_default_device_is_not_where_overlaps_are_looked_for(start, overlap):
    whole = torch.zeros(12)
    params = [nn.Parameter(whole[0:8:2]), nn.Parameter(whole[start:start + 8:2])]
    with torch.device("meta"):
        if overlap:
            with pytest.raises(ValueError, match="share memory"):
                SAM(params, torch.optim.SGD, lr=0.1)
        else:
            SAM(params, torch.optim.SGD, lr=0.1)


def test_an_optimizer_made_in_inference_mode_steps_outside(backend):
    params = parameters()
    with torch.inference_mode():
        opt = SAM(params, torch.optim.SGD, rho=RHO, lr=0.1, momentum=0.9, backend=backend)
    assert_step(opt, params, [normal(3, 4, seed=3), normal(5, seed=4)],
                [normal(3, 4, seed=5), normal(5, seed=6)])


def test_parameters_of_inference_mode_are_refused():
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="inference mode"):
        SAM([p], torch.optim.SGD, lr=0.1)


def test_a_step_may_be_taken_in_inference_mode(backend):
    params = parameters()
    opt = SAM(params, torch.optim.SGD, rho=RHO, lr=0.1, backend=backend)
    with torch.inference_mode():
        first = [normal(3, 4, seed=3), normal(5, seed=4)]
        assert_step(opt, params, first, first[::1])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_double_backward_through_the_first_gradient(backend):
    """create_graph=True: the gradients have graphs, which neither climb nor step disturbs."""
    p = nn.Parameter(normal(3, 4))
    opt = SAM([p], torch.optim.SGD, rho=RHO, lr=0.1, backend=backend)
    for step in (opt.first_step, opt.second_step):
        p.grad = None
        p.pow(3).sum().backward(create_graph=True)
        assert p.grad.grad_fn is not None
        step()
        assert p.is_leaf and p.grad_fn is None


@pytest.mark.parametrize("half", ["climb", "plain step", "second step", "only the return"])
def test_autograd_keeps_what_it_has_saved_where_torch_allows_mutation(half, backend):
    """Kernels write weights past torch, whose mode for this copies what an operation changes."""
    p = nn.Parameter(normal(3, 4))
    opt = SAM([p, nn.Parameter(normal(5))], torch.optim.SGD, rho=RHO, lr=0.1, backend=backend)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        p.grad = normal(3, 4, seed=1)
        if half in ("second step", "only the return"):
            opt.first_step(zero_grad=half == "only the return")
        there, loss = p.detach().clone(), p.pow(3).sum()
        opt.first_step() if half == "climb" else opt.step()
        assert not torch.equal(p, there)
        p.grad = None
        loss.backward()
    close(p.grad, 3 * there ** 2, half)
