"""The compiled code gives the reference's bits where arithmetic leaves no choice, whatever the
schedule, and touches nothing but the tensors it is given."""

from itertools import product

import pytest
import torch

from fastsam import FriendlySAM, MomentumSAM
from fastsam.kernels import triton as kernels

from ...helpers.drawn import normals
from ...helpers.variants import VARIANTS
from .steps import BLOCK, Steps, gaps, signs, untouched_around

SIZES = [1, 17, BLOCK - 1, 3 * BLOCK, BLOCK + 1]
NAMES = ["sam", "asam-weights", "fisher", "fsam", "fsam-official", "fasam", "fsam-cosine"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SGD = dict(base=torch.optim.SGD, momentum=0.75, weight_decay=0.5)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    words = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(words), b.view(words))


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype, masters", [
    (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True),
    (torch.float16, False), (torch.float16, True)], ids=str)
@pytest.mark.parametrize("name", ["sam", "fsam", "fsam-official"])
def test_the_reference_s_bits_where_the_norm_is_exact(executed, name, dtype, masters):
    """All but the norm's sum rounds once per operation, in the reference's order."""
    sizes = [4, 60, BLOCK]

    def course(backend):
        steps = steps_of(name, normals(sizes, dtype=dtype), backend, **SGD, master_weights=masters)
        return steps.run(sizes, steps=1, draw=signs)

    assert equal(course("triton"), course("reference"))


def steps_of(name: str, tensors, backend: str, **kwargs) -> Steps:
    """A variant's, whose lmbda is a power of two."""
    of = VARIANTS[name]
    exactly = dict(lmbda=0.5) if of.cls is FriendlySAM else {}
    return Steps(tensors, backend, of.cls, **of.own, **exactly, **kwargs)


def few_for_every_change():
    """(method, base, dtype): all, and most of them for `make prove`."""
    few = {("sam", "sgd", torch.bfloat16), ("fsam", "adamw", torch.float32),
           ("fsam-official", "sgd", torch.float16), ("fasam", "sgd", torch.float32),
           ("fsam-cosine", "sgd", torch.bfloat16)}
    bases = dict(sgd=SGD, adamw=dict(base=torch.optim.AdamW, lr=1e-2))
    for name, base, dtype in product(NAMES, bases, DTYPES):
        marks = () if (name, base, dtype) in few else pytest.mark.long
        yield pytest.param(name, bases[base], dtype, id=f"{name}-{base}-{dtype}", marks=marks)


@pytest.mark.parametrize("name, base, dtype", list(few_for_every_change()))
def test_nothing_but_the_tensors_elements_is_touched(executed, name, base, dtype):
    steps = steps_of(name, normals(SIZES, dtype=dtype), "triton", **base)
    executed.gaps += gaps(steps.opt)
    seen = steps.run(SIZES, steps=1)
    executed.gaps[:] = gaps(steps.opt)  # the base optimizer's state is there now
    seen += steps.run(SIZES, steps=1)
    assert all(x.isfinite().all() for x in seen)
    assert all(untouched_around(p) for p in steps.params)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("offset", [1, 2])
def test_neither_is_it_from_misaligned_tensors(executed, offset, dtype):
    sizes = [BLOCK + 5, 2 * BLOCK]
    steps = Steps(normals(sizes, dtype=dtype), offset=offset, **SGD)
    plain = Steps(normals(sizes, dtype=dtype), "reference", offset=offset, **SGD)
    executed.gaps += gaps(steps.opt)
    for course in (steps, plain):
        course.climb(signs(sizes, 1, dtype), 3)
        course.step(signs(sizes, 2, dtype), offset)
    assert all(untouched_around(p) for p in steps.params)
    close = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for ours, theirs in zip(steps.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_schedule_changes_no_bit(executed, dtype):
    """Warps as one, or one by one in an order drawn anew each time."""
    sizes = [BLOCK + 5, 40]

    def course():
        return Steps(normals(sizes, dtype=dtype), **SGD).run(sizes, steps=1)

    expected = course()
    executed.together = False
    try:
        assert all(equal(course(), expected) for _ in range(2))
    finally:
        executed.together = True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pgd_s_kernels_touch_their_images_alone(executed, dtype):
    """The last block and the last row are partial ones."""
    for step in (kernels.linf_step, kernels.l2_step):
        x, g = torch.rand(3, 1031).to(dtype), torch.randn(3, 1031).to(dtype)
        x_adv = x.clone()
        step(x_adv, g, x, 0.1, 0.05)
        assert x_adv.isfinite().all() and not torch.equal(x_adv, x)
    assert {name for name, _ in executed.traffic} == {"linf_kernel", "l2_kernel"}


@pytest.mark.parametrize("base, dtype, masters", [
    (SGD, torch.float32, False), (dict(base=torch.optim.AdamW, lr=1e-2), torch.bfloat16, True)],
    ids=["sgd", "adamw"])
def test_the_norm_that_a_step_leaves_has_the_bits_of_one_that_is_taken(executed, base, dtype,
                                                                       masters):
    """From misaligned gradients, and from none, too."""
    sizes = [BLOCK + 7, 40, 2 * BLOCK]
    steps = Steps(normals(sizes, dtype=dtype), "triton", MomentumSAM, rho=0.3,
                  master_weights=masters, **base)
    for offset in (0, 1):
        steps.climb(normals(sizes, 1, dtype))
        grads = normals(sizes, 2 + offset, dtype)
        steps._set(grads, offset)
        if offset:
            steps.params[1].grad = None
        steps.opt.second_step(zero_grad=True)
        layout = steps.opt._phase.layout
        assert layout.has_norm()
        left = steps.spaces[0].partials[0].clone()
        layout.keep_norm(None)
        steps.opt.first_step()
        assert left.any() and same_bits(left, steps.spaces[0].partials[0])
        steps.opt.restore()
