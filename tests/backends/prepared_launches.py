"""A prepared launch hands over what an ordinary one does, and whatever would change that is
noticed. Over a pretended GPU: test_prepared_launches.py runs this in a process of its own, without
the interpreter."""

import gc
import importlib
from itertools import product

import pytest
import torch
from triton import knobs

from fastsam import SAM
from fastsam.kernels import triton as kernels

from ..helpers.passes import Passes
from ..helpers.pretended import Launched, Launcher, pretend
from ..helpers.variants import VARIANTS

launch = importlib.import_module("fastsam.kernels.triton.launch")
norm_kernel = importlib.import_module("fastsam.kernels.triton.norm").norm_kernel
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
GROUP = dict(rho=0.1, lr=0.1, sigma=0.5, lmbda=0.5, momentum=0.9)


@pytest.fixture(autouse=True)
def driver():
    launch.PREPARED.clear()
    Launcher.seen.clear()
    return pretend()


def course(sizes=(5, 1030), name="fsam", dtype=FP32, **kwargs) -> Passes:
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in sizes]
    return Passes(params, [{"params": [*range(len(sizes))], **GROUP}], name, kernels, **kwargs)


def passes(of: Passes, column="g1", g_dtype=FP32) -> list:
    of.kept = [torch.ones(p.shape, dtype=g_dtype) for p in of.params]
    return of.passes(of.kept, column)


def launched(call, *args) -> Launched:
    """The one launch that a call makes."""
    Launcher.seen.clear()
    call(*args)
    (one,) = Launcher.seen
    return one


def two_phases(of: Passes, g_dtype=FP32) -> list[Launched]:
    Launcher.seen.clear()
    (p,), space = passes(of, "g1", g_dtype), of.spaces[0]
    if of.projection is not None:
        kernels.dots(p)
    kernels.norm(p)
    climb = kernels.climb(p, space.partials)
    (p,) = passes(of, "g2", g_dtype)
    kernels.step(p, climb)
    kernels.step(p, None)
    return list(Launcher.seen)


def ordinary(of: Passes, **kwargs) -> list[Launched]:
    launch.PREPARED.clear()
    found = two_phases(of, **kwargs)
    assert not any(one.prepared for one in found)
    return found


def of_the_space(one: Launched) -> tuple:
    """A launch without the gradients' addresses, which are in the tables."""
    return one.kernel, one.programs, one.stream, one.arguments


# ---- the same arguments


@pytest.mark.parametrize("sizes", [(7,), (3, 1025), (0, 16, 2500)], ids=len)
@pytest.mark.parametrize("name, base, dtypes", [
    *product(VARIANTS, ["sgd"], [(FP32, FP32)]), *product(["sam", "fasam"], ["adamw"], [
        (FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, FP16)])])
def test_the_second_time_the_same_is_handed_over_as_by_triton(name, base, dtypes, sizes):
    of = course(sizes, name, dtypes[0], base=base)
    first = ordinary(of, g_dtype=dtypes[1])
    second = two_phases(of, g_dtype=dtypes[1])
    assert len(first) == len(second) >= 4 and all(one.prepared for one in second)
    for a, b in zip(first, second, strict=True):
        assert of_the_space(a) == of_the_space(b)
    space = of.spaces[0]
    for one in second:
        (blocks,) = (table for table in map(space.blocks, (512, 1024, 2048, 4096, 8192))
                     if one.arguments["blocks"] == table.data_ptr())
        assert one.programs == max(1, len(blocks))
        assert one.arguments["hyper"] == space.hyper.data_ptr()


@pytest.mark.parametrize("masters", [False, True])
def test_masters_are_another_kernel_of_another_space(masters):
    of, other = (course(dtype=BF16, masters=m) for m in (masters, not masters))
    first = ordinary(of)
    two_phases(other)
    again = two_phases(of)
    assert [*map(of_the_space, first)] == [*map(of_the_space, again)]
    assert again[0].arguments["saved"] == of.spaces[0].saved.data_ptr()


# ---- what is noticed


