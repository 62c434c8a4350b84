"""The threads of the numba backend's loops: torch's own, or those of a pool."""

import os
import signal
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import pytest
import torch

numba = pytest.importorskip("numba", reason="the CPU kernels need numba")

from fastsam.kernels import cpu  # noqa: E402
from fastsam.kernels.cpu import passes, threads  # noqa: E402
from fastsam.kernels.cpu.tables import TICKET, Loop  # noqa: E402

from ..helpers.hand import Hand  # noqa: E402
from ..helpers.processes import in_a_process  # noqa: E402
from ..helpers.variants import GROUPS as SGD  # noqa: E402


def played(hand: Hand) -> dict:
    for t in range(3):
        climb = hand.first_step(cpu, draw_large(1 + t))
        hand.second_step(cpu, climb, draw_large(11 + t))
    return {**hand.state(), "partials": hand.space.partials, "radii": hand.space.radii}


def draw_large(seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g) for n in (300_000, 17, 200_001)]


def large() -> Hand:
    return Hand(draw_large(0), SGD, [0, 1, 2], "algorithm1")


def assert_equal(found: dict, expected: dict, when: str) -> None:
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert torch.equal(found[name], t), f"{name} {when}"


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def in_pool(monkeypatch):
    monkeypatch.setattr(threads, "openmp", None)


