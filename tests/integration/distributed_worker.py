"""The tests of one of two processes, over gloo on the CPU. `test_distributed.py` starts both.

What they compare with is trained in one process by the float64 oracle, which shares no code with
fastsam; what must not differ between the processes is compared bit for bit, in float32.
"""

import copy
import os
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from fastsam import GSAM, FriendlySAM, LookSAM, MomentumSAM
from fastsam.distributed import average_gradients

from ..helpers.lockstep import build
from ..helpers.oracle import Oracle
from ..helpers.variants import ADAM_GROUPS, BASES, GROUPS, VARIANTS

FOLDER = Path(os.environ.get("FASTSAM_TWO_PROCESSES", "."))  # which both see
RANK, RANKS = int(os.environ.get("RANK", 0)), 2
HYPER = {"sgd": GROUPS[0], "adam": ADAM_GROUPS[0], "adamw": ADAM_GROUPS[0]}
CASES = [("sam", "adamw"), ("fsam", "sgd")]
EXACT = dict(rtol=0, atol=1e-10)  # of float64 courses, which must agree to 1e-6
UNFUSED = {"nadam": (torch.optim.NAdam, dict(lr=0.01)),
           "rmsprop": (torch.optim.RMSprop, dict(lr=0.01, momentum=0.7))}
RELATIVES = {"msam": (MomentumSAM, dict(rho=0.3)), "gsam": (GSAM, dict(rho=0.2, alpha=0.4)),
             "looksam": (LookSAM, dict(rho=0.2, alpha=0.7, k=3))}
both_bases = pytest.mark.parametrize("name, base", CASES)


@pytest.fixture(scope="session", autouse=True)
def two_processes():
    if "FASTSAM_TWO_PROCESSES" not in os.environ:
        pytest.skip("needs the two processes of test_distributed.py")
    dist.init_process_group("gloo", init_method=f"file://{FOLDER / 'store'}", rank=RANK,
                            world_size=RANKS, timeout=timedelta(seconds=300))
    yield
    dist.destroy_process_group()


# ---- the model, its batches, and its training by the oracle


class Net(nn.Module):
    """7 and 5 rows do not divide by two processes, and `gain` is smaller than their number."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 5)
        self.gain = nn.Parameter(torch.tensor([1.3]))

    def forward(self, x):
        return self.gain * self.down(self.up(x).tanh())


def network(dtype=torch.float64, seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(i: int, rank: int | None = None, part: int = 0, parts: int = 1,
          dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """16 examples: all of them, one process's half, or one micro-batch of that."""
    generator = torch.Generator().manual_seed(100 + i)
    x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (6, 5))
    rows = slice(None) if rank is None else slice(rank * parts + part, None, RANKS * parts)
    return x[rows].to(dtype), y[rows].to(dtype)


def loss(model, x, y) -> torch.Tensor:
    return (model(x) - y).square().mean()


def optimizer(net, name: str, base: str):
    params = list(net.parameters())
    return build(params, [dict(HYPER[base], params=range(len(params)))], name, "reference", base)


def oracle_of(name: str, base: str, params) -> Oracle:
    params = list(params)
    groups = [dict(HYPER[base], params=range(len(params)))]
    return Oracle(params, groups, base=base, **VARIANTS[name].oracle)


def gradients(net, oracle, data) -> list[torch.Tensor]:
    """The gradients at the oracle's weights."""
    with torch.no_grad():
        for p, w in zip(net.parameters(), oracle.w, strict=True):
            p.copy_(w)
    return list(torch.autograd.grad(loss(net, *data), list(net.parameters())))


def one_process(name: str, base: str, steps: int) -> list[torch.Tensor]:
    """The weights after `steps` steps on the joint batches."""
    net = network()
    oracle = oracle_of(name, base, net.parameters())
    for i in range(steps):
        oracle.first_step(gradients(net, oracle, batch(i)))
        oracle.second_step(gradients(net, oracle, batch(i)))
    return oracle.w


