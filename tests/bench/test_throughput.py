"""`bench throughput`: turns and ratios, rows, and what it refuses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main
from bench.speed import throughput, training_loops

from ..helpers.loops import OPTIONS, RELATIVES, tiny_config

TINY = ["--model", "smallconv", "--width", "4", "--batch-size", "8", "--images", "40",
        "--image-size", "8", "--threads", "1", "--workers", "0", "--turns", "2"]  # fmt: skip


def clocks(now, processor=lambda: 0.0):
    return SimpleNamespace(perf_counter=now, process_time=processor)


@pytest.mark.parametrize("name, last", [("fast", "step"), ("eager", "second_step")])
def test_breakdown_adds_up_and_leaves_the_loop_as_it_was(name, last, monkeypatch):
    """On a clock that ticks only where the test says so."""
    loop = training_loops.fast_loop(
        tiny_config("sam"), training_loops.random_data(OPTIONS), OPTIONS, name
    )
    now = [0.0]
    monkeypatch.setattr(throughput, "time", clocks(lambda: now[0]))

    def slower(owner, name, seconds):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            now[0] += seconds
            return real(*args, **kwargs)

        setattr(owner, name, call)
        return call

    calls = [slower(loop, "batch", 1), slower(loop, "attack", 2), slower(loop, "update", 4),
             slower(loop.opt, "first_step", 8), slower(loop.opt, last, 16)]  # fmt: skip
    parts = throughput.breakdown(loop, 3, torch.device("cpu"))
    assert parts == pytest.approx({"data": 1e3, "attack": 2e3, "forward and backward": 4e3,
                                   "climb": 8e3, "return and step": 16e3})  # fmt: skip
    assert calls == [loop.batch, loop.attack, loop.update, loop.opt.first_step,
                     getattr(loop.opt, last)]  # fmt: skip


class Timed:
    """A loop of steps that take as long as it is told, by the clock and of the processor."""

    def __init__(self, name, method, now, seconds, processor, order):
        self.name, self.config = name, SimpleNamespace(method=method, batch_size=10)
        self.prefetched, self.now, self.order = 0, now, order
        self.durations = zip(seconds, processor, strict=True)

    def step(self):
        self.order.append(self.name)
        for i, duration in enumerate(next(self.durations)):
            self.now[i] += duration


def test_race_takes_turns_and_compares_within_each(monkeypatch):
    now, order = [0.0, 0.0], []
    monkeypatch.setattr(throughput, "time", clocks(lambda: now[0], lambda: now[1]))
    monkeypatch.setattr(throughput, "breakdown", lambda *_: None)
    # two steps a turn, the first turn warms up
    loops = [Timed("a", "sgd", now, [100, 100, 1, 3, 2, 2, 5, 5], [9, 9, 1, 1, 2, 2, 3, 3], order),
             Timed("b", "msam", now, [100, 100, 2, 6, 9, 9, 10, 20], [9] * 8, order),
             Timed("c", "msam", now, [100, 100, 4, 12, 9, 9, 1, 2], [18] * 8, order)]
    sgd, fast, slow = throughput.race(loops, 2, 3, torch.device("cpu"))
    assert order == ["a", "a", "b", "b", "c", "c"] * 4
    assert sgd["images_per_second"] == 2 * 10 / 4 and sgd["fast_is_faster"] == 1
    assert sgd["times_sgd"] == {"clock": 1, "processor": 1} and sgd["processor_ms"] == 2e3
    assert sgd["step_ms"] == {"p20": 2e3, "p50": 2.5e3, "p80": 5e3}
    assert fast["images_per_second"] == 2 * 10 / 18 and fast["fast_is_faster"] == 1
    assert fast["times_sgd"] == {"clock": 3, "processor": 4.5}, "turn by turn 2, 4.5, 3; 9, 4.5, 3"
    assert slow["fast_is_faster"] == 1, "of its own method's first, turn by turn 2, 1, 0.1"


def test_a_turn_is_whole_periods():
    configs = [tiny_config("sgd"), tiny_config("looksam")]
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert throughput.steps_of_a_turn(configs[:1], OPTIONS, cpu) == 1
    assert throughput.steps_of_a_turn(configs, OPTIONS, cpu) == 5
    assert throughput.steps_of_a_turn(configs, OPTIONS, gpu) == 30
    assert throughput.steps_of_a_turn([replace(configs[1], interval=4)], OPTIONS, gpu) == 32
    with pytest.raises(ValueError, match="steps 7 end within a period of 5"):
        throughput.steps_of_a_turn(configs, replace(OPTIONS, steps=7), cpu)
    assert throughput.steps_of_a_turn(configs[:1], replace(OPTIONS, steps=7), cpu) == 7


def test_the_relatives_beside_sgd(tmp_path, capsys):
    """Passes, as hooks count them in whole turns, and rows."""
    rows = tmp_path / "rows.jsonl"
    assert main(["throughput", *TINY, "--methods", "sgd", *RELATIVES, "--beside", "plain",
                 "--turns", "1", "--rows", str(rows)]) == 0
    printed = capsys.readouterr().out
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["method"], row["loop"]) for row in found] == [
        (method, loop) for method in ("sgd", *RELATIVES) for loop in ("fast", "plain")]
    for row in found:
        assert row["steps"] == 5 and row["processor_ms"] > 0
        assert f"{row['times_sgd']['processor']:.3f}" in printed


def test_command_leaves_rows_of_every_loop(tmp_path, capsys):
    path = tmp_path / "new" / "rows.jsonl"
    command = ["throughput", *TINY, "--methods", "sgd", "fsam", "at-linf", "--cutout", "4",
               "--attack-steps", "2", "--beside", "eager", "fp32", "fp32-nchw", "plain",
               "--rows", str(path)]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {method: [] for method in ("sgd", "fsam", "at-linf")}
    for row in rows:
        found[row["method"]].append(row["loop"])
    every = ["fast", "fp32", "fp32-nchw", "plain"]
    assert found == {"sgd": every, "fsam": ["fast", "eager", *every[1:]], "at-linf": every}
    for row in rows:
        assert row.keys() >= {"versions", "git", "device", "threads", "time", "data", "options"}
        assert row["config"]["data"] == "random" and row["options"]["turns"] == 2
        assert row["step_ms"]["p20"] <= row["step_ms"]["p50"] <= row["step_ms"]["p80"]
        parts = row["breakdown_ms"]
        assert (parts["climb"] > 0) == (row["method"] == "fsam")
        assert min(parts[name] for name in ("data", "attack", "return and step")) > 0
        assert row["errors"]["training"] < 1e-5 and 0 < row["errors"]["precision"] < 0.01
        assert f"{row['images_per_second']:.1f}" in printed
        assert (row["loop"] == "fast") <= (row["fast_is_faster"] == 1)


def test_red_parity_prints_no_speed(tmp_path, capsys, monkeypatch):
    real = training_loops.build_optimizer

    def climbs_too_far(config, model):
        return real(replace(config, rho=1.1 * config.rho) if config.rho else config, model)

    monkeypatch.setattr(training_loops, "build_optimizer", climbs_too_far)
    rows = tmp_path / "rows.jsonl"
    assert main(["throughput", *TINY, "--methods", "sgd", "sam", "--rows", str(rows)]) == 1
    printed = capsys.readouterr().out
    assert "parity is red: sam's training" in printed and "red: sgd" not in printed
    assert "images/s" not in printed and not rows.exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--methods", "adam"], "adam"),
        (["--methods", "sgd", "sam-micro"], "no plain recipe of 'sam-micro'"),
        (["--beside", "graph"], "CUDA"),
        (["--beside", "nothing"], "nothing"),
        (["--turns", "0"], "turns"),
        (["--images", "-1"], "images"),
        (["--images", "7"], "batch"),
        (["--workers", "-1"], "workers"),
        (["--padding", "mirror"], "mirror"),
        (["--cutout", "-3"], "-3"),
        (["--image-size", "4"], "pad 4"),
        (["--device", "abacus"], "abacus"),
        (["--amp", "fp8"], "fp8"),
        (["--methods", "sgd", "sam", "--attack-steps", "3"], "attack_steps 3 has no effect"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence(arguments, said, tmp_path, capsys):
    command = ["throughput", *TINY, *arguments, "--rows", str(tmp_path / "rows.jsonl")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_needs_no_number(monkeypatch):
    """torch.cuda.set_device("cuda") is an error."""
    def reached(*args):
        raise InterruptedError

    monkeypatch.setattr(throughput, "usable_device", torch.device)
    monkeypatch.setattr(throughput, "disagreement", reached)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    config = replace(tiny_config("sgd"), device="cuda")
    with pytest.raises(InterruptedError):
        throughput.throughput([config], training_loops.Options(images=config.batch_size))
