"""The Triton kernels against the float64 oracle: on a GPU, or on the CPU in the interpreter.

The rule: the error of one step, for weights, m and v alike, is at most twice the error of plain
PyTorch in the same dtype (fastsam.reference), plus a few roundings for where that one is exact by
luck. Everything starts from the same weights, state and gradients at every step.
"""

import importlib
import inspect
import math

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from fastsam import reference, space  # noqa: E402
from fastsam.hyper import COLUMN, COLUMNS  # noqa: E402
from fastsam.kernels import triton as kernels  # noqa: E402

from ..helpers.oracle import exact  # noqa: E402
from ..helpers.passes import Course  # noqa: E402
from ..helpers.variants import ADAM_GROUPS, GROUPS, VARIANTS, deal  # noqa: E402

# by import_module: as attributes of the package, these names are the launchers
common, *LAUNCHERS = (importlib.import_module(f"fastsam.kernels.triton.{name}")
                      for name in ("common", "launch", "norm", "climb"))
BLOCK = common.BLOCK
SIZES = [1, 15, 16, BLOCK - 1, BLOCK, BLOCK + 1, 4097]
# the same sizes with weights and biases among them, which ASAM's "weights" form tells apart
SHAPES = [1, (3, 5), 16, BLOCK - 1, (2, BLOCK // 2), BLOCK + 1, (17, 241)]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16]

# the interpreter is NumPy, which warns where inf and NaN are put in on purpose
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow):RuntimeWarning")


def normals(shapes, seed: int, dtype, device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def parameters(tensors) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in tensors]


def ulp(t: torch.Tensor, dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of `dtype` at every element of t."""
    return torch.finfo(dtype).eps * 2.0 ** t.abs().clamp_min(1e-30).log2().floor()


def judge(triton: Course, plain: Course, step: str) -> None:
    """Hold the Triton course to twice the error of the plain one, each from its own oracle."""
    for (what, actual, expected), (_, plain_actual, plain_expected) in zip(
            triton.compared(), plain.compared(), strict=True):
        if not expected.numel():
            continue
        bad = float((exact(plain_actual) - plain_expected).abs().max())
        assert math.isfinite(bad), f"{what} {step}: plain PyTorch is not finite"
        error = (exact(actual) - expected).abs()
        tiny = 4 * torch.finfo(FP32).eps * max(1.0, float(expected.abs().max()))
        assert (error <= 2 * bad + tiny).all(), (
            f"{what} {step}: error {float(error.max()):.3g}, plain PyTorch's {bad:.3g}")
    assert triton.skipped == triton.oracle.skipped == plain.skipped
    triton.check_gaps()


class Pair:
    """The Triton and the plain course of the same parameters, stepped together and judged."""

    def __init__(self, tensors, groups, name: str, make=parameters, **kwargs):
        self.triton = Course(make(tensors), groups, name, kernels, **kwargs)
        self.plain = Course(parameters(tensors), groups, name, reference, **kwargs)

    def __iter__(self):
        return iter((self.triton, self.plain))

    def first_step(self, grads, label="", **kwargs) -> None:
        for course in self:
            course.first_step(grads, **kwargs)
        judge(*self, f"moved, step {label}")

    def second_step(self, grads, label="", **kwargs) -> None:
        for course in self:
            course.second_step(grads, **kwargs)
        judge(*self, f"after step {label}")

    def step(self, first, second, label="") -> None:
        self.first_step(first, label)
        self.second_step(second, label)


def run(shapes, groups, name: str, dtype, device, steps=3, g_dtype=None, **kwargs) -> Pair:
    pair = Pair(normals(shapes, 0, dtype, device), groups, name, **kwargs)
    for t in range(steps):
        pair.step(*(normals(shapes, seed + t, g_dtype or dtype, device) for seed in (10, 20)), t)
    return pair


# ---- the mathematics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_over_several_sizes_and_groups(name, dtype, device):
    run(SHAPES, deal(len(SHAPES), GROUPS), name, dtype, device)


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
@pytest.mark.parametrize("name", VARIANTS)
def test_float32_masters_of_16_bit_weights(name, base, device):
    """The step starts from the master, to float32's precision; the model sees it rounded."""
    groups = deal(len(SHAPES), GROUPS if base == "sgd" else ADAM_GROUPS)
    pair = run(SHAPES, groups, name, BF16, device, base=base, masters=True)
    for i, p in enumerate(pair.triton.params):
        master = pair.triton.weight(i)
        assert master.dtype == FP32
        assert not torch.equal(master, master.bfloat16().float())
        assert ((master - p.float()).abs() <= ulp(master, BF16)).all()


@pytest.mark.parametrize("climbs", [True, False])
def test_a_weight_written_by_someone_else_becomes_the_master(climbs, device):
    shapes = [20, BLOCK + 1]
    pair = run(shapes, deal(2, GROUPS), "fsam", BF16, device, steps=1, masters=True)
    grads, written = normals(shapes, 60, BF16, device), []
    for course in pair:
        old = course.weight(1).clone()
        with torch.no_grad():
            course.params[1][5:9] = 3.25
        written.append(torch.cat([old[:5], course.params[1].detach()[5:9].float(), old[9:]]))
    for course, w in zip(pair, written, strict=True):
        course.follow()
        course.oracle.w[1] = exact(w)
        course.follow = lambda: None
        if climbs:
            course.first_step(grads)
            assert torch.equal(course.weight(1), w), "the climb takes it over"
        course.second_step(grads)
    judge(*pair, "after the write")
    assert pair.triton.oracle.w[1].dtype == torch.float64


@pytest.mark.parametrize("w_dtype, g_dtype", [
    (w, g) for w in (FP32, BF16, FP16) for g in (FP32, BF16, FP16) if w != g or w == FP16], ids=str)
@pytest.mark.parametrize("name", ["sam", "fasam", "fsam-cosine"])
def test_a_gradient_is_read_in_its_own_dtype(name, w_dtype, g_dtype, device):
    run([17, BLOCK + 5, 3 * BLOCK], deal(3, GROUPS), name, w_dtype, device, steps=2,
        g_dtype=g_dtype)


@pytest.mark.parametrize("g", [1e5, 1e-9])
def test_a_float32_gradient_of_float16_weights_is_not_rounded_to_them(g, device):
    """Float16 has neither number: one would be a skip, the other a norm of 0."""
    course = Course(parameters([torch.ones(BLOCK + 3, device=device, dtype=FP16)]),
                    deal(1, [dict(rho=0.5, lr=0.1 / g, momentum=0.0)]), "sam", kernels)
    course.first_step([torch.full((BLOCK + 3,), g, device=device)])
    assert course.norm == pytest.approx(g * math.sqrt(BLOCK + 3), rel=1e-5)
    course.second_step([torch.full((BLOCK + 3,), g, device=device)])
    assert course.skipped == 0
    assert torch.equal(course.params[0], torch.full_like(course.params[0], 0.9))


def test_both_passes_have_a_gradient_dtype_of_their_own(device):
    shapes = [17, 2 * BLOCK]
    pair = Pair(normals(shapes, 0, BF16, device), deal(2, GROUPS), "fsam")
    for t, (first, second) in enumerate([(FP32, BF16), (BF16, FP32)]):
        pair.step(normals(shapes, 10 + t, first, device), normals(shapes, 20 + t, second, device),
                  t)


def test_norm_and_climb_give_sums_norm_radius_and_cells(device):
    shapes, groups = [BLOCK + 3, 40], deal(2, [dict(rho=0.25, lr=0.1, sigma=0.5, lmbda=0.9)])
    tensors, grads = (normals(shapes, seed, FP32, device) for seed in (1, 2))
    for name, share in (("sam", 1.0), ("fsam", 1 - 0.5 * 0.1)):
        course = Course(parameters(tensors), groups, name, kernels)
        (own,) = course.spaces
        size = math.sqrt(sum(float(exact(g).square().sum()) for g in grads))
        course.first_step(grads)
        of_d, of_g = exact(own.partials).sum(1).sqrt().tolist()
        assert of_d == pytest.approx(share * size, rel=1e-6)
        assert of_g == (0 if name == "sam" else pytest.approx(size, rel=1e-6))
        assert course.norm == pytest.approx(share * size, rel=1e-6)
        assert float(own.cells.ok) == 1
        assert math.sqrt(float(exact(own.radii[0]).sum())) == pytest.approx(0.25, rel=1e-5)
        assert own.counters.tolist() == [0, 0, 0]
        for slot, w in zip(own.slots, tensors, strict=True):
            assert torch.equal(slot.saved, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fasam", "sam", "fsam-cosine"])
def test_programs_that_walk_several_blocks(name, dtype, device, monkeypatch):
    """With two programs only, every program loops; the tickets and sums must still come out."""
    monkeypatch.setattr(LAUNCHERS[0], "PROGRAMS", 2)
    pair = run(SIZES, deal(len(SIZES), GROUPS), name, dtype, device, steps=2)
    assert pair.triton.spaces[0].partials[0, :2].all()
    assert not pair.triton.spaces[0].partials[:, 2:].any()
    assert pair.triton.spaces[0].counters.tolist() == [0, 0, 0]


def test_more_than_128_parameters_count_their_steps(device):
    """The last program updates the counters 128 slots at a time."""
    pair = run([1] * 131, deal(131, GROUPS), "fsam-official", FP32, device, steps=2)
    (own,) = pair.triton.spaces
    assert (own.steps[0] == 2).all()
    for slot in own.slots:
        assert int(slot.v_steps) == (2 if GROUPS[slot.group]["momentum"] else 0)


def test_two_runs_are_bit_equal(device):
    def course():
        pair = run([BLOCK + 1, 17], deal(2, GROUPS), "fasam", FP32, device, steps=2)
        return [t.clone() for _, t, _ in pair.triton.compared()], pair.triton.norm

    (first, norm1), (second, norm2) = course(), course()
    assert norm1 == norm2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_steps_without_a_climb(dtype, device):
    """step alone is the base optimizer, and leaves m alone; before, between and after."""
    shapes = [20, BLOCK + 1, 2 * BLOCK]
    pair = Pair(normals(shapes, 0, dtype, device), deal(3, GROUPS), "fsam")
    for t in range(4):
        first, second = (normals(shapes, seed + t, dtype, device) for seed in (30, 40))
        if t == 2:
            pair.step(first, second, t)
            continue
        second[t % 3] = None
        pair.second_step(second, f"{t}, plain")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fasam", "fsam-official", "fsam-cosine"])
def test_the_loss_scale_is_divided_out_of_both_passes(name, dtype, device):
    """Each pass by its own scale, before the average, the norm and the weight decay."""
    shapes = [20, BLOCK + 1]
    pair = Pair(normals(shapes, 0, dtype, device), deal(2, GROUPS), name)
    for t in range(2):
        first, second = (normals(shapes, seed + t, dtype, device) for seed in (30, 40))
        pair.first_step([8 * g for g in first], t, scale=8)
        pair.second_step([32 * g for g in second], t, scale=32)


@pytest.mark.parametrize("climb", [True, False])
def test_found_inf_skips_the_step_bit_for_bit(climb, device):
    shapes = [20, BLOCK + 1]
    course = Course(parameters(normals(shapes, 0, FP32, device)), deal(2, GROUPS), "sam", kernels)
    for s in (30, 31):
        course.first_step(normals(shapes, s, FP32, device))
        course.second_step(normals(shapes, s, FP32, device))
    before = [t.clone() for _, t, _ in course.compared()]
    if climb:
        course.first_step(normals(shapes, 50, FP32, device))
    course.second_step(normals(shapes, 51, FP32, device), found_inf=True)
    assert all(torch.equal(t, b) for (_, t, _), b in zip(course.compared(), before, strict=True))
    assert course.skipped == 1


# ---- a direction that is rounding noise


def noisy(device, sigma: float, lmbda=0.6, name="fsam", dtype=FP32) -> tuple[Course, list]:
    """A first climb with m = 0, after which d = (1 - sigma (1 - lmbda)) g."""
    shapes = [20, BLOCK + 1]
    course = Course(parameters(normals(shapes, 0, dtype, device)),
                    deal(2, [dict(rho=100.0, lr=0.1, sigma=sigma, lmbda=lmbda)]), name, kernels)
    before = [p.detach().clone() for p in course.params]
    course.first_step(normals(shapes, 1, dtype, device))
    return course, before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lmbda", [0.6, 0.9, 0.95])
def test_rounding_noise_perturbs_nothing_and_m_goes_on(lmbda, dtype, device):
    """In exact arithmetic d = 0; scaled up to the radius, what is left of it would be a climb."""
    course, before = noisy(device, 1 / (1 - lmbda), lmbda, dtype=dtype)
    (own,) = course.spaces
    of_d, of_g = exact(own.partials).sum(1).sqrt().tolist()
    assert of_d < 1e-5 * of_g
    assert all(torch.equal(p, b) for p, b in zip(course.params, before, strict=True))
    assert not own.radii.any() and float(own.cells.ok) == 1
    assert course.norm == pytest.approx(of_d, rel=1e-6)
    for i, g in enumerate(normals([20, BLOCK + 1], 1, dtype, device)):
        assert torch.allclose(exact(course.state(i, "m")), (1 - lmbda) * exact(g), rtol=1e-6)
    assert (own.steps[0] == 1).all()
    course.second_step(normals([20, BLOCK + 1], 2, dtype, device))
    assert course.skipped == 0


def test_a_small_direction_that_is_no_noise_climbs_by_the_radius(device):
    course, _ = noisy(device, (1 - 2e-5) / 0.4)
    (own,) = course.spaces
    assert math.sqrt(float(exact(own.radii[0]).sum())) == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("backend", [kernels, reference], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name, share, moves", [
    ("fsam", 2.0**-36, False), ("fsam", 1.0001 * 2.0**-36, True), ("sam-full", 2.0**-36, False),
    ("fsam-official", 0.0, False), ("sam", 2.0**-36, True)])
def test_where_noise_ends(name, share, moves, backend, device):
    """At 64 unit roundoffs of ||T g||, the limit included; SAM's own d is g, and never noise."""
    course = Course(parameters(normals([20, BLOCK], 0, FP32, device)),
                    deal(2, [dict(rho=1.0, lr=0.1, sigma=0.5, lmbda=0.5)]), name, backend)
    (own,) = course.spaces
    (p,) = course.passes(normals([20, BLOCK], 1, FP32, device), "g1")
    sums = torch.zeros_like(own.partials)
    sums[0, 5], sums[1, 900] = 3 * share, 3
    before = [w.clone() for w in p.w]
    backend.climb(p, sums)
    assert moves != all(torch.equal(w, b) for w, b in zip(p.w, before, strict=True))
    assert float(own.cells.ok) == 1
    assert course.norm == pytest.approx(math.sqrt(3 * share))


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
    """The kernels run on the storage itself and write nothing around it."""
    size = 2 * BLOCK + 3
    storage = torch.full((size + 9,), 7.0, dtype=dtype, device=device)

    def inside(tensors):
        storage[3:3 + size] = tensors[0]
        return [torch.nn.Parameter(storage[3:3 + size])]

    pair = Pair(normals([size], 0, dtype, device), deal(1, GROUPS), "fsam", make=inside)
    for t in range(2):
        pair.step(normals([size], 30 + t, dtype, device), normals([size], 40 + t, dtype, device), t)
    assert pair.triton.params[0].data_ptr() == storage.data_ptr() + 3 * storage.element_size()
    assert torch.equal(storage[3:3 + size], pair.triton.params[0].detach())
    assert (storage[:3] == 7).all() and (storage[3 + size:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_last_weights(dtype, device):
    shape = (8, 16, 3, 3)  # 1152 elements: a full block and a tail
    w = normals([shape, shape], 0, dtype, device)
    w[0] = w[0].contiguous(memory_format=torch.channels_last)
    pair = Pair(w, deal(2, GROUPS), "fasam")
    for t in range(3):
        pair.step(*(normals([shape, shape], seed + t, dtype, device) for seed in (30, 40)), t)
    assert pair.triton.params[0].is_contiguous(memory_format=torch.channels_last)
    assert pair.triton.state(0, "m").is_contiguous(memory_format=torch.channels_last)


def test_tensors_without_elements(device):
    shapes = [0, 20, (3, 0)]
    pair = Pair(normals(shapes, 0, FP32, device), deal(3, GROUPS), "fsam")
    pair.step(*(normals(shapes, s, FP32, device) for s in (30, 40)))
    run([0], deal(1, GROUPS), "fsam", FP32, device, steps=1)


# ---- missing, zero and bad gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fasam-official", "sam"])
def test_gradients_missing_in_either_pass(name, dtype, device):
    """Parameter 0 always has both, 1 only the first, 2 only the second, 3 none, 4 comes in at step
    1: its averages then start at its own first step."""
    shapes = [20, BLOCK + 1, BLOCK + 1, BLOCK, 40]
    pair = Pair(normals(shapes, 0, dtype, device), deal(5, GROUPS), name)
    start = pair.triton.params[3].detach().clone()
    for t in range(3):
        first, second = (normals(shapes, seed + t, dtype, device) for seed in (30, 40))
        first[2] = first[3] = second[1] = second[3] = None
        if t == 0:
            first[4] = second[4] = None
        pair.step(first, second, t)
    assert torch.equal(pair.triton.params[3].detach(), start)


def test_no_gradient_at_all(device):
    pair = Pair(normals([20, BLOCK], 0, FP32, device), deal(2, GROUPS), "fsam")
    pair.step([None, None], [None, None])
    pair.step(*(normals([20, BLOCK], s, FP32, device) for s in (30, 40)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_zero_norm_moves_nothing(name, dtype, device):
    shapes = [20, BLOCK + 1]
    pair = Pair(normals(shapes, 0, dtype, device), deal(2, GROUPS), name)
    before = [p.detach().clone() for p in pair.triton.params]
    zeros = [torch.zeros_like(t) for t in before]
    pair.triton.first_step(zeros)
    assert all(torch.equal(p, b) for p, b in zip(pair.triton.params, before, strict=True))
    assert pair.triton.norm == 0
    pair.triton.restore()
    pair.step(zeros, normals(shapes, 40, dtype, device))
    assert pair.triton.skipped == 0


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
    counts = course.spaces[0].steps.clone()
    broken = normals(shapes, 50, dtype, device)
    broken[1][-1] = bad
    course.first_step(broken)
    assert all(torch.equal(t, b) for (_, t, _), b in zip(course.compared(), before, strict=True))
    course.second_step(good[1])
    assert all(torch.equal(t, b) for (_, t, _), b in zip(course.compared(), before, strict=True))
    assert torch.equal(course.spaces[0].steps, counts)
    assert course.skipped == 1
    pair.plain.first_step(broken)
    pair.plain.second_step(good[1])
    pair.step(*good, "after")


def test_a_norm_that_overflows_float32_is_a_skip(device):
    course = Course(parameters(normals([20], 0, FP32, device)), deal(1, GROUPS), "sam", kernels)
    before = course.params[0].detach().clone()
    huge = [torch.full((20,), 1e30, device=device)]
    course.first_step(huge)
    course.second_step(huge)
    assert course.skipped == 1
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

    pair = Pair(tensors, groups, "fsam")
    for t in range(2):
        pair.step(normals(shapes, 30 + t, dtype, device), normals(shapes, 40 + t, dtype, device), t)


@pytest.mark.parametrize("name", ["fsam", "fsam-cosine"])
def test_two_dtypes_share_one_norm(name, device):
    """A space per dtype, but the norm is over both."""
    shapes = [20, BLOCK + 1, 40, BLOCK]
    mixed = [t.to(DTYPES[i % 2]) for i, t in enumerate(normals(shapes, 0, FP32, device))]
    pair = Pair(mixed, deal(4, GROUPS), name)
    assert len(pair.triton.spaces) == 2
    for t in range(2):
        grads = [g.to(w.dtype) for g, w in zip(normals(shapes, 30 + t, FP32, device), mixed,
                                               strict=True)]
        pair.first_step(grads, t)
        for course in pair:
            for own in course.spaces:
                assert float(own.cells.norm) == pytest.approx(course.oracle.norm, rel=1e-6)
        pair.second_step(grads, t)


def test_changed_hyper_parameters_are_used_at_once(device):
    pair = Pair(normals([40], 0, FP32, device), deal(1, GROUPS), "fsam")
    for t in range(3):
        change = dict(lr=0.1 / (t + 1), rho=0.3 * t, momentum=0.5 + 0.1 * t, lmbda=0.2 * t)
        for course in pair:
            course.groups[0].update(change)
            course.oracle.h[0].update(change)
        pair.step(normals([40], 30 + t, FP32, device), normals([40], 40 + t, FP32, device), t)


# ---- the tables and the interface


def test_the_kernels_columns_and_cells_are_the_tables_own():
    unused = {"dampening", "given_sigma"}  # 1 - dampening, and sigma as it is, are enough
    for name, i in COLUMN.items():
        assert name in unused or getattr(common, name.upper()).value == i, name
    assert common.HYPER.value == len(COLUMNS)
    for names in (space.CONTROL, space.COUNTERS):
        assert [getattr(common, name.upper()).value for name in names] == list(range(len(names)))


def test_a_block_starts_at_16_bytes_of_the_flat_buffers():
    assert BLOCK % space.PAD == 0


def test_both_backends_have_the_same_functions_and_arguments():
    for name in ("dots", "norm", "climb", "step"):
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (kernels, reference))
        assert list(ours.parameters) == list(theirs.parameters), name
