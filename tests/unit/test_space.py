"""Where things lie: parameters stay where they are, fastsam's own buffers in between, and tables
are uploaded when something changed."""

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from fastsam import GSAM, SAM, FriendlySAM, layout, space
from fastsam.choose import BACKENDS
from fastsam.hyper import COLUMN
from fastsam.space import PAD, Kind, Space, Tables, is_dense, same_layout

from ..helpers.drawn import normals
from ..helpers.oracle import Oracle, exact

HYPER = dict(rho=0.3, sigma=0.7, lmbda=0.6, lr=0.1, momentum=0.9, weight_decay=0.02)

pytestmark = pytest.mark.filterwarnings("ignore:second_step with the gradients of the first pass")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def optimizer(params, backend: str, **changes) -> FriendlySAM:
    return FriendlySAM(params, torch.optim.SGD, backend=backend, **{**HYPER, **changes})


def train(opt, params, steps=2, seed=10, shapes=None, picks=None) -> None:
    """Steps with drawn gradients: for all of these shapes, of which the optimizer has those that
    are picked."""
    for t in range(steps):
        for which, step in ((0, opt.first_step), (100, opt.second_step)):
            grads = normals(shapes or [p.shape for p in params], seed + t + which,
                            device=params[0].device)
            grads = [grads[i] for i in picks] if picks else grads
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


# ---- nothing is moved


def odd_layouts(device) -> list[torch.nn.Parameter]:
    a, b, c, d, e = normals([(4, 6, 3, 5), (7, 9), (13,), (2, 3, 4, 5, 6), ()], 0, device=device)
    return [torch.nn.Parameter(t) for t in (
        a.contiguous(memory_format=torch.channels_last), b.t().contiguous().t(), c,
        d.contiguous(memory_format=torch.channels_last_3d), e)]


def pieces_of_one_storage(device):
    storage = normals([60], 0, device=device)[0]
    return [torch.nn.Parameter(storage[:23]), torch.nn.Parameter(storage[23:57].view(2, 17))]


def part_of_a_storage(device):
    whole, other = normals([(8, 30), (5,)], 0, device=device)
    return [torch.nn.Parameter(whole[2:6]), torch.nn.Parameter(other)]


def in_shared_memory(device):
    return [torch.nn.Parameter(t.share_memory_())
            for t in normals([(4, 5), (7,)], 0, device=device)]


class Subclass(torch.Tensor):
    pass


def of_a_tensor_subclass(device):
    a, b = normals([(4, 5), (7,)], 0, device=device)
    return [torch.nn.Parameter(a.as_subclass(Subclass)), torch.nn.Parameter(b)]


def views_of_numpy(device):
    return [torch.nn.Parameter(torch.from_numpy(t.cpu().numpy().copy()).to(device))
            for t in normals([(4, 5), (7,)], 0, device=device)]


MADE = [odd_layouts, pieces_of_one_storage, part_of_a_storage, in_shared_memory,
        of_a_tensor_subclass, views_of_numpy]


def memory(tensors) -> list:
    return [(t.data_ptr(), t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(),
             t.stride(), t.storage_offset()) for t in tensors]


@pytest.mark.parametrize("make", MADE, ids=lambda f: f.__name__)
def test_parameters_stay_where_they_are_and_train_as_alone(make, backend, device):
    params = make(device)
    before, types = memory(params), [type(p) for p in params]
    aliases = [p.detach() for p in params]
    opt = optimizer(params, backend)
    assert memory(params) == before
    assert all(p.is_leaf and p.requires_grad for p in params)
    del opt
    assert_trains_like_alone(params, backend)
    assert memory(params) == before and [type(p) for p in params] == types
    assert all(torch.equal(p, alias) for p, alias in zip(params, aliases, strict=True))


def test_no_memory_is_replaced_by_any_call(backend, device):
    params = odd_layouts(device)
    opt = optimizer(params, backend)
    train(opt, params, steps=1)

    def everything():
        state = [x for p in params for x in opt.state[p].values()]
        return memory([*params, *state, *(s.saved for s in opt.spaces)])

    before = everything()
    train(opt, params, steps=2)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    opt.restore()
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert everything() == before


def test_parameters_with_gaps_train_on_the_reference_beside_their_neighbours(device):
    whole = normals([(6, 8)], 0, device=device)[0]
    kept = whole[:, 1::2].clone()
    params = [torch.nn.Parameter(whole[:, ::2]), torch.nn.Parameter(whole[:, 1:4:2].clone())]
    assert_trains_like_alone(params, "reference")
    assert params[0].data_ptr() == whole.data_ptr() and params[0].stride() == (8, 2)
    assert torch.equal(whole[:, 1::2], kept)


