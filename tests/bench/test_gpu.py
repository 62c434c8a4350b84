"""`bench gpu`: the session with made pieces, its agenda, and what it makes of the tools' words.
The measurements themselves need a GPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.__main__ import COMMANDS, main
from bench.cli.parse import parse
from bench.speed import gpu_session, gpu_tools
from bench.speed.gpu_session import Piece, agenda, headline, outcome, read_state, run

from .test_data import make_images

ROOT = Path(__file__).parents[2]
HERE = {"code": "0123", "device": "an abacus"}


def piece(tmp_path, name, code="", **how) -> Piece:
    """A piece that writes its name to tmp_path/ran and runs `code`."""
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n"
    return Piece(name, ("-c", note + code), how.pop("estimate", 1), **how)


def ran(tmp_path) -> list[str]:
    """The pieces that began since the last call, in order."""
    path = tmp_path / "ran"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(condition, seconds=100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


# ---- the session, with made pieces


def test_what_failed_is_tried_again_last_and_what_is_done_is_not(tmp_path, capsys):
    good = piece(tmp_path, "good", "print('42 passed')")
    bad = piece(tmp_path, "bad", f"import os, sys; print('no luck'); "
                                 f"sys.exit(not os.path.exists({str(tmp_path / 'luck')!r}))")
    absent = piece(tmp_path, "absent", "import sys; print('no such tool'); sys.exit(77)")
    out = tmp_path / "out"
    assert run([good, bad, absent], out, HERE) == 1
    assert ran(tmp_path) == ["good", "bad", "absent"]
    state = read_state(out)
    assert {k: (e["exit"], e["note"]) for k, e in state.items()} == {
        "good": (0, "42 passed"), "bad": (1, "no luck"), "absent": (77, "no such tool")}
    assert all(e["seconds"] >= 0 and "git" in e and e["code"] == "0123" for e in state.values())
    table = capsys.readouterr().out.splitlines()[-4:-1]
    assert [line.split()[:2] for line in table] == [["good", "green"], ["bad", "failed"],
                                                    ["absent", "left"]]
    assert "no luck" in (out / "log.txt").read_text()

    later = piece(tmp_path, "later")
    assert run([good, bad, absent, later], out, HERE) == 1
    assert ran(tmp_path) == ["later", "bad"]
    (tmp_path / "luck").touch()
    assert run([good, bad, absent, later], out, HERE) == 0
    assert ran(tmp_path) == ["bad"]
    assert run([good, bad, absent, later], out, HERE) == 0
    assert ran(tmp_path) == []
    assert run([good], out, HERE, again=True) == 0
    assert ran(tmp_path) == ["good"]


@pytest.mark.parametrize("change", [{"code": "4567"}, {"device": "a slide rule"}], ids=str)
def test_a_note_counts_for_the_code_and_device_that_it_was_made_with(change, tmp_path):
    pieces = [piece(tmp_path, "a"), piece(tmp_path, "b", "1 / 0")]
    assert run(pieces, tmp_path, HERE) == 1
    assert ran(tmp_path) == ["a", "b"]
    assert run(pieces, tmp_path, HERE | change) == 1
    assert ran(tmp_path) == ["a", "b"]


def test_a_gate_that_is_not_green_stops_everything(tmp_path, capsys):
    fixed = tmp_path / "fixed"
    broken = f"import os; print('assert 1 == 2'); assert os.path.exists({str(fixed)!r})"
    pieces = [piece(tmp_path, "speed"), piece(tmp_path, "first-gate", gate=True),
              piece(tmp_path, "gate", broken, gate=True)]
    for expected in (["first-gate", "gate"], ["gate"]):
        assert run(pieces, tmp_path, HERE) == 1
        assert ran(tmp_path) == expected
        printed = capsys.readouterr().out
        assert "assert 1 == 2" in printed
        assert "gate is not green; a speed without parity is worth nothing" in printed
    fixed.touch()
    assert run(pieces, tmp_path, HERE) == 0
    assert ran(tmp_path) == ["gate", "speed"]


def test_a_measurement_whose_own_parity_is_red_stops_everything(tmp_path):
    red = "import sys; print('parity is red: sam by someone is off'); sys.exit(1)"
    pieces = [piece(tmp_path, "speed", red), piece(tmp_path, "next")]
    assert run(pieces, tmp_path, HERE) == 1
    assert ran(tmp_path) == ["speed"]


def test_a_piece_past_its_limit_ends_with_its_children(tmp_path):
    child = tmp_path / "child"
    code = ("import subprocess, sys, time\n"
            "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            f"open({str(child)!r}, 'w').write(str(p.pid))\n"
            "print('half way', flush=True)\ntime.sleep(600)")
    start = time.monotonic()
    pieces = [piece(tmp_path, "slow", code, limit=5), piece(tmp_path, "next")]
    assert run(pieces, tmp_path, HERE) == 1
    assert time.monotonic() - start < 300
    assert ran(tmp_path) == ["slow", "next"]
    entry = read_state(tmp_path)["slow"]
    assert (entry["exit"], entry["note"]) == (124, "half way") and 5 <= entry["seconds"] < 300
    wait_until(lambda: not is_running(int(child.read_text())))


def test_a_piece_stays_in_the_session_that_it_is_run_from(tmp_path):
    """So that what ends a session with all that is in it ends its piece too."""
    said = tmp_path / "session"
    code = f"import os; open({str(said)!r}, 'w').write(f'{{os.getsid(0)}} {{os.getpgrp()}}')"
    assert run([piece(tmp_path, "a", code)], tmp_path, HERE) == 0
    session, group = map(int, said.read_text().split())
    assert session == os.getsid(0) and group != os.getpgrp()


def test_a_budget_starts_only_what_fits(tmp_path, capsys):
    pieces = [piece(tmp_path, "long", estimate=400), piece(tmp_path, "short", estimate=20)]
    assert run(pieces, tmp_path, HERE, minutes=5) == 0
    assert ran(tmp_path) == ["short"]
    assert "long: about 400 s do not fit" in capsys.readouterr().out
    assert run(pieces, tmp_path, HERE, minutes=7) == 0
    assert ran(tmp_path) == ["long"]


def test_nothing_is_measured_while_a_gate_does_not_fit(tmp_path):
    pieces = [piece(tmp_path, "gate", estimate=400, gate=True), piece(tmp_path, "speed")]
    assert run(pieces, tmp_path, HERE, minutes=5) == 0
    assert ran(tmp_path) == []


def test_a_budget_ends_what_was_thought_to_fit_and_learns(tmp_path):
    slow = [piece(tmp_path, "slow", "import time; time.sleep(600)", estimate=0.1)]
    assert run(slow, tmp_path, HERE, minutes=0.05) == 1
    assert outcome(read_state(tmp_path)["slow"], HERE) == "timed out"
    assert ran(tmp_path) == ["slow"]
    assert run(slow, tmp_path, HERE, minutes=0.02) == 0
    assert ran(tmp_path) == [], "it took longer than that before"


SESSION = """
import sys
from pathlib import Path
import torch
from bench.speed import gpu_session
from bench.speed.gpu_session import Piece
where, slow = Path(sys.argv[1]), sys.argv[2]
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "an abacus"
gpu_session.agenda = lambda out: [Piece("gate", ("-c", ""), 1, gate=True),
                                  Piece("slow", ("-c", slow), 1),
                          Piece("last", ("-c", ""), 1)]
