"""A GPU that is not there: Triton binds, compiles and launches as for an sm_90, and the launches
are written down instead of run. Import it where TRITON_INTERPRET is not set."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

TARGET = GPUTarget("cuda", 90, 32)
FUNCTION = 2  # the handle of every kernel


class Launched(NamedTuple):
    """One launch. arguments: by name, without constants, addresses for tensors; hooks_data: what
    hooks are called with; prepared: Triton was handed addresses, not tensors."""

    kernel: str
    programs: int
    stream: int
    arguments: dict
    hooks_data: object
    prepared: bool


class Launcher:
    """Stands for triton.backends.nvidia.driver.CudaLauncher."""

    seen: list[Launched] = []

    def __init__(self, src, metadata):
        self.types, self.name = src.signature, metadata.name
        self.metadata = CUDABackend(TARGET).pack_metadata(metadata)

    def __call__(self, x, y, z, stream, function, metadata, hooks_data, enter, leave, *arguments):
        assert (y, z, function, metadata) == (1, 1, FUNCTION, self.metadata)
        assert len(arguments) == len(self.types)
        if enter is not None:
            enter(hooks_data)
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        named = {name: a.data_ptr() if isinstance(a, torch.Tensor) else a
                 for (name, kind), a in zip(self.types.items(), arguments, strict=True)
                 if kind != "constexpr"}
        Launcher.seen.append(Launched(self.name, x, stream, named, hooks_data, not tensors))
        if leave is not None:
            leave(hooks_data)


class Driver:
    """Stands for triton.backends.nvidia.driver.CudaDriver."""

    launcher_cls = Launcher
    device, stream = 0, 7
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda name, binary, shared, device: (1, FUNCTION, 32, 0, 1024),
        unload_module=lambda module: None)

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return self.device

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_stream(self, device: int) -> int:
        return self.stream


def pretend() -> Driver:
    """Make it Triton's."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    return driver
