"""The numba backend's passes, called with passes made by hand: beside the reference, to the bit."""

import os
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba", reason="the CPU kernels need numba")

from fastsam import SAM, reference  # noqa: E402
from fastsam.kernels import cpu  # noqa: E402
from fastsam.kernels.cpu import memory, passes, tables  # noqa: E402
from fastsam.kernels.cpu.norm import norm_loop  # noqa: E402

from ..helpers.hand import Hand  # noqa: E402
from ..helpers.processes import in_a_process  # noqa: E402
from ..helpers.variants import ADAM_GROUPS  # noqa: E402
from ..helpers.variants import GROUPS as SGD  # noqa: E402

F4, F8, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = [(3, 5), (40_000,), (1,), (0,), (17, 3), (20, 1000), (1023,)]
OF = [0, 1, 2, 0, 1, 2, 0]
ADAM = [dict(**{k: x for k, x in group.items() if k != "betas"}, beta1=group["betas"][0],
             beta2=group["betas"][1], decoupled=i == 0) for i, group in enumerate(ADAM_GROUPS)]
PLAIN = [{**group, "momentum": 0.0, "nesterov": False, "dampening": 0.0} for group in SGD]
GROUPS = {"sgd": PLAIN, "sgd-momentum": SGD, "adam": ADAM}
AB = {None: (0.0, 1.0), "weights": [(1.0, 0.0), (0.5, 0.01), (0.0, 1.0), *[(1.0, 0.01)] * 4],
      "gradient": [(0.5, 1.0), (0.0, 1.0), *[(2.0, 1.0)] * 5]}
# mode, scaling, base, masters, dtype, of gradients; every value of each, in few compilations
KINDS = [(None, None, "sgd-momentum", False, F4, F4),
         ("algorithm1", "weights", "adam", False, F4, BF16),
         ("official", "gradient", "sgd", False, F8, F8),
         ("full", "weights", "sgd-momentum", True, BF16, F4),
         ("noise", None, "adam", True, F16, F16),
         ("algorithm1", None, "sgd-momentum", False, F16, F4),
         (None, "gradient", "adam", False, BF16, BF16)]


def placed(t: torch.Tensor, beside: int) -> torch.Tensor:
    """A copy that starts so many bytes beside a multiple of 64, between bytes of 0x5a."""
    buffer = bytearray(b"\x5a" * (t.nbytes + 256))
    address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    start = 64 + -address % 64 + beside
    if t.numel():
        copy = torch.frombuffer(buffer, dtype=t.dtype, offset=start, count=t.numel())
        t = copy.view(t.shape).copy_(t)
        t.surroundings = buffer[:start], memoryview(buffer)[start + t.nbytes:]
    return t


def draw(dtype: torch.dtype, scale: float, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=g, dtype=F8) * scale).to(dtype) for shape in SHAPES]


def pair(mode, scaling, base, masters, dtype, beside=2) -> tuple[Hand, Hand]:
    """The same weights and hyper-parameters, for two backends; the first's lie `beside` a multiple
    of 64 bytes."""
    places = partial(placed, beside=beside), torch.clone
    made = [Hand([place(w) for w in draw(dtype, 0.5, seed=0)], GROUPS[base], OF, mode, base,
                 scaling, AB[scaling], masters) for place in places]
    if mode in ("full", "noise"):
        for hand in made:
            for slot, m in zip(hand.space.slots, draw(hand.space.kind.acc, 1, seed=9), strict=True):
                slot.m.copy_(m)
    return made[0], made[1]


def assert_equal(found: dict, expected: dict, when: str, unit: float = 0) -> None:
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=unit, atol=unit, equal_nan=True,
                                   msg=lambda text, name=name: f"{name} {when}: {text}")


def with_an_exact_root(sums: torch.Tensor) -> torch.Tensor:
    """The sums, the first of them rounded to a square of 12 bits, whose root has no rounding."""
    mantissa, exponent = torch.frexp(sums[0].sum().sqrt())
    root = torch.ldexp((mantissa * 2**12).round(), exponent - 12)
    return torch.stack([root**2, sums[1].sum()])[:, None]


