"""Files that several processes write, disks that are full, files that are damaged, data that
changed under a checkpoint: nothing is lost, and what is wrong is said in one sentence."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.__main__ import main
from bench.experiments.compare import caption
from bench.experiments.train_and_evaluate import train_and_evaluate
from bench.files import append_jsonl, refuse_unwritable, remove_unfinished, replacing, write_text
from bench.provenance import ROOT
from bench.settings.config import resolve
from bench.settings.evaluation import Evaluation
from bench.training.checkpoint import load_checkpoint, load_model
from bench.training.train import load_state, set_up, train

from .test_resume import holder

FAST = ["--width", "4", "--threads", "1", "--eval-linf", "8", "--eval-l2", "128",
        "--eval-steps", "1", "--eval-samples", "20"]  # fmt: skip
TINY = ["--epochs", "1", *FAST]
OPTIONS = {"width": 4, "epochs": 1, "threads": 1}
EVALUATION = Evaluation((8 / 255,), (128 / 255,), steps=1, samples=20)


def error(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "bench", *map(str, arguments)]


# ---- several writers


def children(work, number: int) -> list[int]:
    """Fork processes that do work(i) and end; return their ids."""
    ids = []
    for i in range(number):
        child = os.fork()
        if child == 0:
            try:
                work(i)
                os._exit(0)
            finally:
                os._exit(1)
        ids.append(child)
    return ids


def test_rows_of_processes_that_append_at_once_are_all_there(tmp_path):
    path = tmp_path / "rows.jsonl"

    def work(i):
        for k in range(50):
            append_jsonl(path, [{"process": i, "row": k}])

    assert [os.waitpid(child, 0)[1] for child in children(work, 4)] == [0] * 4
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 200 and {(r["process"], r["row"]) for r in rows} == {
        (i, k) for i in range(4) for k in range(50)}  # fmt: skip
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_rows_of_threads_too(tmp_path):
    path = tmp_path / "rows.jsonl"

    def work(i):
        for k in range(20):
            append_jsonl(path, [{"thread": i, "row": k}])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(path.read_text().splitlines()) == 80


def test_writers_that_are_killed_leave_whole_rows_and_no_lock(tmp_path):
    path, rng = tmp_path / "rows.jsonl", random.Random(0)

    def work(i):
        for k in range(10_000):
            append_jsonl(path, [{"process": i, "row": k, "text": "x" * 500}])

    for child in children(work, 4):
        time.sleep(0.05 + 0.1 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    before = [json.loads(line) for line in path.read_text().splitlines()]
    append_jsonl(path, [{"last": 1}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*before, {"last": 1}]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_appending_keeps_what_is_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"b": "\\u2028 \u2028"}')  # by hand: no line end, a rare separator
    append_jsonl(path, [{"a": 1}, {"c": 3}])
    assert [json.loads(x) for x in path.read_text().split("\n") if x] == [
        {"a": 1}, {"b": "\u2028 \u2028"}, {"c": 3}]  # fmt: skip
    (tmp_path / "link.jsonl").symlink_to(path)
    append_jsonl(tmp_path / "link.jsonl", [{"d": 4}])
    assert (tmp_path / "link.jsonl").is_symlink() and '{"d": 4}' in path.read_text()
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="rows.jsonl"):
        append_jsonl(path, [{"e": 5}])
    assert path.read_bytes() == b"\x89PNG\xff"


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    """The page says that it is; a locale's own encoding may not even have the signs."""
    ascii_alone = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = (
        "import json, sys; from pathlib import Path; from bench.files import *; "
        "from bench.reports.groups import lines_of; "
        "path = Path(sys.argv[1]); write_text(path, '\\u00b1 \\u65e5\\n'); "
        "assert lines_of(path) == ['\\u00b1 \\u65e5'], lines_of(path); "
        "append_jsonl(path, [{'a': 1}]); write_text(path, path.read_text('utf-8')[4:]); "
        "assert read_json(path, '') == {'a': 1}"
    )
    path = tmp_path / "text"
    made = subprocess.run(
        [sys.executable, "-c", program, str(path)], env=os.environ | ascii_alone, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    path = tmp_path / "table.md"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as two:
            two.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["table.md"]


def test_who_has_the_old_file_open_reads_it_whole(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("the old one")
    with open(path) as reader:
        with replacing(path) as tmp:
            tmp.write_text("the new one, which is longer")
        assert reader.read() == "the old one"
    assert path.read_text() == "the new one, which is longer"


def test_what_another_process_is_writing_is_not_removed(tmp_path):
    path = tmp_path / "table.md"
    (tmp_path / ".table.md.0123.tmp").write_text("of a process that was killed")
    with replacing(path) as tmp:
        tmp.write_text("whole")
        remove_unfinished(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [tmp.name]
    assert os.listdir(tmp_path) == ["table.md"] and path.read_text() == "whole"


@pytest.mark.long
def test_a_comparison_leaves_out_what_another_process_makes_and_takes_it_up(tmp_path):
    """The locked run is waited for, not refused; where its process dies, this one makes it."""
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    other = holder(out / "sgd-seed0")
    process = subprocess.Popen(
        command("compare", *TINY, "--methods", "sgd", "sam", "--seeds", 0, "--out", out,
                "--rows", rows), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        for _ in range(1200):
            if (out / "sam-seed0/summary.json").exists():
                break
            time.sleep(0.1)
        time.sleep(1)
        assert process.poll() is None and not (out / "sgd-seed0/last.pt").exists()
    finally:
        other.kill()
        other.communicate()
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "| SGD" in printed and "| SAM" in printed
    assert len(rows.read_text().splitlines()) == 2


@pytest.mark.long
def test_comparisons_in_one_directory_share_the_work(tmp_path):
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    arguments = command("compare", *TINY, "--methods", "sgd", "sam", "fsam", "asam", "--epochs", 3,
                        "--seeds", 0, 1, "--out", out, "--rows", rows)  # fmt: skip
    both = [subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]  # fmt: skip
    printed = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    one, two = (text[text.index("| method") : text.index("wrote")] for text in printed)
    assert one == two
    assert len(rows.read_text().splitlines()) == 8, "a run was made twice"


def test_a_run_that_was_finished_meanwhile_is_not_made_again(tmp_path, monkeypatch):
    config = resolve("sgd", "digits", OPTIONS)
    made = train_and_evaluate(config, EVALUATION, tmp_path)
    looks = []

    def late(*arguments):
        looks.append(arguments)
        return None if len(looks) == 1 else made

    monkeypatch.setattr("bench.experiments.train_and_evaluate.finished", late)
    monkeypatch.setattr("bench.experiments.train_and_evaluate.train",
                        lambda *a: pytest.fail("trained again"))
    assert train_and_evaluate(config, EVALUATION, tmp_path) == made and len(looks) == 2


# ---- full and read-only disks


def limited():
    """No file may grow beyond what a config needs. (Nor may Python's bytecode be written then: it
    would be kept, cut off.)"""
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


def test_a_disk_that_is_full_is_one_sentence_and_the_run_goes_on(tmp_path):
    config, cut = resolve("fsam", "digits", OPTIONS), tmp_path / "cut"
    arguments = command("train", "--method", "fsam", *TINY, "--out", cut)
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    full = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=env,
                          preexec_fn=limited)  # fmt: skip
    said = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert full.returncode == 2 and len(said) == 1 and "Traceback" not in full.stderr
    assert f"cannot write {str(cut / 'best.pt')!r}" in said[0] and "repeat the command" in said[0]
    assert not (cut / "best.pt").exists() and not list(cut.glob(".*.tmp"))
    train(config, cut)
    train(config, tmp_path / "whole")
    ours, whole = (load_checkpoint(p / "last.pt")["model"] for p in (cut, tmp_path / "whole"))
    assert all(torch.equal(ours[k], whole[k]) for k in whole)


def test_every_write_that_fails_names_its_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}])
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"rows\.jsonl.*No space left on device"):
            append_jsonl(path, [{"b": 2}])
    assert path.read_text() == '{"a": 1}\n' and os.listdir(tmp_path) == ["rows.jsonl"]
    append_jsonl(path, [{"b": 2}])
    assert len(path.read_text().splitlines()) == 2


