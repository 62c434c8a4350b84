"""PGD's fused steps against bench/attacks/pgd.py's plain expression and a float64 oracle: on a GPU,
or on the CPU in the interpreter. And what the compiler makes of them, in a process of its own.

The linf step in float32 gives plain PyTorch's bits. Elsewhere the error is at most twice that of
plain PyTorch in the same dtype, plus a few float32 roundings.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from bench.attacks import pgd as attacks  # noqa: E402
from bench.attacks.pgd import Attack, pgd, plain_climb  # noqa: E402
from fastsam.kernels import triton as kernels  # noqa: E402

launchers = importlib.import_module("fastsam.kernels.triton.pgd")
ROOT = Path(__file__).parents[2]
LINF = Attack("linf", 8 / 255, 3 / 255, 10)
L2 = Attack("l2", 0.5, 0.2, 10)
BOTH = pytest.mark.parametrize("attack", [LINF, L2], ids=lambda a: a.norm)
STEPS = {"linf": kernels.linf_step, "l2": kernels.l2_step}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 15, 16, 1023, 1024, 1025, launchers.SAMPLE_BLOCK + 1]
IMAGES = (7, 3, 32, 32)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# the interpreter is NumPy, which warns where inf and NaN are put in on purpose
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow):RuntimeWarning")


def draw(shape, attack, dtype, device, layout=torch.contiguous_format, seed=0):
    """x_adv, g, x: 8-bit images, half of whose pixels are at 0 or 1; deltas inside, on (l_inf) and
    beyond (l2) the ball; gradients of very different size per sample, every tenth one zero."""
    rng = torch.Generator().manual_seed(seed)
    x = (torch.randint(-128, 384, shape, generator=rng).clamp(0, 255) / 255)
    delta = torch.randn(shape, generator=rng)
    radius = 1.6 - 0.2 * torch.arange(len(x)).view(-1, 1, 1, 1)
    if attack.norm == "linf":
        delta = (attack.eps * delta).clamp(-attack.eps, attack.eps) * radius.clamp_max(1)
    else:
        delta *= 2 * attack.eps * radius / attacks.l2_norm(delta)  # before the box cuts it
    g = torch.randn(shape, generator=rng) * 10.0 ** torch.randint(
        -3, 3, (len(x), 1, 1, 1), generator=rng)
    g[..., 1::10] = 0
    return [t.to(device, dtype).contiguous(memory_format=layout)
            for t in ((x + delta).clamp(0, 1), g, x)]


def fused(x_adv, g, x, attack):
    """The step's result; x_adv's memory and layout, and nothing else, are written."""
    moved, before = x_adv.clone(), [g.clone(), x.clone()]
    assert STEPS[attack.norm](moved, g, x, attack.eps, attack.alpha) is None
    assert all(torch.equal(t, b) for t, b in zip((g, x), before, strict=True))
    assert moved.stride() == x_adv.stride()
    return moved


def exact(x_adv, g, x, attack):
    """The step in float64, from Madry et al.'s formula."""
    x_adv, g, x = (t.double().cpu().numpy() for t in (x_adv, g, x))
    rest = tuple(range(1, x.ndim))

    def norms(t):
        norm = np.sqrt((t * t).sum(axis=rest, keepdims=True))
        return np.where(norm == 0, 1, norm)

    if attack.norm == "linf":
        delta = np.clip(x_adv + attack.alpha * np.sign(g) - x, -attack.eps, attack.eps)
    else:
        delta = x_adv - x + attack.alpha * g / norms(g)
        delta = delta * np.minimum(1, attack.eps / norms(delta))
    return torch.from_numpy(np.clip(x + delta, 0, 1))


def error(actual, expected) -> torch.Tensor:
    return (actual.double().cpu() - expected).abs()


def judge(moved, x_adv, g, x, attack) -> None:
    """Hold `moved` to twice plain PyTorch's error, each element, and a few float32 roundings."""
    expected = exact(x_adv, g, x, attack)
    bad = float(error(plain_climb(x_adv, g, x, attack), expected).max())
    assert math.isfinite(bad)
    allowed = 2 * bad + 4 * torch.finfo(torch.float32).eps
    if x.dtype == torch.bfloat16 and kernels.INTERPRETED:  # the interpreter truncates
        allowed = allowed + torch.finfo(x.dtype).eps * 2.0 ** expected.clamp_min(
            1e-30).log2().floor()
    found = error(moved, expected)
    assert (found <= allowed).all(), f"error {float(found.max()):.3g}, plain PyTorch's {bad:.3g}"


