"""What can be imported from where: without Triton, from a checkout, from a built wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_TRITON = "import sys\nsys.modules['triton'] = None\n"  # as if it were not installed


def python(code: str, cwd: Path, *options: str, path: Path | None = None):
    """Run code in a fresh interpreter that sees no GPU, and no more on its path than `path`."""
    env = {k: x for k, x in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    env["CUDA_VISIBLE_DEVICES"] = ""
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *options, "-c", code], cwd=cwd, env=env,
                          capture_output=True, text=True)


def succeeds(*args, **kwargs) -> str:
    done = python(*args, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_needs_neither_triton_nor_a_gpu_and_training_works():
    succeeds(NO_TRITON + """
import torch
import fastsam
assert not torch.cuda.is_available()
p = torch.nn.Parameter(torch.ones(3))
opt = fastsam.FriendlySAM([p], torch.optim.SGD, lr=0.1)
assert opt.backend_report()["backend"] == "reference"
p.grad = torch.ones(3)
opt.first_step()
opt.second_step()
assert torch.allclose(p, torch.full((3,), 0.9))
assert not any(m.partition(".")[0] == "triton" and sys.modules[m] for m in sys.modules)
""", ROOT)


def test_asking_for_triton_without_it_says_why():
    done = python(NO_TRITON + """
import torch
import fastsam
fastsam.SAM([torch.nn.Parameter(torch.ones(3))], torch.optim.SGD, backend="triton")
""", ROOT)
    assert "ValueError: backend='triton' cannot run: Triton cannot be imported" in done.stderr


def test_importing_fastsam_imports_no_compiler_before_it_is_needed():
    succeeds("import sys, fastsam\n"
             "assert not {'triton', 'numba', 'fastsam.kernels.cpu'} & {*sys.modules}\n"
             "assert not any(name.startswith('fastsam.kernels.') for name in sys.modules)", ROOT)


def test_without_numba_the_reference_runs_and_says_what_is_missed():
    succeeds("""
import sys
sys.modules["numba"] = None
import torch
import fastsam
p = torch.nn.Parameter(torch.ones(2**15))
opt = fastsam.SAM([p], torch.optim.SGD, lr=0.1)
report = opt.backend_report()
assert report["backend"] == "reference" and "numba" in report["why"], report
try:
    fastsam.SAM([p], torch.optim.SGD, lr=0.1, backend="numba")
except ValueError as error:
    assert "numba" in str(error), error
else:
    raise AssertionError("no error")
""", ROOT)


def test_in_a_checkout_only_the_kernels_are_importable_under_fastsam():
    succeeds("import fastsam.kernels.cpu\nimport pkgutil, fastsam\n"
             "from importlib.util import find_spec\n"
             "for name in ('bench', 'tests', 'docs', 'fastsam'):\n"
             "    assert find_spec(f'fastsam.{name}') is None, name\n"
             "found = {m.name for m in pkgutil.iter_modules(fastsam.__path__)}\n"
             "assert not {'bench', 'tests', 'kernels'} & found, found", ROOT)


def test_the_kernels_folder_is_no_package_of_its_own():
    """Another package has that name: who looks for it in a checkout must find it missing."""
    for code in ("from kernels import triton", "import kernels.triton", "import kernels.cpu"):
        done = python(code, ROOT)
        assert done.returncode == 1
        assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr
    succeeds("import kernels, sys\nassert kernels.__file__ is None and not kernels.__all__\n"
             "assert 'torch' not in sys.modules", ROOT)


def test_transformers_works_in_a_checkout():
    """It imports what is called kernels to read its version."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    succeeds("from transformers import Trainer\n"
             "from transformers.utils import is_kernels_available\n"
             "assert not is_kernels_available()", ROOT)


def test_the_kernels_are_importable_from_anywhere(tmp_path):
    pytest.importorskip("triton", reason="the kernels need Triton")
    assert succeeds("import fastsam.kernels.triton as k\nprint(k.__name__)", tmp_path, path=ROOT,
                    ) == "fastsam.kernels.triton\n"


def test_the_kernels_of_a_compiler_do_not_stand_for_the_compiler(tmp_path):
    pytest.importorskip("triton", reason="the kernels need Triton")
    succeeds("import fastsam.kernels.triton, triton\nassert triton.jit and triton.__version__\n"
             "assert fastsam.kernels.triton is not triton", tmp_path, path=ROOT)


def test_the_installed_package_is_found_from_another_folder(tmp_path):
    pytest.importorskip("triton", reason="the kernels need Triton")
    succeeds("import fastsam, fastsam.kernels.cpu, fastsam.kernels.triton", tmp_path)
    for name in ("kernels", "bench"):
        done = python(f"import {name}", tmp_path)
        assert f"No module named '{name}'" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a copy of the checkout: building in place leaves build/ behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("fastsam", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / folder, source / folder,
                        ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet",
         "--disable-pip-version-check", "-w", out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(out.glob("*.whl"))


def test_the_wheel_holds_fastsam_and_nothing_else_at_top_level(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"fastsam"}
    held = {n for n in names if n.endswith(".py")}
    assert held == {f"{p.relative_to(ROOT)}" for p in (ROOT / "fastsam").rglob("*.py")} | {
        f"fastsam/kernels/{p.relative_to(ROOT / 'kernels')}"
        for p in (ROOT / "kernels").rglob("*.py")}
    assert {"fastsam/kernels/cpu/climb.py", "fastsam/kernels/triton/climb.py"} <= held
    metadata = next(n for n in names if n.endswith("METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    assert 'Requires-Dist: numba; extra == "cpu"' in lines
    assert "fastsam/py.typed" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    pytest.importorskip("triton", reason="the kernels need Triton")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    where = succeeds("import fastsam, fastsam.kernels.triton, fastsam.kernels.cpu\n"
                     "import fastsam.kernels as k\nprint(fastsam.__file__, k.__file__)",
                     tmp_path, path=tmp_path / "site").split()
    assert where == [str(tmp_path / "site" / "fastsam" / "__init__.py"),
                     str(tmp_path / "site" / "fastsam" / "kernels" / "__init__.py")]
