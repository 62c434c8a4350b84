"""The Triton kernels against the float64 oracle: on a GPU, or on the CPU in the interpreter.

The rule: the error of one step, for weights, m and v alike, is at most twice the error of plain
PyTorch in the same dtype (backend "reference"), plus a few roundings for where that one is exact
by luck. Everything starts from the same weights, state and gradients at every step.
"""

import importlib
import inspect
import math

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from fastsam import flat, kernels, reference  # noqa: E402

from .oracle import exact  # noqa: E402
from .support import ADAM_GROUPS, GROUPS, METHODS, Course, deal  # noqa: E402

common = importlib.import_module("fastsam.kernels.common")
LAUNCHERS = [importlib.import_module(f"fastsam.kernels.{name}")
             for name in ("norm", "climb", "step", "dots")]
BLOCK = common.BLOCK
SIZES = [1, 15, 16, BLOCK - 1, BLOCK, BLOCK + 1, 4097]
# the same sizes with weights and biases among them, which ASAM's "weights" form tells apart
SHAPES = [1, (3, 5), 16, BLOCK - 1, (2, BLOCK // 2), BLOCK + 1, (17, 241)]
DTYPES = [torch.float32, torch.bfloat16]

# the interpreter is NumPy, which warns where inf and NaN are put in on purpose
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow):RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody wrote holds NaN, so that reading it cannot go unnoticed."""
    def poison(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(math.nan) if t.is_floating_point() else t
        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def normals(shapes, seed: int, dtype, device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def parameters(tensors) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(t.clone()) for t in tensors]


def ulp(t: torch.Tensor, dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of `dtype` at every element of t."""
    return torch.finfo(dtype).eps * 2.0 ** t.abs().clamp_min(1e-30).log2().floor()


def allowed(what: str, expected, reference_error: float, dtype):
    tiny = 4 * torch.finfo(torch.float32).eps * max(1.0, float(expected.abs().max()))
    return 2 * reference_error + tiny


def judge(triton: Course, plain: Course, step: str) -> None:
    """Hold the Triton course to twice the error of the plain one, each from its own oracle."""
    for (what, actual, expected), (_, plain_actual, plain_expected) in zip(
            triton.compared(), plain.compared(), strict=True):
        bad = float((exact(plain_actual) - plain_expected).abs().max())
        assert math.isfinite(bad), f"{what} {step}: plain PyTorch is not finite"
        error = (exact(actual) - expected).abs()
        assert (error <= allowed(what, expected, bad, triton.params[0].dtype)).all(), (
            f"{what} {step}: error {float(error.max()):.3g}, plain PyTorch's {bad:.3g}")
    assert triton.opt.skipped_steps == triton.oracle.skipped == plain.opt.skipped_steps


def check_padding(opt) -> None:
    """What lies between the slots of the flat buffers stays zero."""
    for space in opt._spaces:
        padding = torch.ones(space.size, dtype=torch.bool)
        for slot in space.slots:
            padding[slot.offset:slot.offset + slot.w.numel()] = False
        for buffer in (space.flat_w, space.backup, space.m, space.v, space.u):
            if buffer is not None:
                assert not buffer.cpu()[padding].any()


class Pair:
    """The Triton and the plain course of the same parameters, stepped together and judged."""

    def __init__(self, tensors, groups, name: str, make=parameters, **kwargs):
        self.triton = Course(make(tensors), groups, name, "triton", **kwargs)
        self.plain = Course(parameters(tensors), groups, name, "reference", **kwargs)

    def step(self, first, second, label="") -> None:
        both = (self.triton, self.plain)
        for course in both:
            course.first_step(first)
        judge(*both, f"moved, step {label}")
        for course in both:
            course.second_step(second)
        judge(*both, f"after step {label}")
        check_padding(self.triton.opt)


def run(shapes, groups, name: str, dtype, device, steps=3, **kwargs) -> Pair:
    pair = Pair(normals(shapes, 0, dtype, device), groups, name, **kwargs)
    for t in range(steps):
        pair.step(normals(shapes, 10 + t, dtype, device), normals(shapes, 20 + t, dtype, device), t)
    return pair


# ---- the mathematics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_over_several_sizes_and_groups(name, dtype, device):
    pair = run(SHAPES, deal(len(SHAPES), GROUPS), name, dtype, device)
    scaling = "gradient" if name == "fisher" else "weights" if "asam" in name else None
    assert pair.triton.opt._spaces[0].scaling == scaling
    assert pair.triton.opt.backend_report()["backend"] == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_alone(size, dtype, device):
    run([size], deal(1, GROUPS), "fsam", dtype, device, steps=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", [
    {}, dict(weight_decay=0.1), dict(momentum=0.9), dict(momentum=0.9, dampening=0.4),
    dict(momentum=0.9, nesterov=True), dict(momentum=0.9, dampening=0.4, weight_decay=0.1),
    dict(momentum=0.9, nesterov=True, weight_decay=0.1),
], ids=lambda base: "-".join(base) or "plain")
def test_every_form_of_sgd(base, dtype, device):
    group = dict(rho=0.2, lr=0.1, momentum=0, dampening=0, weight_decay=0, nesterov=False)
    run([33, BLOCK + 5], deal(2, [{**group, **base}]), "sam", dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["adam", "adamw"])
