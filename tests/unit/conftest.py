"""The backends that a test of what the host does goes over."""

import pytest
import torch

from fastsam.choose import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request):
    """For tests whose tensors are on the CPU. On a GPU Triton's kernels are compiled, for tensors
    there: the drawn sequences and the optimizer's contract edit and save those."""
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's kernels take tensors on a CPU only where there is no GPU")
    return request.param
