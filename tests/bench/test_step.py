"""The optimizer-step benchmark: its gate, its peers, what it times, its rows and its report."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main
from bench.settings.speed import METHODS
from bench.speed import bandwidth as memory
from bench.speed import contenders as who
from bench.speed.baselines import PerParameterFriendlySAM, PerParameterSAM, why_not_compile
from bench.speed.contenders import Contender, bytes_per_parameter
from bench.speed.parity import BASE_HYPER, SHAPES, exact_course, flat, parity_error
from bench.speed.step import StepConfig, model_shapes, workload
from bench.speed.step_report import read_rows, same_parameters, same_tensors, step_report
from bench.speed.timing import Runner, count_launches, line_up, race, random_like
from fastsam import SAM, reference
from fastsam.choose import BACKENDS

from ..helpers.oracle import Oracle

CPU = torch.device("cpu")
TINY = ["step", "--params", "2000", "--tensors", "5", "--reps", "2"]
HYPER = dict(rho=0.8, sigma=0.7, lmbda=0.6)
SGD = dict(lr=0.3, momentum=0.8, weight_decay=0.05)


@pytest.fixture
def quick(monkeypatch):
    """Bandwidth from small buffers, and no backend that compiles for seconds: what is tested here
    is not the machine's speed, nor the backends."""
    monkeypatch.setattr(who, "BACKENDS", [b for b in BACKENDS if b != "compiled"])
    monkeypatch.setattr("bench.speed.step.bandwidth",
                        lambda device: memory.bandwidth(device, 2**20, 2))


# ---- the budget


@pytest.mark.parametrize(
    "method, base, weight, state, expected",
    [
        ("fsam", "sgd", 4, 4, 52), ("sam", "sgd", 4, 4, 40), ("asam", "sgd", 4, 4, 44),
        ("fasam", "sgd", 4, 4, 56), ("sgd", "sgd", 4, 4, 20),
        ("fsam", "adamw", 4, 4, 60), ("sam", "adamw", 4, 4, 48), ("asam", "adamw", 4, 4, 52),
        # bf16: K1 2 (+ m 4), K2 8 (+ m 8), K3 6 + v 8
        ("sam", "sgd", 2, 4, 2 + 8 + 14), ("fsam", "sgd", 2, 4, 6 + 16 + 14),
        ("asam", "sgd", 2, 4, 4 + 8 + 14), ("fsam", "adamw", 2, 4, 6 + 16 + 22),
        ("sgd", "sgd", 2, 2, 10), ("fsam", "sgd", 2, 2, 4 + 12 + 10),
    ],
)  # fmt: skip
def test_bytes_are_the_designs(method, base, weight, state, expected):
    assert bytes_per_parameter(method, base, weight, state) == expected


# ---- the formulas that judge, and the peers, against the tests' own oracle


@pytest.mark.parametrize("convention", ["algorithm1", "official"])
@pytest.mark.parametrize("method", ["sam", "asam", "fsam", "fasam"])
def test_the_gates_formulas_are_the_oracles(method, convention):
    weights = random_like(SHAPES, torch.float64, CPU, seed=1)
    passes = [tuple(random_like(SHAPES, torch.float64, CPU, 2 * i + j) for j in (2, 3))
              for i in range(4)]  # fmt: skip
    oracle = Oracle(weights, [dict(params=range(len(SHAPES)), **HYPER, **SGD)], method, convention)
    course = exact_course(flat(weights), [(flat(a), flat(b)) for a, b in passes], method, "sgd",
                          convention, HYPER | SGD)  # fmt: skip
    for (g1, g2), (before, climbed, after) in zip(passes, course, strict=True):
        assert torch.allclose(before, flat(oracle.w), rtol=0, atol=1e-13)
        oracle.first_step(g1)
        assert torch.allclose(climbed, flat(oracle.w), rtol=0, atol=1e-13)
        oracle.second_step(g2)
        assert torch.allclose(after, flat(oracle.w), rtol=0, atol=1e-13)


