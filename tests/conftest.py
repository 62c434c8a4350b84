"""Without a GPU the kernels run in Triton's interpreter, chosen before any decorator runs."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def patch_the_interpreter_once_per_launch() -> None:
    """A launch patches triton.language for the interpreter; a call from kernel to helper patches
    all of it again, on top, which takes most of the tests' time and changes nothing."""
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("fastsam.")
        return self.rewrite()(*args, **kwargs) if ours else patch_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def round_to_bfloat16_as_gpus_do() -> None:
    """The interpreter cuts float32 off at 16 bits where a GPU (and torch) rounds to nearest."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounded(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        values = torch.from_numpy(np.ascontiguousarray(src.data, dtype=np.float32))
        bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits.reshape(src.data.shape), dst_type.scalar)

    InterpreterBuilder.cast_impl = rounded


if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        import numpy as np
        import triton.language as tl
    except ImportError:
        pass  # the tests that need Triton say so
    else:
        patch_the_interpreter_once_per_launch()
        round_to_bfloat16_as_gpus_do()


LONGEST = ("test_sequences", "test_recipes", "test_aot", "test_contract",
           "test_distributed", "test_resume")


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that two processes end at about the same time."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels are tested: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def repeatable_convolutions(monkeypatch) -> None:
    """On a GPU: the same bits every time, and float32's precision, which torch does not ask of
    cuDNN by default."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
