"""What type checkers make of users' code."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("mypy", reason="it is what checks the types")

RIGHT = """
import torch
from torch import Tensor
from fastsam import ASAM, SAM, FriendlySAM, FullGradientSAM, GraphedStep, RhoScheduler
from fastsam.integrations import SAMModule, SAMTrainer, both_passes

p = torch.nn.Parameter(torch.ones(3))
opt = FriendlySAM([p], torch.optim.SGD, rho=0.1, sigma=1.0, lmbda=0.6, lr=0.05, momentum=0.9)

def closure() -> Tensor:
    loss = (p ** 2).sum()
    loss.backward()
    return loss

def number() -> float:
    return float(closure())

x: float = opt.step(closure).item()
x = opt.step(closure, closure).item()
x = opt.step(number)
opt.step()
opt.first_step(zero_grad=True, scaler=torch.amp.GradScaler())
opt.second_step(zero_grad=True)
wrapped: FriendlySAM = FriendlySAM.wrap(torch.optim.SGD([p], lr=0.1), rho=0.1)
asam: ASAM = ASAM.wrap(torch.optim.AdamW([p]), scale="weights")
groups = [{"params": [p], "rho": 0.1}, {"params": [p], "perturb": False}]
sam = SAM(groups, torch.optim.SGD, 0.05, lr=0.1)
base: torch.optim.Optimizer = sam.base_optimizer
as_any: torch.optim.Optimizer = sam
torch.optim.lr_scheduler.CosineAnnealingLR(sam, T_max=10)
last: float | Tensor = RhoScheduler(sam, lambda i: 0.9 ** i).get_last_rho()[0]
radius: float = sam.last_radius
perturbed: bool = sam.is_perturbed
backend: str = sam.backend_report()["backend"]
graphed: Tensor = GraphedStep(torch.nn.Linear(3, 1), torch.nn.MSELoss(), sam, (p, p))(p, p)

def mean(batch: Tensor) -> tuple[Tensor, int]:
    return batch.mean(), len(batch)

FullGradientSAM([p], torch.optim.SGD, "noise", lr=0.1).measure_full_gradient([p], mean)

class Net(SAMModule):
    def training_step(self, batch: Tensor) -> Tensor:
        return batch.sum() if self.second_pass else 2 * batch.sum()

class Trainer(SAMTrainer):
    pass
"""
WRONG = """
import torch
from fastsam import SAM, FullGradientSAM
from fastsam.integrations import both_passes
p = torch.nn.Parameter(torch.ones(3))
opt = SAM([p], torch.optim.SGD, lr=0.1)
opt.step().item()
opt.step(p.sum())
opt.second_step(scaler=None)
SAM.wrap(torch.optim.SGD)
SAM([p], torch.optim.SGD, rho="0.05")
opt.sync_lookahead()
FullGradientSAM([p], torch.optim.SGD, "noise", lr=0.1).measure_full_gradient([p], p.sum)
both_passes(p)
"""


def test_mypy_takes_right_code_and_refuses_wrong(tmp_path):
    """In strict mode. One run for both: it is reading torch that takes the time."""
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml",
         tmp_path / "right.py", tmp_path / "wrong.py"],
        cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    found = {int(line.partition("wrong.py:")[2].partition(":")[0]) for line in lines
             if "wrong.py" in line}
    assert not [line for line in lines if "wrong.py" not in line], done.stdout
    assert found == set(range(7, 15)), done.stdout + done.stderr