sys.exit(gpu_session.gpu(where))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM], ids=lambda kill: kill.name)
def test_a_killed_session_goes_on_with_the_piece_it_was_at(kill, tmp_path):
    pid = tmp_path / "pid"
    slow = (f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    command = [sys.executable, "-c", SESSION, str(tmp_path), slow]
    session = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: pid.exists() and pid.read_text())
    session.send_signal(kill)
    assert session.wait(100) != 0
    if kill is signal.SIGTERM:
        wait_until(lambda: not is_running(int(pid.read_text())))
    else:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert list(read_state(tmp_path)) == ["gate"]
    pieces = [piece(tmp_path, "gate", gate=True), piece(tmp_path, "slow"), piece(tmp_path, "last")]
    here = {"code": gpu_session.code_digest(), "device": "an abacus"}
    assert run(pieces, tmp_path, here) == 0
    assert ran(tmp_path) == ["slow", "last"]


def test_the_headline_is_friendly_sams_by_the_kernels():
    def step(method, name, ms):
        return {"kind": "step", "method": method, "implementation": name, "ms": {"p50": ms},
                "of_copy": 0.914, "launches": 3}

    rows = [step("sam", "fastsam triton", 0.1), step("fsam", "per-parameter", 9.0),
            step("fsam", "fastsam triton", 0.1581), step("fasam", "fastsam triton", 0.2)]
    assert headline(rows) == "fsam 0.158 ms, 91% of copy, 3 launches"
    assert headline(rows[:2]) == "sam 0.1 ms, 91% of copy, 3 launches"
    assert headline(rows[1:2]) is None and headline([]) is None
    speeds = [{"kind": "throughput", "method": m, "loop": loop, "images_per_second": s}
              for m, loop, s in (("sgd", "fast", 1.0), ("fsam", "fast", 20000.4),
                                 ("fsam", "graph", 31000.0), ("at-linf", "fast", 2.0))]
    assert headline(speeds) == "fsam, images/s: 20000 fast, 31000 graph"


