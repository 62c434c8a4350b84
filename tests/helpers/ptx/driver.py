"""A driver for Triton that compiles for a GPU which is not there, and executes the PTX here.

    driver = Driver("sm_90")
    with driver.active():
        kernel[grid](*arguments)  # torch CPU tensors, or their addresses as integers

Everything before the launch is Triton's own: the binder, the specialisation of arguments, the
compiler, the launch's arguments.
"""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from .machine import WARP, Machine
from .memory import Global
from .order import Order
from .parse import parse

SCRATCH = 2  # the last parameters: Triton's own scratch memory, which nobody here needs


class Driver:
    """What Triton asks of a driver, and what a test may ask of this one.

    Args:
        target: "sm_80", "sm_90" and so on.
        together: whether warps at the same instruction take it as one (fast), or each goes alone,
            in a random order.
        seed: of that order.

    Attributes:
        rewrite: (kernel's name, PTX) -> the PTX that is executed.
        gaps: tensors' bytes that nobody may touch: a list of (first address, one past the last).
        traffic: for every launch (the kernel's name, the sectors that its warps asked for): a
            Counter of (argument, "read", "written" or "atomic"); "*g_table" is what the addresses
            in g_table lead to.
    """

    def __init__(self, target: str, together: bool = True, seed: int = 0):
        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), WARP)
        self.together = together
        self.random = np.random.default_rng(seed)
        self.rewrite: Callable[[str, str], str] = lambda name, ptx: ptx
        self.gaps: list[tuple[int, int]] = []
        self.traffic: list[tuple[str, dict]] = []
        self.asked: dict[int, list] = defaultdict(list)

    # ---- Triton's side

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a device for each target, as kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    # ---- ours

    @contextlib.contextmanager
    def active(self) -> Iterator["Driver"]:
        """Triton launches through this driver."""
        before = triton.runtime.driver._active
        init_handles, data_ptr = CompiledKernel._init_handles, torch.Tensor.data_ptr

        def launcher(kernel: CompiledKernel) -> None:
            kernel._run = Launcher(kernel)

        def note_and_ask(tensor: torch.Tensor) -> int:
            address = data_ptr(tensor)
            self._note(address, tensor)
            return address

        triton.runtime.driver.set_active(self)
        CompiledKernel._init_handles, torch.Tensor.data_ptr = launcher, note_and_ask
        try:
            yield self
        finally:
            triton.runtime.driver.set_active(before)
            CompiledKernel._init_handles, torch.Tensor.data_ptr = init_handles, data_ptr

    def _note(self, address: int, tensor: torch.Tensor) -> None:
        """An address is meant for the tensor whose data_ptr() it is, as long as that or what it is
        a view of lives."""
        owner = tensor._base if tensor._is_view() else tensor
        known = [(ref, size) for ref, size in self.asked[address] if ref() is not None]
        if not any(ref() is owner and size == size_of(tensor) for ref, size in known):
            known.append((weakref.ref(owner), size_of(tensor)))
        self.asked[address] = known

    def extent(self, address: int) -> int | None:
        """The bytes of the largest living tensor whose address was asked for; None: there is
        none."""
        known = self.asked.get(address, ())
        return max((size for ref, size in known if ref() is not None), default=None)

    def launch(self, kernel: CompiledKernel, ctas: int, arguments: tuple) -> None:
        program = parse(self.rewrite(kernel.name, kernel.asm["ptx"]))
        order = Order(ctas * program.threads // WARP)
        gaps = np.array(sorted(self.gaps), np.int64).reshape(-1, 2)
        memory = Global(self.extent, gaps, program.narrowest("global"), order, WARP)
        signature = kernel.src.signature
        words = [self.word(memory, name, kind, value) for (name, kind), value
                 in zip(signature.items(), arguments, strict=True) if kind != "constexpr"]
        machine = Machine(program, ctas, words + [0] * SCRATCH, kernel.metadata.shared, memory,
                          order, self.together, self.random)
        machine.run()
        self.traffic.append((kernel.name, memory.sectors))

    def word(self, memory: Global, name: str, kind: str, value) -> int:
        """An argument as the kernel gets it."""
        if kind == "fp32":
            return int(np.float32(value).view(np.uint32))
        if isinstance(value, torch.Tensor):
            return memory.tag(value.data_ptr(), size_of(value), name)
        if kind[0] == "*" or kind in ("i64", "u64"):
            size = self.extent(value)
            return (value & (2**64 - 1)) if size is None else memory.tag(value, size, name)
        if kind in ("i32", "u32"):
            return value & (2**32 - 1)
        raise NotImplementedError(f"argument {name} of type {kind}")


class Launcher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, kernel: CompiledKernel):
        self.kernel = weakref.ref(kernel)

    def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook,
                 exit_hook, *arguments) -> None:
        if (y, z) != (1, 1):
            raise NotImplementedError(f"a grid of {x} x {y} x {z}")
        if x:
            triton.runtime.driver.active.launch(self.kernel(), x, arguments)


def size_of(tensor: torch.Tensor) -> int:
    """The bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()
