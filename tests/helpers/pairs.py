"""A backend and plain PyTorch stepped together, each from its own oracle, and judged."""

import math
from types import ModuleType

import torch

from fastsam import reference

from .drawn import normals
from .oracle import exact
from .passes import Passes

BLOCK = 1024  # elements of the Triton kernels' blocks
SIZES = [1, 15, 16, BLOCK - 1, BLOCK, BLOCK + 1, 4097]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def parameters(tensors) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in tensors]


def ulp(t: torch.Tensor, dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of `dtype` at every element of t."""
    return torch.finfo(dtype).eps * 2.0 ** t.abs().clamp_min(1e-30).log2().floor()


def judge(ours: Passes, plain: Passes, step: str) -> None:
    """Hold a backend's course to twice the error of the plain one, each from its own oracle."""
    for (what, actual, expected), (_, plain_actual, plain_expected) in zip(
            ours.compared(), plain.compared(), strict=True):
        if not expected.numel():
            continue
        bad = float((exact(plain_actual) - plain_expected).abs().max())
        assert math.isfinite(bad), f"{what} {step}: plain PyTorch is not finite"
        error = (exact(actual) - expected).abs()
        tiny = 4 * torch.finfo(FP32).eps * max(1.0, float(expected.abs().max()))
        assert (error <= 2 * bad + tiny).all(), (
            f"{what} {step}: error {float(error.max()):.3g}, plain PyTorch's {bad:.3g}")
    assert ours.skipped == ours.oracle.skipped == plain.skipped
    ours.check_gaps()


class Pair:
    """A backend's and the plain course of the same parameters, stepped together and judged."""

    def __init__(self, backend: ModuleType, tensors, groups, name: str, make=parameters, **kwargs):
        self.ours = Passes(make(tensors), groups, name, backend, **kwargs)
        self.plain = Passes(parameters(tensors), groups, name, reference, **kwargs)

    def __iter__(self):
        return iter((self.ours, self.plain))

    def first_step(self, grads, label="", **kwargs) -> None:
        for course in self:
            course.first_step(grads, **kwargs)
        judge(*self, f"moved, step {label}")

    def second_step(self, grads, label="", **kwargs) -> None:
        for course in self:
            course.second_step(grads, **kwargs)
        judge(*self, f"after step {label}")

    def step(self, first, second, label="") -> None:
        self.first_step(first, label)
        self.second_step(second, label)


def run(backend: ModuleType, shapes, groups, name: str, dtype, device, steps=3, g_dtype=None,
        **kwargs) -> Pair:
    pair = Pair(backend, normals(shapes, 0, dtype, device), groups, name, **kwargs)
    for t in range(steps):
        pair.step(*(normals(shapes, seed + t, g_dtype or dtype, device) for seed in (10, 20)), t)
    return pair