# ---- the mathematics


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, n, dtype, attack, device):
    batch = draw((n, 1, 1, size), attack, dtype, device, seed=size)
    moved = fused(*batch, attack)
    assert moved.min() >= 0 and moved.max() <= 1
    judge(moved, *batch, attack)
    if attack.norm == "linf" and dtype == torch.float32:
        assert torch.equal(moved, plain_climb(*batch, attack))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_images_in_both_layouts(layout, dtype, attack, device):
    batch = draw(IMAGES, attack, dtype, device, layout)
    moved = fused(*batch, attack)
    judge(moved, *batch, attack)
    assert moved.is_contiguous(memory_format=layout)
    if attack.norm == "linf" and dtype == torch.float32:
        assert torch.equal(moved, plain_climb(*batch, attack))
    delta = error(moved, batch[2].double().cpu()).flatten(1)
    rounding = torch.full_like(delta, torch.finfo(dtype).eps)
    radius, slack = (t.norm(dim=1, p=math.inf if attack.norm == "linf" else 2)
                     for t in (delta, rounding))
    assert (radius <= attack.eps + slack).all()


def test_the_drawn_images_exercise_both_projections(device):
    """Otherwise the tests above would pass without them."""
    for attack in (LINF, L2):
        x_adv, g, x = (t.double().cpu() for t in draw(IMAGES, attack, torch.float32, device))
        free = x_adv - x + attack.alpha * (
            g.sign() if attack.norm == "linf" else g / attacks.l2_norm(g))
        size = free.abs() if attack.norm == "linf" else attacks.l2_norm(free)
        assert (size > 1.05 * attack.eps).any() and (size < 0.95 * attack.eps).any()
        clipped = (x + free < 0) | (x + free > 1)
        assert 0.1 < clipped.double().mean() < 0.9


def test_the_linf_step_in_numbers(device):
    """Inside, on and off the ball, at 0 and at 1; all values are exact in float32."""
    eps, alpha = 1 / 8, 1 / 32
    rows = [  # x, x_adv, g, expected
        (0.5, 0.5, 3.0, 0.53125), (0.5, 0.5, -1e-30, 0.46875), (0.5, 0.5, 0.0, 0.5),
        (0.5, 0.625, 1.0, 0.625), (0.5, 0.625, -1.0, 0.59375), (0.5, 0.625, 0.0, 0.625),
        (0.5, 0.375, -1.0, 0.375), (0.5, 0.609375, 2.0, 0.625), (0.5, 0.75, -1.0, 0.625),
        (0.0, 0.0, -1.0, 0.0), (0.0, 0.0, 1.0, 0.03125), (0.015625, 0.03125, -5.0, 0.0),
        (1.0, 1.0, 1.0, 1.0), (1.0, 1.0, -1.0, 0.96875), (0.984375, 0.984375, 1.0, 1.0),
    ]
    x, x_adv, g, expected = torch.tensor(rows, device=device).t().unsqueeze(0).unbind(1)
    x, x_adv, g = (t.contiguous() for t in (x, x_adv, g))
    kernels.linf_step(x_adv, g, x, eps, alpha)
    assert torch.equal(x_adv, expected)


def test_the_l2_step_in_numbers(device):
    """3-4-5 triangles of dyadic numbers, whose norms float32 holds exactly; eps = 5/16."""
    rows = [  # x, x_adv, g, expected; one sample each
        ([1 / 4, 1 / 4], [7 / 16, 1 / 2], [0, 0], [7 / 16, 1 / 2]),  # on the ball, no gradient
        ([1 / 4, 1 / 4], [5 / 8, 3 / 4], [0, 0], [7 / 16, 1 / 2]),  # twice the radius: halved
        ([1 / 4, 1 / 4], [1 / 4, 1 / 4], [-8, 0], [1 / 8, 1 / 4]),  # alpha along an axis
        ([1 / 4, 1 / 4], [1 / 4, 1 / 4], [0, 1e-4], [1 / 4, 3 / 8]),  # whatever g's size
        ([1 / 4, 1 / 4], [1 / 4, 7 / 16], [0, 2], [1 / 4, 9 / 16]),  # exactly onto the ball
        ([1 / 4, 1 / 4], [1 / 4, 1 / 2], [0, 2], [1 / 4, 9 / 16]),  # beyond it: back
        ([1 / 16, 1 / 4], [1 / 16, 1 / 4], [-8, 0], [0, 1 / 4]),  # cut at 0
        ([1, 15 / 16], [1, 15 / 16], [0, 8], [1, 1]),  # cut at 1
    ]
    x, x_adv, g, expected = torch.tensor(rows, device=device).unbind(1)
    x, x_adv, g = (t.contiguous() for t in (x, x_adv, g))
    kernels.l2_step(x_adv, g, x, 5 / 16, 1 / 8)
    assert torch.equal(x_adv, expected)


