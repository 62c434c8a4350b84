"""Programs that CUDA's tools watch, and what the tools say: `python -m bench.speed.gpu_tools NAME`.

compute-sanitizer looks for bad accesses and races in a few steps of every variant; ncu counts the
bytes that each kernel moves, to hold beside the budget. And short trainings on CIFAR-10.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.files import append_jsonl
from bench.provenance import git_hash
from bench.speed.bandwidth import wait
from bench.speed.contenders import BASES, FRIENDLY, Contender, adaptive, kernel_bytes
from bench.speed.parity import BASE_HYPER, SHAPES
from bench.speed.step import BASE_HYPER as STEP_HYPER
from bench.speed.step import PERTURBATION, provenance
from bench.speed.timing import Runner, random_like
from fastsam import (
    ASAM,
    GSAM,
    SAM,
    FisherSAM,
    FriendlySAM,
    FullGradientSAM,
    LookSAM,
    MomentumSAM,
)

IMAGES = Path(".data/cifar10-jpeg")  # a directory of classes, as docs/studies.md makes it
LEFT_OUT = 77  # exit code: the tool is not here
VARIANTS = [
    (SAM, {}), (ASAM, {}), (ASAM, {"scale": "weights"}), (FisherSAM, {}), (FriendlySAM, {}),
    (FriendlySAM, {"convention": "official"}), (FriendlySAM, {"adaptive": True}),
    (FriendlySAM, {"projection": "cosine"}), (FullGradientSAM, {"part": "full"}),
    (FullGradientSAM, {"part": "noise"}), (MomentumSAM, {}), (GSAM, {}), (LookSAM, {"k": 2}),
]  # fmt: skip
OVER = [("sgd", BASE_HYPER["sgd"]), ("sgd", {"lr": 0.1}), ("adamw", BASE_HYPER["adamw"])]
TYPES = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]  # masters


def take_steps(variant: tuple, over: tuple, kind: tuple, device: torch.device) -> SAM:
    """Take two steps, which climb where they are due to, and one that does not, with the kernels,
    each pass without one of the gradients; return the optimizer. Raises RuntimeError when a weight
    is not finite then."""
    (cls, own), (base, hyper), (dtype, masters) = variant, over, kind
    params = [nn.Parameter(w) for w in random_like(SHAPES, dtype, device, seed=0)]
    own = {"rho": 3.0, "backend": "triton", "master_weights": masters} | own
    opt = cls(params, BASES[base], **own, **hyper)
    if cls is FullGradientSAM:
        opt.set_full_gradient(random_like(SHAPES, dtype, device, seed=1))
    seeds = count()
    for t in range(3):
        climbs = t < 2 and opt.climbs_next
        for call in (opt.first_step, opt.second_step) if climbs else (opt.step,):
            seed = next(seeds)
            for p, g in zip(params, random_like(SHAPES, dtype, device, seed), strict=True):
                p.grad = g
            params[seed % len(params)].grad = None
            call()
    if opt.skipped_steps or not all(p.isfinite().all() for p in params):
        raise RuntimeError(f"{cls.__name__} {own} over {base} in {dtype} left the finite numbers")
    return opt


def variants() -> int:
    """Take steps with everything that the kernels can do, PGD's included."""
    from fastsam.kernels import triton as kernels

    device = torch.device("cuda")
    for variant, over, kind in product(VARIANTS, OVER, TYPES):
        if variant[0] is MomentumSAM and over == ("sgd", {"lr": 0.1}):
            continue  # it climbs along the momentum
        take_steps(variant, over, kind, device)
    for (dtype, _), pgd_step in product(TYPES[:2], (kernels.linf_step, kernels.l2_step)):
        x, g, x_adv = (t.sigmoid() for t in random_like([(5, 3, 33, 31)] * 3, dtype, device, 0))
        pgd_step(x_adv, g, x, 8 / 255, 2 / 255)
    torch.cuda.synchronize()
    return 0


def friendly() -> int:
    """Take Friendly-SAM's steps over SGD with momentum in float32, alone."""
    take_steps(VARIANTS[4], OVER[0], TYPES[0], torch.device("cuda"))
    torch.cuda.synchronize()
    return 0


def find_tool(name: str) -> str | None:
    """Return the path of one of CUDA's tools; None, after a line that says so, without it."""
    tool = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if tool is None:
        print(f"{name} is not installed here")
    return tool


def sanitize(check: str, program: str = "variants") -> int:
    """Run a program under compute-sanitizer: 0 when it finds nothing, LEFT_OUT when it is not
    here or cannot work on this device."""
    tool = find_tool("compute-sanitizer")
    if tool is None:
        return LEFT_OUT
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor has an end of its own
    command = [tool, "--tool", check, "--error-exitcode", "86"]
    command += ["--report-api-errors", "no"]  # PyTorch asks the driver for what it may not have,
    command += ["--launch-timeout", "0", sys.executable]  # and takes long to import
    trivial = "import torch; torch.ones(1, device='cuda').item()"
    if subprocess.run([*command, "-c", trivial], env=env).returncode:
        print("compute-sanitizer cannot watch even a trivial program on this device", flush=True)
        return LEFT_OUT
    return subprocess.run([*command, "-m", "bench.speed.gpu_tools", program], env=env).returncode