def test_another_gradient_dtype_is_another_kernel_and_the_first_is_kept():
    of = course()
    compiled = [two_phases(of, dtype) and dict(launch.PREPARED) for dtype in (FP32, BF16)]
    assert len(compiled[0]) == 4 and len(compiled[1]) == 8
    kernel_of = {key[3]: one.compiled for key, one in compiled[1].items()
                 if key[0] == id(norm_kernel)}
    assert "bf16" in kernel_of[BF16].asm["ttir"] and "bf16" not in kernel_of[FP32].asm["ttir"]
    assert all(one.prepared for one in two_phases(of, FP32) + two_phases(of, BF16))


def test_another_scaling_is_another_kernel():
    of = course(name="fasam")
    (p,) = passes(of)
    launched(kernels.norm, p)
    assert not launched(kernels.norm, p._replace(scaling=None)).prepared
    assert launched(kernels.norm, p).prepared


def test_other_tables_are_handed_over():
    """With an odd number of slots the columns lie differently to 16 bytes."""
    of, addresses = course((5, 6, 7)), set()
    two_phases(of)
    for _ in range(3):
        (p,) = passes(of)
        tables = [torch.tensor([1, 2, 3]) for _ in range(2)]
        one = launched(kernels.norm, p._replace(w_table=tables[0], g_table=tables[1]))
        assert [one.arguments[k] for k in ("w_table", "g_table")] == [
            t.data_ptr() for t in tables]
        climb = kernels.climb(p, of.spaces[0].partials)
        tables.append(torch.tensor([1, 2, 3]))
        one = launched(kernels.step, p, climb._replace(table=tables[2]))
        assert one.arguments["climbed_table"] == tables[2].data_ptr()
        addresses |= {t.data_ptr() for t in tables}
    assert len(addresses) > 1


def test_more_spaces_are_more_sums():
    of = course()
    (p,), own = passes(of), of.spaces[0].partials
    assert launched(kernels.climb, p, own).programs == 3
    both = torch.cat([own, own], 1)
    for prepared in (False, True):
        one = launched(kernels.climb, p, both)
        assert (one.prepared, one.arguments["n_spaces"]) == (prepared, 2)
        assert one.arguments["sums"] == both.data_ptr()
    one = launched(kernels.climb, p, own)
    assert one.prepared and "n_spaces" not in one.arguments, "1 is a constant"


def test_sums_that_lie_otherwise_to_16_bytes_are_another_kernel():
    of = course()
    (p,), own = passes(of), of.spaces[0].partials
    launched(kernels.climb, p, own)
    odd = torch.zeros(own.numel() + 1)[1:].view_as(own)
    assert odd.data_ptr() % 16
    assert not launched(kernels.climb, p, odd).prepared
    assert launched(kernels.climb, p, odd).prepared
    aligned, not_aligned = (one.compiled for key, one in launch.PREPARED.items() if len(key) == 6)
    assert aligned is not not_aligned


def test_plain_and_perturbed_steps_are_different_launches():
    of = course()
    two_phases(of)
    (p,) = passes(of, "g2")
    one = launched(kernels.step, p, None)
    assert one.prepared and "climbed_table" not in one.arguments


def test_a_launch_goes_to_the_stream_that_is_current(driver):
    of = course()
    two_phases(of)
    (p,) = passes(of)
    for driver.stream in (11, 12, 11):
        one = launched(kernels.norm, p)
        assert one.prepared and one.stream == driver.stream


def test_a_launch_goes_to_the_spaces_own_device(driver, monkeypatch):
    of, entered = course(), []
    two_phases(of)
    (p,) = passes(of)

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            self.before, driver.device = driver.device, self.index

        def __exit__(self, *_):
            driver.device = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    assert launched(kernels.norm, p).prepared and entered == []
    driver.device = 1
    assert launched(kernels.norm, p).prepared and entered == [0]
    assert driver.device == 1


class Hook:
    def __init__(self):
        self.calls = 0

    def __call__(self, *_, **__):
        self.calls += 1
        return "", ""  # what the hook of the compiler's stages gives