@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_kernels_refuse_parameters_with_gaps_by_name(backend, device):
    whole = normals([(6, 8)], 0, device=device)[0]
    with pytest.raises(ValueError, match="one stretch of memory"):
        optimizer([torch.nn.Parameter(whole[:, ::2])], backend)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_an_empty_parameter_does_not_disturb_the_others(shape, backend, device):
    params = [torch.nn.Parameter(t) for t in normals([5, shape, 7, shape], 0, device=device)]
    alone = [torch.nn.Parameter(params[i].detach().clone()) for i in (0, 2)]
    opt, other = optimizer(params, backend), optimizer(alone, backend)
    train(opt, params, shapes=[5, shape, 7, shape])
    train(other, alone, shapes=[5, shape, 7, shape], picks=(0, 2))
    assert torch.equal(params[0], alone[0]) and torch.equal(params[2], alone[1])


def test_parameters_that_someone_re_ordered_are_followed(backend, device):
    """`p.data = ...` and a change of layout in mid-training: state and course stay the same."""
    shapes = [(4, 6, 3, 5), (7,)]
    params = [torch.nn.Parameter(t) for t in normals(shapes, 0, device=device)]
    same = [torch.nn.Parameter(t) for t in normals(shapes, 0, device=device)]
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


# ---- slots and buffers


def laid_out(shapes, **kind) -> Space:
    params = [torch.nn.Parameter(t) for t in normals(shapes, 0, device="cpu")]
    return Space.of(Kind(torch.device("cpu"), torch.float32, **kind),
                    [(p, None, 0) for p in params], 1)


def test_slots_are_aligned_apart_and_shaped_as_their_parameters():
    made = laid_out([(4, 6, 3, 5), (7, 9), (13,), (), (0, 3)], mode="algorithm1", base="adam")
    slots = made.slots
    assert all(slot.offset % PAD == 0 for slot in slots)
    ends = [slot.offset + slot.numel for slot in slots]
    assert all(end <= slot.offset for end, slot in zip(ends, slots[1:], strict=False))
    assert ends[-1] <= made.size
    for slot in slots:
        for t, flat in ((slot.saved, made.saved), (slot.m, made.m), (slot.v, made.v),
                        (slot.u, made.u)):
            assert t.shape == slot.param.shape and (t.stride() == slot.stride or not t.numel())
            assert t.data_ptr() == flat.data_ptr() + 4 * slot.offset or not t.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtype_of_state_is_float32_unless_the_weights_are_float64(dtype, device):
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype, device=device))
    opt = optimizer([p], "reference")
    p.grad = torch.ones_like(p)
    opt.first_step()
    opt.second_step()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert opt.state[p]["ema"].dtype == opt.state[p]["momentum_buffer"].dtype == expected
    assert opt.spaces[0].saved.dtype == p.dtype == dtype


def test_plain_sam_keeps_no_average_and_no_momentum_it_does_not_need(device):
    p = torch.nn.Parameter(torch.ones(5, device=device))
    opt = SAM([p], torch.optim.SGD, lr=0.1, backend="reference")
    train(opt, [p], steps=1)
    (was,) = opt.spaces
    assert was.m is None and was.v is None
    opt.param_groups[0]["momentum"] = 0.9
    train(opt, [p], steps=1)
    assert opt.spaces[0].v is not None and int(opt.state[p]["momentum_steps"]) == 1


