"""The optimizer-step benchmark: its budget, what it times, its rows and refusals."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main
from bench.settings.speed import METHODS
from bench.speed import bandwidth as memory
from bench.speed.baselines import why_not_compile
from bench.speed.contenders import Contender, bytes_per_parameter
from bench.speed.step import StepConfig, model_shapes, workload
from bench.speed.step_report import read_rows
from bench.speed.timing import Runner, count_launches, line_up, race, random_like

CPU = torch.device("cpu")
TINY = ["step", "--params", "2000", "--tensors", "5", "--reps", "2"]


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
