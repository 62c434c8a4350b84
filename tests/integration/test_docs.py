"""The documentation names tests and files that exist, and its code runs as printed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastsam

from .recipes_support import code_of, execute

ROOT = Path(__file__).parents[2]
PAINS = (ROOT / "docs" / "pains.md").read_text()
NAMED = "".join((ROOT / "docs" / f"{page}.md").read_text()
                for page in ("pains", "design", "evaluation"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
         ROOT / "examples" / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
RUN_HERE = [page for page in PAGES if page.parent.name != "recipes" and code_of(page).strip()]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+::test_\w+)`", NAMED))))
def test_every_test_that_a_page_names_exists(name):
    file, test = name.split("::")
    (path,) = (ROOT / "tests").rglob(f"{file}.py")
    assert f"\ndef {test}(" in path.read_text()


def test_every_pain_has_its_row_and_a_test():
    rows = re.findall(r"^\| (\d+) \|(.*)$", PAINS, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 23))
    assert all("::test_" in row for _, row in rows)


def test_every_page_is_in_the_navigation_and_every_public_name_in_the_reference():
    listed = (ROOT / "mkdocs.yml").read_text()
    navigation = re.findall(r"^ +- ([\w/.-]+\.md)$", listed, re.MULTILINE)
    assert sorted(navigation) == sorted(str(page.relative_to(ROOT / "docs"))
                                        for page in ROOT.glob("docs/**/*.md"))
    listed = re.findall(r"^        - (\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(set(fastsam.__all__) - {"__version__"})


@pytest.mark.parametrize("page", [name_of(page) for page in PAGES])
def test_every_link_to_a_file_leads_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


TOP = "bench|tests|docs|examples|fastsam|kernels"
TEXTS = [*PAGES, *sorted(ROOT.glob("bench/**/*.md")), ROOT / "Makefile"]


@pytest.mark.parametrize("page", [name_of(page) for page in TEXTS])
def test_every_path_in_a_page_exists(page):
    """In its code too, but for rows that a command will write; a name in capitals, such as
    NAME.json, stands for one of the reader's."""
    text = (ROOT / page).read_text().replace("--rows ", "--rows=")
    paths = set(re.findall(rf"(?<![\w./*=-])((?:{TOP})/[\w./-]*\w)", text))
    missing = [path for path in paths if not (ROOT / path).exists()
               and not re.search(r"(?<![A-Za-z])[A-Z]+(?![A-Za-z])", path)]
    assert not missing, missing


def test_the_pages_that_run_here_are_more_than_a_few():
    assert {"README.md", "docs/drop-in.md", "docs/checkpoints.md"} <= set(map(name_of, RUN_HERE))


@pytest.mark.parametrize("page", [name_of(page) for page in RUN_HERE])
def test_every_code_block_runs_as_printed(page, tmp_path, monkeypatch, recwarn):
    """From elsewhere, one block after the other, without a warning of ours."""
    if page == "docs/checkpoints.md":
        pytest.importorskip("safetensors", reason="needs safetensors: pip install .[recipes]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module = ModuleType("page_" + re.sub(r"\W", "_", page))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    execute(ROOT / page, module)
    assert [w for w in recwarn if "fastsam" in str(w.filename) or w.filename.endswith(".md")] == []


def test_one_block_alone_is_not_run():
    """A block that is marked `py` is not; what stands beside it says why."""
    marked = [page for page in PAGES for _ in re.findall("^```py$", page.read_text(), re.MULTILINE)]
    assert [name_of(page) for page in marked] == ["docs/evaluation.md"]


def test_readme_s_first_block_is_short_and_complete():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(block.strip().splitlines()) <= 17 and "import torch" in block


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 900


def test_every_command_of_a_page_is_there():
    """make's targets, and the benchmark's commands."""
    text = "\n".join(page.read_text() for page in PAGES)
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)\b(?=`|\s+#|$)", text, re.MULTILINE)) <= targets
    listed = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout
    named = set(re.findall(r"python -m bench ([a-z]+)", text))
    assert named and named <= set(re.findall(r"[a-z]+", listed))


def test_replicas_of_the_distributed_page_stay_equal_in_two_processes(tmp_path):
    """The page under torchrun: every way it shows ends with the same bits on both ranks."""
    (tmp_path / "page.py").write_text(code_of(ROOT / "docs" / "distributed.md") + """
rank = os.environ["RANK"]
torch.save([[p.detach() for p in replica.parameters()] for replica in replicas], f"{rank}.pt")
""")
    torchrun(tmp_path, "page.py")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first) == 3
    for mine, other in zip(first, second, strict=True):
        assert all(map(torch.equal, mine, other))


@pytest.mark.long
def test_fsdp2_s_page_in_two_processes(tmp_path):
    (tmp_path / "page.py").write_text(code_of(ROOT / "docs" / "recipes" / "fsdp2.md") + """
assert all(map(torch.equal, whole, whole_resumed))
""")
    torchrun(tmp_path, "page.py", CHECKPOINTS=str(tmp_path / "checkpoints"))


def torchrun(folder: Path, *arguments: str, **environment: str) -> str:
    """Run a program in two processes."""
    return program(folder, sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", "2", *arguments, **environment)


def program(folder: Path, *command: str, **environment: str) -> str:
    """Run a program without a warning of ours; what it printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                               **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fastsam" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def test_the_relatives_times_are_those_of_the_rows():
    rows = [json.loads(line) for line in
            (ROOT / "bench" / "results" / "throughput-relatives.jsonl").read_text().splitlines()]
    times = {(row["method"], row["config"]["model"]): row["times_sgd"]["processor"]
             for row in rows}
    page = (ROOT / "docs" / "performance.md").read_text()
    _, _, table = page.partition("**Momentum-SAM, LookSAM and GSAM beside SGD**")
    for name, method in (("SAM", "sam"), ("Momentum-SAM", "msam"), ("LookSAM", "looksam"),
                         ("GSAM", "gsam")):
        (line,) = re.findall(rf"^\| {name} \| (.*)$", table.partition("\n\n**")[0], re.MULTILINE)
        assert line.split(" | ")[:2] == [f"{times[method, model]:.2f}"
                                         for model in ("airbench-relu", "preactresnet18")]
    assert all(row["threads"] == 1 and not row["git"].endswith("-dirty") for row in rows)


# ---- examples

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
NEEDS = {"lora.py": "peft"}
LONG = ("lora.py", "ddp.py")


def test_every_example_is_listed():
    text = (ROOT / "examples" / "README.md").read_text()
    assert EXAMPLES and all(f"[{name}]({name})" in text for name in EXAMPLES)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in EXAMPLES])
def test_an_example_runs_and_learns(name, tmp_path):
    """As a program elsewhere, in seconds; the last line tells what it has reached."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"needs {NEEDS[name]}: pip install .[recipes]")
    shutil.copy(ROOT / "examples" / name, tmp_path)
    if name == "ddp.py":
        printed = torchrun(tmp_path, name, "--quick")
    else:
        printed = program(tmp_path, sys.executable, name, "--quick")
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) > 1 and losses[-1] < losses[0]