def m_sharpness(name: str, base: str, steps: int, parts: int = 1, bad=None):
    """The weights after `steps` steps in which each half of the batch (each of its micro-batches)
    climbs by itself, and the number of skipped steps. `bad` is the (step, rank, part) whose first
    gradient is not finite."""
    net = network()
    oracles = [oracle_of(name, base, net.parameters()) for _ in range(RANKS)]
    for i in range(steps):
        total, ok = [torch.zeros_like(p) for p in net.parameters()], True
        for part in range(parts):
            for rank, oracle in enumerate(oracles):
                data = batch(i, rank, part, parts)
                g = gradients(net, oracle, data)
                if (i, rank, part) == bad:
                    g[0][0] = torch.inf
                oracle.first_step(g)
                for t, g in zip(total, gradients(net, oracle, data), strict=True):
                    t += g / RANKS
                ok = ok and oracle.ok
                oracle.restore()
        for oracle in oracles:
            oracle.ok = ok
            oracle.second_step(total)
    return oracles[0].w, oracles[0].skipped


def two_passes(model, opt, data) -> None:
    loss(model, *data).backward()
    opt.first_step(zero_grad=True)
    loss(model, *data).backward()
    opt.second_step(zero_grad=True)


def two_passes_apart(model, opt, data, bad: bool = False) -> None:
    """The climb by this process's own gradient."""
    with opt.local_first_pass(model):
        loss(model, *data).backward()
    if bad:
        next(model.parameters()).grad[0] = torch.inf
    opt.first_step(zero_grad=True)
    loss(model, *data).backward()


def whole(tensors) -> list[torch.Tensor]:
    return [t.full_tensor() if isinstance(t, DTensor) else t.detach() for t in tensors]


def assert_near(actual, expected) -> None:
    for p, w in zip(whole(actual), expected, strict=True):
        torch.testing.assert_close(p, w, **EXACT)


def assert_bits(actual, expected) -> None:
    for p, q in zip(whole(actual), whole(expected), strict=True):
        assert torch.equal(p, q)


def ranks_agree(tensors) -> bool:
    mine = torch.cat([t.detach().flatten() for t in tensors])
    all_of_them = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(all_of_them, mine)
    return torch.equal(*all_of_them)


def collectives(comm: CommDebugMode) -> dict[str, int]:
    return {str(op).split(".")[-1].strip("'>)"): n for op, n in comm.get_comm_counts().items()}


# ---- DistributedDataParallel


@both_bases
def test_ddp_replicas_stay_bit_identical(name, base):
    net = network(torch.float32)
    model, start = DistributedDataParallel(net), copy.deepcopy(net)
    opt = optimizer(net, name, base)
    for i in range(200):
        two_passes(model, opt, batch(i % 7, RANK, dtype=torch.float32))
    assert ranks_agree(net.parameters()) and opt.skipped_steps == 0
    assert not torch.equal(net.up.weight, start.up.weight)


@both_bases
def test_ddp_is_one_process_on_the_joint_batch(name, base):
    net = network()
    model, opt = DistributedDataParallel(net), optimizer(net, name, base)
    for i in range(20):
        two_passes(model, opt, batch(i, RANK))
    assert_near(net.parameters(), one_process(name, base, 20))


def test_a_local_first_pass_makes_no_all_reduce():
    net, calls = network(), []

    def counted(calls, bucket):
        calls.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(None, bucket)

    model, opt = DistributedDataParallel(net), optimizer(net, "sam", "sgd")
    model.register_comm_hook(calls, counted)
    for i in range(3):
        calls.clear()
        with opt.local_first_pass(model):
            loss(model, *batch(i, RANK)).backward()
        assert calls == [] and not ranks_agree(p.grad for p in net.parameters())
        with CommDebugMode() as comm:
            opt.first_step(zero_grad=True)
        assert collectives(comm) == {} and not ranks_agree(net.parameters())
        loss(model, *batch(i, RANK)).backward()
        assert sum(calls) == sum(p.numel() for p in net.parameters())
        with CommDebugMode() as comm:
            opt.second_step(zero_grad=True)
        assert collectives(comm) == {"allreduce_": 1} and ranks_agree(net.parameters())
    calls.clear()
    loss(model, *batch(3, RANK)).backward()  # the default: both passes are synchronised
    assert calls and ranks_agree(p.grad for p in net.parameters())
    opt.first_step(zero_grad=True)
    loss(model, *batch(3, RANK)).backward()
    with CommDebugMode() as comm:
        opt.second_step()
    assert collectives(comm) == {}