def test_the_gates_adamw_is_torchs():
    p = torch.nn.Parameter(random_like([(50,)], torch.float64, CPU, seed=1)[0])
    opt = torch.optim.AdamW([p], **BASE_HYPER["adamw"])
    grads = random_like([(50,)] * 4, torch.float64, CPU, seed=2)
    course = exact_course(p.detach().clone(), [(g, g) for g in grads], "sgd", "adamw", "",
                          BASE_HYPER["adamw"] | dict(rho=0.0))  # fmt: skip
    for g, (_, _, after) in zip(grads, course, strict=True):
        p.grad = g
        opt.step()
        assert torch.allclose(p, after, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", ["sam", "asam", "fsam", "fasam"])
def test_the_peers_do_what_the_oracle_does(method):
    params = [torch.nn.Parameter(w) for w in random_like(SHAPES, torch.float64, CPU, seed=1)]
    oracle = Oracle(params, [dict(params=range(len(SHAPES)), **HYPER, **SGD)], method, "official")
    arguments = dict(rho=HYPER["rho"], adaptive=method in ("asam", "fasam"), **SGD)
    if method in ("fsam", "fasam"):
        friendly = dict(sigma=HYPER["sigma"], lmbda=HYPER["lmbda"])
        opt = PerParameterFriendlySAM(params, torch.optim.SGD, **friendly, **arguments)
    else:
        opt = PerParameterSAM(params, torch.optim.SGD, **arguments)
    for i in range(4):
        for j, phase in enumerate(("first_step", "second_step")):
            grads = random_like(SHAPES, torch.float64, CPU, seed=2 * i + j + 2)
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            getattr(opt, phase)()
            getattr(oracle, phase)(grads)
            assert torch.allclose(flat(params), flat(oracle.w), rtol=0, atol=1e-13)
            assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


# ---- the gate


def norm_too_small(monkeypatch):
    norm = reference.norm

    def broken(p):
        norm(p)
        p.space.partials.mul_(0.98)

    monkeypatch.setattr(reference, "norm", broken)


def norm_of_nothing(monkeypatch):
    monkeypatch.setattr(reference, "norm", lambda p: p.space.partials.fill_(float("nan")))


def no_return(monkeypatch):
    step = reference.step
    monkeypatch.setattr(reference, "step", lambda p, climb: step(p, None))


def lose(key):
    def sabotage(monkeypatch):
        second_step = SAM.second_step

        def broken(self, *args):
            second_step(self, *args)
            for state in self.state.values():
                state.get(key, torch.empty(0)).zero_()

        monkeypatch.setattr(SAM, "second_step", broken)

    return sabotage


@pytest.mark.parametrize(
    "sabotage, method, base",
    [
        (norm_too_small, "sam", "sgd"), (norm_too_small, "fasam", "adamw"),
        (norm_of_nothing, "asam", "sgd"), (no_return, "sam", "sgd"),
        (lose("momentum_buffer"), "asam", "sgd"), (lose("ema"), "fsam", "sgd"),
        (lose("ema"), "fasam", "sgd"),
    ],
    ids=["norm", "norm-adamw", "nan", "return", "momentum", "ema-fsam", "ema-fasam"],
)  # fmt: skip
def test_a_wrong_backend_is_red_and_has_no_speed(
    sabotage, method, base, monkeypatch, capsys, tmp_path, quick
):
    monkeypatch.setattr(who, "BACKENDS", ("reference",))
    sabotage(monkeypatch)
    rows = tmp_path / "rows.jsonl"
    command = [*TINY, "--methods", "sgd", method, "--base", base, "--rows", str(rows)]
    assert main(command) == 1
    printed = capsys.readouterr().out
    red = [line for line in printed.splitlines() if line.startswith("parity is red")]
    assert len(red) == 1 and f"{method} by fastsam reference" in red[0]
    assert "GB/s" not in printed and not rows.exists()


def test_a_step_to_nan_is_infinitely_wrong():
    class ToNaN(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.fill_(float("nan"))

    contender = Contender("sgd", "to NaN", ToNaN, state=4)
    assert parity_error(contender, "sgd", torch.float32, CPU) == float("inf")


class CorrectedAverage(PerParameterFriendlySAM):
    """Averages d instead of g: the error of some published F-SAM."""

    def directions(self):
        gs, ms = [p.grad for p in self.params], self.state["ema"]
        if not ms:
            return super().directions()
        ds = [g - self.sigma * m for g, m in zip(gs, ms, strict=True)]
        for d, m in zip(ds, ms, strict=True):
            m.mul_(self.lmbda).add_(d, alpha=1 - self.lmbda)
        return ds


class TwiceAsFar(PerParameterSAM):
    def first_step(self):
        super().first_step()
        with torch.no_grad():
            for p, w in zip(self.params, self.state["saved"], strict=True):
                p.add_(p - w)


def package(monkeypatch, *classes):
    monkeypatch.setattr(who, "BACKENDS", ())
    monkeypatch.setattr(who, "pytorch_optimizer_classes", lambda: classes or None)


def test_a_package_with_another_friendly_sam_is_speed_only(monkeypatch, capsys, tmp_path, quick):
    package(monkeypatch, PerParameterSAM, CorrectedAverage)
    rows = tmp_path / "rows.jsonl"
    assert main([*TINY, "--methods", "sam", "fsam", "--rows", str(rows)]) == 0
    marks = {(r["method"], r["implementation"]): r["speed_only"] for r in read_rows([rows])}
    assert [key for key, mark in marks.items() if mark] == [("fsam", "pytorch_optimizer")]
    assert len(marks) == 4
    assert capsys.readouterr().out.count("pytorch_optimizer (speed only)") == 1


def test_a_package_with_another_sam_is_red(monkeypatch, capsys, quick):
    package(monkeypatch, TwiceAsFar, PerParameterFriendlySAM)
    assert main([*TINY, "--methods", "sam", "fsam"]) == 1
    assert "parity is red: sam by pytorch_optimizer is off by 1.0e+00" in capsys.readouterr().out


def test_every_backend_of_fastsam_is_timed_or_said_to_be_left_out(monkeypatch):
    assert who.BACKENDS == BACKENDS
    monkeypatch.setattr(who, "BACKENDS", ("reference", "triton", "abacus"))
    found, left_out = who.contenders(("sam",), "sgd", torch.float32, CPU)
    assert [c.name for c in found if c.name.startswith("fastsam")] == ["fastsam reference"]
    assert [line.split(":")[0] for line in left_out if line.startswith("fastsam")] == [
        "fastsam triton", "fastsam abacus"
    ]  # fmt: skip


def test_an_absent_package_is_one_line(monkeypatch, capsys, quick):
    package(monkeypatch)
    assert main([*TINY, "--methods", "sam"]) == 0
    printed = capsys.readouterr().out
    assert "| pytorch_optimizer" not in printed
    assert "left out: pytorch_optimizer: not installed\n" in printed


# ---- what is timed


class Recorder:
    """A SAM that writes down who was called with which gradients, and spoils them."""

    calls: list = []

    def __init__(self, params, name, **kwargs):
        self.params, self.name, self.state = params, name, {}

    def note(self, phase):
        self.calls.append((self.name, phase, [p.grad.clone() for p in self.params]))
        for p in self.params:
            p.grad.add_(1) if phase == 1 else None

    def first_step(self):
        self.note(1)

    def second_step(self):
        self.note(2)


def test_rounds_take_turns_with_fresh_gradients(monkeypatch):
    def recorder(name):
        return Contender("sam", name, lambda ps, **kw: Recorder(ps, name, **kw), state=4)

    monkeypatch.setattr(Recorder, "calls", [])
    shapes, hyper = [(3,), (2, 2)], dict(rho=1.0)
    found = [recorder("a"), recorder("b"), recorder("c")]
    runners, first = line_up(found, shapes, hyper, torch.float32, CPU, graph=False)
    g1, g2 = (random_like(shapes, torch.float32, CPU, seed, 0.01) for seed in (1, 2))
    Recorder.calls.clear()
    race(runners, first, reps=2)
    assert [len(r.ms) for r in runners] == [2, 2, 2]
    assert "".join(name for name, phase, _ in Recorder.calls if phase == 1) == "cab" "abc" "bca"
    assert [phase for _, phase, _ in Recorder.calls] == 9 * [1, 2]
    for _, phase, grads in Recorder.calls:
        assert all(map(torch.equal, grads, g1 if phase == 1 else g2))


def test_only_the_phases_are_timed(monkeypatch):
    now, flushes = [0.0], []  # a clock of our own, which other programs cannot delay
    monkeypatch.setattr(memory, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Sleeper(Recorder):
        def note(self, phase):
            now[0] += 0.01 * phase

    def no_flush():
        now[0] += 0.1
        flushes.append(1)

    flush = torch.zeros(1)
    monkeypatch.setattr(flush, "sum", no_flush)
    contender = Contender("sam", "", lambda ps, **kw: Sleeper(ps, "", **kw), state=4)
    passes = tuple(random_like([(3,)], torch.float32, CPU, seed) for seed in (1, 2))
    runner = Runner(contender, passes[0], passes, dict(rho=1.0))
    runner.time(passes[0], flush)
    assert len(flushes) == 2, "cold caches before each phase"
    assert runner.ms[0] == pytest.approx(30)


def test_bandwidth_counts_two_buffers_for_a_copy_and_three_for_a_triad(monkeypatch):
    monkeypatch.setattr(memory, "elapsed_ms", lambda call, device: call() is None or 2.0)
    assert memory.bandwidth(CPU, 4_000_000) == {
        "copy": 4.0, "triad": 6.0, "buffer_bytes": 4_000_000
    }  # fmt: skip


def test_default_buffers_are_past_the_last_level_cache(monkeypatch):
    sizes = []
    monkeypatch.setattr(memory, "cache_bytes", lambda device: 2**27)
    monkeypatch.setattr(torch, "full", lambda size, *a, **k: sizes.append(*size) or torch.ones(1))
    memory.bandwidth(CPU, reps=1)
    assert sizes == 3 * [2**27]  # float32: 4 times the cache each


def test_launches_are_kernels_copies_and_fills():
    kinds = ["kernel", "kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "gpu_user_annotation"]
    events = [{"ph": "X", "cat": kind} for kind in kinds] + [{"ph": "M", "name": "process_name"}]
    assert count_launches({"traceEvents": events}) == 4


def test_models_are_their_parameters():
    shapes = model_shapes("preactresnet18", None)
    assert (len(shapes), sum(s.numel() for s in shapes)) == (56, 11_172_170)
    shapes = model_shapes("resnet34", None)  # torchvision's
    assert (len(shapes), sum(s.numel() for s in shapes)) == (110, 21_289_802)
    shapes = model_shapes("resnet18", None)
    assert (len(shapes), sum(s.numel() for s in shapes)) == (62, 11_173_962)
    shapes = workload(StepConfig(params=1001, tensors=4))[1]
    assert [s.numel() for s in shapes] == [251, 250, 250, 250]
    assert len(workload(StepConfig(params=1001))[1]) == 62


# ---- rows


@pytest.mark.parametrize("base, dtype", [("sgd", "fp32"), ("adamw", "fp32"), ("sgd", "bf16")])
def test_rows(base, dtype, tmp_path, capsys, quick):
    path, n = tmp_path / "results" / "rows.jsonl", 2000
    command = [*TINY, "--base", base, "--dtype", dtype, "--rows", str(path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["method"] for row in rows} == set(METHODS)
    names = {row["implementation"] for row in rows}
    assert names >= {"fastsam reference", "per-parameter", "torch", "torch foreach", "torch fused"}
    assert names.isdisjoint({"fastsam triton", "per-parameter compiled"})
    kept = {(row["method"], row["implementation"]): row["state_bytes"] for row in rows}
    element, states = (4 if dtype == "fp32" else 2), (1 if base == "sgd" else 2)
    steps = 5 * 4 * (base == "adamw")  # AdamW's own counters
    assert kept["sgd", "torch fused"] == states * n * element + steps
    assert kept["sam", "per-parameter"] == (1 + states) * n * element + steps
    assert kept["fasam", "per-parameter"] == (2 + states) * n * element + steps
    assert kept["fsam", "fastsam reference"] >= n * (element + 4 + 4 * states)
    for row in rows:
        assert row["kind"] == "step" and row["parity_error"] >= 0 and not row["speed_only"]
        assert (row["parameters"], row["tensors"], row["reps"]) == (n, 5, 2)
        assert (row["base"], row["dtype"], row["graph"]) == (base, dtype, False)
        ms, speeds = row["ms"], row["bandwidth"]
        assert 0 < ms["p20"] <= ms["p50"] <= ms["p80"] < 1000
        assert row["bytes"] == row["bytes_per_parameter"] * n
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / 1e9 / (ms["p50"] / 1e3))
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / speeds["copy"])
        assert row["of_triad"] == pytest.approx(row["gb_per_s"] / speeds["triad"])
        assert row["launches"] is None, "on a CPU nothing is launched"
        assert row["device"].startswith("cpu: ") and row["threads"] == torch.get_num_threads()
        assert row["versions"]["torch"].startswith(torch.__version__.split("+")[0])
        assert {"triton", "numpy", "cuda", "driver", "pytorch_optimizer"} <= row["versions"].keys()
        assert {"git", "time", "cpus"} <= row.keys()
        assert row["config"]["params"] == n and row["hyper"]["rho"] == 0.1
        assert f"{row['gb_per_s']:.3g}" in printed
    assert main(command) == 0 and len(path.read_text().splitlines()) == 2 * len(rows)


def test_the_budget_knows_whose_states_are_float32(quick, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert main([*TINY, "--methods", "fsam", "--dtype", "bf16", "--rows", str(path)]) == 0
    budget = {row["implementation"]: row["bytes_per_parameter"] for row in read_rows([path])}
    assert budget["fastsam reference"] == 36 and budget["per-parameter"] == 26


# ---- what cannot be done


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--params", "0"], "0"),
        (["--params", "10"], "62"),
        (["--params", "10", "--tensors", "11"], "11"),
        (["--params", "100000000000000"], "100000000000000"),
        (["--params", "1000", "--model", "smallconv"], "1000"),
        (["--tensors", "4"], "--params"),
        (["--model", "transformer"], "transformer"),
        (["--model", "resnet34", "--width", "8"], "resnet34"),
        (["--width", "-3"], "-3"),
        (["--methods", "sam", "adam"], "adam"),
        (["--base", "lion"], "lion"),
        (["--dtype", "int8"], "int8"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "meta"),
        (["--graph"], "cpu"),
        (["--reps", "0"], "0"),
        (["--threads", "0"], "0"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence(arguments, said, tmp_path, capsys):
    why_not_compile(CPU)  # torch may warn of the machine when it compiles first
    capsys.readouterr()
    rows = tmp_path / "rows.jsonl"
    assert main(["step", *arguments, "--rows", str(rows)]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and said in output.err
    assert output.out == "" and not rows.exists()


def test_compile_that_cannot_be_is_refused(monkeypatch, capsys):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nsomewhere in a long trace")

    monkeypatch.setattr(torch, "compile", no_compiler)
    # what why_not_compile sets is put back; monkeypatch would leave the options hidden
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        assert why_not_compile(CPU) == "No working C++ compiler found"
        assert main([*TINY, "--methods", "sam", "--compile"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No working C++ compiler found" in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and launches need a GPU")
@pytest.mark.parametrize("graph", [[], ["--graph"]], ids=" ".join)
def test_on_a_gpu(graph, tmp_path, quick):
    path = tmp_path / "rows.jsonl"
    assert main([*TINY, "--device", "cuda", "--no-compile", *graph, "--rows", str(path)]) == 0
    rows = read_rows([path])
    triton = {row["method"]: row["launches"] for row in rows
              if row["implementation"] == "fastsam triton"}  # fmt: skip
    assert triton == {"sgd": 1, "sam": 3, "asam": 3, "fsam": 3, "fasam": 3}
    assert all(row["graph"] == bool(graph) and row["launches"] > 0 for row in rows)


def test_keeping_freed_memory_is_part_of_the_setting(tmp_path, quick, monkeypatch):
    asked = []
    monkeypatch.setattr("bench.speed.step.keep_freed_memory", lambda: asked.append(True))
    path = tmp_path / "rows.jsonl"
    assert main([*TINY, "--no-compile", "--keep-memory", "--rows", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert asked == [True] and all(row["keep_memory"] for row in rows)
    assert all(row["first_ms"] > 0 for row in rows)


def test_keeping_freed_memory_needs_glibc(capsys, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert main([*TINY, "--no-compile", "--keep-memory"]) == 2
    assert "needs glibc" in capsys.readouterr().err


# ---- report


def made(n, k, method="sam", implementation="fastsam reference", ms=1.0, **more):
    return {
        "kind": "step", "device": "cpu: an abacus", "threads": 2, "base": "sgd", "dtype": "fp32",
        "graph": False, "keep_memory": False, "method": method, "implementation": implementation,
        "speed_only": False, "workload": f"{k} equal tensors", "parameters": n, "tensors": k,
        "reps": 20,
        "ms": {"p20": 0.9 * ms, "p50": ms, "p80": 1.2 * ms}, "bytes_per_parameter": 40,
        "gb_per_s": 40 * n / ms / 1e6, "of_copy": 0.5, "of_triad": 0.25, "launches": None,
        "state_bytes": 8 * n, "bandwidth": {"copy": 20.0, "triad": 25.0},
        "versions": {"torch": "2.15.0", "triton": None}, "git": "0123456789-dirty", **more,
    }  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SWEEP = [made(n, k, method, name, ms=n * 1e-6 + k * speed)
         for n, k in [(10**6, 10), (10**7, 10), (10**7, 100), (10**7, 1000), (10**8, 10)]
         for method in ("sam", "fsam")
         for name, speed in (("fastsam reference", 0.001), ("per-parameter", 0.01))]  # fmt: skip


def test_report_draws_and_tabulates_rows(tmp_path, capsys):
    other = [made(10**6, 10, device="a GPU", launches=3, speed_only=True, ms=0.01234)]
    files = [write(tmp_path / "a.jsonl", SWEEP), write(tmp_path / "b.jsonl", other)]
    out = tmp_path / "out"
    assert main(["report", "--step", *files, "--out", str(out)]) == 0
    for name in ("step-parameters.png", "step-tensors.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    text = (out / "step.md").read_text()
    assert text.strip() in capsys.readouterr().out
    table = [[cell.strip() for cell in line.strip("| ").split("|")]
             for line in text.splitlines() if line.startswith("| ")]  # fmt: skip
    cells = [line for line in table if line[0] in ("SAM", "Friendly-SAM")]
    assert len(cells) == len(SWEEP) + 1
    for line in (
        "fastsam reference (speed only);1,000,000;10;0.0123 (0.0111-0.0148);40;3241;50%;25%;3;8.0",
        "per-parameter;10,000,000;1000;20 (18-24);40;20;50%;25%;-;8.0",
    ):
        assert line.split(";") in [cell[1:] for cell in cells]
    assert text.count("###") == 2 and "### cpu: an abacus, 2 threads, over sgd, fp32" in text
    assert text.count("Speed only: does not compute the method.") == 1
    assert "torch 2.15.0; commit 0123456-dirty." in text


def test_figures_vary_one_thing_at_a_time():
    assert {(r["parameters"], r["tensors"]) for r in same_tensors(SWEEP)} == {
        (10**6, 10), (10**7, 10), (10**8, 10)
    }  # fmt: skip
    assert {(r["parameters"], r["tensors"]) for r in same_parameters(SWEEP)} == {
        (10**7, 10), (10**7, 100), (10**7, 1000)
    }  # fmt: skip


def test_of_equal_measurements_the_last_counts(tmp_path):
    rows = [made(10**6, 10, ms=5.0), made(10**6, 10, ms=7.0), made(10**6, 10, ms=3.0, threads=1)]
    write(tmp_path / "rows.jsonl", rows)
    assert [r["ms"]["p50"] for r in read_rows([tmp_path / "rows.jsonl"])] == [7.0, 3.0]
    assert "7 (6.3-8.4)" in step_report(read_rows([tmp_path / "rows.jsonl"]))


@pytest.mark.parametrize(
    "text, said",
    [(None, "is not there"), ("", "is empty"), ("{}\n", "line 1"), ("[1]\n", "line 1"),
     (json.dumps(made(1, 1)) + "\nnot JSON\n", "line 2"), ("7\n", "line 1")],
)  # fmt: skip
def test_report_refuses_what_is_no_row(text, said, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    assert main(["report", "--step", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and said in error
    assert not (tmp_path / "out").exists()