@pytest.mark.parametrize("beside, past_caches", [(2, False), (2, True), (0, True)],
                         ids=["", "past the caches from odd places", "past the caches"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(x) for x in kind))
def test_equals_the_reference_to_the_bit_where_the_norms_do(kind, beside, past_caches, monkeypatch):
    """The norms, which are added up in another order, to rounding; and where there are roots of
    vectors, which torch takes from MKL, not always rounded to nearest."""
    if past_caches:
        monkeypatch.setattr(passes, "PAST_CACHES", 0)
    *kind, g_dtype = kind
    ours, theirs = pair(*kind, beside)
    has_roots = "gradient" in kind or "adam" in kind
    unit = 4 * torch.finfo(kind[-1]).eps if has_roots else 0
    for t in range(4):
        first, second = draw(g_dtype, 0.1, seed=1 + t), draw(g_dtype, 0.1, seed=5 + t)
        if t == 1:
            first[1] = second[5] = second[0] = first[0] = None
        scale = 0.25 if t == 2 else None
        p, q = ours.read(first, "g1", inv_scale=scale), theirs.read(first, "g1", inv_scale=scale)
        cpu.norm(p)
        reference.norm(q)
        torch.testing.assert_close(ours.space.partials.sum(1), theirs.space.partials.sum(1),
                                   rtol=1e-5 if g_dtype != F8 else 1e-13, atol=0)
        sums = with_an_exact_root(theirs.space.partials)
        climbs = cpu.climb(p, sums), reference.climb(q, sums)
        assert_equal(ours.state(), theirs.state(), f"after climb {t}", unit)
        torch.testing.assert_close(ours.space.radii.sum(1), theirs.space.radii.sum(1),
                                   rtol=1e-4, atol=0)
        assert climbs[0].moved == climbs[1].moved
        climbs = climbs if t != 3 else (None, None)  # a plain step from where the weights are
        ours.second_step(cpu, climbs[0], second, inv_scale=scale)
        theirs.second_step(reference, climbs[1], second, inv_scale=scale)
        assert_equal(ours.state(), theirs.state(), f"after step {t}", unit)
    for w in ours.weights:
        assert all(set(bytes(x)) <= {0x5a} for x in getattr(w, "surroundings", ()))


@pytest.mark.parametrize("mode", ["algorithm1", "official"])
def test_dots_are_the_inner_products(mode):
    ours, _ = pair(mode, None, "sgd-momentum", False, F4)
    for slot, m in zip(ours.space.slots, draw(F4, 1, seed=3), strict=True):
        slot.m.copy_(m)
    first = draw(BF16, 0.1, seed=1)
    first[4] = None
    cpu.dots(ours.read(first, "g1", inv_scale=0.5))
    expected = torch.zeros(3, dtype=F8)
    for slot, g in zip(ours.space.slots, first, strict=True):
        if g is not None:
            g, m, lmbda = g.double() / 2, slot.m.double(), SGD[slot.group]["lmbda"]
            m = lmbda * m + (1 - lmbda) * g if mode == "algorithm1" else m
            expected += torch.stack([(x * y).sum() for x, y in ((g, m), (g, g), (m, m))])
    torch.testing.assert_close(ours.space.dots.double().sum(1), expected, rtol=1e-5, atol=1e-5)


FSAM_KIND = ("algorithm1", None, "sgd-momentum", False, F4)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_norm_that_is_not_finite_is_a_counted_skip(value):
    ours, _ = pair(*FSAM_KIND)
    before, first = ours.state(), draw(F4, 0.1, seed=1)
    first[5].view(-1)[777] = value
    climb = ours.first_step(cpu, first)
    for name in ("m", "steps", *[f"w{i}" for i in range(len(SHAPES))]):
        assert torch.equal(ours.state()[name], before[name])
    ours.second_step(cpu, climb, draw(F4, 0.1, seed=2))
    changed = {"skipped", "saved", "ok", "norm"}
    assert_equal(*({k: t for k, t in state.items() if k not in changed}
                   for state in (ours.state(), before)), "after a skip")
    assert ours.space.cells.skipped == 1 and not ours.space.cells.ok