def test_the_note_is_the_headline_of_the_rows_that_the_piece_added(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"kind": "throughput", "method": "sgd", "loop": "fast", "images_per_second": 7.0}
    rows.write_text(json.dumps(row | {"method": "fsam"}) + "\n")
    code = f"open({str(rows)!r}, 'a').write({json.dumps(row)!r} + chr(10)); print('wrote it')"
    run([piece(tmp_path, "a", code, rows=rows), piece(tmp_path, "b", rows=rows)], tmp_path, HERE)
    assert [e["note"] for e in read_state(tmp_path).values()] == ["sgd, images/s: 7 fast", ""]


# ---- the command


@pytest.mark.parametrize("arguments, said", [
    ([], "no CUDA device"), (["--only", "memcheck"], "no CUDA device"),
    (["--only", "everything"], "'everything'"), (["--minutes", "0"], "0.0"),
    (["--minutes", "nan"], "nan"),
], ids=" ".join)
def test_what_cannot_be_is_refused_in_one_sentence(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("absent", gpu_session.PARITY_NEEDS)
def test_without_what_the_tests_import_nothing_is_called_red(absent, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an abacus")
    find = gpu_session.find_spec
    monkeypatch.setattr(gpu_session, "find_spec",
                            lambda name: None if name == absent else find(name))
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {absent} cannot be imported") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_state_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "state.json").write_text('{"memcheck": ')
    assert main(["gpu", "--list", "--out", str(tmp_path)]) == 2
    assert "state.json" in capsys.readouterr().err


def test_the_list_runs_nothing_and_shows_what_another_machine_did(tmp_path, monkeypatch, capsys):
    assert main(["gpu", "--list", "--out", str(tmp_path / "out")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [p.name for p in agenda(tmp_path)]
    assert all(line[1:3] == ["to", "do"] for line in lines)
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    entry = {"exit": 0, "seconds": 41.7, "note": "no errors", "git": None}
    entry |= {"code": gpu_session.code_digest(), "device": "an abacus"}
    (tmp_path / "state.json").write_text(json.dumps({"memcheck": entry}))
    assert main(["gpu", "--list", "--only", "memcheck", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == ["memcheck", "green", "42", "s", "no", "errors"]


def test_the_agenda_is_whole_and_every_command_of_it_can_be_parsed(tmp_path):
    pieces = agenda(tmp_path)
    names = [p.name for p in pieces]
    assert len(set(names)) == len(names)
    assert all(p.limit < 600 and p.estimate <= p.limit for p in pieces)
    first = gpu_session.FIRST + gpu_session.NEXT
    assert tuple(names[:len(first)]) == first
    assert [p.gate for p in pieces] == [i < 4 for i in range(len(pieces))]
    files = [p.arguments[-1] for p in pieces if p.name.startswith("tests-")]
    assert sorted(files) == sorted(p.relative_to(ROOT).as_posix()
                                   for p in (ROOT / "tests").rglob("test_*.py"))
    benches = [p for p in pieces if p.arguments[1] == "bench"]
    for p in benches:
        options = parse(COMMANDS, list(p.arguments[2:]))[1]
        assert options["device"] == "cuda" and options["rows"] == p.rows
    steps = [p for p in benches if p.arguments[2] == "step"]
    for base in ("sgd", "adamw"):
        for size in ("preactresnet18", "wrn28-10", "100000000", "1000000000"):
            forms = {"--graph" in p.arguments for p in steps
                     if size in p.arguments and base in p.arguments}
            assert forms == {True, False}, (base, size)


def test_the_tests_and_programs_that_parity_names_are_there(tmp_path):
    """A pytest that selects nothing fails, and would end the session as red."""
    text = "".join((ROOT / f"tests/backends/test_{name}.py").read_text()
                   for name in ("contract", "kernels"))
    tests = re.findall(r"def (test_\w+)", text)
    for name in gpu_session.PARITY.split(" or "):
        assert any(name in test for test in tests), name
    sequences = (ROOT / "tests/unit/test_sequences.py").read_text()
    assert "def test_any_sequence_of_events_is_right(backend" in sequences
    for p in agenda(tmp_path):
        if p.arguments[1] == "bench.speed.gpu_tools":
            program, *more = p.arguments[2:]
            known = set(gpu_tools.PROGRAMS) if program != "accuracy" else {"sgd", "sam", "fsam"}
            assert program in gpu_tools.PROGRAMS and set(more) - {str(p.rows)} <= known


def test_nine_and_a_half_minutes_hold_the_first_pieces_and_the_next_call_the_next(
        tmp_path, monkeypatch, capsys):
    """Dry: every piece takes as long as it is thought to, on a clock that is pretended."""
    clock, ran = [0.0], []

    def take_its_time(piece, log, limit):
        clock[0] += piece.estimate
        ran.append(piece.name)
        assert limit >= piece.estimate
        return 0, ""

    monkeypatch.setattr(gpu_session, "run_piece", take_its_time)
    monkeypatch.setattr(gpu_session.time, "monotonic", lambda: clock[0])
    pieces = agenda(tmp_path)
    assert run(pieces, tmp_path, HERE, minutes=9.5) == 0
    assert tuple(ran[:len(gpu_session.FIRST)]) == gpu_session.FIRST and clock[0] <= 570
    ran.clear()
    clock[0] = 0.0
    assert run(pieces, tmp_path, HERE, minutes=4) == 0
    assert ran[0] in gpu_session.NEXT and clock[0] <= 240
    assert not set(ran) & set(gpu_session.FIRST)


# ---- what the pieces run


@pytest.mark.parametrize("variant, over, kind", [
    (0, 0, 0), (2, 1, 2), (3, 2, 0), (5, 0, 1), (7, 2, 2), (9, 1, 1), (10, 0, 2), (11, 2, 1),
    (12, 0, 0)])
def test_the_watched_steps_are_steps_of_the_kernels(variant, over, kind, device):
    variant, over, kind = gpu_tools.VARIANTS[variant], gpu_tools.OVER[over], gpu_tools.TYPES[kind]
    opt = gpu_tools.take_steps(variant, over, kind, device)
    assert opt.backend_report()["backend"] == "triton" and opt.backend_report()["fused_base"]
    assert opt.param_groups[0]["sam_steps"] == 3 and not opt.is_perturbed


def test_every_mode_scaling_and_mix_of_the_kernels_is_watched(device, monkeypatch):
    from fastsam.kernels import triton as kernels
    from fastsam.kernels.triton.common import MIXES, MODES, SCALINGS

    seen = {"mode": set(), "scaling": set(), "mix": set(), "along_v": set()}

    def noted(function):
        def note(p, *arguments):
            for name, value in (("mode", p.space.kind.mode), ("scaling", p.scaling),
                                ("mix", p.mix), ("along_v", p.along_v)):
                seen[name].add(value)
            return function(p, *arguments)
        return note

    for name in ("norm", "climb", "step"):
        monkeypatch.setattr(kernels, name, noted(getattr(kernels, name)))
    for variant in gpu_tools.VARIANTS:
        gpu_tools.take_steps(variant, gpu_tools.OVER[0], gpu_tools.TYPES[0], device)
    assert seen == {"mode": set(MODES), "scaling": set(SCALINGS), "mix": set(MIXES),
                    "along_v": {False, True}}


@pytest.mark.filterwarnings("ignore:invalid:RuntimeWarning")  # the interpreter is NumPy
def test_a_watched_step_to_nan_is_an_error(device):
    over = ("sgd", {"lr": float("inf"), "momentum": 0.9})
    with pytest.raises(RuntimeError, match="left the finite"):
        gpu_tools.take_steps(gpu_tools.VARIANTS[0], over, gpu_tools.TYPES[0], device)


def tool(folder: Path, name: str, script: str) -> None:
    """An executable of this name that runs `script`."""
    (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("script, code, said", [
    ("sys.exit(0)", 0, ""),
    ("sys.exit(86 if 'bench.speed.gpu_tools' in sys.argv else 0)", 86, ""),
    ("sys.exit(1)", 77, "compute-sanitizer cannot watch even a trivial program"),
    (None, 77, "compute-sanitizer is not installed here"),
], ids=["clean", "errors", "does not work", "absent"])
def test_the_sanitizers_words(script, code, said, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    find = gpu_tools.shutil.which
    monkeypatch.setattr(gpu_tools.shutil, "which",
                        lambda name, path=None: None if path else find(name))
    if script:
        tool(tmp_path, "compute-sanitizer", f"print(*sys.argv[1:], flush=True)\n{script}")
    assert gpu_tools.sanitize("racecheck") == code
    printed = capfd.readouterr().out
    told = "--tool racecheck --error-exitcode 86 --report-api-errors no --launch-timeout 0"
    assert said in printed and (script is None or told in printed)


def ncu_table(change=lambda launches: launches) -> str:
    """What ncu writes for the steps of COUNTED, each kernel reading 3/4 of its budget and writing
    half of it."""
    columns = ["ID", "Process ID", "Kernel Name", *gpu_tools.METRICS.values()]
    launches = []
    for base, method in gpu_tools.COUNTED:
        for kernel, budget in 2 * list(gpu_tools.kernel_bytes(method, base, weight=4).items()):
            read, written = (f"{int(part * budget * gpu_tools.PARAMETERS):,}"
                             for part in (0.75, 0.5))
            launches.append([f"{kernel}_kernel", "12,345.5", read, written, "16", "16", "48.7",
                             "80"])
    lines = [[str(i), "77", *launch] for i, launch in enumerate(change(launches))]
    units = ["", "", "", "ns", "byte", "byte", "", "", "%", "register/thread"]
    quoted = [",".join(f'"{x}"' for x in line) for line in [columns, units, *lines]]
    return "\n".join(["==PROF== Connected to process 77", "==PROF== Profiling", *quoted]) + "\n"


def test_counters_of_every_launch_beside_the_budget(tmp_path, monkeypatch):
    (tmp_path / "table").write_text(ncu_table())
    tool(tmp_path, "ncu", "import shutil\nassert '--clock-control' in sys.argv\n"
         f"shutil.copy({str(tmp_path / 'table')!r}, sys.argv[sys.argv.index('--log-file') + 1])")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu_tools, "provenance", lambda device, git: {"device": device.type})
    path = tmp_path / "rows.jsonl"
    assert gpu_tools.counters(path) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * 2 * (1 + 3 * 3)
    climb = next(r for r in rows if (r["method"], r["base"], r["kernel"]) ==
                 ("fsam", "adamw", "climb"))
    assert climb["budget"] == 24 and climb["bytes_per_parameter"] == pytest.approx(30)
    assert (climb["ns"], climb["registers"], climb["occupancy_percent"]) == (12345.5, 80, 48.7)
    assert headline(rows).startswith("fsam at most 1.25 times its budget")


def test_what_ncu_says_in_place_of_counters_is_shown(tmp_path, monkeypatch, capfd):
    tool(tmp_path, "ncu", "open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write("
         "'==ERROR== ERR_NVGPUCTRPERM')")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ValueError, match="saw 0 launches"):
        gpu_tools.counters(tmp_path / "rows.jsonl")
    assert "==ERROR== ERR_NVGPUCTRPERM" in capfd.readouterr().out


def test_the_counted_optimizers_are_the_kernels_alone(monkeypatch, device):
    """Not what else could do the step, and would be compiled to see whether it can."""
    built = []
    init = gpu_tools.Runner.__init__
    monkeypatch.setattr(gpu_tools, "PARAMETERS", 64)
    monkeypatch.setattr(gpu_tools.Runner, "step", lambda self: ())
    monkeypatch.setattr(gpu_tools.Runner, "__init__", lambda self, *args: (
        built.append(self), init(self, *args))[0])
    assert gpu_tools.counted(device.type) == 0
    assert [(runner.contender.method, len(runner.phases)) for runner in built] == [
        (method, 1 if method == "sgd" else 2) for _, method in gpu_tools.COUNTED]
    assert {runner.opt.backend_report()["backend"] for runner in built} == {"triton"}


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_a_short_training_leaves_its_accuracy(method, tmp_path, monkeypatch):
    """As on a GPU, but narrow, short, and of noise. Again, it changes nothing."""
    for part in ("train", "test"):
        make_images(tmp_path / "images" / part, "ab", 8, size=(32, 32))
    full = gpu_tools.training(method, tmp_path / "images", tmp_path)
    full.remove("--graph")
    small = ["--device", "cpu", "--width", "1", "--epochs", "1", "--eval-linf", "1",
             "--eval-l2", "32", "--eval-steps", "1"]
    monkeypatch.setattr(gpu_tools, "training", lambda *_: [*full[:-2], *small, *full[-2:]])
    rows = tmp_path / "accuracy.jsonl"
    for _ in range(2):
        assert gpu_tools.accuracy(method, rows, tmp_path / "images") == 0
        row, = [json.loads(line) for line in rows.read_text().splitlines()]
        assert row["method"] == method
        assert headline([row]).startswith(f"{method} {row['natural']:.1%} natural, ")


def test_no_training_without_images(tmp_path, capsys):
    code = gpu_tools.accuracy("sgd", tmp_path / "rows.jsonl", tmp_path / "images")
    assert code == gpu_tools.LEFT_OUT and not (tmp_path / "rows.jsonl").exists()
    assert "bench unpack" in capsys.readouterr().out


@pytest.mark.parametrize("change", [lambda launches: launches[1:], lambda launches: []],
                         ids=["one short", "none"])
def test_other_launches_than_the_steps_are_refused(change):
    with pytest.raises(ValueError, match="launches, not the 40 of the steps"):
        gpu_tools.counter_rows(gpu_tools.parse_counters(ncu_table(change)))


def test_a_file_that_is_no_table_has_no_launches():
    assert gpu_tools.parse_counters("==ERROR== LibraryNotLoaded\n") == []


def test_the_digest_is_of_the_optimizers_and_the_kernels_sources(tmp_path, monkeypatch):
    for folder in ("fastsam", "kernels", "bench"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1")
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    digests = [gpu_session.code_digest()]
    for folder in ("bench", "fastsam", "kernels"):
        (tmp_path / folder / "a.py").write_text("2")
        digests.append(gpu_session.code_digest())
    assert digests[0] == digests[1] and len(set(digests)) == 3
