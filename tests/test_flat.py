"""The flat parameter space: packing, layouts, what is left alone, and when tables are uploaded."""

import itertools
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsam import SAM, FriendlySAM
from fastsam.flat import PAD, Space, is_dense, is_packable, same_layout

from .oracle import Oracle, exact

on_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need Triton")
BACKENDS = ["reference", pytest.param("triton", marks=on_triton)]
HYPER = dict(rho=0.3, sigma=0.7, lmbda=0.6, lr=0.1, momentum=0.9, weight_decay=0.02)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def normals(shapes, seed: int, device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device) for s in shapes]


def optimizer(params, backend: str, **changes) -> FriendlySAM:
    return FriendlySAM(params, torch.optim.SGD, backend=backend, **{**HYPER, **changes})


def train(opt, params, steps=2, seed=10) -> None:
    for t in range(steps):
        for which, step in ((0, opt.first_step), (100, opt.second_step)):
            grads = normals([p.shape for p in params], seed + t + which, params[0].device)
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            step()


def assert_trains_like_alone(params, backend: str) -> None:
    """The same course, bit for bit, as ordinary parameters of the same values."""
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt = optimizer(params, backend)
    train(opt, params)
    train(optimizer(alone, backend), alone)
    for i, (p, q) in enumerate(zip(params, alone, strict=True)):
        assert torch.equal(p, q), f"parameter {i}"


# ---- packing


def odd_layouts(device) -> list[torch.nn.Parameter]:
    a, b, c, d, e = normals([(4, 6, 3, 5), (7, 9), (13,), (2, 3, 4, 5, 6), ()], 0, device)
    return [torch.nn.Parameter(t) for t in (
        a.contiguous(memory_format=torch.channels_last), b.t().contiguous().t(), c,
        d.contiguous(memory_format=torch.channels_last_3d), e)]


def test_packing_keeps_values_strides_and_alignment(backend, device):
    params = odd_layouts(device)
    before = [(p.detach().clone(memory_format=torch.preserve_format), p.stride()) for p in params]
    space = optimizer(params, backend)._spaces[0]
    assert space.flat_w is not None
    for p, (value, stride), slot in zip(params, before, space.slots, strict=True):
        assert torch.equal(p.detach(), value) and p.stride() == stride
        assert slot.w is p and slot.offset % PAD == 0
        assert p.data_ptr() == space.flat_w.data_ptr() + slot.offset * p.element_size()
        assert p.untyped_storage().data_ptr() == space.flat_w.untyped_storage().data_ptr()
        assert slot.backup.stride() == slot.m.stride() == stride
        assert p.is_leaf and p.requires_grad
    assert params[0].is_contiguous(memory_format=torch.channels_last)
    slots = sorted(space.slots, key=lambda s: s.offset)
    ends = [s.offset + s.w.numel() for s in slots]
    assert all(end <= s.offset for end, s in zip(ends, slots[1:], strict=False))
    assert ends[-1] <= space.size


def test_no_memory_is_replaced_by_any_step(backend, device):
    params = odd_layouts(device)
    opt = optimizer(params, backend)
    train(opt, params, steps=1)

    def memory():
        tensors = [*params, *(x for p in params for x in opt.state[p].values())]
        tensors += [s.backup for s in opt._spaces] + [s.flat_w for s in opt._spaces]
        return [(t.data_ptr(), t.untyped_storage().data_ptr(), t.stride()) for t in tensors]

    before = memory()
    train(opt, params, steps=3)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    opt.restore()
    opt.step()
    assert memory() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtype_of_state_is_float32_unless_the_weights_are_float64(dtype, device):
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype, device=device))
    opt = optimizer([p], "reference")
    p.grad = torch.ones_like(p)
    opt.first_step()
    opt.second_step()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert opt.state[p]["ema"].dtype == opt.state[p]["momentum_buffer"].dtype == expected
    assert opt._spaces[0].backup.dtype == p.dtype == dtype


# ---- what stays in its own memory


def pieces_of_one_storage(device):
    storage = normals([60], 0, device)[0]
    return [torch.nn.Parameter(storage[:23]), torch.nn.Parameter(storage[23:57].view(2, 17))]


def part_of_a_storage(device):
    whole, other = normals([(8, 30), (5,)], 0, device)
    return [torch.nn.Parameter(whole[2:6]), torch.nn.Parameter(other)]


