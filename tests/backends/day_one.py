"""Machines on which Triton cannot work: what is chosen, what the report says, what raises.

Triton's own NVIDIA driver runs, over a libcuda that is pretended, and fails by itself.
test_day_one.py runs this in a process of its own, without the interpreter.
"""

import ctypes
import gc
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.driver import GPUDriver
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build

from bench.speed.host import LIBCUDA
from fastsam import SAM, choose, reference
from fastsam.kernels import triton as kernels

GPU = torch.device("cuda", 0)
FOLDER = tempfile.TemporaryDirectory()
# what its calls return: 0 is success
RESULTS = """
int load_result = 0, launch_result = 0;
int cuModuleLoadData(void **x) { *x = (void *)1; return load_result; }
int cuLaunchKernelEx() { return launch_result; }
"""


def pretended_libcuda() -> ctypes.CDLL:
    """bench.speed.host's, whose module loading and launches may fail; for Triton to find."""
    library, source = Path(FOLDER.name, "libcuda.so.1"), LIBCUDA
    for own in ("ONE(cuModuleLoadData) ", "int cuLaunchKernelEx() { launches++; return 0; }"):
        source = source.replace(own, "")
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o",
               str(library)]
    subprocess.run(command, input=source + RESULTS, text=True, check=True)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


LOADED = pretended_libcuda()


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU, and is not."""

    device = GPU


def space(dtype=torch.float32, device=GPU, dense=True):
    """What `choose` looks at of one."""
    kind = SimpleNamespace(device=device, dtype=dtype)
    return SimpleNamespace(kind=kind, numel=10**6, dense=dense)


def set_results(**results: int) -> None:
    for name in ("load_result", "launch_result"):
        ctypes.c_int.in_dll(LOADED, name).value = results.get(name, 0)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A GPU of compute capability 9.0 whose launches do nothing, and nothing cached on disk or in
    the process."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device=None, **kwargs: (
        zeros(*sizes, **kwargs).as_subclass(OnGPU) if device == GPU
        else zeros(*sizes, device=device, **kwargs)))
    cuda = dict(get_device_name=lambda device=None: "an abacus", synchronize=lambda device: None,
                get_device_capability=lambda device=None: (9, 0))
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)

    def init(self):
        self.get_device_capability = torch.cuda.get_device_capability
        self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 0

    monkeypatch.setattr(GPUDriver, "__init__", init)
    monkeypatch.setattr(nvidia.CudaDriver, "is_active", staticmethod(lambda: True))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", FOLDER.name)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.runtime.driver, "_default", None)
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    for remembered in (build._find_compiler, nvidia.libcuda_dirs, nvidia.library_dirs,
                       choose.trial):
        remembered.cache_clear()
    set_results()
    yield
    # what is dropped is unloaded, by the driver that it was loaded with
    kernels.linf_step.__globals__["linf_kernel"].device_caches.clear()
    gc.collect()


def chosen(backend=None, **kwargs) -> tuple:
    module, report = choose.choose(backend, [space(**kwargs)])
    return module, report["backend"], report["why"]


def test_a_gpu_on_which_triton_works_gets_it():
    assert chosen() == (kernels, "triton", "the parameters are on a GPU")
    assert chosen("triton") == (kernels, "triton", "asked for")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return "Failed to find C compiler", "such as gcc"


def failing_compiler(monkeypatch, tmp_path):
    """As gcc does without python3-dev."""
    monkeypatch.setenv("CC", script(tmp_path / "cc", "echo 'fatal error: Python.h' >&2; exit 1"))
    return "CalledProcessError", "python3-dev"


def no_libcuda(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path / "nothing"))
    return "CalledProcessError", "the driver's libcuda"


def old_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))
    return "an abacus has a compute capability below 7.0",


def ptxas_fails(monkeypatch, tmp_path):
    version = "Cuda compilation tools, release 12.8, V12.8.1"
    ptxas = script(tmp_path / "ptxas",
                   f"case $* in *--version*) echo '{version}';; *) exit 255;; esac")
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.setenv(name, ptxas)
    return "PTXAS error",


def nowhere_to_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")
    return "/dev/null",


def module_is_refused(monkeypatch, tmp_path):
    """As by a driver that is too old for the code."""
    set_results(load_result=222)
    return "Triton Error [CUDA]",


def launch_is_refused(monkeypatch, tmp_path):
    set_results(launch_result=701)
    return "Triton Error [CUDA]",


def import_fails(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fastsam.kernels.triton", None)
    return "Triton cannot be imported",


OBSTACLES = [no_compiler, failing_compiler, no_libcuda, old_gpu, ptxas_fails, nowhere_to_cache,
             module_is_refused, launch_is_refused, import_fails]


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda f: f.__name__)
def test_what_works_is_chosen_and_the_report_says_why(obstacle, monkeypatch, tmp_path):
    reasons = obstacle(monkeypatch, tmp_path)
    module, backend, why = chosen()
    assert (module, backend) == (reference, "reference")
    assert all(reason in why for reason in reasons), why
    assert "\n" not in why
    assert ("C compiler" in why) == (
        obstacle in (no_compiler, failing_compiler, no_libcuda))
    with pytest.raises(ValueError) as raised:
        chosen("triton")
    assert str(raised.value) == (
        f"backend='triton' cannot run: {why}; use backend='reference' or None")


def test_a_name_that_cannot_run_raises_where_the_optimizer_is_made(monkeypatch, tmp_path):
    """Of tensors on the CPU, which the driver calls its own: nothing is changed by it."""
    monkeypatch.setattr(nvidia.CudaDriver, "get_active_torch_device",
                        lambda self: torch.device("cpu"))
    w = torch.nn.Parameter(torch.ones(3))
    assert SAM([w], torch.optim.SGD, lr=0.1, backend="triton").backend_report()["why"] == (
        "asked for")
    choose.trial.cache_clear()
    set_results(launch_result=701)
    kernels.linf_step.__globals__["linf_kernel"].device_caches.clear()
    with pytest.raises(ValueError, match="'triton' cannot run: Triton fails on cpu .*CUDA"):
        SAM([w], torch.optim.SGD, lr=0.1, backend="triton")
    assert w.tolist() == [1.0] * 3


def test_without_any_driver_a_cpu_s_tensors_need_a_gpu(monkeypatch):
    monkeypatch.setattr(nvidia.CudaDriver, "is_active", staticmethod(lambda: False))
    with pytest.raises(ValueError, match="'cpu': Triton needs a GPU"):
        choose.choose("triton", [space(device=torch.device("cpu"))])


def test_a_failure_is_asked_for_once_a_process(monkeypatch, tmp_path):
    set_results(launch_result=701)
    why = chosen()[2]
    set_results()
    assert chosen()[2] == why


def test_other_devices_are_tried_on_their_own(monkeypatch):
    """The second GPU may be an old one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability",
                        lambda device=None: (9, 0) if device == GPU else (6, 0))
    assert chosen()[1] == "triton"
    assert "below 7.0" in chosen(device=torch.device("cuda", 1))[2]
