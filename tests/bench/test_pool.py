"""Many runs: how one's end is taken, by devices, by several processes, by a process that is killed;
the table of recipes. On a Ray cluster: test_ray.py."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.experiments import places, pool
from bench.experiments.pool import run_all
from bench.experiments.recipes import runs_of_recipes
from bench.experiments.train_and_evaluate import train_and_evaluate
from bench.files import Busy
from bench.provenance import ROOT
from bench.settings.config import resolve
from bench.settings.evaluation import Evaluation
from bench.settings.pool import Pool
from bench.settings.recipes import load_recipe, recipes_matching
from bench.training.diverged import Diverged
from bench.training.stopped import Stopped, Terminated
from bench.training.train import refuse_early, train

from ..helpers.survive import difference
from .test_resume import holder

OPTIONS = {"width": 4, "epochs": 1, "threads": 1}
EVALUATION = Evaluation((8 / 255,), (128 / 255,), steps=1, samples=20)
FAST = ["--data", "digits", "--width", "4", "--threads", "1", "--eval-linf", "8",
        "--eval-l2", "128", "--eval-steps", "1", "--eval-samples", "20"]  # fmt: skip


def error(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


def runs_of(*methods, evaluations=None, **options):
    evaluations = {"summary.json": EVALUATION} if evaluations is None else evaluations
    configs = [resolve(m, "digits", OPTIONS | options) for m in methods]
    return {config.name: (config, evaluations) for config in configs}


# ---- how a run's end is taken


@pytest.fixture
def ends(monkeypatch):
    """Let runs end as said, by their names: one outcome after the other; what was begun is in
    "begun". An outcome that is raised is a fault that nobody knows."""
    said = {"begun": []}

    def attempt(config, evaluations, out, until, track, **how):
        said["begun"].append(out.name)
        outcome = said[out.name].pop(0)
        if callable(outcome):
            outcome = outcome(**how)
        if isinstance(outcome, ArithmeticError):
            raise outcome
        return outcome

    monkeypatch.setattr(places, "attempt", attempt)
    monkeypatch.setattr(pool, "ASKED_AGAIN", 0.05)
    monkeypatch.setattr(pool, "refuse_all_early", lambda *a: None)
    monkeypatch.setattr(pool, "one_line", str)
    return said


def test_a_run_that_fails_is_begun_again_and_the_others_are_made_first(ends, tmp_path, capsys):
    runs = runs_of("sgd", "sam", "asam")
    ends |= {"sgd-seed0": [OSError("no room"), ArithmeticError("what is this"), [{"row": 1}]],
             "sam-seed0": [[{"row": 2}]], "asam-seed0": [[{"row": 3}]]}  # fmt: skip
    rows = []
    made = run_all(runs, tmp_path, Pool(retries=2), rows.append)
    assert list(made.items()) == [("sgd-seed0", [{"row": 1}]), ("sam-seed0", [{"row": 2}]),
                                  ("asam-seed0", [{"row": 3}])]  # fmt: skip
    assert rows == [{"row": 2}, {"row": 3}, {"row": 1}]
    said = capsys.readouterr().err
    assert "failed (no room), is begun again" in said
    assert "ArithmeticError: what is this" in said and "Traceback" in said


def test_retries_end_and_what_failed_is_named_once_all_others_are_made(ends, tmp_path):
    runs = runs_of("sgd", "sam")
    ends |= {"sgd-seed0": [OSError("no room")] * 2, "sam-seed0": [[{"row": 2}]]}
    with pytest.raises(ChildProcessError, match="1 of 2 runs failed.*sgd-seed0.*no room") as said:
        run_all(runs, tmp_path, Pool(retries=1))
    assert "\n" not in str(said.value) and not ends["sgd-seed0"] and not ends["sam-seed0"]


def test_what_diverges_is_not_begun_again(ends, tmp_path):
    ends |= {"sgd-seed0": [Diverged("lost")], "sam-seed0": [[{"row": 2}]]}
    with pytest.raises(Diverged, match="1 of 2 runs diverged .sgd-seed0."):
        run_all(runs_of("sgd", "sam"), tmp_path, Pool())
    assert ends["begun"] == ["sgd-seed0", "sam-seed0"]


def test_what_is_refused_ends_it_all_with_its_own_sentence(ends, tmp_path):
    ends |= {"sgd-seed0": [ValueError("no such thing")]}
    with pytest.raises(ValueError, match="^no such thing$"):
        run_all(runs_of("sgd", "sam"), tmp_path, Pool())
    assert ends["begun"] == ["sgd-seed0"]


def test_what_is_at_work_elsewhere_comes_last_and_is_no_failure(ends, tmp_path, capsys):
    ends |= {"sgd-seed0": [Busy("at work there")] * 5 + [[{"row": 1}]], "sam-seed0": [[{"row": 2}]]}
    assert len(run_all(runs_of("sgd", "sam"), tmp_path, Pool(retries=0))) == 2
    assert ends["begun"] == ["sgd-seed0", "sam-seed0"] + ["sgd-seed0"] * 5
    assert capsys.readouterr().err.count("at work there") == 1


def test_or_is_not_waited_for(ends, tmp_path):
    ends |= {"sgd-seed0": [Busy("at work there")], "sam-seed0": [[{"row": 2}]]}
    with pytest.raises(Stopped, match="with 1 of 2 runs made, 1 at work elsewhere"):
        run_all(runs_of("sgd", "sam"), tmp_path, Pool(no_wait=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_stop_the_run_and_begin_no_other(number, ends, tmp_path, capfd):
    def run(asked, after_epoch):
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        return Stopped("after 1 of 4 steps")

    ends |= {"sgd-seed0": [run]}
    before = signal.getsignal(number)
    with pytest.raises(Terminated, match="with 0 of 2 runs made"):
        run_all(runs_of("sgd", "sam"), tmp_path, Pool())
    assert ends["begun"] == ["sgd-seed0"] and signal.getsignal(number) is before
    assert ("Ctrl-C again" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_the_budget_begins_no_other_run(ends, tmp_path):
    def run(**how):
        time.sleep(0.2)
        return [{"row": 1}]

    ends |= {"sgd-seed0": [run]}
    with pytest.raises(Stopped, match="with 1 of 2 runs made"):
        run_all(runs_of("sgd", "sam"), tmp_path, Pool(time_budget=0.1 / 60))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--retries", "-1"], "retries must be at least 0, got -1"),
        (["--time-budget", "0"], "time_budget must be positive and finite, got 0"),
        (["--time-budget", "nan"], "time_budget must be positive and finite, got nan"),
        (["--devices", "cuda:99"], "device 'cuda:99' is not here"),
        (["--devices", "gpu0"], "--devices cannot be 'gpu0'"),
        (["--devices", "cuda:x"], "--devices cannot be 'cuda:x'"),
        (["--devices", "cpu", "cuda:0"], "--devices cpu cuda:0 give runs other bits by chance"),
        (["--devices", "cpu", "--device", "cpu"], "--device cpu has no effect"),
        (["--ray", "--device", "cuda"], "pass --gpus-per-run 1"),
        (["--ray", "--devices", "cpu"], "leave out --devices and --jobs"),
        (["--ray", "--jobs", "2"], "leave out --devices and --jobs"),
        (["--ray", "--gpus-per-run", "-1"], "gpus_per_run must be at least 0, got -1"),
        (["--gpus-per-run", "1"], "are for --ray"),
    ],
)
def test_refused_before_anything_is_written(arguments, said, tmp_path, capsys):
    for command in (["compare", "--methods", "sgd"], ["sweep", "--methods", "sgd"]):
        text = error(capsys, *command, *arguments, "--out", tmp_path / "out")
        assert said in text
    assert not (tmp_path / "out").exists()


def test_a_cluster_with_gpus_is_given_runs_on_cuda_by_a_machine_without(ends, tmp_path,
                                                                        monkeypatch):  # fmt: skip
    given = []

    def cluster(*arguments):
        given.append(arguments)
        return places.Here(lambda row: None)

    def run(config, *_, **how):
        given.append(config.device)
        return [{"row": 1}]

    monkeypatch.setattr(pool, "Cluster", cluster)
    monkeypatch.setattr(Pool, "check_ray", lambda self: None)
    monkeypatch.setattr(places, "attempt", run)
    run_all(runs_of("sgd"), tmp_path, Pool(ray=("head:6379",), cpus_per_run=4, gpus_per_run=0.5))
    assert given == [("head:6379", 4, 0.5), "cuda"]


def test_settings_for_another_machines_gpu_are_checked_here(tmp_path):
    config = resolve("sgd", "digits", OPTIONS)
    theirs = replace(config, device="cuda", backend="triton")
    refuse_early(theirs, tmp_path, elsewhere=True)
    with pytest.raises(ValueError, match="data 'nowhere' is neither"):
        refuse_early(replace(theirs, data="nowhere"), tmp_path, elsewhere=True)
    train(config, tmp_path)
    with pytest.raises(ValueError, match="device 'cpu' -> 'cuda', backend None -> 'triton'"):
        refuse_early(theirs, tmp_path, elsewhere=True)


# ---- real runs


def owner(folder: Path) -> int:
    """Wait until a process is at work in a directory and has saved; return its id."""
    for _ in range(6000):
        if (folder / "last.pt").exists():
            return int((folder / ".lock").read_text().split()[-1])
        time.sleep(0.1)
    raise AssertionError(f"nothing in {folder}")


def tracked_epochs(folder: Path) -> list[int]:
    """The epochs that TensorBoard has of a run; what tracked them is removed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    (folder / "tracker.json").unlink()
    shutil.rmtree(folder / "tensorboard")
    assert len(board.Scalars("test/natural")) == 1
    return [event.step for event in board.Scalars("train_loss")]