def test_rows_that_cannot_be_written_are_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for rows in (tmp_path, tmp_path / "file" / "rows.jsonl"):
        for arguments in (("compare", *TINY, "--methods", "sgd"), ("sweep", "--methods", "sgd"),
                          ("study", "rho")):  # fmt: skip
            text = error(capsys, *arguments, "--rows", rows, "--out", tmp_path / "out")
            assert str(rows) in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module, words", [
    ("step", ["step"]), ("host", ["step", "--host"]), ("throughput", ["throughput"]),
    ("predict", ["gpu", "--predict"]),
], ids=lambda of: of if isinstance(of, str) else "")  # fmt: skip
def test_so_they_are_before_a_measurement(tmp_path, monkeypatch, capsys, module, words):
    """Its numbers were lost: neither the rows nor the table was left of them."""
    measuring = import_module(f"bench.speed.{module}")
    monkeypatch.setattr(measuring, module, lambda *given: pytest.fail("measured"))
    assert str(tmp_path) in error(capsys, *words, "--rows", tmp_path)


def test_so_a_figure_is_before_the_tables(tmp_path, capsys):
    rows = ROOT / "bench" / "results" / "study-rho.jsonl"
    assert main(["study", "rho", "--show", str(rows), "--figure", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert str(tmp_path) in said.err and not said.out


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path, capsys):
    """What reads forever was read to the end of memory, and /dev/null became a file."""
    os.mkfifo(pipe := tmp_path / "pipe")
    (link := tmp_path / "link").symlink_to(pipe)
    for path in (pipe, link):
        for write, *what in ((refuse_unwritable,), (append_jsonl, []), (write_text, "")):
            with pytest.raises(OSError, match="no file"):
                write(path, *what)
    assert "no file" in error(capsys, "compare", *TINY, "--rows", pipe, "--out", tmp_path / "out")
    assert pipe.is_fifo() and link.is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_file_that_is_not_there_can_be_written(tmp_path):
    refuse_unwritable(None)
    refuse_unwritable(tmp_path / "new" / "folder" / "rows.jsonl")


# ---- damage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of one epoch in "sgd-seed0" of a directory."""
    root = tmp_path_factory.mktemp("made")
    train_and_evaluate(resolve("sgd", "digits", OPTIONS), EVALUATION, root / "sgd-seed0")
    return root


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


def test_no_damage_to_a_checkpoint_passes_unseen(copy):
    """torch.load does not look at a file's checksums."""
    config, path = resolve("sgd", "digits", OPTIONS), copy / "sgd-seed0/last.pt"
    run, data, rng = set_up(config), path.read_bytes(), random.Random(0)
    whole = load_checkpoint(path)["model"]
    for i in range(60):
        damaged, where = bytearray(data), rng.randrange(len(data))
        match i % 4:
            case 0:
                damaged = damaged[:where]
            case 1:
                damaged[where] ^= 1 << rng.randrange(8)
            case 2:
                damaged[where : where + 500] = bytes(len(damaged[where : where + 500]))
            case 3:
                damaged[where:where] = b"more"
        path.write_bytes(damaged)
        try:
            load_state(run, path.parent)
        except ValueError as e:
            assert repr(str(path)) in str(e) and "train again" in str(e) and "\n" not in str(e)
        else:  # a bit that nothing reads, such as a date
            assert i % 4 == 1
            found = load_checkpoint(path)["model"]
            assert all(torch.equal(found[k], whole[k]) for k in whole)


def test_a_checkpoint_without_an_optimizer_is_no_last_one(copy, capsys):
    folder = copy / "sgd-seed0"
    shutil.copy(folder / "best.pt", folder / "last.pt")
    (folder / "summary.json").unlink()
    text = error(capsys, "train", "--method", "sgd", *TINY, "--out", folder)
    assert "last.pt" in text and "has no history" in text


def test_a_damaged_best_checkpoint_is_named_with_a_way_out_that_is_one(copy, capsys):
    folder = copy / "sgd-seed0"
    before = load_checkpoint(folder / "best.pt")["model"]
    (folder / "best.pt").write_bytes((folder / "best.pt").read_bytes()[:5000])
    (folder / "summary.json").unlink()
    arguments = ("train", "--method", "sgd", *TINY, "--out", folder)
    text = error(capsys, *arguments)
    assert repr(str(folder / "best.pt")) in text and "remove its run's last.pt and best.pt" in text
    for name in ("last.pt", "best.pt"):
        (folder / name).unlink()
    assert main([str(a) for a in arguments]) == 0
    after = load_checkpoint(folder / "best.pt")["model"]
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("damage", ["", "{", '{"method": "sgd"}', "[]", "\xff", "null"])
def test_a_damaged_summary_is_named_and_made_again(damage, copy, capsys):
    folder = copy / "sgd-seed0"
    path, before = folder / "summary.json", (folder / "last.pt").read_bytes()
    path.write_bytes(damage.encode("latin-1"))
    for arguments in (
        ("train", "--method", "sgd", *TINY, "--out", folder),
        ("compare", "--methods", "sgd", "--seeds", 0, *TINY, "--out", copy),
        ("report", copy, "--out", copy / "report"),
    ):
        text = error(capsys, *arguments)
        assert repr(str(path)) in text and "remove it" in text
    path.unlink()
    assert main(["train", "--method", "sgd", *TINY, "--out", str(folder)]) == 0
    assert json.loads(path.read_text())["method"] == "sgd"
    assert (folder / "last.pt").read_bytes() == before, "trained again"


@pytest.mark.parametrize("key, value", [("natural", None), ("natural", "0.5"), ("best", None),
                                        ("images_per_second", []), ("config", "sgd"),
                                        ("robust", [0.1]), ("method", 3)])  # fmt: skip
def test_a_summary_with_a_value_of_another_kind_is_named(key, value, copy, capsys):
    path, rows = copy / "sgd-seed0/summary.json", copy / "rows.jsonl"
    summary = json.loads(path.read_text()) | {key: value}
    rows.write_text(json.dumps(summary) + "\n")
    assert f"{str(rows)!r}, line 1, is no row of a run: {key} is {value!r}" in error(
        capsys, "report", rows, "--out", copy / "report")  # fmt: skip
    path.write_text(json.dumps(summary))
    assert repr(str(path)) in error(capsys, "report", copy / "sgd-seed0", "--out", copy / "report")


@pytest.mark.parametrize("damage", ["{", '{"epoch": 0}\n', "7\n", "\xff",
                                    '{"epoch": 0, "seconds": null}\n',
                                    '{"epoch": null, "seconds": 1}\n'])  # fmt: skip
def test_damaged_metrics_are_named_and_the_report_goes_on_without(damage, copy, capsys):
    path = copy / "sgd-seed0/metrics.jsonl"
    path.write_bytes(damage.encode("latin-1"))
    assert repr(str(path)) in error(capsys, "report", copy, "--out", copy / "report")
    assert not (copy / "report").exists()
    path.unlink()
    assert main(["report", str(copy), "--out", str(copy / "report")]) == 0


def test_a_report_that_is_killed_leaves_whole_files_and_is_made_again(copy, tmp_path):
    out = tmp_path / "report"
    child = os.fork()
    if child == 0:
        try:
            import bench.reports.runs as module

            def half(*arguments):
                with replacing(out / "table.csv") as tmp:
                    tmp.write_text("half")
                    os.kill(os.getpid(), signal.SIGKILL)

            module.csv_of = half
            module.report_runs([copy], out)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == {"table.md"}
    assert main(["report", str(copy), "--out", str(out)]) == 0
    assert not list(out.glob(".*.tmp")) and (out / "report.html").exists()


# ---- output that nobody reads


def test_a_closed_pipe_ends_in_silence():
    process = subprocess.Popen(command("recipes"), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


# ---- the data under a checkpoint


def images(root: Path, per_class: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    return root


PHOTOS = ["--model", "smallconv", "--augment", "none", "--batch-size", "8", *TINY]


def test_one_more_image_makes_test_images_of_training_images_and_is_refused(tmp_path, capsys):
    root, out = images(tmp_path / "images"), tmp_path / "runs"
    arguments = ["--data", root, "--preset", "digits", *PHOTOS]
    last = out / "sgd-seed0/last.pt"
    assert main(["train", "--method", "sgd", *map(str, arguments), "--out", str(last.parent)]) == 0
    assert main(["evaluate", str(last), *FAST[4:]]) == 0
    capsys.readouterr()
    rows = tmp_path / "same.jsonl"
    assert main(["evaluate", str(last), *FAST[4:], "--other-data", "--rows", str(rows)]) == 0
    assert json.loads(rows.read_text())["evaluation"]["data"] is None
    assert f"{root} test images" not in capsys.readouterr().out
    shutil.copy(root / "x/003.png", root / "x/0035.png")
    capsys.readouterr()
    text = error(capsys, "evaluate", last, *FAST[4:])
    assert "training and test images" in text and str(last) in text and "--other-data" in text
    text = error(capsys, "evaluate", last, *FAST[4:], "--robustbench", tmp_path / "info.json")
    assert "training and test images" in text and not (tmp_path / "info.json").exists()
    text = error(capsys, "compare", "--methods", "sgd", "sam", "--seeds", "0", *arguments,
                 "--out", out)  # fmt: skip
    assert "sgd-seed0" in text and "changed" in text and not (out / "sam-seed0").exists()
    (out / "sgd-seed0/summary.json").unlink()
    text = error(capsys, "train", "--method", "sgd", *arguments, "--out", out / "sgd-seed0")
    assert "training and test images" in text and "changed" in text
    capsys.readouterr()
    rows = tmp_path / "rows.jsonl"
    assert main(["evaluate", str(last), *FAST[4:], "--other-data", "--rows", str(rows)]) == 0
    assert json.loads(rows.read_text())["evaluation"]["data"] == str(root)
    assert f" {root} test images" in capsys.readouterr().out


@pytest.mark.parametrize("augment", ["none", "resized-crop"])
def test_a_training_image_among_the_test_images_is_refused(augment, tmp_path, capsys):
    root, out = tmp_path / "images", tmp_path / "run"
    for part in ("train", "test"):
        images(root / part, 4)
    arguments = [*PHOTOS, "--augment", augment, "--image-size", "8", "--workers", "0"]
    assert main(["train", "--data", str(root), "--preset", "digits", *arguments, "--val", "0",
                 "--out", str(out)]) == 0  # fmt: skip
    shutil.copy(root / "train/x/000.png", root / "test/x/100.png")
    capsys.readouterr()
    assert "the test images of" in error(capsys, "evaluate", out / "last.pt", *FAST[4:])
    (root / "test/x/100.png").unlink()
    moved = root.rename(tmp_path / "elsewhere")
    assert main(["evaluate", str(out / "last.pt"), *FAST[4:], "--data", str(moved)]) == 0


def test_noisy_labels_are_no_other_data_and_old_checkpoints_have_no_test_fingerprint(tmp_path):
    out = tmp_path / "run"
    assert main(["train", *TINY, "--label-noise", "0.3", "--seed", "3", "--out", str(out)]) == 0
    assert main(["evaluate", str(out / "last.pt"), *FAST[4:]]) == 0
    checkpoint = load_checkpoint(out / "last.pt")
    del checkpoint["test_fingerprint"]
    torch.save(checkpoint, out / "last.pt")
    assert main(["evaluate", str(out / "last.pt"), *FAST[4:]]) == 0
    assert load_model(out / "last.pt")(torch.rand(1, 1, 8, 8)).shape == (1, 10)


# ---- what tables say of themselves


def test_the_caption_tells_all_that_differs_between_methods():
    methods = {"sgd": {"epochs": 60}, "sam": {"weight_decay": 1e-3}, "fsam": {"lr": 0.2}}
    rows = [
        {"config": vars(resolve(m, "fsam-cifar10", {"seed": 0, **own})), "seeds": [0],
         "evaluation": {"linf": [8 / 255], "l2": [0.5], "steps": 10}, "test_images": 10,
         "device": "an abacus", "warnings": {}}
        for m, own in methods.items()
    ]  # fmt: skip
    text = caption(rows)
    said = dict(part.split(" ", 1) for part in
                text.splitlines()[1].removeprefix("Methods: ").rstrip(".").split("; "))  # fmt: skip
    assert said["SGD"] == "epochs 60, lr 0.05, weight_decay 0.0005"
    assert said["SAM"] == "rho 0.1, epochs 200, lr 0.05, weight_decay 0.001"
    assert all(x in said["Friendly-SAM"] for x in ("epochs 200", "lr 0.2", "sigma 1.0"))
    assert "resnet18, width 64, last checkpoint" in text and "8/255 (0.0314)" in text
    assert text.startswith("Test accuracy in % on 10 images of cifar10, resnet18")
    other = caption([row | {"evaluation": row["evaluation"] | {"on": "test", "data": "elsewhere"}}
                     for row in rows])  # fmt: skip
    assert other.startswith("Test accuracy in % on 10 images of elsewhere, after training on those "
                            "of cifar10, resnet18")
    alike = caption([row | {"config": row["config"] | {"epochs": 5}} for row in rows])
    assert "width 64, 5 epochs, last checkpoint" in alike and "epochs" not in alike.splitlines()[1]


@pytest.mark.parametrize("judges, said", [
    ({}, "Test accuracy in % on 10 images of digits, "),
    ({"on": "held-out"}, "Accuracy in % on 10 images held out of the training images of digits, "),
    ({"data": "p"}, "Test accuracy in % on 10 images of p, after training on those of digits, "),
])
def test_the_caption_tells_which_images_judged_and_what_was_warned_of(judges, said):
    flat = "the gradient is exactly 0 for 9 of 10 images"
    row = {"config": vars(resolve("sam", "digits", {})), "seeds": [0], "test_images": 10,
           "evaluation": {"linf": [8 / 255], "l2": [0.5], "steps": 10, **judges},
           "device": "an abacus", "warnings": {flat: [0]}}  # fmt: skip
    text = caption([row])
    assert text.startswith(said)
    assert text.splitlines()[-1] == f"Warning: SAM, seed 0: {flat}."