def chain_of(hook) -> knobs.HookChain:
    chain = knobs.HookChain()
    chain.add(hook)
    return chain


def alone(hook):
    return hook


@pytest.mark.parametrize("where, name, made", [
    (knobs.runtime, "launch_enter_hook", chain_of), (knobs.runtime, "launch_exit_hook", chain_of),
    (knobs.runtime, "launch_enter_hook", alone), (norm_kernel, "pre_run_hooks", lambda h: [h])])
def test_a_hook_gets_an_ordinary_launch_and_is_called(where, name, made, monkeypatch):
    of, hook = course(), Hook()
    two_phases(of)
    (p,) = passes(of)
    assert launched(kernels.norm, p).prepared
    with monkeypatch.context() as patch:
        patch.setattr(where, name, made(hook))
        for _ in range(2):
            before = hook.calls
            assert not launched(kernels.norm, p).prepared
            assert hook.calls > before
    before = hook.calls
    assert launched(kernels.norm, p).prepared
    assert hook.calls == before


@pytest.mark.parametrize("where, name, value", [
    (knobs.runtime, "debug", True), (knobs.compilation, "instrumentation_mode", "consan"),
    (knobs.runtime, "add_stages_inspection_hook", Hook())])
def test_debugging_and_instrumentation_get_an_ordinary_launch(where, name, value, monkeypatch):
    """Those that this version of Triton does not have, it does not look at."""
    of = course()
    two_phases(of)
    (p,) = passes(of)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, value, raising=False)
        ordinary = []
        patch.setattr(launch, "launch_ordinarily", lambda *_: ordinary.append(1))
        kernels.norm(p)
        assert ordinary
    assert launched(kernels.norm, p).prepared


def test_what_was_launched_under_a_hook_is_not_kept():
    of, hook = course(), Hook()
    (p,) = passes(of)
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        launched(kernels.norm, p)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert not launched(kernels.norm, p).prepared
    assert launched(kernels.norm, p).prepared


def test_no_hook_at_all_is_none_too(monkeypatch):
    of = course()
    (p,) = passes(of)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", None)
    launched(kernels.norm, p)
    assert launched(kernels.norm, p).prepared


def test_a_version_of_triton_that_is_not_known_gets_ordinary_launches(monkeypatch):
    monkeypatch.setattr(launch, "CAN_PREPARE", False)
    of = course()
    assert not any(one.prepared for one in two_phases(of) + two_phases(of))


def test_a_buffer_of_the_state_that_moved_is_not_looked_for_where_it_was():
    """As one on a GPU does whose storage is freed and comes back. Graphs, too, have its address:
    there is a new space, which makes them capture anew."""
    p = torch.nn.Parameter(torch.ones(8))
    opt = SAM([p], torch.optim.SGD, lr=0.1, momentum=0.9, backend="triton")
    (space,), layout = opt.spaces, opt._phase.layout

    def step() -> Launched:
        for do in (opt.first_step, opt.second_step):
            p.grad = torch.ones(8)
            do()
        return Launcher.seen[-1]

    step()
    object.__setattr__(space.kind, "device", torch.device("cuda", 0))
    layout._on_gpus = layout._buffers_on_gpus()
    one = step()
    assert one.prepared and one.arguments["v"] == space.v.data_ptr()
    storage, was = opt.state[p]["momentum_buffer"].untyped_storage(), space.v.data_ptr()
    opt.state[p]["momentum_buffer"].fill_(3)
    while space.v.data_ptr() == was:
        storage.resize_(2 * storage.nbytes())
    for _ in range(2):
        one = step()
        assert opt.state[p]["momentum_buffer"].tolist() == [3.0] * 8
        assert one.arguments["v"] == opt.state[p]["momentum_buffer"].data_ptr()
    assert opt.spaces[0] is not space and one.prepared


def test_what_was_prepared_goes_with_its_space():
    of = course()
    two_phases(of)
    assert len(launch.PREPARED) == 4
    del of
    gc.collect()
    assert len(launch.PREPARED) == 0