@contextmanager
def started(*arguments):
    """A command of the bench, which does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *map(str, arguments)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.long
def test_of_two_processes_by_device_one_is_killed_and_no_bit_is_another(tmp_path):
    """Through the command line: two workers, SIGKILL for the one that makes sgd-seed0."""
    out = tmp_path / "out"
    command = ["sweep", *FAST, "--methods", "sgd", "sam", "--seeds", "0", "--epochs", "6",
               "--devices", "cpu", "cpu", "--track", "tensorboard", "--out", out]  # fmt: skip
    with started(*command) as process:
        os.kill(owner(out / "sgd-seed0"), signal.SIGKILL)
        said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    assert "sgd-seed0: failed (its process was killed; was memory short?), is begun again" in said
    for name, (config, _) in runs_of("sgd", "sam", epochs=6).items():
        train_and_evaluate(config, EVALUATION, tmp_path / name)
        assert tracked_epochs(out / name) == [*range(6)]
        assert difference(out / name, tmp_path / name) == ""


@pytest.mark.long
def test_sigterm_saves_every_run_and_the_command_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["compare", *FAST, "--methods", "sgd", "sam", "--seeds", "0", "--epochs", "15",
               "--jobs", "2", "--out", out]  # fmt: skip
    with started(*command) as process:
        workers = [owner(out / name) for name in ("sgd-seed0", "sam-seed0")]
        assert process.pid not in workers
        for pid in (*workers, process.pid):  # as a batch system does, to all
            os.kill(pid, signal.SIGTERM)
        printed = process.communicate(timeout=600)[0]
    assert process.returncode == 143 and "stopped with 0 of 2 runs made" in printed
    command = [str(part) for part in command]
    assert main([*command, "--jobs", "1", "--time-budget", "0.0001"]) == 0
    assert "stopped with 0 of 2 runs made" in capsys.readouterr().out
    assert main([*command, "--jobs", "1"]) == 0
    for name, (config, _) in runs_of("sgd", "sam", epochs=15).items():
        train_and_evaluate(config, EVALUATION, tmp_path / name)
        assert difference(out / name, tmp_path / name) == ""


def test_a_study_of_two_processes_leaves_out_what_the_other_makes(tmp_path):
    """Without evaluations too, as of `study --train-only`."""
    other = holder(tmp_path / "sgd-seed0")
    try:
        with pytest.raises(Stopped, match="at work elsewhere"):
            run_all(runs_of("sgd", "sam", evaluations={}), tmp_path, Pool(no_wait=True))
        assert str(other.pid) in (tmp_path / "sgd-seed0/.lock").read_text()
    finally:
        other.kill()
        other.communicate()
    assert (tmp_path / "sam-seed0/last.pt").exists()
    assert not (tmp_path / "sgd-seed0/last.pt").exists()


# ---- recipes


def test_patterns_of_recipes():
    names = recipes_matching(["sam-at/cifar10/sam-*", "sam-at/cifar10/s*"])
    assert names == [*(f"sam-at/cifar10/sam-rho{rho}" for rho in (0.1, 0.2, 0.4)),
                     "sam-at/cifar10/st"]  # fmt: skip
    with pytest.raises(ValueError, match="no recipe matches 'sam-at/cifar-10/st' .did you "
                       "mean 'sam-at/cifar10/st'"):  # fmt: skip
        recipes_matching(["sam-at/cifar10/*", "sam-at/cifar-10/st"])


def test_recipes_times_seeds_times_values(tmp_path):
    names = ["sam-at/cifar10/st", "sam-at/cifar10/sam-rho0.2"]
    runs = runs_of_recipes(names, [0, 1], {"epochs": [1, 2]}, {"data": "digits"})
    assert list(runs)[:3] == [f"{names[0]}/sgd-epochs1-seed0", f"{names[0]}/sgd-epochs2-seed0",
                              f"{names[1]}/sam-epochs1-seed0"]  # fmt: skip
    assert len(runs) == 8
    config = runs[f"{names[1]}/sam-epochs2-seed1"]
    assert (config.rho, config.epochs, config.seed, config.recipe) == (0.2, 2, 1, names[1])
    with pytest.raises(ValueError, match="no effect on sgd"):
        runs_of_recipes(names[:1], [0], {}, {"rho": 0.1})
    files = [tmp_path / "a" / "mine.json", tmp_path / "b" / "mine.json"]
    for i, file in enumerate(files, 1):
        file.parent.mkdir()
        file.write_text(f'{{"config": {{"method": "sgd", "data": "digits", "epochs": {i}}}}}')
    assert list(runs_of_recipes([str(files[0])], [0], {}, {})) == ["mine/sgd-seed0"]
    with pytest.raises(ValueError, match="two recipes of the name 'mine'"):
        runs_of_recipes([*map(str, files)], [0], {}, {})


def test_recipes_end_with_a_table_beside_the_papers_numbers(tmp_path, capsys):
    out, rows = tmp_path / "table", tmp_path / "rows.jsonl"
    command = ["compare", "--recipes", "sam-at/cifar10/s*", "--seeds", "0", "1", *FAST,
               "--epochs", "1", "--out", str(out), "--rows", str(rows)]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in printed.splitlines() if line.startswith("| S")]  # fmt: skip
    papers = [line for line in lines if line[1] == "paper*"]
    natural = [load_recipe(f"sam-at/cifar10/{name}").published["natural"]
               for name in ("st", "sam-rho0.1", "sam-rho0.2", "sam-rho0.4")]  # fmt: skip
    assert [float(line[2]) for line in papers] == natural
    assert len([line for line in lines if line[1] == "last" and re.search(" ± ", line[2])]) == 4
    assert len(rows.read_text().splitlines()) == 8
    assert (out / "report.html").exists() and (out / "table.md").read_text().strip() in printed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    assert len(before) == 16 and main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}, "trained again"
    assert len(rows.read_text().splitlines()) == 8


@pytest.mark.parametrize("arguments", [["--methods", "sgd"], ["--recipe", "sam-at/cifar10/st"],
                                       ["--preset", "digits"]])  # fmt: skip
def test_recipes_name_their_methods(arguments, tmp_path, capsys):
    text = error(capsys, "compare", "--recipes", "sam-at/cifar10/st", *arguments, "--out",
                 tmp_path / "out")  # fmt: skip
    assert f"{arguments[0]} has no effect with --recipes" in text
    assert "needs --methods, such as sgd sam, or --recipes" in error(capsys, "sweep")


# ---- the script for Slurm


@pytest.mark.parametrize("code", [0, 3])
def test_the_slurm_script_ends_as_its_command(code, tmp_path):
    process = slurm_script(tmp_path, f"exit {code}")
    assert process.wait(timeout=60) == code and not (tmp_path / "asked").exists()


def test_the_slurm_script_hands_sigterm_on_and_asks_for_another_turn(tmp_path):
    """bash's `wait` ends with the trap, before the command has saved."""
    saves = "trap 'sleep 0.5; touch saved; exit 143' TERM; touch begun; while :; do sleep 0.1; done"
    process = slurm_script(tmp_path, saves)
    for _ in range(600):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143 and (tmp_path / "saved").exists()
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


def slurm_script(folder: Path, does: str) -> subprocess.Popen:
    """Start the script of docs/cluster.md as printed, where `python` does something else and
    `scontrol` writes down what it is asked for."""
    (script,) = re.findall("```bash\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "activate").write_text(f"PATH={tools}:$PATH\n")
    for name, text in (("python", does), ("scontrol", "echo $* > asked")):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    return subprocess.Popen(["bash", "-c", script], cwd=folder,
                            env=os.environ | {"SLURM_JOB_ID": "17"})  # fmt: skip