PARAMETERS = 2**26  # every float32 buffer is several times the L2 cache
COUNTED = list(product(BASES, ("sgd", "sam", "asam", "fsam")))
METRICS = {
    "ns": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "load_sectors_per_request":
        "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "store_sectors_per_request":
        "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}  # fmt: skip


def counted(kind: str = "cuda") -> int:
    """Two steps of each of COUNTED, for ncu to watch."""
    device, shapes = torch.device(kind), [(PARAMETERS // 64,)] * 64
    for base, method in COUNTED:
        cls = FriendlySAM if method in FRIENDLY else SAM
        build = partial(cls, base_optimizer=BASES[base], backend="triton", **adaptive(method))
        ours = Contender(method, "fastsam triton", build, state=4)
        w, g1, g2 = (random_like(shapes, torch.float32, device, seed, 0.1) for seed in range(3))
        runner = Runner(ours, w, (g1, g2), PERTURBATION | STEP_HYPER[base])
        for _ in range(2):
            list(runner.step())
    wait(device)
    return 0


def parse_counters(text: str) -> list[dict[str, Any]]:
    """Return {"kernel", and METRICS' names} per launch, from the raw page of ncu in CSV: messages,
    a line of names, a line of units, then a line per launch."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches = list(csv.DictReader(lines[start:]))[1:]
    return [
        {"kernel": launch["Kernel Name"].split("(")[0].removesuffix("_kernel")}
        | {name: float(launch[metric].replace(",", "")) for name, metric in METRICS.items()}
        for launch in launches
    ]


def counter_rows(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per launch of `counted`, with the bytes per parameter beside the budget.

    Raises ValueError when these are not its launches.
    """
    expected = [
        {"method": method, "base": base, "kernel": kernel, "budget": budget}
        for base, method in COUNTED
        for kernel, budget in 2 * list(kernel_bytes(method, base, weight=4).items())
    ]
    if [row["kernel"] for row in launches] != [row["kernel"] for row in expected]:
        raise ValueError(f"ncu saw {len(launches)} launches, not the {len(expected)} of the steps")
    rows = []
    for launch, what in zip(launches, expected, strict=True):
        moved = (launch["read"] + launch["written"]) / PARAMETERS
        more = {"bytes_per_parameter": moved, "of_budget": moved / what["budget"]}
        rows.append({"kind": "counters", "parameters": PARAMETERS} | what | launch | more)
    return rows


def counters(rows_path: Path) -> int:
    """Append a row per launch of `counted`, from ncu's hardware counters."""
    tool, git = find_tool("ncu"), git_hash()
    if tool is None:
        return LEFT_OUT
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "counters.csv")
        command = [
            tool, "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base",
            "--log-file", str(path), "--metrics", ",".join(METRICS.values()),
            "--kernel-name", "regex:^(norm|climb|step)_kernel",
            sys.executable, "-m", "bench.speed.gpu_tools", "counted",
        ]  # fmt: skip
        code = subprocess.run(command).returncode
        text = path.read_text() if path.exists() else ""
    if code:
        print(f"{text}\nncu ended with {code}")
        return code
    try:
        rows = counter_rows(parse_counters(text))
    except (ValueError, KeyError):
        print(text)
        raise
    append_jsonl(rows_path, [row | provenance(torch.device("cuda"), git) for row in rows])
    return 0


def training(method: str, images: Path, out: Path) -> list[str]:
    """Return the arguments of `python -m bench` that train a full-width PreActResNet-18 on CIFAR-10
    and evaluate it, in a short schedule that is one for all methods, its step one CUDA graph. Given
    again, it goes on."""
    own = [] if method == "sgd" else ["--rho", "0.1"]
    return [
        "train", "--device", "cuda", "--graph", "--data", str(images), "--preset", "cifar-fast",
        "--model", "preactresnet18", "--width", "64", "--epochs", "16", "--method", method, *own,
        "--eval-linf", "1", "2", "--eval-l2", "32", "--n-examples", "2000",
        "--out", str(out / f"accuracy-{method}"),
    ]  # fmt: skip


def accuracy(method: str, rows_path: Path, images: Path = IMAGES) -> int:
    """Append a row of what training by this method reaches; LEFT_OUT without the images."""
    from bench.__main__ import main

    if not images.is_dir():
        print(f"no images in {images}: `python -m bench unpack ARCHIVE {images}` puts them there")
        return LEFT_OUT
    arguments = training(method, images, rows_path.parent)
    if code := main(arguments):
        return code
    summary = json.loads(Path(arguments[-1], "summary.json").read_text())
    append_jsonl(rows_path, [{"kind": "accuracy"} | summary])
    return 0


PROGRAMS = {
    "variants": variants,
    "friendly": friendly,
    "memcheck": partial(sanitize, "memcheck"),
    "racecheck": partial(sanitize, "racecheck"),
    "counted": counted,
    "counters": lambda path: counters(Path(path)),
    "accuracy": lambda method, path: accuracy(method, Path(path)),
}

if __name__ == "__main__":
    sys.exit(PROGRAMS[sys.argv[1]](*sys.argv[2:]))
