"""One contract for every backend, in every variant, dtype and layout: against the float64 oracle.

The rule: the error of one step, for weights, m and v alike, is at most twice the error of plain
PyTorch in the same dtype (fastsam.reference), plus a few roundings for where that one is exact by
luck. Everything starts from the same weights, state and gradients at every step. The Triton kernels
run on a GPU, or on the CPU in the interpreter; numba's on the CPU.
"""

import inspect
import math
from importlib import import_module
from itertools import product

import pytest
import torch

from fastsam import reference
from fastsam.choose import MODULES

from ..helpers.drawn import normals
from ..helpers.oracle import exact
from ..helpers.pairs import (
    BF16,
    BLOCK,
    FP16,
    FP32,
    SIZES,
    Pair,
    judge,
    parameters,
    run,
    ulp,
)
from ..helpers.passes import Passes
from ..helpers.variants import ADAM_GROUPS, GROUPS, VARIANTS, deal

# the same sizes with weights and biases among them, which ASAM's "weights" form tells apart
SHAPES = [1, (3, 5), 16, BLOCK - 1, (2, BLOCK // 2), BLOCK + 1, (17, 241)]
DTYPES = [FP32, BF16]

# the interpreter is NumPy, which warns where inf and NaN are put in on purpose
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow):RuntimeWarning")


@pytest.fixture(params=["triton", "numba"])
def backend(request):
    if request.param != "reference":
        pytest.importorskip(request.param, reason=f"these kernels need {request.param}")
    return import_module(MODULES[request.param])


# ---- the mathematics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_over_several_sizes_and_groups(name, dtype, backend, device):
    run(backend, SHAPES, deal(len(SHAPES), GROUPS), name, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_alone(size, dtype, backend, device):
    run(backend, [size], deal(1, GROUPS), "fsam", dtype, device, steps=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", [
    {}, dict(weight_decay=0.1), dict(momentum=0.9), dict(momentum=0.9, dampening=0.4),
    dict(momentum=0.9, nesterov=True), dict(momentum=0.9, dampening=0.4, weight_decay=0.1),
    dict(momentum=0.9, nesterov=True, weight_decay=0.1),
], ids=lambda base: "-".join(base) or "plain")
def test_every_form_of_sgd(base, dtype, backend, device):
    group = dict(rho=0.2, lr=0.1, momentum=0, dampening=0, weight_decay=0, nesterov=False)
    run(backend, [33, BLOCK + 5], deal(2, [{**group, **base}]), "sam", dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["adam", "adamw"])
@pytest.mark.parametrize("name", ["sam", "fasam-official"])
def test_adam_and_adamw(name, base, dtype, backend, device):
    run(backend, SHAPES, deal(len(SHAPES), ADAM_GROUPS), name, dtype, device, steps=4, base=base)


@pytest.mark.parametrize("name, base", [
    *((name, "sgd") for name in VARIANTS), ("sam", "adamw"), ("fasam-official", "adamw")])
@pytest.mark.interpreted(name=["sam", "fsam", "fasam-official"])
def test_float32_masters_of_16_bit_weights(name, base, backend, device):
    """The step starts from the master, to float32's precision; the model sees it rounded."""
    groups = deal(len(SHAPES), GROUPS if base == "sgd" else ADAM_GROUPS)
    pair = run(backend, SHAPES, groups, name, BF16, device, base=base, masters=True)
    for i, p in enumerate(pair.ours.params):
        master = pair.ours.weight(i)
        assert master.dtype == FP32
        assert not torch.equal(master, master.bfloat16().float())
        assert ((master - p.float()).abs() <= ulp(master, BF16)).all()


@pytest.mark.parametrize("climbs", [True, False])
def test_a_weight_written_by_someone_else_becomes_the_master(climbs, backend, device):
    shapes = [20, BLOCK + 1]
    pair = run(backend, shapes, deal(2, GROUPS), "fsam", BF16, device, steps=1, masters=True)
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
    assert pair.ours.oracle.w[1].dtype == torch.float64


def pairs_of_dtypes():
    """Of weights and gradients. Numba compiles for each: most of them for `make prove`."""
    dtypes = FP32, BF16, FP16
    for case in product(["triton", "numba"], ["sam", "fasam", "fsam-cosine"], dtypes, dtypes):
        backend, name, w, g = case
        if w != g or w == FP16:
            few = backend == "triton" or (name == "sam" and FP16 not in (w, g))
            yield pytest.param(*case, marks=[pytest.mark.long] * (not few))


@pytest.mark.parametrize("backend, name, w_dtype, g_dtype", list(pairs_of_dtypes()), ids=str,
                         indirect=["backend"])
def test_a_gradient_is_read_in_its_own_dtype(name, w_dtype, g_dtype, backend, device):
    run(backend, [17, BLOCK + 5, 3 * BLOCK], deal(3, GROUPS), name, w_dtype, device, steps=2,
        g_dtype=g_dtype)


@pytest.mark.parametrize("g", [1e5, 1e-9])
def test_a_float32_gradient_of_float16_weights_is_not_rounded_to_them(g, backend, device):
    """Float16 has neither number: one would be a skip, the other a norm of 0."""
    course = Passes(parameters([torch.ones(BLOCK + 3, device=device, dtype=FP16)]),
                    deal(1, [dict(rho=0.5, lr=0.1 / g, momentum=0.0)]), "sam", backend)
    course.first_step([torch.full((BLOCK + 3,), g, device=device)])
    assert course.norm == pytest.approx(g * math.sqrt(BLOCK + 3), rel=1e-5)
    course.second_step([torch.full((BLOCK + 3,), g, device=device)])
    assert course.skipped == 0
    assert torch.equal(course.params[0], torch.full_like(course.params[0], 0.9))


def test_both_passes_have_a_gradient_dtype_of_their_own(backend, device):
    shapes = [17, 2 * BLOCK]
    pair = Pair(backend, normals(shapes, 0, BF16, device), deal(2, GROUPS), "fsam")
    for t, (first, second) in enumerate([(FP32, BF16), (BF16, FP32)]):
        pair.step(normals(shapes, 10 + t, first, device), normals(shapes, 20 + t, second, device),
                  t)


def test_norm_and_climb_give_sums_norm_radius_and_cells(backend, device):
    shapes, groups = [BLOCK + 3, 40], deal(2, [dict(rho=0.25, lr=0.1, sigma=0.5, lmbda=0.9)])
    tensors, grads = (normals(shapes, seed, FP32, device) for seed in (1, 2))
    for name, share in (("sam", 1.0), ("fsam", 1 - 0.5 * 0.1)):
        course = Passes(parameters(tensors), groups, name, backend)
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


def test_two_runs_are_bit_equal(backend, device):
    def course():
        pair = run(backend, [BLOCK + 1, 17], deal(2, GROUPS), "fasam", FP32, device, steps=2)
        return [t.clone() for _, t, _ in pair.ours.compared()], pair.ours.norm

    (first, norm1), (second, norm2) = course(), course()
    assert norm1 == norm2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_steps_without_a_climb(dtype, backend, device):
    """step alone is the base optimizer, and leaves m alone; before, between and after."""
    shapes = [20, BLOCK + 1, 2 * BLOCK]
    pair = Pair(backend, normals(shapes, 0, dtype, device), deal(3, GROUPS), "fsam")
    for t in range(4):
        first, second = (normals(shapes, seed + t, dtype, device) for seed in (30, 40))
        if t == 2:
            pair.step(first, second, t)
            continue
        second[t % 3] = None
        pair.second_step(second, f"{t}, plain")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fasam", "fsam-official", "fsam-cosine"])
def test_the_loss_scale_is_divided_out_of_both_passes(name, dtype, backend, device):
    """Each pass by its own scale, before the average, the norm and the weight decay."""
    shapes = [20, BLOCK + 1]
    pair = Pair(backend, normals(shapes, 0, dtype, device), deal(2, GROUPS), name)
    for t in range(2):
        first, second = (normals(shapes, seed + t, dtype, device) for seed in (30, 40))
        pair.first_step([8 * g for g in first], t, scale=8)
        pair.second_step([32 * g for g in second], t, scale=32)


@pytest.mark.parametrize("climb", [True, False])
def test_found_inf_skips_the_step_bit_for_bit(climb, backend, device):
    shapes = [20, BLOCK + 1]
    course = Passes(parameters(normals(shapes, 0, FP32, device)), deal(2, GROUPS), "sam", backend)
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


def noisy(backend, device, sigma: float, lmbda=0.6, name="fsam", dtype=FP32) -> tuple[Passes, list]:
    """A first climb with m = 0, after which d = (1 - sigma (1 - lmbda)) g."""
    shapes = [20, BLOCK + 1]
    course = Passes(parameters(normals(shapes, 0, dtype, device)),
                    deal(2, [dict(rho=100.0, lr=0.1, sigma=sigma, lmbda=lmbda)]), name, backend)
    before = [p.detach().clone() for p in course.params]
    course.first_step(normals(shapes, 1, dtype, device))
    return course, before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lmbda", [0.6, 0.9, 0.95])
def test_rounding_noise_perturbs_nothing_and_m_goes_on(lmbda, dtype, backend, device):
    """In exact arithmetic d = 0; scaled up to the radius, what is left of it would be a climb."""
    course, before = noisy(backend, device, 1 / (1 - lmbda), lmbda, dtype=dtype)
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


def test_a_small_direction_that_is_no_noise_climbs_by_the_radius(backend, device):
    course, _ = noisy(backend, device, (1 - 2e-5) / 0.4)
    (own,) = course.spaces
    assert math.sqrt(float(exact(own.radii[0]).sum())) == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("backend", ["triton", "numba", "reference"], indirect=True)
@pytest.mark.parametrize("name, share, moves", [
    ("fsam", 2.0**-36, False), ("fsam", 1.0001 * 2.0**-36, True), ("sam-full", 2.0**-36, False),
    ("fsam-official", 0.0, False), ("sam", 2.0**-36, True)])
def test_where_noise_ends(name, share, moves, backend, device):
    """At 64 unit roundoffs of ||T g||, the limit included; SAM's own d is g, and never noise."""
    course = Passes(parameters(normals([20, BLOCK], 0, FP32, device)),
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
def test_misaligned_gradients(offset, dtype, backend, device):
    """Views into a larger storage, as gradient buckets are: read in place, neighbours unread."""
    shapes = [BLOCK + 5, 4 * BLOCK]
    pair = Pair(backend, normals(shapes, 0, dtype, device), deal(2, GROUPS), "fasam")
    for t in range(2):
        grads = []
        for g in normals(shapes, 30 + t, dtype, device):
            bucket = torch.full((offset + len(g) + 7,), math.nan, dtype=dtype, device=device)
            bucket[offset:offset + len(g)] = g
            grads.append(bucket[offset:offset + len(g)])
            assert grads[-1].data_ptr() % 16
        pair.step(grads, grads, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_weights_in_a_larger_storage(dtype, backend, device):
    """The kernels run on the storage itself and write nothing around it."""
    size = 2 * BLOCK + 3
    storage = torch.full((size + 9,), 7.0, dtype=dtype, device=device)

    def inside(tensors):
        storage[3:3 + size] = tensors[0]
        return [torch.nn.Parameter(storage[3:3 + size])]

    pair = Pair(backend, normals([size], 0, dtype, device), deal(1, GROUPS), "fsam", make=inside)
    for t in range(2):
        pair.step(normals([size], 30 + t, dtype, device), normals([size], 40 + t, dtype, device), t)
    assert pair.ours.params[0].data_ptr() == storage.data_ptr() + 3 * storage.element_size()
    assert torch.equal(storage[3:3 + size], pair.ours.params[0].detach())
    assert (storage[:3] == 7).all() and (storage[3 + size:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_last_weights(dtype, backend, device):
    shape = (8, 16, 3, 3)  # 1152 elements: a full block and a tail
    w = normals([shape, shape], 0, dtype, device)
    w[0] = w[0].contiguous(memory_format=torch.channels_last)
    pair = Pair(backend, w, deal(2, GROUPS), "fasam")
    for t in range(3):
        pair.step(*(normals([shape, shape], seed + t, dtype, device) for seed in (30, 40)), t)
    assert pair.ours.params[0].is_contiguous(memory_format=torch.channels_last)
    assert pair.ours.state(0, "m").is_contiguous(memory_format=torch.channels_last)


def test_tensors_without_elements(backend, device):
    shapes = [0, 20, (3, 0)]
    pair = Pair(backend, normals(shapes, 0, FP32, device), deal(3, GROUPS), "fsam")
    pair.step(*(normals(shapes, s, FP32, device) for s in (30, 40)))
    run(backend, [0], deal(1, GROUPS), "fsam", FP32, device, steps=1)


# ---- missing, zero and bad gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fasam-official", "sam"])
def test_gradients_missing_in_either_pass(name, dtype, backend, device):
    """Parameter 0 always has both, 1 only the first, 2 only the second, 3 none, 4 comes in at step
    1: its averages then start at its own first step."""
    shapes = [20, BLOCK + 1, BLOCK + 1, BLOCK, 40]
    pair = Pair(backend, normals(shapes, 0, dtype, device), deal(5, GROUPS), name)
    start = pair.ours.params[3].detach().clone()
    for t in range(3):
        first, second = (normals(shapes, seed + t, dtype, device) for seed in (30, 40))
        first[2] = first[3] = second[1] = second[3] = None
        if t == 0:
            first[4] = second[4] = None
        pair.step(first, second, t)
    assert torch.equal(pair.ours.params[3].detach(), start)


def test_no_gradient_at_all(backend, device):
    pair = Pair(backend, normals([20, BLOCK], 0, FP32, device), deal(2, GROUPS), "fsam")
    pair.step([None, None], [None, None])
    pair.step(*(normals([20, BLOCK], s, FP32, device) for s in (30, 40)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_zero_norm_moves_nothing(name, dtype, backend, device):
    shapes = [20, BLOCK + 1]
    pair = Pair(backend, normals(shapes, 0, dtype, device), deal(2, GROUPS), name)
    before = [p.detach().clone() for p in pair.ours.params]
    zeros = [torch.zeros_like(t) for t in before]
    pair.ours.first_step(zeros)
    assert all(torch.equal(p, b) for p, b in zip(pair.ours.params, before, strict=True))
    assert pair.ours.norm == 0
    pair.ours.restore()
    pair.step(zeros, normals(shapes, 40, dtype, device))
    assert pair.ours.skipped == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["sam", "fasam", "fsam-official"])
def test_a_gradient_that_is_not_finite_skips_bit_for_bit(name, bad, dtype, backend, device):
    shapes = [20, BLOCK + 1]
    pair = Pair(backend, normals(shapes, 0, dtype, device), deal(2, GROUPS), name)
    good = [normals(shapes, seed, dtype, device) for seed in (30, 40)]
    pair.step(*good, "before")
    course = pair.ours
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


def test_a_norm_that_overflows_float32_is_a_skip(backend, device):
    course = Passes(parameters(normals([20], 0, FP32, device)), deal(1, GROUPS), "sam", backend)
    before = course.params[0].detach().clone()
    huge = [torch.full((20,), 1e30, device=device)]
    course.first_step(huge)
    course.second_step(huge)
    assert course.skipped == 1
    assert torch.equal(course.params[0].detach(), before)


# ---- groups


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_that_is_not_perturbed_and_one_of_rho_zero(dtype, backend, device):
    """perturb=False stays out of the norm and of m; rho=0 counts in both but does not move."""
    shapes = [20, BLOCK + 1, 33]
    groups = deal(3, [{**GROUPS[0], "perturb": False}, {**GROUPS[1], "rho": 0.0}, GROUPS[2]])
    tensors = normals(shapes, 0, dtype, device)
    pair = Pair(backend, tensors, groups, "fsam")
    pair.ours.first_step(normals(shapes, 30, dtype, device))
    p, q, r = pair.ours.params
    assert torch.equal(p.detach(), tensors[0]) and torch.equal(q.detach(), tensors[1])
    assert not torch.equal(r.detach(), tensors[2])
    assert not pair.ours.state(0, "m").any() and pair.ours.state(1, "m").any()

    pair = Pair(backend, tensors, groups, "fsam")
    for t in range(2):
        pair.step(normals(shapes, 30 + t, dtype, device), normals(shapes, 40 + t, dtype, device), t)


@pytest.mark.parametrize("name", ["fsam", "fsam-cosine"])
def test_two_dtypes_share_one_norm(name, backend, device):
    """A space per dtype, but the norm is over both."""
    shapes = [20, BLOCK + 1, 40, BLOCK]
    mixed = [t.to(DTYPES[i % 2]) for i, t in enumerate(normals(shapes, 0, FP32, device))]
    pair = Pair(backend, mixed, deal(4, GROUPS), name)
    assert len(pair.ours.spaces) == 2
    for t in range(2):
        grads = [g.to(w.dtype) for g, w in zip(normals(shapes, 30 + t, FP32, device), mixed,
                                               strict=True)]
        pair.first_step(grads, t)
        for course in pair:
            for own in course.spaces:
                assert float(own.cells.norm) == pytest.approx(course.oracle.norm, rel=1e-6)
        pair.second_step(grads, t)


def test_changed_hyper_parameters_are_used_at_once(backend, device):
    pair = Pair(backend, normals([40], 0, FP32, device), deal(1, GROUPS), "fsam")
    for t in range(3):
        change = dict(lr=0.1 / (t + 1), rho=0.3 * t, momentum=0.5 + 0.1 * t, lmbda=0.2 * t)
        for course in pair:
            course.groups[0].update(change)
            course.oracle.h[0].update(change)
        pair.step(normals([40], 30 + t, FP32, device), normals([40], 40 + t, FP32, device), t)


# ---- the interface


def test_a_backend_has_the_reference_s_functions_and_arguments(backend):
    for name in ("dots", "norm", "climb", "step"):
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (backend, reference))
        assert list(ours.parameters) == list(theirs.parameters), name
