"""Without a GPU the kernels run in Triton's interpreter, chosen before any decorator runs."""

import os
from dataclasses import replace
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def patch_the_interpreter_once_per_launch() -> None:
    """A launch patches triton.language for the interpreter; a call from kernel to helper, or to a
    function of triton.language, patches all of it again, on top. That takes most of the tests' time
    and changes nothing where a launch patches all that those functions see."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    sees_all = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def call(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = lambda fn: patch(sees_all)
    interpreter.InterpretedFunction.__call__ = call


def look_up_types_once() -> None:
    """The interpreter writes down its table of types anew whenever it looks one up."""
    from triton.runtime import interpreter

    look_up, known = interpreter._get_np_dtype, {}

    def looked_up(dtype):
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        if isinstance(dtype, tl.pointer_type):
            return np.dtype(np.uint64)
        if dtype.name not in known:
            known[dtype.name] = look_up(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = looked_up


def look_for_no_overflow() -> None:
    """The interpreter works out whether integers overflow, and asks for `debug` before it looks."""
    from triton.runtime import interpreter

    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


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
        look_up_types_once()
        look_for_no_overflow()
        round_to_bfloat16_as_gpus_do()


LONGEST = ("test_optimizer", "test_contract", "test_distributed", "test_sequences", "test_executed",
           "test_invariants", "test_files", "test_cpu", "test_checkpoints", "test_relatives",
           "test_state_edits", "test_packaging", "test_resume", "test_recipes", "test_aot")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that two processes end at about the same time; and what only
    `make prove` asks Triton's interpreter, which takes a second where numba takes milliseconds."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items if os.environ.get("TRITON_INTERPRET") == "1" else ():
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        for few in item.iter_markers("interpreted"):
            if parameters["backend"] == "triton" and any(
                    parameters[name] not in values for name, values in few.kwargs.items()):
                item.add_marker("long")


@pytest.fixture
def device(request) -> torch.device:
    """Where a test's tensors are: on the GPU if there is one, but for numba's kernels, which are
    the CPU's; else on the CPU, where Triton's kernels are interpreted."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    on_gpu = torch.cuda.is_available() and parameters.get("backend") != "numba"
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def repeatable_convolutions(monkeypatch) -> None:
    """On a GPU: the same bits every time, and float32's precision, which torch does not ask of
    cuDNN by default."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