@both_bases
def test_replicas_with_local_first_passes_stay_bit_identical(name, base):
    net = network(torch.float32)
    model, opt = DistributedDataParallel(net), optimizer(net, name, base)
    for i in range(200):
        data = batch(i % 7, RANK, dtype=torch.float32)
        two_passes_apart(model, opt, data, bad=i == 50 and RANK == 1)
        opt.second_step(zero_grad=True)
        assert opt.skipped_steps == (i >= 50)
    assert ranks_agree(net.parameters()) and torch.isfinite(net.up.weight).all()


@both_bases
@pytest.mark.parametrize("bad", [None, (4, 1, 0)])
def test_local_first_passes_are_m_sharpness(name, base, bad):
    net = network()
    model, opt = DistributedDataParallel(net), optimizer(net, name, base)
    for i in range(20):
        two_passes_apart(model, opt, batch(i, RANK), bad == (i, RANK, 0))
        opt.second_step(zero_grad=True)
    expected, skipped = m_sharpness(name, base, 20, bad=bad)
    assert opt.skipped_steps == skipped == (bad is not None)
    assert_near(net.parameters(), expected)


@both_bases
@pytest.mark.parametrize("bad", [None, (2, 1, 0)])
@pytest.mark.parametrize("views", [False, True])
def test_local_first_passes_over_micro_batches(name, base, bad, views):
    """m-sharpness over ranks and micro-batches: each climbs, its second gradient is set aside,
    also where the gradients are views of DDP's buckets, which are used again."""
    net = network()
    model = DistributedDataParallel(net, gradient_as_bucket_view=views)
    opt = optimizer(net, name, base)
    for i in range(10):
        for part in range(2):
            two_passes_apart(model, opt, batch(i, RANK, part, 2), bad == (i, RANK, part))
            opt.stash_grad()
        opt.unstash_grad()
        opt.step()
        opt.zero_grad()
    expected, skipped = m_sharpness(name, base, 10, parts=2, bad=bad)
    assert opt.skipped_steps == skipped == (bad is not None)
    assert ranks_agree(net.parameters())
    assert_near(net.parameters(), expected)


