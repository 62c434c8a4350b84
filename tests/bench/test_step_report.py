"""Tables and figures of the step benchmark's rows."""

import json

import pytest

from bench.__main__ import main
from bench.speed.step_report import read_rows, same_parameters, same_tensors, step_report


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
