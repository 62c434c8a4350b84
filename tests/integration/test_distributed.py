"""DistributedDataParallel, sharding, ZeRO and distributed checkpoints, in two processes.

Starting processes takes seconds, so two are started once, each as pytest over
`distributed_worker.py`; each of its tests is reported here by its name.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch was built without gloo", allow_module_level=True)

from . import distributed_worker as worker

TESTS = [name for name in vars(worker) if name.startswith("test_")]


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[tuple[list[ElementTree.Element], str]]:
    """What each process reports: its test cases, and its output."""
    folder = tmp_path_factory.mktemp("processes")
    started = []
    for rank in range(worker.RANKS):
        command = [sys.executable, "-m", "pytest", worker.__file__, "-x", "-q", "--no-header",
                   "-p", "no:cacheprovider", f"--junitxml={folder / str(rank)}.xml"]
        env = dict(os.environ, FASTSAM_TWO_PROCESSES=str(folder), RANK=str(rank),
                   OMP_NUM_THREADS="1")
        started.append(subprocess.Popen(command, env=env, cwd=Path(__file__).parents[2],
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True))
    outputs = [process.communicate()[0] for process in started]
    reports = [folder / f"{rank}.xml" for rank in range(worker.RANKS)]
    return [(list(ElementTree.parse(report).iter("testcase")) if report.exists() else [], output)
            for report, output in zip(reports, outputs, strict=True)]


@pytest.mark.parametrize("name", TESTS)
def test_in_two_processes(processes, name):
    for rank, (cases, output) in enumerate(processes):
        mine = [case for case in cases if case.get("name").split("[")[0] == name]
        assert mine, f"process {rank} did not come to it:\n{output[-3000:]}"
        for case in mine:
            assert len(case.findall("*")) == 0, (
                f"process {rank}, {case.get('name')}:\n" + "\n".join(case.itertext()))