@given(st.lists(st.integers(0, 70), min_size=1, max_size=5), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_blocks_cover_every_element_once(sizes, block):
    made = laid_out(sizes)
    seen = [(slot, i) for slot, index in made.blocks(block).tolist()
            for i in range(index * block, min((index + 1) * block, sizes[slot]))]
    assert seen == [(slot, i) for slot, n in enumerate(sizes) for i in range(n)]
    assert made.blocks(block) is made.blocks(block)


class ToTheHost(TorchFunctionMode):
    """Counts what fastsam sends to the host's memory without waiting for it."""

    def __init__(self):
        super().__init__()
        self.not_waited_for = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = sys._getframe(1).f_globals["__name__"].startswith("fastsam")
        self.not_waited_for += (ours and func is torch.Tensor.to and torch.device("cpu") in args[1:]
                                and kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


@pytest.mark.parametrize("make", [
    lambda ps: FriendlySAM(ps, torch.optim.SGD, projection="cosine", lr=0.1),
    lambda ps: GSAM(ps, torch.optim.SGD, lr=0.1),
], ids=["projection", "mix"])
def test_spaces_on_the_host_wait_for_what_they_share_with_a_gpu_s(make):
    """A copy from a GPU that is not waited for leaves what was in the memory before."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype))
              for dtype in (torch.float32, torch.float64)]
    opt, scaler = make(params), torch.amp.GradScaler("cpu", init_scale=4.0)
    with ToTheHost() as seen:
        scaler.scale(sum(p.float().square().sum() for p in params)).backward()
        opt.first_step(zero_grad=True, scaler=scaler)
        scaler.scale(sum(p.float().square().sum() for p in params)).backward()
        scaler.step(opt)
    assert not opt.is_perturbed and seen.not_waited_for == 0


def test_spaces_are_by_dtype_and_share_one_norm(backend, device):
    params = [torch.nn.Parameter(torch.ones(4, device=device, dtype=d))
              for d in (torch.float32, torch.bfloat16, torch.float32)]
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    assert [len(s.slots) for s in opt.spaces] == [2, 1]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    assert opt.last_grad_norm == pytest.approx(12 ** 0.5)
    opt.restore()


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


# ---- tables


@pytest.fixture
def uploads(monkeypatch):
    """The buffers that were uploaded since the last `clear`."""
    seen = []

    def recorded(values, target):
        seen.append(target.data_ptr())
        upload(values, target)

    upload = space.upload
    monkeypatch.setattr(space, "upload", recorded)
    monkeypatch.setattr(layout, "upload", recorded)
    return seen


def test_tables_are_uploaded_again_only_when_an_address_changed(uploads, backend, device):
    params = [torch.nn.Parameter(t) for t in normals([5, 7, 40], 0, device=device)]
    opt = optimizer(params, backend)
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
    params[1].data = params[1].data.clone()
    assert step() == 1  # w


def test_what_could_not_be_uploaded_is_uploaded_the_next_time(monkeypatch):
    """After a Ctrl-C, say: the kernels would read at the addresses of before."""
    params = [torch.nn.Parameter(torch.ones(2))]
    opt = SAM(params, torch.optim.SGD, adaptive=True, lr=0.1)
    (own,) = opt.spaces
    tables = Tables(own)

    def fails(values, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(space, "upload", fails)
        with pytest.raises(KeyboardInterrupt):
            tables.bring("w", [16])
        patched.setattr(layout, "upload", fails)
        opt.param_groups[0]["adaptive"] = False
        with pytest.raises(KeyboardInterrupt):
            opt.backend_report()
    assert tables.bring("w", [16]).tolist() == [16]
    assert opt.spaces == (own,) and own.scalings.tolist() == [[0.0, 1.0]]


def test_a_cell_that_was_set_is_known_to_be():
    """A Ctrl-C before it is would leave a loss scale to the steps that have none."""
    class Interrupted(dict):
        def __setitem__(self, *_):
            raise KeyboardInterrupt

    opt = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    own = opt._phase.layout
    own._set = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        own.set_cell(0, "inv_scale1", torch.tensor(0.5), 1)
    assert own.spaces[0].cells.inv_scale1 == 1


def test_tables_of_a_capture_are_filled_when_it_ends(uploads):
    tables = Tables(laid_out([5, 7]), late=True)
    column = tables.bring("w", [16, 32])
    assert not column.any() and tables.held("w") == [16, 32] and uploads == []
    tables.upload_late()
    assert column.tolist() == [16, 32]


def test_hyper_parameters_are_uploaded_again_only_when_one_changed(uploads, backend, device):
    params = [torch.nn.Parameter(t) for t in normals([5, 7], 0, device=device)]
    opt = optimizer([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], backend)
    train(opt, params, steps=1)
    hyper = opt.spaces[0].hyper.data_ptr()

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
    assert opt.spaces[0].hyper[1, COLUMN["lr"]].item() == pytest.approx(0.2)


def test_a_tensor_learning_rate_is_followed_without_upload(uploads, backend, device):
    """In place on the device, as in a captured graph, and beside numbers that change."""
    params = [torch.nn.Parameter(t) for t in normals([5, 7], 0, device=device)]
    lr = torch.tensor(0.1, device=device)
    opt = optimizer(params, backend, lr=lr)
    oracle = Oracle(params, [{**HYPER, "params": [0, 1]}], method="fsam")
    for t, value in enumerate((0.1, 0.5, 0.02, 0.02)):
        lr.fill_(value)
        rho = 0.3 if t < 2 else 0.7
        opt.param_groups[0]["rho"] = rho
        uploads.clear()
        train(opt, params, steps=1, seed=10 + t)
        assert uploads.count(opt.spaces[0].hyper.data_ptr()) == (t == 2)
        for h in oracle.h:
            h.update(lr=value, rho=rho)
        oracle.first_step(normals([5, 7], 10 + t, device=device))
        oracle.second_step(normals([5, 7], 110 + t, device=device))
        for p, w in zip(params, oracle.w, strict=True):
            torch.testing.assert_close(exact(p), w, rtol=1e-5, atol=1e-6)


def test_a_default_device_of_the_users_is_not_where_tables_are_made(backend, device):
    params = [torch.nn.Parameter(t) for t in normals([5, 40], 0, device=device)]
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, normals([5, 40], 1, device=device), strict=True):
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
    with opt.capture():
        opt.param_groups[0]["lr"] = torch.tensor(0.5, device=device)
        (made,) = opt.spaces
        assert made.hyper[0, COLUMN["lr"]].item() == pytest.approx(0.1)
    assert opt.spaces[0].hyper[0, COLUMN["lr"]].item() == pytest.approx(0.5)