def in_shared_memory(device):
    if device.type == "cuda":
        pytest.skip("every CUDA tensor counts as shared")
    return [torch.nn.Parameter(t.share_memory_()) for t in normals([(4, 5), (7,)], 0, device)]


class Subclass(torch.Tensor):
    pass


def of_a_tensor_subclass(device):
    a, b = normals([(4, 5), (7,)], 0, device)
    return [torch.nn.Parameter(a.as_subclass(Subclass)), torch.nn.Parameter(b)]


UNPACKED = [pieces_of_one_storage, part_of_a_storage, in_shared_memory, of_a_tensor_subclass]


@pytest.mark.parametrize("make", UNPACKED)
def test_unpackable_parameters_keep_their_memory_and_train(make, backend, device):
    params = make(device)
    memory = [p.data_ptr() for p in params]
    opt = optimizer(params, backend)
    assert opt._spaces[0].flat_w is None
    assert "in their own memory" in opt.backend_report()["spaces"][0]
    del opt
    assert_trains_like_alone(params, backend)
    assert [p.data_ptr() for p in params] == memory


def test_parameters_with_gaps_train_on_the_reference_and_are_refused_by_triton(device):
    whole = normals([(6, 8)], 0, device)[0]
    params = [torch.nn.Parameter(whole[:, ::2]), torch.nn.Parameter(whole[:, 1:4:2].clone())]
    assert_trains_like_alone(params, "reference")
    assert params[0].data_ptr() == whole.data_ptr() and params[0].stride() == (8, 2)


@on_triton
def test_triton_refuses_parameters_with_gaps_by_name(device):
    whole = normals([(6, 8)], 0, device)[0]
    with pytest.raises(ValueError, match="one stretch of memory"):
        optimizer([torch.nn.Parameter(whole[:, ::2])], "triton")


@pytest.mark.parametrize("stretch", [(0, 20, 0, 20), (0, 20, 5, 25)], ids=["same", "overlapping"])
def test_parameters_over_the_same_memory_come_back_or_are_refused(stretch, backend, device):
    """Two parameters over one memory: the second must not save what the first has moved."""
    a, b, c, d = stretch
    storage = normals([32], 0, device)[0]
    params = [torch.nn.Parameter(storage[a:b]), torch.nn.Parameter(storage[c:d])]
    before = storage.clone()
    try:
        opt = optimizer(params, backend)
    except ValueError:
        return
    for p, g in zip(params, normals([20, 20], 1, device), strict=True):
        p.grad = g
    opt.first_step()
    opt.restore()
    assert torch.equal(storage, before)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_an_empty_parameter_does_not_disturb_the_others(shape, backend, device):
    params = [torch.nn.Parameter(t) for t in normals([5, shape, 7, shape], 0, device)]
    alone = [torch.nn.Parameter(params[i].detach().clone()) for i in (0, 2)]
    opt, other = optimizer(params, backend), optimizer(alone, backend)
    for t in range(2):
        grads = normals([5, 7], 10 + t, device)
        for course, both in ((opt, [params[0], params[2]]), (other, alone)):
            for p, g in zip(both, grads, strict=True):
                p.grad = g
            for p in (params[1], params[3]):
                p.grad = torch.zeros_like(p)
            course.first_step()
            course.second_step()
    assert torch.equal(params[0], alone[0]) and torch.equal(params[2], alone[1])


