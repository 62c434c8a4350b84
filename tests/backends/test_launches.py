"""What a step puts on the device: launches, copies from the host, and the page that counts them.

On a CPU no launch happens, so the launchers' kernels are replaced by ones that only write down
that they were called, and everything else that PyTorch executes is listed by its dispatcher.
"""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="the kernels need Triton")

from bench.models import MODELS  # noqa: E402
from bench.speed.contenders import bytes_per_parameter  # noqa: E402
from fastsam import GSAM, SAM, FriendlySAM, LookSAM, MomentumSAM, layout, space  # noqa: E402

from ..helpers.variants import VARIANTS  # noqa: E402
from .test_aot import budget  # noqa: E402

# nothing here depends on what a gradient is
pytestmark = pytest.mark.filterwarnings("ignore:second_step with the gradients:UserWarning")
# without a projection, which is a launch more
PLAIN = [name for name, variant in VARIANTS.items() if not variant.oracle.get("projection")]
BASES = {
    "sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.01)),
    "adamw": (torch.optim.AdamW, dict(lr=0.1, weight_decay=0.01)),
}
STEP = ["norm_kernel", "climb_kernel", "step_kernel"]
LAYOUTS = [(1, 1), (5, 1), (5, 4), (130, 1), (130, 4)]  # tensors, groups


