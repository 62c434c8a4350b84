"""The whole two-pass step as one CUDA graph; on a CPU the same step without a graph.

    python examples/graphed.py
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastsam import FriendlySAM, GraphedStep


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="40 steps")
    args = parser.parse_args()
    steps = 40 if args.quick else args.steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("on a GPU: the step is captured as a CUDA graph and replayed" if device.type == "cuda"
          else "on a CPU: there is no graph here; the same step runs operation by operation")

    torch.manual_seed(0)
    x = torch.randn(128, 32, device=device)
    y = (x[:, :4] + 0.5 * torch.randn(128, 4, device=device)).argmax(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
    model.to(device)
    opt = FriendlySAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)   # data of the graph
    step = GraphedStep(model, cross_entropy, opt, (x, y))
    begin = time.perf_counter()
    for i in range(steps):
        loss = step(x, y)                            # on the device; reading it waits
        schedule.step()
        if i % max(steps // 10, 1) == 0 or i == steps - 1:
            print(f"step {i:4}  loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - begin
    print(f"{1000 * seconds / steps:.2f} ms a step, the capture included")


if __name__ == "__main__":
    main()
