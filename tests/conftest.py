"""Without a GPU the kernels run in Triton's interpreter, chosen before any decorator runs."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_the_interpreter_once_per_launch()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels are tested: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