def test_parameters_that_someone_replaced_are_followed(backend, device):
    """`p.data = ...` and a change of layout in mid-training: state and course stay the same."""
    shapes = [(4, 6, 3, 5), (7,)]
    params = [torch.nn.Parameter(t) for t in normals(shapes, 0, device)]
    same = [torch.nn.Parameter(t) for t in normals(shapes, 0, device)]
    opt, other = optimizer(params, backend), optimizer(same, backend)
    train(opt, params)
    train(other, same)
    params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
    params[1].data = params[1].data.clone()
    train(opt, params, seed=50)
    train(other, same, seed=50)
    assert params[0].is_contiguous(memory_format=torch.channels_last)
    for p, q in zip(params, same, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        for key in ("ema", "momentum_buffer"):
            torch.testing.assert_close(opt.state[p][key], other.state[q][key], rtol=1e-5, atol=1e-6)


# ---- layouts


@st.composite
def strided(draw):
    """A tensor of up to four dimensions: permuted, with steps, expanded, with odd strides at
    dimensions of size 1."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    order = draw(st.permutations(range(len(sizes))))
    strides, step = [0] * len(sizes), draw(st.sampled_from([1, 1, 1, 2]))
    for i in order:
        strides[i] = step
        step *= sizes[i] + draw(st.sampled_from([0, 0, 0, 1]))
        if sizes[i] == 1:
            strides[i] = draw(st.sampled_from([strides[i], 0, 1, 77]))
        elif draw(st.integers(0, 9)) == 0:
            strides[i] = draw(st.sampled_from([0, 1]))
    return torch.zeros(5000).as_strided(sizes, strides)


def positions(t: torch.Tensor) -> list[int]:
    """Where in memory each element lies, in the order of the logical indices."""
    return [sum(i * s for i, s in zip(index, t.stride(), strict=True))
            for index in itertools.product(*map(range, t.shape))]


@settings(max_examples=300, deadline=None)
@given(strided())
def test_is_dense_means_that_the_elements_fill_one_stretch(t):
    assert is_dense(t) == (sorted(positions(t)) == list(range(t.numel())))


@settings(max_examples=300, deadline=None)
@given(strided(), strided())
def test_same_layout_means_the_same_element_at_every_place(t, u):
    assert same_layout(t, t)
    if t.shape == u.shape and is_dense(t) and is_dense(u):
        assert same_layout(t, u) == (positions(t) == positions(u))
    if same_layout(t, u):
        assert t.shape == u.shape and positions(t) == positions(u)


def test_is_dense_and_same_layout_on_the_usual_suspects():
    x = torch.zeros(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert is_dense(x) and is_dense(last) and is_dense(x.permute(3, 1, 0, 2))
    assert not is_dense(x[:, :, ::2]) and not is_dense(torch.zeros(1, 4).expand(3, 4))
    assert not same_layout(x, last) and same_layout(last, torch.empty_like(last))
    # with one channel or 1 x 1 pixels the two formats differ in strides that do not matter
    y = torch.zeros(6, 1, 3, 3)
    assert same_layout(y, y.contiguous(memory_format=torch.channels_last))
    assert is_dense(torch.zeros(())) and is_dense(torch.zeros(0))


def test_is_packable_refuses_what_others_may_see():
    x = torch.zeros(4, 6)
    assert is_packable(torch.nn.Parameter(x))
    assert is_packable(torch.nn.Parameter(x.t()))
    for t in (x[1:], x[:2], x[:, ::2], x.as_subclass(Subclass), x.clone().share_memory_()):
        assert not is_packable(t)


# ---- gradients


def test_a_sparse_gradient_is_refused_before_anything_moves(backend, device):
    table = torch.nn.Embedding(9, 4, sparse=True, device=device)
    other = torch.nn.Parameter(torch.ones(3, device=device))
    opt = optimizer([other, table.weight], backend)
    before = [p.detach().clone() for p in (other, table.weight)]
    (table(torch.tensor([1, 2], device=device)).sum() + other.sum()).backward()
    for call in (opt.first_step, opt.step):
        with pytest.raises(ValueError, match="sparse=False"):
            call()
        assert not opt.is_perturbed
        for p, b in zip((other, table.weight), before, strict=True):
            assert torch.equal(p.detach(), b)


def test_a_sparse_gradient_in_the_second_pass_leaves_restore_possible(backend, device):
    p = torch.nn.Parameter(torch.ones(3, 2, device=device))
    opt = optimizer([p], backend)
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    opt.first_step()
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(ValueError, match="sparse=False"):
        opt.second_step()
    assert opt.is_perturbed
    opt.restore()
    assert torch.equal(p.detach(), before)


# ---- tables


@pytest.fixture
def uploads(monkeypatch):
    """The buffers that were uploaded since the last `clear`."""
    seen = []
    upload = Space._upload

    def recorded(self, values, target):
        seen.append(target.data_ptr())
        upload(self, values, target)

    monkeypatch.setattr(Space, "_upload", recorded)
    return seen


@on_triton
def test_tables_are_uploaded_again_only_when_an_address_changed(uploads, device):
    params = [torch.nn.Parameter(t) for t in normals([5, 7, 40], 0, device)]
    opt = optimizer(params, "triton")
    for p in params:
        p.grad = torch.ones_like(p)

    def step():
        uploads.clear()
        opt.first_step()
        opt.second_step()
        return len(uploads)

    assert step() == 3  # w, g1, g2
    assert step() == 0
    for p in params:
        p.grad.mul_(2)
    assert step() == 0
    old, params[1].grad = params[1].grad, torch.ones_like(params[1])
    assert step() == 2  # g1 and g2
    params[1].grad = None
    assert step() == 2
    params[1].grad = old
    assert step() == 2
    assert step() == 0


def test_hyper_parameters_are_uploaded_again_only_when_one_changed(uploads, backend, device):
    params = [torch.nn.Parameter(t) for t in normals([5, 7], 0, device)]
    opt = optimizer([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], backend)
    train(opt, params, steps=1)
    hyper = opt._spaces[0].hyper.data_ptr()

    def changed(**values):
        opt.param_groups[1].update(values)
        uploads.clear()
        train(opt, params, steps=1)
        return uploads.count(hyper)

    assert changed() == 0
    assert changed(lr=0.3) == 0
    assert changed(lr=0.2) == 1
    assert changed(rho=0.1, sigma=0.2) == 1
    assert changed(nesterov=True) == 1
    assert changed() == 0
    assert opt._spaces[0].hyper[1, 3].item() == pytest.approx(0.2)


def test_a_tensor_learning_rate_is_followed_without_upload(uploads, backend, device):
    """In place on the device, as in a captured graph, and beside numbers that change."""
    params = [torch.nn.Parameter(t) for t in normals([5, 7], 0, device)]
    lr = torch.tensor(0.1, device=device)
    opt = optimizer(params, backend, lr=lr)
    oracle = Oracle(params, [{**HYPER, "params": [0, 1]}], method="fsam")
    for t, value in enumerate((0.1, 0.5, 0.02, 0.02)):
        lr.fill_(value)
        rho = 0.3 if t < 2 else 0.7
        opt.param_groups[0]["rho"] = rho
        uploads.clear()
        train(opt, params, steps=1, seed=10 + t)
        assert uploads.count(opt._spaces[0].hyper.data_ptr()) == (t == 2)
        for h in oracle.h:
            h.update(lr=value, rho=rho)
        oracle.first_step(normals([5, 7], 10 + t, device))
        oracle.second_step(normals([5, 7], 110 + t, device))
        for p, w in zip(params, oracle.w, strict=True):
            torch.testing.assert_close(exact(p), w, rtol=1e-5, atol=1e-6)


def test_plain_sam_keeps_no_average_and_no_momentum_it_does_not_need(device):
    p = torch.nn.Parameter(torch.ones(5, device=device))
    opt = SAM([p], torch.optim.SGD, lr=0.1, backend="reference")
    train(opt, [p], steps=1)
    space = opt._spaces[0]
    assert space.m is None and space.v is None
    opt.param_groups[0]["momentum"] = 0.9
    train(opt, [p], steps=1)
    assert space.v is not None and int(opt.state[p]["momentum_steps"]) == 1


def test_a_default_device_of_the_users_is_not_where_tables_are_made(backend, device):
    params = [torch.nn.Parameter(t) for t in normals([5, 40], 0, device)]
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, normals([5, 40], 1, device), strict=True):
        p.grad = g
    with torch.device("meta"):  # torch.set_default_device("cuda") is the usual one
        opt = optimizer(params, backend)
        opt.first_step()
        opt.second_step()
    assert all(p.isfinite().all() and not torch.equal(p, q)
               for p, q in zip(params, before, strict=True))


def test_a_tensor_hyper_parameter_is_no_part_of_a_captured_step(device):
    """A graph would copy, at every replay, from where the tensor of the capture was."""
    p = torch.nn.Parameter(torch.ones(3, device=device))
    opt = optimizer([p], "reference", lr=torch.tensor(0.1, device=device))
    (space,), (group,) = opt._spaces, opt.param_groups
    space.late_uploads, group["lr"] = [], torch.tensor(0.5, device=device)
    opt._bring_hyper()
    assert space.hyper[0, 3].item() == pytest.approx(0.1) and space.late_uploads == []
    space.late_uploads = None
    opt._bring_hyper()
    assert space.hyper[0, 3].item() == pytest.approx(0.5)