@pytest.mark.parametrize("name", ["sam", "fasam-official"])
def test_adam_and_adamw(name, base, dtype, device):
    run(SHAPES, deal(len(SHAPES), ADAM_GROUPS), name, dtype, device, steps=4, base=base)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", METHODS)
def test_float32_masters_of_16_bit_weights(name, base, device):
    """The step starts from the master, to float32's precision; the model sees it rounded."""
    groups = deal(len(SHAPES), GROUPS if base == "sgd" else ADAM_GROUPS)
    pair = run(SHAPES, groups, name, torch.bfloat16, device, base=base, master_weights=True)
    for p in pair.triton.params:
        master = pair.triton.opt.state[p]["master"]
        assert master.dtype == torch.float32
        assert not torch.equal(master, master.bfloat16().float())
        assert ((master - p.float()).abs() <= ulp(master, torch.bfloat16)).all()


def test_a_weight_written_by_someone_else_becomes_the_master(device):
    shapes = [20, BLOCK + 1]
    for climbs in (True, False):
        pair = run(shapes, deal(2, GROUPS), "fsam", torch.bfloat16, device, steps=1,
                   master_weights=True)
        for course in (pair.triton, pair.plain):
            masters = [course.weight(i).clone() for i in range(2)]
            with torch.no_grad():
                course.params[1][5:9] = 3.25
            course.follow()
            course.oracle.w[1][5:9] = 3.25
            grads = normals(shapes, 60, torch.bfloat16, device)
            if climbs:
                course._set(grads)
                course.opt.first_step()
                course.oracle.first_step(grads)
                course.opt.restore()
                course.oracle.restore()
                assert (course.params[1][5:9] == 3.25).all()
            course._set(grads)
            course.opt.step()
            course.oracle.second_step(grads)
            assert not torch.equal(course.weight(1)[:5], masters[1][:5])
        judge(pair.triton, pair.plain, "after the write")


def test_float16(device):
    run([17, BLOCK + 5], deal(2, GROUPS), "fasam", torch.float16, device)