class Executed(TorchDispatchMode):
    """The operations that read or write memory, in order: views, allocations and copies of a tensor
    onto itself, by which a mode such as this is told of what kernels write, are left out."""

    def __init__(self):
        super().__init__()
        self.names, self.elements = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        kind, _, name = op.name().partition("::")
        onto_itself = name == "copy_" and args[0] is args[1]
        if kind == "aten" and not (op.is_view or name.startswith("empty") or onto_itself):
            self.names.append(name)
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
        return result


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The kernels launched since the last `clear`; none runs."""
    seen = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **named: seen.append(self.name)

    for module, name in (("norm", "dots"), ("norm", "norm"), ("climb", "climb"), ("step", "step")):
        launcher = importlib.import_module(f"fastsam.kernels.triton.{module}")
        monkeypatch.setattr(launcher, f"{name}_kernel", Noted(f"{name}_kernel"))
    return seen


@pytest.fixture
def uploads(monkeypatch) -> list[torch.Tensor]:
    """The tables on the device that the host sent anew since the last `clear`."""
    seen, upload = [], space.upload

    def noted(values, target):
        seen.append(target)
        upload(values, target)

    for module in (space, layout):
        monkeypatch.setattr(module, "upload", noted)
    return seen


def parameters(n: int, device, dtype=torch.float32) -> list[torch.nn.Parameter]:
    """n parameters of unequal sizes with gradients that stay where they are."""
    ps = [torch.nn.Parameter(torch.randn(3 + i % 7, device=device, dtype=dtype)) for i in range(n)]
    for p in ps:
        p.grad = torch.randn_like(p)
    return ps


def optimizer(params, groups: int, cls, base: str, **own) -> SAM:
    kind, hyper = BASES[base]
    dealt = [{"params": params[i::groups], "lr": 0.1 / (i + 1)} for i in range(groups)]
    return cls(dealt, kind, backend="triton", **own, **hyper)


def variant(name: str, params, groups: int, base: str) -> SAM:
    return optimizer(params, groups, VARIANTS[name].cls, base, **VARIANTS[name].own)


def two_phases(opt) -> None:
    opt.first_step()
    opt.second_step()


# ---- launches


@pytest.mark.parametrize("tensors, groups", LAYOUTS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PLAIN)
def test_a_step_is_three_launches_and_nothing_else(name, base, tensors, groups, launches, device):
    params = parameters(tensors, device)
    opt = variant(name, params, groups, base)
    two_phases(opt)
    assert launches == STEP
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        launches.clear()
        with Executed() as executed:
            two_phases(opt)
        assert launches == STEP
        assert executed.names == []
    for p, w in zip(params, before, strict=True):
        assert torch.equal(p, w), "something but the kernels, which did not run, moved a weight"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tensors, groups", LAYOUTS)
def test_a_plain_step_is_one_launch(base, tensors, groups, launches, device):
    opt = optimizer(parameters(tensors, device), groups, FriendlySAM, base)
    opt.step()
    launches.clear()
    with Executed() as executed:
        opt.step()
    assert launches == ["step_kernel"] and executed.names == []


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PLAIN)
def test_a_group_added_in_mid_training_shares_the_launches(name, base, launches, device):
    opt = variant(name, parameters(5, device), 2, base)
    two_phases(opt)
    opt.add_param_group({"params": parameters(4, device), "lr": 0.3})
    for _ in range(3):
        launches.clear()
        with Executed() as executed:
            two_phases(opt)
        assert launches == STEP
    assert executed.names == []


@pytest.mark.parametrize("projection", ["cosine", "orthogonal"])
@pytest.mark.parametrize("convention", ["algorithm1", "official"])
def test_a_projection_is_a_fourth_launch_and_a_few_operations_on_a_few_numbers(
        projection, convention, launches, device):
    counts = set()
    for tensors, groups in LAYOUTS:
        opt = optimizer(parameters(tensors, device), groups, FriendlySAM, "sgd",
                        projection=projection, convention=convention)
        two_phases(opt)
        launches.clear()
        with Executed() as executed:
            two_phases(opt)
        assert launches == ["dots_kernel", *STEP]
        assert executed.elements <= 4
        counts.add((groups, len(executed.names)))
    assert len(counts) == 2, "the operations depend on the groups alone, not on the tensors"
    assert max(n for _, n in counts) <= 16


def test_every_dtype_has_launches_of_its_own(launches, device):
    params = [p for dtype in (torch.float32, torch.bfloat16) for p in parameters(3, device, dtype)]
    opt = optimizer(params, 2, FriendlySAM, "sgd")
    two_phases(opt)
    launches.clear()
    two_phases(opt)
    assert sorted(launches) == sorted(2 * STEP)


def test_a_gradient_in_another_layout_or_absent_is_no_launch_of_the_kernels(launches, device):
    """It is copied, by PyTorch; which slots have a gradient is a matter of a table."""
    params = parameters(4, device)
    params[2] = torch.nn.Parameter(torch.randn(3, 4, device=device))
    params[2].grad = torch.randn(4, 3, device=device).t()
    params[0].grad = None
    opt = optimizer(params, 1, SAM, "sgd")
    two_phases(opt)
    launches.clear()
    with Executed() as executed:
        two_phases(opt)
    assert launches == STEP
    assert set(executed.names) == {"copy_"} and 2 <= len(executed.names) <= 4, "gradients, tables"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU's profiler sees launches")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PLAIN)
def test_the_profiler_sees_three_kernels(name, base, device, tmp_path):
    for tensors, groups in LAYOUTS:
        opt = variant(name, parameters(tensors, device), groups, base)
        two_phases(opt)
        two_phases(opt)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            two_phases(opt)
            torch.cuda.synchronize()
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        seen = [event for event in events
                if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        seen.sort(key=lambda event: event["ts"])
        assert [re.sub(r"(?<=_kernel)\W.*", "", event["name"]) for event in seen] == STEP


# ---- copies from the host


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PLAIN)
def test_a_scheduled_learning_rate_is_one_upload_per_space_and_step(
        name, base, launches, uploads, device):
    params = [p for dtype in (torch.float32, torch.bfloat16) for p in parameters(5, device, dtype)]
    opt = variant(name, params, 4, base)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=50)
    two_phases(opt)
    for _ in range(4):
        schedule.step()
        uploads.clear()
        two_phases(opt)
        spaces = opt._phase.layout.spaces
        assert len(spaces) == 2
        assert sorted(map(id, uploads)) == sorted(id(s.hyper) for s in spaces)
    uploads.clear()
    two_phases(opt)
    assert uploads == [], "nothing was scheduled"


def test_gradients_at_new_addresses_are_one_more_upload_per_pass(launches, uploads, device):
    params = parameters(6, device)
    opt = optimizer(params, 2, FriendlySAM, "sgd")
    two_phases(opt)
    for addresses in range(2):
        kept = [p.grad for p in params]
        for p in params:
            p.grad = torch.randn_like(p)
        uploads.clear()
        two_phases(opt)
        assert len(uploads) == 2, f"g1's table and g2's, time {addresses}"
        del kept


# ---- the page


def page_rows(*head: str) -> list[list[str]]:
    """The cells of the page's table with this head."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    lines = page.split("| " + " | ".join(head) + " |\n")[1].splitlines()
    table = lines[1:next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def moved(kernel: str, kind: str, **constants) -> int:
    """The bytes per parameter that test_aot.py finds in a kernel's compiled loads and stores."""
    row = dict(kernel=kernel, type=kind, elements=1, partials=0, constants=constants,
               target="sm_90")
    return sum(budget(row))


def test_the_pages_kernels_move_what_the_compiled_ones_do():
    found = [int(cells[-1]) for cells in page_rows("kernel", "when", "loads", "stores", "bytes")]
    plain = dict(MASTERS=False)
    assert found == [
        moved("dots", "fp32", MODE=1), moved("dots", "fp32", MODE=-1),
        *(moved("norm", "fp32", MODE=mode, SCALING=scaling, **plain)
          for mode, scaling in ((0, 0), (0, 1), (1, 0), (1, 1))),
        *(moved("climb", "fp32", MODE=mode, SCALING=0, **plain) for mode in (0, 1, -1)),
        *(moved("step", "fp32", BASE=base, MIX=mix, PERTURBED=mix != 3, **plain)
          for base, mix in ((0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0))),
    ]
    for kernel in ("norm", "climb"):  # FisherSAM's are SAM's
        assert (moved(kernel, "fp32", MODE=0, SCALING=2, **plain)
                == moved(kernel, "fp32", MODE=0, SCALING=0, **plain))


@pytest.mark.parametrize("column, kind, masters, base", [
    (1, "fp32", False, "sgd"), (2, "fp32", False, "adamw"), (3, "bf16", False, "sgd"),
    (4, "bf16", False, "adamw"), (5, "bf16", True, "sgd"), (6, "bf16", True, "adamw")])
def test_the_pages_steps_are_the_sums_and_the_benchmarks_budget(column, kind, masters, base):
    rows = page_rows("step", "float32, SGD", "float32, AdamW", "bf16, SGD", "bf16, AdamW",
                     "masters, SGD", "masters, AdamW")
    assert [cells[0] for cells in rows] == ["base optimizer alone", "SAM", "ASAM", "Friendly-SAM",
                                            "F-ASAM", "Momentum-SAM", "GSAM",
                                            "LookSAM, every k-th step", "LookSAM, between them"]
    relatives = steps_of_relatives(kind, masters, {"sgd": 1, "adamw": 2}[base])
    assert [int(cells[column]) for cells in rows[5:]] == relatives
    if not masters:
        weight = 4 if kind == "fp32" else 2
        assert relatives[:3] == [bytes_per_parameter(method, base, weight, 4)
                                 for method in ("msam", "gsam", "looksam")]
    rows = rows[:5]
    methods = {"sgd": None, "sam": (0, 0), "asam": (0, 1), "fsam": (1, 0), "fasam": (1, 1)}
    for cells, (method, direction) in zip(rows, methods.items(), strict=True):
        number = {"sgd": 1, "adamw": 2}[base]
        total = moved("step", kind, BASE=number, PERTURBED=direction is not None, MASTERS=masters)
        if direction is not None:
            mode, scaling = direction
            total += sum(moved(kernel, kind, MODE=mode, SCALING=scaling, MASTERS=masters)
                         for kernel in ("norm", "climb"))
        assert int(cells[column]) == total, method
        if not masters:
            weight = 4 if kind == "fp32" else 2
            assert total == bytes_per_parameter(method, base, weight, 4), method


def steps_of_relatives(kind: str, masters: bool, base: int) -> list[int]:
    """Momentum-SAM's, GSAM's, LookSAM's two. Momentum-SAM's climb reads float32, and the norm was
    left by the step before."""
    climb = sum(moved(kernel, kind, MODE=mode, SCALING=0, MASTERS=masters)
                for kernel, mode in (("norm", 0), ("climb", -1)))

    def step(mix: int) -> int:
        return moved("step", kind, BASE=base, MIX=mix, PERTURBED=mix != 3, MASTERS=masters)

    dots = moved("dots", kind, MODE=-1)
    weights = kind.partition("/")[0]
    along_v = moved("climb", weights + "/fp32", MODE=0, SCALING=0, MASTERS=masters)
    return [along_v + step(0), climb + dots + step(1), climb + dots + step(2), dots + step(3)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("n, groups", [(5, 1), (130, 4)])
def test_launches_of_the_relatives(launches, base, n, groups, device):
    params = parameters(n, device)
    for cls, expected in ((MomentumSAM, [STEP, STEP[1:], STEP[1:]]),
                          (GSAM, [[*STEP[:2], "dots_kernel", STEP[2]]] * 2),
                          (LookSAM, [[*STEP[:2], "dots_kernel", STEP[2]],
                                     ["dots_kernel", STEP[2]]])):
        opt = optimizer(params, groups, cls, base)
        for i, kernels in enumerate(expected):
            launches.clear()
            with Executed() as executed:
                if opt.climbs_next:
                    opt.first_step()
                opt.step()
            assert launches == kernels, cls
            few = 16 if "dots_kernel" in kernels else 0
            if i > 0:  # the first step brings its tables
                assert len(executed.names) <= few and executed.elements <= 4, executed.names


@pytest.mark.parametrize("base", BASES)
def test_momentum_sam_takes_the_norm_where_no_step_has_left_it(launches, base, device):
    opt = optimizer(parameters(5, device), 1, MomentumSAM, base)
    for change, kernels in (
            (lambda: None, STEP), (lambda: None, STEP[1:]), (lambda: opt.step(), STEP),
            (lambda: opt.spaces[0].v.mul_(2), STEP), (lambda: opt.state_dict(), STEP[1:]),
            (lambda: opt.load_state_dict(opt.state_dict()), STEP)):
        change()
        launches.clear()
        two_phases(opt)
        assert launches == kernels


def test_the_pages_arithmetic():
    with torch.device("meta"):
        model, image = MODELS["preactresnet18"](3, 10, 64), torch.empty(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    flops, n = counter.get_total_flops(), sum(p.numel() for p in model.parameters())
    large, small = (2 * flops * batch / (52 * n) for batch in (128, 8))
    page = " ".join((Path(__file__).parents[2] / "docs" / "performance.md").read_text().split())
    for text in (f"{n:,} parameters", f"{flops / 1e9:.2f} GFLOP", f"do {large:,.0f} operations",
                 f"they do {small:.0f}."):
        assert text in page, text