def test_an_overflow_returns_every_weight_and_is_counted():
    ours, _ = pair(*FSAM_KIND)
    before = ours.state()
    climb = ours.first_step(cpu, draw(F4, 0.1, seed=1))
    ours.space.cells.found_inf.fill_(1)
    ours.second_step(cpu, climb, draw(F4, 0.1, seed=2))
    for name in ("v", *[f"w{i}" for i in range(len(SHAPES))]):
        assert torch.equal(ours.state()[name], before[name])
    assert ours.space.cells.skipped == 1


def test_zero_gradients_and_directions_of_rounding_noise_move_nothing():
    for groups, scale in ((SGD, 0.0), ([dict(rho=1e4, sigma=1 / (1 - 0.6), lmbda=0.6)] * 3, 1.0)):
        hand = Hand(draw(F4, 0.5, seed=0), groups, OF, "algorithm1")
        before = hand.state()
        first = draw(F4, scale, seed=1)
        hand.first_step(cpu, first)
        assert all(torch.equal(w, before[f"w{i}"]) for i, w in enumerate(hand.weights))
        assert hand.space.cells.ok
        if scale:
            torch.testing.assert_close(hand.space.slots[1].m, 0.4 * first[1])


def test_without_numba_fastsam_runs_and_names_the_remedy():
    out = in_a_process("""
import sys
sys.modules["numba"] = None
import torch, fastsam
p = torch.nn.Parameter(torch.ones(2**21))
opt = fastsam.SAM([p], torch.optim.SGD, lr=0.1)
print(opt.backend_report()["backend"], opt.backend_report()["why"])
try:
    fastsam.SAM([p], torch.optim.SGD, lr=0.1, backend="numba")
except ValueError as error:
    print(error)
""")
    assert out.startswith("reference")
    assert out.count("pip install 'fastsam[cpu]'") == 2


def add_one(x):
    x[0] += 1


def runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    x = torch.zeros(1, dtype=torch.int64)
    tables.compiled(add_one).call(x.data_ptr())
    assert x == 1


def test_numba_that_compiles_nothing_is_named(monkeypatch):
    """As NUMBA_DISABLE_JIT has it, which people set to debug code of their own."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    p = torch.nn.Parameter(torch.ones(20_000))
    report = SAM([p], torch.optim.SGD, lr=0.1).backend_report()
    assert report["backend"] == "reference" and "NUMBA_DISABLE_JIT" in report["why"]
    with pytest.raises(ValueError, match="NUMBA_DISABLE_JIT.*unset it"):
        SAM([p], torch.optim.SGD, lr=0.1, backend="numba")


@pytest.mark.filterwarnings("error")
def test_no_folder_to_keep_compiled_code_in(tmp_path, monkeypatch):
    monkeypatch.setattr("numba.core.caching.tempfile.TemporaryFile",
                        Mock(side_effect=PermissionError("read-only")))
    runs(tmp_path, monkeypatch)
    assert not list(tmp_path.rglob("*.nb*"))


@pytest.mark.filterwarnings("error")
def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save",
                        Mock(side_effect=OSError(28, "No space left on device")))
    runs(tmp_path, monkeypatch)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_broken_file_of_compiled_code(kind, tmp_path, monkeypatch):
    runs(tmp_path, monkeypatch)
    (kept,) = tmp_path.rglob(f"*.{kind}")
    kept.write_bytes(kept.read_bytes()[:100])
    runs(tmp_path, monkeypatch)


def test_what_one_process_compiled_no_other_compiles_again(tmp_path):
    """numba finds a loop again by the values that it closes over, as pickle writes them: they must
    be written alike in every process."""
    code = """
import torch
from fastsam import FriendlySAM, LookSAM

def closure():
    opt.zero_grad()
    loss = (w**4).sum()
    loss.backward()
    return loss