def test_an_overflow_on_one_rank_backs_every_scaler_off():
    net = network(torch.float32)
    model, opt = DistributedDataParallel(net), optimizer(net, "sam", "sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(4):
        data = batch(i, RANK, dtype=torch.float32)
        with opt.local_first_pass(model):
            scaler.scale(loss(model, *data)).backward()
        if i == 2 and RANK == 0:
            net.gain.grad[0] = torch.inf
        opt.first_step(zero_grad=True, scaler=scaler)
        scaler.scale(loss(model, *data)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert scaler.get_scale() == (2.0**9 if i >= 2 else 2.0**10)
        assert opt.skipped_steps == (i >= 2) and ranks_agree(net.parameters())


def test_an_unfused_base_skips_on_every_rank():
    net = network()
    model = DistributedDataParallel(net)
    opt = FriendlySAM(net.parameters(), torch.optim.NAdam, rho=0.3, lr=0.01)
    for i in range(3):
        two_passes_apart(model, opt, batch(i, RANK), bad=i == 1 and RANK == 0)
        before = [slot.saved.clone() for space in opt.spaces for slot in space.slots]
        opt.second_step(zero_grad=True)
        assert torch.equal(before[0], net.gain) == (i == 1)
        assert opt.skipped_steps == (i >= 1) and ranks_agree(net.parameters())


def test_a_local_first_pass_of_a_compiled_model():
    """Compiled around DDP, as Accelerate does."""
    net = network()
    model, opt = DistributedDataParallel(net), optimizer(net, "sam", "sgd")
    model = torch.compile(model, backend="eager")
    for i in range(3):
        two_passes_apart(model, opt, batch(i, RANK), bad=i == 1 and RANK == 1)
        opt.second_step(zero_grad=True)
    expected, skipped = m_sharpness("sam", "sgd", 3, bad=(1, 1, 0))
    assert opt.skipped_steps == skipped == 1 and ranks_agree(net.parameters())
    assert_near(net.parameters(), expected)


def test_gradients_are_averaged_that_a_rank_has_none_of():
    """Ranks whose batches took different branches pair the same parameters; what no rank has a
    gradient of gets none."""
    both, first, second, none = params = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    both.grad = torch.full((2,), 1.0 + RANK)
    (first, second)[RANK].grad = torch.tensor([3.0, torch.inf if RANK else 4.0])
    average_gradients(params, dist.group.WORLD)
    assert both.grad.tolist() == [1.5, 1.5] and none.grad is None
    assert first.grad.tolist() == [1.5, 2.0] and second.grad.tolist() == [1.5, torch.inf]


def test_a_local_first_pass_of_another_model_is_refused():
    net = network()
    opt = optimizer(net, "sam", "sgd")
    with pytest.raises(ValueError, match="Net: .*DistributedDataParallel"):
        with opt.local_first_pass(net):
            pass


# ---- sharded parameters


def shard(net: Net) -> Net:
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(net.up, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["sam", "asam-all", "fisher", "fsam", "fsam-cosine"])
def test_fsdp_is_one_process_on_the_joint_batch(name, base):
    net = shard(network())
    opt = optimizer(net, name, base)
    assert "sharded" in opt.backend_report()["spaces"][0]
    for i in range(20):
        two_passes(net, opt, batch(i, RANK))
    assert net.gain.to_local().numel() == 1 - RANK and net.up.bias.to_local().numel() == 4 - RANK
    assert_near(net.parameters(), one_process(name, base, 20))


def relative(net, name: str, base: str):
    """Momentum-SAM, GSAM or LookSAM."""
    cls, own = RELATIVES[name]
    hyper = {k: x for k, x in HYPER[base].items() if k not in ("rho", "sigma", "lmbda")}
    return cls(net.parameters(), BASES[base], backend="reference", **own, **hyper)


def one_step(model, opt, parts) -> None:
    """The passes that the class asks for, over all parts, of which the last is reduced."""
    def one_pass():
        for i, part in enumerate(parts):
            last = i == len(parts) - 1 or not isinstance(model, DistributedDataParallel)
            with nullcontext() if last else model.no_sync():
                (loss(model, *part) / len(parts)).backward()

    climbs = opt.climbs_next
    if climbs and opt.climbs_first:
        opt.first_step()
    one_pass()
    if climbs and not opt.climbs_first:
        opt.first_step(zero_grad=True)
        one_pass()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("how", ["DDP", "DDP, accumulated", "FSDP2"])
@pytest.mark.parametrize("name, base", [("msam", "sgd"), ("msam", "adamw"), ("gsam", "sgd"),
                                        ("looksam", "adamw")])
def test_the_relatives_are_one_process_on_the_joint_batch(name, base, how):
    net, twin = network(), network()
    model = shard(net) if how == "FSDP2" else DistributedDataParallel(net)
    opt, plain = relative(net, name, base), relative(twin, name, base)
    parts = 2 if how == "DDP, accumulated" else 1
    for i in range(10):
        one_step(model, opt, [batch(i, RANK, part, parts) for part in range(parts)])
        one_step(twin, plain, [batch(i)])
    assert_near(net.parameters(), list(twin.parameters()))


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
@pytest.mark.parametrize("other", ["replicas", "tensor parallelism"])
def test_meshes_of_two_dimensions_are_one_process(sizes, other):
    """Shards within replicas, and FSDP over tensor parallelism, which makes strided shards."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner"))
    net = network()
    if other == "replicas":
        fully_shard(net, mesh=mesh)
        data = batch
    else:
        column_wise = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(net, mesh["inner"], {"up": column_wise, "down": column_wise})
        fully_shard(net, mesh=mesh["outer"])
        assert isinstance(net.up.weight.placements[0], _StridedShard) or sizes == (2, 1)
        data = batch if sizes == (2, 1) else lambda i, rank: batch(i)
    opt = optimizer(net, "fsam-cosine", "sgd")
    for i in range(10):
        two_passes(net, opt, data(i, RANK))
    assert_near(net.parameters(), one_process("fsam-cosine", "sgd", 10))


def test_fsdp_sums_the_norm_over_the_shards_once():
    for name, sums in (("sam", 1), ("asam-all", 1), ("fsam", 1), ("fsam-cosine", 2)):
        net = shard(network())
        opt = optimizer(net, name, "sgd")
        for i in range(2):
            loss(net, *batch(i, RANK)).backward()
            with CommDebugMode() as comm:
                opt.first_step(zero_grad=True)
            assert collectives(comm) == {"allreduce_": sums}, name
            loss(net, *batch(i, RANK)).backward()
            with CommDebugMode() as comm:
                opt.second_step(zero_grad=True)
            assert collectives(comm) == {}, name


@pytest.mark.parametrize("base", ["sgd", "nadam"])
def test_a_bad_gradient_of_one_shard_skips_on_both(base):
    net = shard(network(torch.float32))
    opt = (optimizer(net, "fsam", base) if base in BASES else
           FriendlySAM(net.parameters(), UNFUSED[base][0], rho=0.3, **UNFUSED[base][1]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(4):
        before = [p.full_tensor().clone() for p in net.parameters()]
        scaler.scale(loss(net, *batch(i, RANK, dtype=torch.float32))).backward()
        if i == 1 and RANK == 1:
            net.up.weight.grad.to_local()[2, 0] = torch.nan
        opt.first_step(zero_grad=True, scaler=scaler)
        scaler.scale(loss(net, *batch(i, RANK, dtype=torch.float32))).backward()
        if i == 2 and RANK == 0:
            net.down.weight.grad.to_local()[0, 1] = torch.inf
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        after = whole(net.parameters())
        assert all(torch.equal(p, q) == (i in (1, 2)) for p, q in zip(before, after, strict=True))
        assert opt.skipped_steps == (0, 1, 2, 2)[i]
        assert scaler.get_scale() == 2.0 ** (10, 9, 8, 8)[i]


SHAPES = [((5, 3), Shard(0)), ((3, 4), Shard(1)), ((1, 2), Shard(0)), ((4,), Replicate()),
          ((6,), _StridedShard(0, split_factor=1)), ((), Replicate())]


def spread(tensor: torch.Tensor, placement, mesh) -> DTensor:
    if isinstance(placement, _StridedShard):  # FSDP over tensor parallelism makes them
        return DTensor.from_local(tensor.chunk(RANKS)[RANK].clone(), mesh, [placement])
    return distribute_tensor(tensor, mesh, [placement])


def random_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in SHAPES]


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["sam", "asam-all", "fisher", "fsam", "fsam-cosine"])
def test_dtensors_are_one_process(name, base):
    """Every placement at once; what every process has a copy of counts once in the norm."""
    mesh = init_device_mesh("cpu", (RANKS,))
    place = [placement for _, placement in SHAPES]
    start = random_tensors(0)
    params = [nn.Parameter(spread(t, p, mesh)) for t, p in zip(start, place, strict=True)]
    opt = build(params, [dict(HYPER[base], params=range(len(params)))], name, "reference", base)
    oracle = oracle_of(name, base, start)
    for i in range(20):
        for step, seed in (("first_step", 2 * i + 1), ("second_step", 2 * i + 2)):
            grads = random_tensors(seed)
            getattr(oracle, step)(grads)
            for p, g, placement in zip(params, grads, place, strict=True):
                p.grad = spread(g, placement, mesh)
            getattr(opt, step)(zero_grad=True)
        assert opt.last_grad_norm == pytest.approx(oracle.norm, rel=1e-12)
    for p, w, placement in zip(params, oracle.w, place, strict=True):
        torch.testing.assert_close(p.to_local(), spread(w, placement, mesh).to_local(), **EXACT)


def test_gradients_of_another_placement_are_brought_to_the_parameters():
    """Tensor parallelism leaves partial sums in the gradients of replicated parameters."""
    mesh = init_device_mesh("cpu", (RANKS,))
    weight, bias = torch.arange(1.0, 7).view(3, 2), torch.ones(3)
    params = [nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])),
              nn.Parameter(distribute_tensor(bias, mesh, [Replicate()]))]
    opt = build(params, [dict(GROUPS[0], params=range(2))], "sam", "reference")
    oracle = oracle_of("sam", "sgd", [weight, bias])
    for step in ("first_step", "second_step"):
        whole_one, parts = weight.flip(0), [torch.tensor([0.5, -1, 2]), torch.tensor([3.0, 1, 0])]
        params[0].grad = distribute_tensor(whole_one, mesh, [Replicate()])
        params[1].grad = DTensor.from_local(parts[RANK], mesh, [Partial()])
        getattr(oracle, step)([whole_one, sum(parts)])
        getattr(opt, step)(zero_grad=True)
    assert opt.last_grad_norm == pytest.approx(oracle.norm, rel=1e-6)
    for p, w in zip(whole(params), oracle.w, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=1e-6, atol=1e-6)


def test_sharded_momenta_may_change_places():
    mesh = init_device_mesh("cpu", (RANKS,))
    params = [nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)])) for _ in "ab"]
    opt = build(params, [dict(GROUPS[0], params=range(2), momentum=0.9)], "sam", "reference")
    for half in (opt.first_step, opt.second_step):
        for i, p in enumerate(params):
            p.grad = distribute_tensor(torch.full((4,), i + 1.0), mesh, [Shard(0)])
        half()
    a, b = (opt.state[p] for p in params)
    before = whole([a["momentum_buffer"], b["momentum_buffer"]])
    a["momentum_buffer"], b["momentum_buffer"] = b["momentum_buffer"], a["momentum_buffer"]
    opt.backend_report()
    after = whole([opt.state[p]["momentum_buffer"] for p in params])
    assert not torch.equal(*before) and all(map(torch.equal, after, before[::-1]))


def test_a_sharded_momentum_that_was_put_aside_is_its_holders():
    mesh = init_device_mesh("cpu", (RANKS,))
    p = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    opt = build([p], [dict(GROUPS[0], params=range(1), momentum=0.9)], "sam", "reference")

    def step():
        p.grad = distribute_tensor(torch.full((4,), 2.0), mesh, [Shard(0)])
        opt.step()

    step()
    aside = opt.state[p]["momentum_buffer"]
    before = whole([aside])
    opt.state[p]["momentum_buffer"] = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    step()
    assert_bits(whole([aside]), before)
    opt.state[p]["momentum_buffer"] = aside
    opt.backend_report()
    assert_bits(whole([opt.state[p]["momentum_buffer"]]), before)


def test_autograd_refuses_a_graph_of_sharded_weights_that_have_moved():
    """As it does under torch's optimizers: the version that it has saved is the DTensor's."""
    mesh = init_device_mesh("cpu", (RANKS,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    opt = build([p], [dict(GROUPS[0], params=range(1))], "sam", "reference")
    for call in (opt.first_step, opt.restore, opt.step):
        old = (p * p).sum()
        p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        call()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            old.backward()


def test_partial_sums_as_parameters_are_refused():
    mesh = init_device_mesh("cpu", (RANKS,))
    p = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()]))
    with pytest.raises(ValueError, match="redistribute partial sums"):
        build([p], [dict(GROUPS[0], params=[0])], "sam", "reference")


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_shards_of_fsdp1_are_refused(use_orig_params):
    """They are plain tensors: each process would take the norm of its own."""
    net = FullyShardedDataParallel(network(torch.float32), device_id=torch.device("cpu"),
                                   use_orig_params=use_orig_params)
    with pytest.raises(ValueError, match="use torch.distributed.fsdp.fully_shard"):
        FriendlySAM(net.parameters(), torch.optim.SGD, lr=0.1)


# ---- ZeroRedundancyOptimizer


def zero(net, name: str, base: str):
    hyper = {k: x for k, x in HYPER[base].items() if k not in ("rho", "sigma", "lmbda")}
    inner = ZeroRedundancyOptimizer(net.parameters(), BASES[base], **hyper)
    own = {k: HYPER[base][k] for k in (("rho", "sigma", "lmbda") if name == "fsam" else ("rho",))}
    return VARIANTS[name].cls.wrap(inner, **own)


@pytest.mark.parametrize("name, base", [("sam", "sgd"), ("fsam", "adam")])
def test_zero_is_one_process_and_follows_a_schedule(name, base):
    net, single = network(), network()
    model, opt = DistributedDataParallel(net), zero(net, name, base)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 5, gamma=0.3)
    oracle = oracle_of(name, base, single.parameters())
    for i in range(20):
        two_passes(model, opt, batch(i, RANK))
        scheduler.step()
        oracle.first_step(gradients(single, oracle, batch(i)))
        oracle.second_step(gradients(single, oracle, batch(i)))
        for h in oracle.h:
            h["lr"] = HYPER[base]["lr"] * 0.3 ** ((i + 1) // 5)
    assert opt.base_optimizer.optim.param_groups[0]["lr"] < HYPER[base]["lr"] / 25
    assert len(opt.base_optimizer.optim.state) < len(list(net.parameters()))
    assert_near(net.parameters(), oracle.w)


@pytest.mark.parametrize("name, base", [("sam", "sgd"), ("fsam", "adam")])
def test_zero_saves_where_it_was_consolidated_and_continues(name, base):
    net = network(torch.float32)
    model, opt = DistributedDataParallel(net), zero(net, name, base)
    for i in range(3):
        two_passes(model, opt, batch(i, RANK, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="consolidate"):
        opt.state_dict()
    opt.base_optimizer.consolidate_state_dict(to=0)
    saved = [copy.deepcopy([net.state_dict(), opt.state_dict()]) if RANK == 0 else None]
    dist.broadcast_object_list(saved)
    twin = network(torch.float32, seed=2)
    twin.load_state_dict(saved[0][0])
    other = zero(twin, name, base)
    other.param_groups[0]["lr"] = 9.0
    other.load_state_dict(saved[0][1])
    replica = DistributedDataParallel(twin)
    for i in range(3, 6):
        two_passes(model, opt, batch(i, RANK, dtype=torch.float32))
        two_passes(replica, other, batch(i, RANK, dtype=torch.float32))
        assert_bits(twin.parameters(), net.parameters())
    for o in (opt, other):
        o.base_optimizer.consolidate_state_dict(to=RANKS - 1)
    if RANK == RANKS - 1:
        mine, its = opt.state_dict(), other.state_dict()
        assert mine["param_groups"] == its["param_groups"]
        for i, entry in mine["state"].items():
            assert entry.keys() == its["state"][i].keys()
            assert all(torch.equal(x, its["state"][i][k]) for k, x in entry.items())


# ---- torch.distributed.checkpoint


def saved_case(net, name: str, base: str, **changes):
    cls, own, *_ = VARIANTS[name]
    if base in BASES:
        hyper = HYPER[base] if name == "fsam" else {
            k: x for k, x in HYPER[base].items() if k not in ("sigma", "lmbda")}
        return cls(net.parameters(), BASES[base], **{**own, **hyper, **changes})
    kind, hyper = UNFUSED[base]
    return cls(net.parameters(), kind, rho=0.3, **{**own, **hyper, **changes})


def fresh(name: str, base: str):
    """Another model and an optimizer that has done nothing, of another learning rate."""
    net = shard(network(torch.float32, seed=2))
    return net, saved_case(net, name, base, lr=0.5)


def assert_continues(net, opt, twin, other) -> None:
    for i in range(3, 6):
        two_passes(net, opt, batch(i, RANK, dtype=torch.float32))
        two_passes(twin, other, batch(i, RANK, dtype=torch.float32))
        assert_bits(twin.parameters(), net.parameters())
    assert opt.param_groups[0]["sam_steps"] == other.param_groups[0]["sam_steps"] == 6


@pytest.mark.parametrize("name, base", [("sam", "sgd"), ("fsam", "adamw"), ("sam", "nadam"),
                                        ("fsam", "rmsprop"), ("fsam-official", "nadam")])
def test_a_distributed_checkpoint_continues_bit_for_bit(name, base):
    net = shard(network(torch.float32))
    opt = saved_case(net, name, base)
    for i in range(3):
        two_passes(net, opt, batch(i, RANK, dtype=torch.float32))
    path = str(FOLDER / f"{name}-{base}")
    dcp.save({"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, opt)},
             checkpoint_id=path)
    twin, other = fresh(name, base)
    state = {"model": get_model_state_dict(twin), "optim": get_optimizer_state_dict(twin, other)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(twin, state["model"])
    set_optimizer_state_dict(twin, other, state["optim"])
    assert_continues(net, opt, twin, other)


@pytest.mark.parametrize("option", ["full_state_dict", "flatten_optimizer_state_dict"])
@pytest.mark.parametrize("name, base", [("fsam", "sgd"), ("fsam", "rmsprop")])
def test_the_options_of_distributed_state_dicts(name, base, option):
    options = StateDictOptions(**{option: True})
    net = shard(network(torch.float32))
    opt = saved_case(net, name, base)
    for i in range(3):
        two_passes(net, opt, batch(i, RANK, dtype=torch.float32))
    state = copy.deepcopy(get_optimizer_state_dict(net, opt, options=options))
    twin, other = fresh(name, base)
    set_model_state_dict(twin, get_model_state_dict(net))
    set_optimizer_state_dict(twin, other, state, options=options)
    assert_continues(net, opt, twin, other)


def test_an_asynchronous_checkpoint_and_a_copy_of_sharded_state():
    net = shard(network(torch.float32))
    opt = saved_case(net, "fsam", "adamw")
    for i in range(3):
        two_passes(net, opt, batch(i, RANK, dtype=torch.float32))
    state = get_optimizer_state_dict(net, opt)
    copied, path = copy.deepcopy(state), str(FOLDER / "asynchronous")
    dcp.async_save({"optim": state}, checkpoint_id=path).result()
    twin, other = fresh("fsam", "adamw")
    loaded = {"optim": get_optimizer_state_dict(twin, other)}
    dcp.load(loaded, checkpoint_id=path)
    for fqn, entry in state["state"].items():
        for name in ("ema", "exp_avg", "exp_avg_sq"):
            mine = entry[name].to_local()
            assert torch.equal(copied["state"][fqn][name].to_local(), mine)
            assert torch.equal(loaded["optim"]["state"][fqn][name].to_local(), mine)
            assert mine.any() or not mine.numel()
    set_model_state_dict(twin, get_model_state_dict(net))
    set_optimizer_state_dict(twin, other, copied)
    assert_continues(net, opt, twin, other)