@pytest.fixture
def ctrl_c():
    """Raises, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["openmp", "pool"])
def either(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(threads, "openmp", None)
    elif threads.openmp is None:
        pytest.skip("torch's OpenMP is not found here")
    return request.param


def test_torchs_own_threads_are_found_on_linux():
    if torch.__config__.parallel_info().count("ATen parallel backend: OpenMP") == 0:
        pytest.skip("this torch has no OpenMP")
    assert threads.sys.platform != "linux" or threads.openmp is not None


@pytest.mark.skipif(threads.sys.platform != "linux", reason="its pool is for Linux")
def test_an_openmp_that_the_whole_process_was_given_is_torchs_too(monkeypatch):
    """As LD_PRELOAD=libiomp5.so gives it, which torch.backends.xeon.run_cpu sets."""
    process, torchs = Mock(), Mock()
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda path: torchs if path else process)
    assert threads.openmp_of_torch() == (process.GOMP_parallel, process.fegetenv)
    del process.GOMP_parallel
    assert threads.openmp_of_torch() == (torchs.GOMP_parallel, process.fegetenv)


def test_any_number_of_threads_gives_the_same_bits(either, set_threads):
    set_threads(1)
    expected = played(large())
    for n in range(2, 6):
        set_threads(n)
        assert_equal(played(large()), expected, f"with {n} threads")


def test_all_threads_take_part(either, set_threads, monkeypatch):
    """Soon, on a machine that does other work too: this one needs but a part of the time of all."""
    set_threads(2)
    hand = Hand([torch.zeros(2**24)], SGD, [0], "algorithm1")
    g = [torch.ones(2**24)]
    hand.first_step(cpu, g)

    def share() -> float:
        own, every = time.thread_time(), time.process_time()
        for _ in range(5):
            cpu.norm(hand.read(g, "g1"))
        return (time.thread_time() - own) / (time.process_time() - every)

    assert any(share() < 0.9 for _ in range(100))


@pytest.fixture
def flush():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    torch.set_flush_denormal(False)
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("now", [True, False])
def test_tiny_numbers_are_flushed_in_all_threads_or_in_none(now, either, set_threads, flush):
    """It is set for each thread by itself, and a new one begins as the one that made it."""
    tiny = torch.full((2**24,), 2.0**-127)

    def bits(n):
        set_threads(n)
        hand = Hand([torch.zeros(2**24)], [dict(SGD[0], momentum=0.5, weight_decay=0)], [0], None)
        flush(now)
        try:
            hand.second_step(cpu, None, [tiny])
        finally:
            flush(False)
        return hand.weights[0].view(torch.int32)

    flush(not now)
    threads.begin_anew()
    set_threads(2)
    played(large())
    expected = bits(1)
    assert bool(expected.any()) is not now
    assert all(torch.equal(bits(2), expected) for _ in range(5))


def test_torchs_threads_flush_as_before(set_threads, flush):
    if threads.openmp is None:
        pytest.skip("torch's OpenMP is not found here")
    set_threads(2)
    tiny = torch.full((2**22,), 2.0**-127)

    def kept() -> int:
        return int((tiny * 0.5).view(torch.int32).ne(0).sum())

    before = kept()
    flush(True)
    played(large())
    flush(False)
    assert kept() == before == len(tiny)


def test_optimizers_step_at_once_in_several_threads(either, set_threads):
    set_threads(3)
    expected, found = played(large()), []
    callers = [threading.Thread(target=lambda: found.append(played(large()))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    for state in found:
        assert_equal(state, expected, "beside others")


def test_a_pool_that_can_start_no_thread_is_done_without(in_pool, set_threads, monkeypatch):
    set_threads(1)
    expected = played(large())
    set_threads(3)
    refused = RuntimeError("can't start new thread")
    monkeypatch.setattr(threads.pool, "submit", partial(fail, refused))
    assert_equal(played(large()), expected, "without a pool")


def fail(error: BaseException, *_args) -> None:
    raise error


def test_an_interrupted_climb_leaves_the_weights(in_pool, set_threads, monkeypatch):
    set_threads(3)
    hand, submit = large(), threads.pool.submit
    before, calls = hand.state(), []

    def submit_one(*args):
        calls.append(args)
        return submit(*args) if len(calls) < 4 else fail(KeyboardInterrupt())

    monkeypatch.setattr(threads.pool, "submit", submit_one)
    with pytest.raises(KeyboardInterrupt):
        hand.first_step(cpu, draw_large(1))
    assert len(calls) == 4  # the second of the climb's
    for i, w in enumerate(hand.weights):
        assert torch.equal(w, before[f"w{i}"])


def test_an_interrupt_within_the_loops_comes_after_them(either, set_threads, ctrl_c, monkeypatch):
    """The weights are back, and m and its count have gone on together."""
    set_threads(2)
    hand = large()
    before, loops = hand.state(), passes.climb_loop
    interrupt = partial(signal.raise_signal, signal.SIGINT)

    def interrupted(*kind) -> Loop:
        loop = loops(*kind)
        if either == "openmp":
            parallel, environment = threads.openmp
            monkeypatch.setattr(threads, "openmp", (
                lambda *args: (parallel(*args), interrupt()), environment))
        return loop._replace(call=lambda at: (loop.call(at), interrupt()))

    monkeypatch.setattr(passes, "climb_loop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hand.first_step(cpu, draw_large(1))
    after = hand.state()
    for i in range(len(hand.weights)):
        assert torch.equal(after[f"w{i}"], before[f"w{i}"])
    assert not torch.equal(after["m"], before["m"])
    assert hand.space.steps[0].tolist() == [1, 1, 1]


class Helpers:
    """A loop that ends when a helper is at work, and which the helpers are late to end."""

    def __init__(self, monkeypatch, interrupts: bool):
        self.begun, self.ended, self.interrupts = threading.Event(), False, interrupts
        self.loop = Loop(self.call, 0, None)
        monkeypatch.setattr(passes, "climb_loop", lambda *_: self.loop)

    def call(self, arguments: int) -> None:
        passes.c_int64.from_address(arguments + 8 * TICKET).value = 1
        if threading.current_thread() is threading.main_thread():
            assert self.begun.wait(10)
            return
        self.begun.set()
        time.sleep(0.1)
        if self.interrupts:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.3)
        self.ended = True


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends no signals")
def test_an_interrupted_climb_waits_for_its_helpers(in_pool, set_threads, ctrl_c, monkeypatch):
    """They would move weights that are back."""
    set_threads(2)
    hand, helpers = large(), Helpers(monkeypatch, interrupts=True)
    with pytest.raises(KeyboardInterrupt):
        hand.first_step(cpu, draw_large(1))
    assert helpers.ended


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("can't start new thread")])
def test_a_helper_that_was_queued_before_the_pool_failed_is_waited_for(error, in_pool, set_threads,
                                                                       monkeypatch):
    """As ThreadPoolExecutor.submit does where it cannot start a thread."""
    set_threads(2)
    hand, submit = large(), threads.pool.submit
    helpers = Helpers(monkeypatch, interrupts=False)

    def queue(*args) -> Future:
        queued = submit(*args)
        if helpers.loop in args:
            assert helpers.begun.wait(10)
            raise error
        return queued

    monkeypatch.setattr(threads.pool, "submit", queue)
    with nullcontext() if isinstance(error, RuntimeError) else pytest.raises(KeyboardInterrupt):
        hand.first_step(cpu, draw_large(1))
    assert helpers.ended


def test_a_helper_that_fails_is_raised_when_the_others_are_done():
    """They would move weights that are back."""
    failed, busy, ended = Future(), Future(), []
    failed.set_exception(MemoryError("(pretended)"))
    assert busy.set_running_or_notify_cancel()

    def finish():
        ended.append(True)
        busy.set_result(None)

    timer = threading.Timer(0.3, finish)
    timer.start()
    with pytest.raises(MemoryError, match="pretended"):
        threads.wait_for([failed, busy])
    was_waited_for = bool(ended)
    timer.join()
    assert was_waited_for


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_threads_of_its_own():
    """torch's do not outlive the fork, and would be waited for for ever."""
    out = in_a_process("""
import os, warnings
import torch
warnings.filterwarnings("ignore", category=DeprecationWarning)  # of forking with threads
from fastsam.kernels.cpu import threads
from tests.backends.test_threads import large, played
torch.set_num_threads(1)
expected = played(large())
torch.set_num_threads(3)
played(large())
child = os.fork()
if child == 0:  # Hand's own copies are to be made by this thread alone
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 3
found = played(large())
same = all(torch.equal(found[k], expected[k]) for k in expected)
if child == 0:
    os._exit(not same or not threads.pool._threads)
print(same, os.waitpid(child, 0)[1])
""")
    assert out.split() == ["True", "0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_so_has_a_forked_child_that_is_the_first_to_load_the_loops():
    out = in_a_process("""
import os, signal, warnings
import torch
import fastsam
warnings.filterwarnings("ignore", category=DeprecationWarning)  # of forking with threads
torch.set_num_threads(3)
torch.ones(2**22).mul_(2)  # torch's threads begin
child = os.fork()
if child == 0:
    signal.alarm(20)
    from fastsam.kernels.cpu import threads
    from tests.backends.test_threads import large, played
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 3
    played(large())
    os._exit(not threads.pool._threads)
print(os.waitpid(child, 0)[1])
""")
    assert out.split() == ["0"]