@BOTH
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-12, 1e-6, 1e6, 1e18, 1e30, 1e36])
def test_the_gradients_size_does_not_matter(scale, attack, device):
    """Where its squares are no float32 numbers, and where it is none but a denormal one itself."""
    x_adv, g, x = draw((5, 1, 1, 300), attack, torch.float32, device)
    g = g.sign() * (1 + g.abs() / g.abs().max())  # between 1 and 2: denormals keep the directions
    expected = exact(x_adv, g, x, attack)
    small = (g.double() * scale).float()
    if scale < 1e-38:  # denormals are few: what they hold is what counts
        expected = exact(x_adv, small, x, attack)
    for step in (fused, plain_climb):
        assert error(step(x_adv, small, x, attack), expected).max() < 1e-6


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradients_move_nothing(dtype, attack, device):
    """x in 64ths and delta in 256ths inside the ball: nothing rounds in any of the dtypes."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(1, 33, IMAGES, generator=rng) / 64
    x_adv = x.clone()
    x_adv[:, 0, 0] += torch.randint(-4, 5, IMAGES[-1:], generator=rng) / 256
    x_adv, x = x_adv.to(device, dtype), x.to(device, dtype)
    assert torch.equal(fused(x_adv, torch.zeros_like(x), x, attack), x_adv)


@BOTH
def test_integers_and_a_negative_alpha_are_numbers_too(attack, device):
    """Triton would make constants of the integers 0 and 1."""
    for eps, alpha in ((1, 1), (0, 1), (1, 0), (attack.eps, -attack.alpha)):
        other = Attack(attack.norm, eps, alpha, 1)
        batch = draw((3, 1, 1, 40), attack, torch.float32, device)
        judge(fused(*batch, other), *batch, other)


@BOTH
def test_nan_and_inf_do_as_in_plain_pytorch(attack, device):
    x_adv, g, x = draw((6, 1, 1, 40), attack, torch.float32, device)
    g[0, ..., 3], g[1, ..., 3], g[2, ..., 3] = math.nan, math.inf, -math.inf
    x_adv[3, ..., 3], x[4, ..., 3] = math.nan, math.nan
    moved, plain = x_adv.clone(), plain_climb(x_adv, g, x, attack)
    STEPS[attack.norm](moved, g, x, attack.eps, attack.alpha)
    assert torch.equal(moved.isnan(), plain.isnan())
    assert moved[5].isfinite().all()
    assert torch.allclose(moved, plain, rtol=0, atol=1e-6, equal_nan=True)
    lost = moved.isnan().flatten(1).sum(1).tolist()
    assert lost == ([0, 0, 0, 1, 1, 0] if attack.norm == "linf" else [40] * 5 + [0])


# ---- order, memory, layout


@BOTH
def test_a_sample_gets_the_same_bits_alone_and_in_a_batch(attack, device):
    x_adv, g, x = draw(IMAGES, attack, torch.float32, device)
    together = fused(x_adv, g, x, attack)
    assert torch.equal(together, fused(x_adv, g, x, attack))
    for i in range(len(x)):
        one = slice(i, i + 1)
        assert torch.equal(together[one], fused(x_adv[one], g[one], x[one], attack))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset, size", [(1, 1040), (3, 341)])  # 3 * 341: one short of a block
def test_misaligned_tensors_and_their_neighbours(offset, size, dtype, attack, device):
    batch = draw((3, 1, 1, size), attack, dtype, device)
    held = []
    for t, around in zip(batch, (7.0, math.nan, math.nan), strict=True):
        storage = torch.full((t.numel() + 9,), around, dtype=dtype, device=device)
        held.append(storage[offset:offset + t.numel()].view(t.shape))
        held[-1].copy_(t)
        assert held[-1].data_ptr() % 16
    STEPS[attack.norm](*held, attack.eps, attack.alpha)
    judge(held[0], *batch, attack)
    if attack.norm == "linf":
        assert torch.equal(held[0], fused(*batch, attack))
    storage, end = held[0]._base, offset + held[0].numel()
    assert (storage[:offset] == 7).all() and (storage[end:] == 7).all()


@BOTH
@pytest.mark.parametrize("shape", [(5,), (2, 6), (2, 3, 4, 5, 6), (0, 3, 4, 4), (2, 0)], ids=str)
def test_any_number_of_dimensions(shape, attack, device):
    x_adv, g, x = (torch.rand(shape, device=device) for _ in range(3))
    assert torch.allclose(fused(x_adv, g, x, attack).double().cpu(), exact(x_adv, g, x, attack),
                          rtol=0, atol=1e-6)


@BOTH
def test_the_stride_of_a_dimension_of_size_1_is_free(attack, device):
    """A grey channels_last batch, and one sample of a strided batch, are contiguous as well."""
    grey = draw((3, 1, 8, 8), attack, torch.float32, device)
    expected = fused(*grey, attack)
    grey[1] = grey[1].as_strided(grey[1].shape, (64, 1, 8, 1))
    grey[2] = grey[2].as_strided(grey[2].shape, (64, 7, 8, 1))
    assert torch.equal(fused(*grey, attack), expected)
    x_adv, g, x = draw((2, 3, 8, 8), attack, torch.float32, device)
    assert torch.equal(fused(x_adv[:1], g[::2], x[:1], attack), fused(x_adv, g, x, attack)[:1])


def test_autograd_notices_the_write(device):
    x_adv = torch.rand(2, 8, device=device)
    w = torch.rand(2, 8, device=device, requires_grad=True)
    loss = (w * x_adv).sum()  # saves x_adv for w's gradient
    kernels.linf_step(x_adv, torch.ones_like(x_adv), torch.rand_like(x_adv), 0.1, 0.02)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def refusals():
    x = torch.rand(2, 3, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    sliced = torch.rand(2, 3, 4, 8)[..., ::2]
    yield "shape", (x[:1].clone(), x, x), {}, r"x_adv is \(1, 3, 4, 4\).*make them equal"
    yield "dtype", (x.clone(), x.bfloat16(), x), {}, r"g is .*bfloat16.*make them equal"
    yield "float64", (x.double(),) * 3, {}, r"float64; use float32, bfloat16 or float16"
    yield "layout", (x.clone(), last, x), {}, r"g has strides .*empty_like\(x\)\.copy_"
    yield "x_adv-layout", (last.clone(), x, x), {}, r"x_adv has strides .*empty_like"
    yield "gaps", (sliced, x, sliced), {}, r"neither contiguous nor .*call \.contiguous\(\)"
    yield "expanded", (x.clone(), x, x[:1].expand(2, 3, 4, 4)), {}, r"neither contiguous nor"
    yield "same", (x, x.clone(), x), {}, r"same memory.*start from x\.clone\(\)"
    yield "no-samples", (torch.tensor(0.5),) * 3, {}, r"no dimension.*x\[None\]"
    for eps in (-0.1, math.inf, math.nan, "0.1", torch.tensor(0.1)):
        yield f"eps-{eps}", (x.clone(), x, x), {"eps": eps}, r"eps=.*finite Python number"
    for alpha in (math.inf, math.nan, None):
        yield f"alpha-{alpha}", (x.clone(), x, x), {"alpha": alpha}, r"alpha=.*Python number"


@BOTH
@pytest.mark.parametrize("tensors, change, message",
                         [pytest.param(*r[1:], id=r[0]) for r in refusals()])
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
        tensors, change, message, attack, device):
    # one copy per tensor, so that one memory stays one memory and strides stay strides
    moved = {id(t): t if t.device == device else t.to(device) for t in tensors}
    tensors = [moved[id(t)] for t in tensors]
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError, match=message):
        STEPS[attack.norm](*tensors, **{"eps": 0.1, "alpha": 0.02, **change})
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_the_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr("fastsam.kernels.triton.common.INTERPRETED", False)
    x = torch.rand(2, 8)
    with pytest.raises(ValueError, match="'cpu'; the kernels need a GPU"):
        kernels.linf_step(x.clone(), x, x, 0.1, 0.02)


# ---- the whole attack


def network(seed: int, size: int, classes: int, device, layout=torch.contiguous_format):
    """A smooth classifier whose gradients have the same bits every time."""
    rng = torch.Generator().manual_seed(seed)
    W1, W2 = (torch.randn(s, generator=rng).to(device) for s in ((size, 32), (32, classes)))
    return lambda x: torch.tanh(
        x.contiguous(memory_format=layout).flatten(1) @ W1 / math.sqrt(size)) @ W2


def attacked(monkeypatch, fuse: bool, forward, x, y, attack):
    """pgd() with the fused or with the plain step, and how many fused steps it made."""
    calls = []

    def counted(name):
        step = STEPS[name]
        return lambda *args: calls.append(name) or step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(attacks, "can_fuse", lambda x: fuse)
        for name in STEPS:
            patch.setattr(kernels, f"{name}_step", counted(name))
        x_adv = pgd(forward, x, y, attack, torch.Generator(x.device).manual_seed(3))
    assert calls == [attack.norm] * (attack.steps if fuse else 0)
    return x_adv


@BOTH
@pytest.mark.parametrize("of_x", LAYOUTS.values(), ids=lambda f: f"x-{f}".replace("torch.", ""))
@pytest.mark.parametrize("of_g", LAYOUTS.values(), ids=lambda f: f"g-{f}".replace("torch.", ""))
def test_the_whole_attack_is_the_plain_one(of_g, of_x, attack, device, monkeypatch):
    """Bit for bit in l_inf; in l2 the norms are summed in another order: 10 steps of float32
    roundings. The gradient comes in the model's layout, whatever the images' is."""
    x = draw(IMAGES, attack, torch.float32, device, of_x)[2]
    y = torch.arange(len(x), device=device) % 5
    forward = network(1, x[0].numel(), 5, device, of_g)
    plain, fused = (attacked(monkeypatch, fuse, forward, x, y, attack) for fuse in (False, True))
    assert plain.stride() == fused.stride() == x.stride()
    assert not torch.equal(fused, x)
    if attack.norm == "linf":
        assert torch.equal(fused, plain)
    else:
        assert error(fused, plain.double().cpu()).max() <= 10 * torch.finfo(torch.float32).eps


def test_the_fused_step_is_chosen_on_a_gpu_only(device):
    for dtype in DTYPES:
        x = torch.rand(2, 3, 4, 4, device=device).to(dtype)
        assert attacks.can_fuse(x) == (device.type == "cuda")
    assert not attacks.can_fuse(torch.rand(2, 3, 4, 4, device=device).double())
    assert not attacks.can_fuse(torch.rand(2, 3, 4, 4))


# ---- what the compiler makes of them


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    env = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, Path(__file__).with_name("aot_pgd.py")], text=True,
                          env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def streams_missed(row: dict) -> bool:
    """Whether a thread moves less in vectors than every stream, once per sweep (l2: g; g; x_adv,
    g, x; x_adv, g, x)."""
    item = {"fp32": 4, "bf16": 2, "fp16": 2}[row["type"]] * row["elements"]
    loads = {"linf": 3, "l2": 8}[row["kernel"]]
    return row["load_bytes"] < loads * item or row["store_bytes"] < item


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_aligned_tensors_move_in_vectors(rows, target):
    rows = [r for r in rows if r["target"] == target and r["form"] == "aligned"]
    assert len(rows) == 6  # two kernels, three types
    assert not [r for r in rows if streams_missed(r)]


def test_the_vector_check_notices_misaligned_tensors(rows):
    rows = [r for r in rows if r["form"] == "misaligned"]
    assert len(rows) == 2 and all(streams_missed(r) for r in rows)


def test_no_spills_no_atomics_no_fused_multiply_adds_and_64_bit_addresses(rows):
    """Fused multiply-adds round once where plain PyTorch rounds twice."""
    assert len(rows) == 44
    for row in rows:
        assert row["stack"] == 0 and row["atomics"] == [] and not row.get("fused"), row
        assert row["registers"] <= 64, row  # two programs of 16 warps share a multiprocessor
        assert row["wide_addresses"] >= 3, row  # x_adv, g and x
