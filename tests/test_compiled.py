"""The compiled backend, compiled: against the oracle, without compiling again, and when chosen.

The drawn sequences and the contract's tests run it uncompiled, in all of its structures.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from fastsam import ASAM, SAM, FriendlySAM, compiled, dispatch, runs

from .player import Grads, Group, Setup, Weight
from .sequences import play, run
from .support import ADAM_GROUPS, GROUPS, Course, deal

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(dispatch.why_not_compiled("cpu") is not None,
                       reason=str(dispatch.why_not_compiled("cpu")))]
ROOT = Path(__file__).parent.parent
LARGE = runs.LARGE
SHAPES = [(7,), (LARGE + 5,), (4, 3), (1,), (0,), (2, 3, 2, 2), (LARGE // 8, 8), (5, 5), (33,)]
HYPER = dict(lr=0.05, momentum=0.9, weight_decay=1e-2)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def normals(shapes, seed: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def parameters(shapes, dtype=torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(t) for t in normals(shapes, 0, dtype)]


def two_steps(opt, params, t: int, scale: float = 0.01) -> None:
    shapes, dtype = [p.shape for p in params], params[0].dtype
    for seed, call in ((1000, opt.first_step), (2000, opt.second_step)):
        for p, g in zip(params, normals(shapes, seed + t, dtype), strict=True):
            p.grad = scale * g
        call()


def alike(group: dict) -> list[dict]:
    """Two groups of one structure, whose small parameters make runs, and one of another."""
    other = {k: 1.3 * x if k in ("rho", "lr", "weight_decay") else x for k, x in group.items()}
    return [group, other]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class FreeCourse(Course):
    """Lockstep without ever correcting the oracle: the errors of all steps add up."""

    def follow(self) -> None:
        pass


@pytest.mark.parametrize("name, base, groups", [
    ("fsam-official", "sgd", [*alike(GROUPS[0]), GROUPS[2]]),
    pytest.param("fasam", "adamw", alike(ADAM_GROUPS[0]), marks=pytest.mark.long),
    pytest.param("asam-weights", "sgd", alike(GROUPS[1]), marks=pytest.mark.long),
    pytest.param("fsam-cosine", "adam", alike(ADAM_GROUPS[2]), marks=pytest.mark.long),
])
def test_course_equals_the_oracle(name, base, groups, threads):
    """Weights, moved weights and state at every step; missing and bad gradients on the way."""
    torch.set_num_threads(2 if base == "sgd" else 1)
    params = parameters(SHAPES, torch.float64)
    course = FreeCourse(params, deal(len(SHAPES), groups), name, "compiled", base)
    for t in range(8):
        first, second = normals(SHAPES, 1000 + t), normals(SHAPES, 2000 + t)
        if t == 3:
            first[1] = first[2] = second[2] = second[3] = None
        if t == 5:
            first[5][0, 0] = torch.inf
        for step, grads in ((course.first_step, first), (course.second_step, second)):
            step(grads)
            for what, actual, expected in course.compared():
                torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13,
                                           msg=lambda text, w=what, t=t: f"{w} at {t}: {text}")
    assert course.opt.skipped_steps == course.oracle.skipped == 1


STEP = ("step", dict(first=Grads(seed=3), second=Grads(seed=4, missing=5), zero_grad=True))
AMP = ("amp", dict(first=Grads(seed=5), second=Grads(seed=6), scale=1024.0, climbs=True, bad=None,
                   unscale=False))
SEQUENCES = {
    "16 bits": (Setup((Group((Weight((31, 34), BF16), Weight((17,), BF16), Weight((5, 3), BF16)),
                             dict(rho=0.3, sigma=0.7, lmbda=0.3, lr=0.1, momentum=0.5,
                                  weight_decay=0.02)),), "fsam", {}, "sgd", "compiled"),
                [STEP, AMP, STEP]),
    "masters": (Setup((Group((Weight((31, 34), F16), Weight((17,), F16), Weight((5, 3), F16)),
                             dict(rho=0.3, lr=0.1, betas=(0.8, 0.97), eps=1e-3,
                                  weight_decay=0.02)),), "sam", {}, "adamw", "compiled",
                      dict(master_weights=True)),
                [STEP, STEP, AMP]),
    "apart": (Setup((Group((Weight((31, 34), F32, form="gapped"), Weight((17,), F32, lodger=True),
                            Weight((5, 3), F32, form="transposed")),
                           dict(rho=1.7, adaptive=True, eta=0.03, lr=0.1, momentum=0.9,
                                nesterov=True)),), "asam", dict(scale="weights"), "sgd",
                    "compiled"), [STEP, STEP]),
}


@pytest.mark.parametrize(
    "name", ["16 bits", "apart", pytest.param("masters", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:the weights are 16-bit:UserWarning")
def test_sequences_that_the_uncompiled_ones_also_play(name, monkeypatch):
    monkeypatch.setattr(runs, "LARGE", 20)
    play(*SEQUENCES[name])


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_a_thousand_steps_of_changing_hyper_parameters_compile_nothing():
    params = parameters([(40,), (5, 5), (LARGE,)])
    opt = FriendlySAM([{"params": params[:1], "lr": 0.01}, {"params": params[1:]}],
                      torch.optim.SGD, rho=0.1, backend="compiled", **HYPER)
    two_steps(opt, params, 0)
    before = graphs()
    grads = [p.grad for p in params]
    for t in range(1000):
        for group in opt.param_groups:
            group.update(lr=0.05 / (t + 1), rho=0.1 + 1e-4 * t, sigma=1 - 1e-4 * t,
                         lmbda=0.9 - 1e-4 * t, momentum=0.9 - 1e-4 * t, weight_decay=1e-6 * (t + 1))
        for call in (opt.first_step, opt.second_step):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            call()
    assert graphs() == before
    assert all(torch.isfinite(p).all() for p in params)


def test_other_networks_need_no_compiling():
    for shapes in ([(40,), (5, 5), (LARGE,)], [(3,), (LARGE, 2), (100, 8), (6,), (LARGE + 3,)],
                   [(17, 3), (12,), (1,), (LARGE // 2,), (9,)]):
        params = parameters(shapes)
        opt = SAM(params, torch.optim.SGD, backend="compiled", **HYPER)
        before = graphs()
        two_steps(opt, params, 0)
    assert graphs() == before


@pytest.mark.parametrize("phase", ["norm", "climb", "step"])
def test_a_phase_is_one_loop_over_memory_and_makes_no_tensor(phase, monkeypatch, threads):
    torch.set_num_threads(2)
    monkeypatch.setattr(compiled, "compiled", compiled.Compiled)  # compile it anew
    params = parameters([(LARGE,)])
    opt = FriendlySAM(params, torch.optim.SGD, backend="compiled", **HYPER)
    two_steps(opt, params, 0)
    codes, call = [], getattr(compiled, phase)

    def looked_at(*args):
        codes.extend(run_and_get_code(call, *args)[1])

    monkeypatch.setattr(compiled, phase, looked_at)
    two_steps(opt, params, 1)
    code, = codes
    loops = re.findall(r"for\(int64_t x0=.*x0<static_cast<int64_t>\(ks\d+\)", code)
    assert len(loops) == 1
    assert not re.findall(r"empty_strided_cpu\(\(s\d+", code)


# ---- what needs no C++: Dynamo's part of the compiling, or none


@pytest.fixture
def without_inductor(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compiled.Compiled, "options", lambda self: None)
    monkeypatch.setattr(runs, "LARGE", 20)
    monkeypatch.setattr(compiled, "compiled", functools.cache(compiled.Compiled))


def test_no_number_of_threads_is_one_too_many(without_inductor, threads):
    params = parameters([(70,), (80,)])
    opt = SAM(params, torch.optim.SGD, backend="compiled", **HYPER)
    for n in range(1, 10):
        torch.set_num_threads(n)
        two_steps(opt, params, n)


def test_plain_steps_compile_one_structure_more(without_inductor):
    before, counts = graphs(), []
    for first, second in ((70, 80), (90, 130), (64, 65)):
        params = parameters([(first,), (5,), (3,), (second,)])
        opt = SAM(params, torch.optim.SGD, backend="compiled", **HYPER)
        for t in range(3):
            two_steps(opt, params, t)
            opt.step()
        counts.append(graphs() - before)
    assert counts == [4, 4, 4]  # norm, climb, step, plain step


def test_other_lengths_after_a_reset_of_dynamo(monkeypatch):
    monkeypatch.setattr(compiled, "compiled", functools.cache(compiled.Compiled))
    courses = []
    for backend in ("compiled", "reference"):
        params = parameters([(LARGE + 5,), (LARGE + 70, 2), (7,), (50,)])
        opt = SAM(params, torch.optim.SGD, backend=backend, **HYPER)
        two_steps(opt, params, 0)
        torch._dynamo.reset()
        two_steps(opt, params, 1)
        courses.append(params)
    torch.testing.assert_close(*courses)


@pytest.mark.parametrize("examples", [12, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:the weights are 16-bit:UserWarning",
                            "ignore:the closure left no gradients:UserWarning")
def test_no_guard_that_is_left_out_would_fail(examples, without_inductor, threads):
    """Drawn sequences with all guards, any of whose failures is an error."""
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run("compiled", examples, seed=examples, shrink=False)


@pytest.mark.long
def test_steps_inside_and_outside_of_inference_mode(without_inductor):
    courses = []
    for backend in ("compiled", "reference"):
        params = parameters([(70,), (5,), (3,)])
        opt = SAM(params, torch.optim.SGD, backend=backend, **HYPER)
        with torch.inference_mode():
            two_steps(opt, params, 0)
        two_steps(opt, params, 1)
        courses.append(params)
    torch.testing.assert_close(*courses)


def test_an_eps_that_float32_does_not_know(without_inductor):
    params = parameters([(5,), (3,)])
    opt = ASAM(params, torch.optim.AdamW, backend="compiled", lr=0.1, eps=1e-60)
    for t in range(3):
        two_steps(opt, params, t)
    assert opt.skipped_steps == 0 and all(torch.isfinite(p).all() for p in params)


def fails_on(broken, function, plan, tensors, more):
    if function is broken and plan.many:
        raise OSError("no space left on device\nand more")
    return compiled.on_stand_in(function, plan, tensors, more)


@pytest.mark.parametrize("phase", ["norm", "climb", "step"])
def test_what_cannot_be_compiled_changes_nothing_and_shows_the_way_out(phase, without_inductor,
                                                                       monkeypatch):
    broken = getattr(compiled.reference, f"{phase}_of" if phase == "norm" else f"{phase}_slot")
    monkeypatch.setattr(torch, "compile", lambda own, **kwargs: functools.partial(fails_on, broken))
    params = parameters([(70,), (5,), (3,)])
    opt = FriendlySAM(params, torch.optim.SGD, convention="official", backend="compiled",
                      dampening=0.1, **HYPER)
    weights = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="no space left on device.*use backend='reference'"):
        two_steps(opt, params, 0)
    assert opt.is_perturbed == (phase == "step")
    opt.restore()
    assert all(map(torch.equal, params, weights))
    assert phase == "step" or not any(s["ema"].any() for s in opt.state.values())
    assert not any(s["momentum_buffer"].any() for s in opt.state.values())


def test_an_interrupted_climb_is_taken_back(without_inductor, monkeypatch):
    call = compiled.Stretch.call

    def interrupted(self, run, *args):
        if len(self.slots) > 1 and run.arguments[0] is compiled.reference.climb_slot:
            raise KeyboardInterrupt
        return call(self, run, *args)

    monkeypatch.setattr(compiled.Stretch, "call", interrupted)
    params = parameters([(70,), (5,), (3,)])
    opt = SAM(params, torch.optim.SGD, backend="compiled", **HYPER)
    weights = [p.detach().clone() for p in params]
    with pytest.raises(KeyboardInterrupt):
        two_steps(opt, params, 0)
    assert not opt.is_perturbed and all(map(torch.equal, params, weights))


RUN = """
import torch
from torch._dynamo.utils import counters
import fastsam
p = torch.nn.Parameter(torch.randn(100))
opt = fastsam.SAM([p], torch.optim.SGD, backend="compiled", lr=0.1)
for call in (opt.first_step, opt.second_step):
    p.grad = torch.ones(100)
    call()
