"""`python -m bench step --host`: in processes of their own, as it puts a driver in Triton's place
and this process may have the interpreter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.speed.host import HostConfig, table

ROOT = Path(__file__).parents[2]
needs = pytest.mark.skipif(shutil.which("cc") is None or torch.cuda.is_available(),
                           reason="needs a C compiler and no GPU")


def bench(*arguments) -> subprocess.CompletedProcess:
    env = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "bench", "step", "--host", *arguments], cwd=ROOT,
                          env=env, capture_output=True, text=True)


@needs
def test_everybody_is_timed_over_the_launcher_and_fastsam_really_launches(tmp_path):
    pytest.importorskip("triton", reason="what is timed is Triton's launcher")
    done = bench("--tensors", "3", "--reps", "20", "--rows", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    names = {(r["method"], r["implementation"]) for r in rows}
    assert [r["gradients"] for r in rows] == sorted(["stay", "move"] * (len(rows) // 2),
                                                    reverse=True)
    assert {("sam", "fastsam triton"), ("fsam", "fastsam triton"), ("fsam", "per-parameter"),
            ("sgd", "torch"), ("sgd", "torch foreach"), ("sgd", "torch fused")} <= names
    for r in rows:
        assert r["kind"] == "host" and r["tensors"] == 3 and r["reps"] == 20
        assert 0 < r["us"]["p20"] <= r["us"]["p50"] <= r["us"]["p80"]
        assert r["launches"] == (3 if r["implementation"] == "fastsam triton" else 0)
        assert r["versions"]["triton"] and r["git"] is not None
    assert "fsam fastsam triton" in done.stdout


def test_what_does_not_belong_to_it_is_refused(capsys):
    assert main(["step", "--host", "--params", "100"]) == 2
    assert "--host takes --tensors, --reps and --rows, not --params" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least 1, got 0"):
        HostConfig(tensors=(10, 0))


def test_the_table_has_a_line_per_optimizer_and_a_column_per_number():
    rows = [{"method": m, "implementation": i, "gradients": "stay", "tensors": n, "us": {"p50": t}}
            for m, i, n, t in (("sgd", "torch", 62, 30.4), ("sgd", "torch", 10, 7.0),
                               ("fsam", "fastsam triton", 10, 9.0),
                               ("fsam", "fastsam triton", 62, 12.6))]
    assert [line.split()[-2:] for line in table(rows).splitlines()] == [
        ["10", "62"], ["7", "30"], ["9", "13"]]