def test_the_launchers_alone_give_norm_radius_and_control(device):
    """norm and climb as called, without the optimizer: partials, norm, ok and realised radius."""
    tensors = normals([BLOCK + 3, 40], 1, torch.float32, device)
    grads = normals([BLOCK + 3, 40], 2, torch.float32, device)
    space = flat.Space([(p, None, 0) for p in parameters(tensors)], None)
    space.set_hyper([flat.Hyper(0.25, 1, 0.9, 0.1, 0, 0, 0, 0, 0, 0, 0, 0)])
    for slot, g in zip(space.slots, grads, strict=True):
        slot.g1 = g
    norm = math.sqrt(sum(float(exact(g).square().sum()) for g in grads))
    with torch.no_grad():
        kernels.norm(space)
        assert math.sqrt(float(exact(space.partials).sum())) == pytest.approx(norm, rel=1e-6)
        kernels.climb(space, space.partials)
    assert float(space.control.norm) == pytest.approx(norm, rel=1e-6)
    assert float(space.control.ok) == 1
    assert math.sqrt(float(exact(space.radii[0]).sum())) == pytest.approx(0.25, rel=1e-5)
    assert space.counters.tolist() == [0, 0, 0]
    for slot, w in zip(space.slots, tensors, strict=True):
        assert torch.equal(slot.backup, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fasam", "sam", "fsam-cosine"])
def test_programs_that_walk_several_blocks(name, dtype, device, monkeypatch):
    """With two programs only, every program loops; the tickets and sums must still come out."""
    for module in (flat, *LAUNCHERS):
        monkeypatch.setattr(module, "PARTIALS", 2)
    pair = run(SIZES, deal(len(SIZES), GROUPS), name, dtype, device, steps=2)
    assert pair.triton.opt._spaces[0].partials.shape == (2,)
    assert pair.triton.opt._spaces[0].counters.tolist() == [0, 0, 0]


def test_more_than_128_parameters_count_their_steps(device):
    """The last program updates the counters 128 slots at a time."""
    pair = run([1] * 131, deal(131, GROUPS), "fsam-official", torch.float32, device, steps=2)
    space = pair.triton.opt._spaces[0]
    assert (space.steps[0] == 2).all()
    for slot in space.slots:
        assert int(slot.v_steps) == (2 if GROUPS[slot.group]["momentum"] else 0)


def test_two_runs_are_bit_equal(device):
    def course():
        pair = run([BLOCK + 1, 17], deal(2, GROUPS), "fasam", torch.float32, device, steps=2)
        return [t.clone() for _, t, _ in pair.triton.compared()], pair.triton.opt.last_grad_norm

    (first, norm1), (second, norm2) = course(), course()
    assert norm1 == norm2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_steps_without_a_climb(dtype, device):
    """step() alone is the base optimizer, and leaves m alone; before, between and after."""
    shapes = [20, BLOCK + 1, 2 * BLOCK]
    pair = Pair(normals(shapes, 0, dtype, device), deal(3, GROUPS), "fsam")
    for t in range(4):
        first, second = (normals(shapes, seed + t, dtype, device) for seed in (30, 40))
        if t == 2:
            pair.step(first, second, t)
            continue
        second[t % 3] = None
        for course in (pair.triton, pair.plain):
            course.follow()
            course._set(second)
            course.opt.step()
            course.oracle.second_step(second)
        judge(pair.triton, pair.plain, f"after plain step {t}")
        check_padding(pair.triton.opt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fasam", "fsam-official"])
def test_the_loss_scale_is_divided_out_of_both_passes(name, dtype, device):
    """Each pass by its own scale, before the average, the norm and the weight decay."""
    shapes = [20, BLOCK + 1]
    pair = Pair(normals(shapes, 0, dtype, device), deal(2, GROUPS), name)
    for course in (pair.triton, pair.plain):
        control = course.opt._spaces[0].control
        control.inv_scale1.fill_(1 / 8)
        control.inv_scale2.fill_(1 / 32)
    for t in range(2):
        first, second = (normals(shapes, seed + t, dtype, device) for seed in (30, 40))
        for course in (pair.triton, pair.plain):
            course.follow()
            course._set([8 * g for g in first])
            course.opt.first_step()
            course.oracle.first_step(first)
        judge(pair.triton, pair.plain, f"moved, step {t}")
        for course in (pair.triton, pair.plain):
            course._set([32 * g for g in second])
            course.opt.second_step()
            course.oracle.second_step(second)
        judge(pair.triton, pair.plain, f"after step {t}")


@pytest.mark.parametrize("climb", [True, False])
def test_found_inf_skips_the_step_bit_for_bit(climb, device):
    shapes = [20, BLOCK + 1]
    course = Pair(normals(shapes, 0, torch.float32, device), deal(2, GROUPS), "sam").triton
    for s in (30, 31):
        course.first_step(normals(shapes, s, torch.float32, device))
        course.second_step(normals(shapes, s, torch.float32, device))
    before = [t.clone() for _, t, _ in course.compared()]
    course.opt._spaces[0].control.found_inf.fill_(1)
    if climb:
        course._set(normals(shapes, 50, torch.float32, device))
        course.opt.first_step()
    course._set(normals(shapes, 51, torch.float32, device))
    course.opt.step()
    assert all(torch.equal(t, b) for (_, t, _), b in zip(course.compared(), before, strict=True))
    assert course.opt.skipped_steps == 1


# ---- where gradients and weights lie


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3, 5])
def test_misaligned_gradients(offset, dtype, device):
    """Views into a larger storage, as gradient buckets are: read in place, neighbours unread."""
    shapes = [BLOCK + 5, 4 * BLOCK]
    pair = Pair(normals(shapes, 0, dtype, device), deal(2, GROUPS), "fasam")
    for t in range(2):
        grads = []
        for g in normals(shapes, 30 + t, dtype, device):
            bucket = torch.full((offset + len(g) + 7,), math.nan, dtype=dtype, device=device)
            bucket[offset:offset + len(g)] = g
            grads.append(bucket[offset:offset + len(g)])
            assert grads[-1].data_ptr() % 16
        pair.step(grads, grads, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_weights_in_a_larger_storage(dtype, device):
    """They are not packed: the kernels run on the storage itself and write nothing around it."""
    size = 2 * BLOCK + 3
    storage = torch.full((size + 9,), 7.0, dtype=dtype, device=device)
    tensors = normals([size], 0, dtype, device)

    def inside(tensors):
        storage[3:3 + size] = tensors[0]
        return [torch.nn.Parameter(storage[3:3 + size])]

    pair = Pair(tensors, deal(1, GROUPS), "fsam", make=inside)
    assert pair.triton.opt._spaces[0].flat_w is None
    for t in range(2):
        pair.step(normals([size], 30 + t, dtype, device), normals([size], 40 + t, dtype, device), t)
    assert pair.triton.params[0].data_ptr() == storage.data_ptr() + 3 * storage.element_size()
    assert torch.equal(storage[3:3 + size], pair.triton.params[0].detach())
    assert (storage[:3] == 7).all() and (storage[3 + size:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_last_weights_and_gradients_of_any_layout(dtype, device):
    shape = (8, 16, 3, 3)  # 1152 elements: a full block and a tail
    w = normals([shape, shape], 0, dtype, device)
    w[0] = w[0].contiguous(memory_format=torch.channels_last)
    pair = Pair(w, deal(2, GROUPS), "fasam", make=lambda ts: [torch.nn.Parameter(
        t.clone(memory_format=torch.preserve_format)) for t in ts])
    layouts = [torch.channels_last, torch.contiguous_format]
    for t in range(3):
        first, second = (
            [g.contiguous(memory_format=layouts[(i + t) % 2])
             for i, g in enumerate(normals([shape, shape], seed + t, dtype, device))]
            for seed in (30, 40))
        pair.step(first, second, t)
    assert pair.triton.params[0].is_contiguous(memory_format=torch.channels_last)
    assert pair.triton.state(0, "m").is_contiguous(memory_format=torch.channels_last)


def test_gradients_that_are_not_dense(device):
    """A transposed gradient, an expanded one and one with gaps."""
    shape = (24, 48)
    pair = Pair(normals([shape] * 3, 0, torch.float32, device), deal(3, GROUPS), "fsam")
    for t in range(2):
        a, b, c = normals([(48, 24), (24, 1), (24, 96)], 30 + t, torch.float32, device)
        grads = [a.t(), b.expand(shape), c[:, ::2]]
        pair.step(grads, grads, t)


# ---- missing, zero and bad gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fasam-official", "sam"])
def test_gradients_missing_in_either_pass(name, dtype, device):
    """Parameter 0 always has both, 1 only the first, 2 only the second, 3 none (frozen), 4 comes
    in at step 1: its averages then start at its own first step."""
    shapes = [20, BLOCK + 1, BLOCK + 1, BLOCK, 40]
    pair = Pair(normals(shapes, 0, dtype, device), deal(5, GROUPS), name)
    frozen = pair.triton.params[3].requires_grad_(False)
    start = frozen.detach().clone()
    for t in range(3):
        first, second = (normals(shapes, seed + t, dtype, device) for seed in (30, 40))
        first[2] = first[3] = second[1] = second[3] = None
        if t == 0:
            first[4] = second[4] = None
        pair.step(first, second, t)
    assert torch.equal(frozen.detach(), start)


def test_no_gradient_at_all(device):
    pair = Pair(normals([20, BLOCK], 0, torch.float32, device), deal(2, GROUPS), "fsam")
    pair.step([None, None], [None, None])
    pair.step(*(normals([20, BLOCK], s, torch.float32, device) for s in (30, 40)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_zero_norm_moves_nothing(name, dtype, device):
    shapes = [20, BLOCK + 1]
    pair = Pair(normals(shapes, 0, dtype, device), deal(2, GROUPS), name)
    before = [p.detach().clone() for p in pair.triton.params]
    zeros = [torch.zeros_like(t) for t in before]
    pair.triton.first_step(zeros)
    assert all(torch.equal(p, b) for p, b in zip(pair.triton.params, before, strict=True))
    assert pair.triton.opt.last_grad_norm == 0
    pair.triton.opt.restore()
    pair.triton.oracle.restore()
    pair.step(zeros, normals(shapes, 40, dtype, device))
    assert pair.triton.opt.skipped_steps == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["sam", "fasam", "fsam-official"])
def test_a_gradient_that_is_not_finite_skips_bit_for_bit(name, bad, dtype, device):
    shapes = [20, BLOCK + 1]
    pair = Pair(normals(shapes, 0, dtype, device), deal(2, GROUPS), name)
    good = [normals(shapes, seed, dtype, device) for seed in (30, 40)]
    pair.step(*good, "before")
    course = pair.triton
    before = [t.clone() for _, t, _ in course.compared()]
    counts = course.opt._spaces[0].steps.clone()
    broken = normals(shapes, 50, dtype, device)
    broken[1][-1] = bad
    course.first_step(broken)
    assert all(torch.equal(t, b) for (_, t, _), b in zip(course.compared(), before, strict=True))
    course.second_step(good[1])
    assert all(torch.equal(t, b) for (_, t, _), b in zip(course.compared(), before, strict=True))
    assert torch.equal(course.opt._spaces[0].steps, counts)
    assert course.opt.skipped_steps == 1
    pair.plain.first_step(broken)
    pair.plain.second_step(good[1])
    pair.step(*good, "after")


def test_a_norm_that_overflows_float32_is_a_skip(device):
    course = Course(parameters(normals([20], 0, torch.float32, device)), deal(1, GROUPS), "sam",
                    "triton")
    before = course.params[0].detach().clone()
    huge = [torch.full((20,), 1e30, device=device)]
    course.first_step(huge)
    course._set(huge)
    course.opt.second_step()
    assert course.opt.skipped_steps == 1
    assert torch.equal(course.params[0].detach(), before)


# ---- groups


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_that_is_not_perturbed_and_one_of_rho_zero(dtype, device):
    """perturb=False stays out of the norm and of m; rho=0 counts in both but does not move."""
    shapes = [20, BLOCK + 1, 33]
    groups = deal(3, [{**GROUPS[0], "perturb": False}, {**GROUPS[1], "rho": 0.0}, GROUPS[2]])
    tensors = normals(shapes, 0, dtype, device)
    pair = Pair(tensors, groups, "fsam")
    pair.triton.first_step(normals(shapes, 30, dtype, device))
    p, q, r = pair.triton.params
    assert torch.equal(p.detach(), tensors[0]) and torch.equal(q.detach(), tensors[1])
    assert not torch.equal(r.detach(), tensors[2])
    assert not pair.triton.state(0, "m").any() and pair.triton.state(1, "m").any()
    pair.triton.opt.restore()

    pair = Pair(tensors, groups, "fsam")
    for t in range(2):
        pair.step(normals(shapes, 30 + t, dtype, device), normals(shapes, 40 + t, dtype, device), t)


def test_two_dtypes_share_one_norm(device):
    """A space per dtype, but the norm is over both."""
    shapes = [20, BLOCK + 1, 40, BLOCK]
    mixed = [t.to(DTYPES[i % 2]) for i, t in enumerate(normals(shapes, 0, torch.float32, device))]
    triton, plain = (Course(parameters(mixed), deal(4, GROUPS), "fsam", backend)
                     for backend in ("triton", "reference"))
    assert len(triton.opt._spaces) == 2
    for t in range(2):
        grads = [g.to(w.dtype) for g, w in zip(normals(shapes, 30 + t, torch.float32, device),
                                               mixed, strict=True)]
        for course in (triton, plain):
            course.first_step(grads)
            assert course.opt.last_grad_norm == pytest.approx(course.oracle.norm, rel=1e-6)
        for (what, actual, expected), (_, other, other_expected) in zip(
                triton.compared(), plain.compared(), strict=True):
            error = (exact(actual) - expected).abs()
            bad = float((exact(other) - other_expected).abs().max())
            assert (error <= allowed(what, expected, bad, actual.dtype)).all(), what
        for course in (triton, plain):
            course.second_step(grads)
    check_padding(triton.opt)


def test_changed_hyper_parameters_are_used_at_once(device):
    pair = Pair(normals([40], 0, torch.float32, device), deal(1, GROUPS), "fsam")
    for t in range(3):
        for course in (pair.triton, pair.plain):
            change = dict(lr=0.1 / (t + 1), rho=0.3 * t, momentum=0.5 + 0.1 * t, lmbda=0.2 * t)
            course.opt.param_groups[0].update(change)
            course.oracle.h[0].update(change)
        pair.step(normals([40], 30 + t, torch.float32, device),
                  normals([40], 40 + t, torch.float32, device), t)


# ---- the tables and the interface


def test_the_kernels_columns_are_the_flat_space_s():
    columns = (*flat.Hyper._fields, "given_sigma", "ema_share", "momentum_share", "beta1_share",
               "beta2_share", "log_beta1", "log_beta2")
    unused = {"dampening", "given_sigma"}  # 1 - dampening, and sigma as it is, are enough
    assert all(getattr(common, name.upper()).value == i
               for i, name in enumerate(columns) if name not in unused)
    assert common.HYPER.value == len(columns) == len(flat.Hyper._fields) + len(flat.SHARES)
    for names in (flat.CONTROL, flat.COUNTERS):
        assert [getattr(common, name.upper()).value for name in names] == list(range(len(names)))


def test_sizes_agree_between_the_kernels_and_the_flat_space():
    assert common.PARTIALS == flat.PARTIALS
    assert all(m.PARTIALS == flat.PARTIALS for m in LAUNCHERS)
    climb = inspect.getsource(LAUNCHERS[1])
    assert "guard=space.guard" in climb and flat.Space.guard == flat.GUARD == 1e-12
    assert BLOCK % flat.PAD == 0


def test_both_backends_have_the_same_functions_and_arguments():
    for name in ("dots", "norm", "climb", "step"):
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (kernels, reference))
        assert list(ours.parameters) == list(theirs.parameters), name