inductor = counters["inductor"]
print(inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"])
"""


@pytest.mark.long
def test_the_next_run_compiles_nothing(tmp_path):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first, second = (subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, env=env, check=True,
                                    capture_output=True, text=True).stdout.split()
                     for _ in range(2))
    assert first == ["0", "4"] and second == ["4", "0"]  # one to see whether it works


# ---- when it is chosen


def report(n: int, backend: str | None = None, **kwargs) -> dict:
    p = torch.nn.Parameter(torch.zeros(n))
    return SAM([p], torch.optim.SGD, backend=backend, lr=0.1, **kwargs).backend_report()


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Without Triton's interpreter, which the tests run the kernels in."""
    monkeypatch.setattr(dispatch, "why_not_triton", lambda *kind: "there is no GPU")


def test_a_cpu_compiles_where_that_pays(on_a_cpu):
    few, many = report(1000), report(dispatch.WORTH_COMPILING)
    assert few["backend"] == "reference" and "does not pay for 1000 parameters" in few["why"]
    assert many["backend"] == "compiled" and "C++ compiler" in many["why"]
    assert report(1000, "compiled")["why"] == "asked for"
    assert report(dispatch.WORTH_COMPILING, "reference")["backend"] == "reference"


def no_compiler():
    from torch._inductor import exc
    raise exc.InvalidCxxCompiler


@pytest.fixture
def without_compiler(on_a_cpu, monkeypatch):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    dispatch.why_not_compiled.cache_clear()
    yield
    dispatch.why_not_compiled.cache_clear()


def test_without_a_compiler_the_reference_runs_and_says_why(without_compiler):
    got = report(dispatch.WORTH_COMPILING)
    assert got["backend"] == "reference" and "there is no C++ compiler" in got["why"]
    with pytest.raises(ValueError, match=r"backend='compiled' cannot run: there is no C\+\+"):
        report(10, "compiled")


def test_without_python_s_headers_the_reference_runs_and_says_why(on_a_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    dispatch.why_not_compiled.cache_clear()
    try:
        assert "Python.h is missing" in report(dispatch.WORTH_COMPILING)["why"]
    finally:
        dispatch.why_not_compiled.cache_clear()


CHOSEN = f"""
import torch
import fastsam
p = torch.nn.Parameter(torch.zeros({dispatch.WORTH_COMPILING}))
opt = fastsam.SAM([p], torch.optim.SGD, lr=0.1)
p.grad = torch.ones_like(p)
opt.step()
print(*opt.backend_report().values())
"""


@pytest.mark.long
def test_where_the_compiler_is_broken_the_reference_runs_and_says_why(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\ntest \"$1\" = --version && echo g++ 13\n")
    broken.chmod(0o755)
    env = {**os.environ, "CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
           "TRITON_INTERPRET": "0"}
    out = subprocess.run([sys.executable, "-c", CHOSEN], cwd=ROOT, env=env, check=True,
                         capture_output=True, text=True).stdout
    assert out.startswith("reference") and "torch.compile fails on 'cpu'" in out


def test_the_scratch_memory_is_counted():
    params = parameters([(100,), (50,), (LARGE,)])
    opt = SAM(params, torch.optim.SGD, backend="compiled", **HYPER)
    before = opt.memory_report()["other"]
    two_steps(opt, params, 0)
    assert opt.memory_report()["other"] - before == 4 * (112 + 64)