for cls, base, own in ((FriendlySAM, torch.optim.SGD, dict(projection="cosine", adaptive=True)),
                       (LookSAM, torch.optim.AdamW, dict(k=2, alpha=0.5))):
    w = torch.nn.Parameter(torch.linspace(-1, 1, 20_000))
    opt = cls([w], base, lr=0.01, backend="numba", **own)
    for _ in range(2):
        opt.step(closure)
"""

    def kept() -> dict[str, int]:
        subprocess.run([sys.executable, "-c", code], check=True,
                       env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)})
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb?")}

    first = kept()
    assert sum(name.endswith("nbc") for name in first) >= 8
    assert kept() == first


COLUMN = 0


def add_to_column(x):
    x[COLUMN] += 1


def copy_of(function):
    return types.FunctionType(function.__code__, globals(), function.__name__)


def test_code_made_from_other_sources_is_not_taken_from_the_cache(tmp_path, monkeypatch):
    """Columns stand in compiled code as numbers, and come from other files than the loops'."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    x = np.zeros(2, np.int64)
    tables.compiled(copy_of(add_to_column)).call(x.ctypes.data)
    monkeypatch.setitem(globals(), "COLUMN", 1)
    monkeypatch.setattr(tables, "MADE_FROM", "others")
    tables.compiled(copy_of(add_to_column)).call(x.ctypes.data)
    assert x.tolist() == [1, 1]


def test_each_kind_of_loop_has_names_of_its_own(tmp_path, monkeypatch):
    """Where two processes compile at once, one's index may be written over the other's, and then
    the other's code over its own."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    loops = [norm_loop.__wrapped__(None, None, False, kind, kind) for kind in ("f4", "bf16", "f4")]
    first, other, again = (
        (loop.code._cache._cache_file._index_path, loop.code.__qualname__) for loop in loops)
    assert first == again and not {*first} & {*other}


@pytest.mark.parametrize("name", ["memory.py", "tables.py", "climb.py", "hyper.py", "space.py"])
def test_the_fingerprint_is_of_every_source(name, tmp_path):
    copies = [Path(shutil.copy(file, tmp_path)) for file in tables.SOURCES]
    assert tables.fingerprint(copies) == tables.MADE_FROM
    (changed,) = (copy for copy in copies if copy.name == name)
    changed.write_text(changed.read_text() + "\n")
    assert tables.fingerprint(copies) != tables.MADE_FROM


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_sixteen_bits_are_read_exactly_and_rounded_to_nearest_even(dtype):
    kind = cpu.DTYPES[dtype]

    @numba.njit
    def widen(x, y, n):
        for i in range(n):
            memory.store(y, i, memory.load(x, i, "w", kind), "v", "f4")

    @numba.njit
    def narrow(x, y, n):
        for i in range(n):
            memory.store(y, i, memory.load(x, i, "v", "f4"), "w", kind)

    every = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)
    wide = torch.empty(2**16)
    widen(every.data_ptr(), wide.data_ptr(), 2**16)
    expected = every.float()
    finite = ~expected.isnan()
    assert torch.equal(wide[finite].view(torch.int32), expected[finite].view(torch.int32))
    assert wide[~finite].isnan().all()

    steps = wide[finite]
    middle = ((steps.double() + steps.double().nextafter(torch.tensor(torch.inf)).float()) / 2)
    ties = (steps[:-1].double() + steps[1:].double()).div(2).float()
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-2**31, 2**31, (2**18,), generator=g).to(torch.int32).view(F4)
    x = torch.cat([steps, ties, ties.nextafter(torch.tensor(torch.inf)),
                   ties.nextafter(torch.tensor(-torch.inf)), middle.float(), bits])
    found = torch.empty(len(x), dtype=dtype)
    narrow(x.data_ptr(), found.data_ptr(), len(x))
    expected, nan = x.to(dtype), x.isnan()
    assert torch.equal(found[~nan].view(torch.int16), expected[~nan].view(torch.int16))
    assert found[nan].isnan().all()
