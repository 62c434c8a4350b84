"""Other people's ways to save, share and alias weights: as under torch.optim.SGD, which every test
tries first."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from fastsam import FriendlySAM

HYPER = dict(lr=0.07, momentum=0.85, weight_decay=3e-3)
EVERY = ["torch", "reference", "numba"]
every_optimizer = pytest.mark.parametrize("backend", EVERY)
and_triton = pytest.mark.parametrize("backend", [*EVERY, "triton"])


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


def optimizer(model: nn.Module, backend: str):
    if backend == "torch":
        return SGD(model.parameters(), **HYPER)
    pytest.importorskip({"numba": "numba", "triton": "triton"}.get(backend, "torch"))
    return FriendlySAM(model.parameters(), SGD, rho=0.1, lmbda=0.6, backend=backend, **HYPER)


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    return (torch.randn(12, 6, generator=generator),
            torch.randint(4, (12,), generator=generator))


def train(model: nn.Module, opt, steps: range) -> None:
    """Steps of whichever optimizer it is, bare or in Accelerate's wrapper."""
    opt = getattr(opt, "optimizer", opt)
    for i in steps:
        x, y = batch(i)
        for step in ((opt.step,) if type(opt) is SGD else (opt.first_step, opt.second_step)):
            opt.zero_grad()
            cross_entropy(model(x), y).backward()
            step()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    mine, its = one.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def assert_different(one: nn.Module, other: nn.Module) -> None:
    assert not all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


# ---- files


@and_triton
@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_saves_and_loads_all(backend, tmp_path, safe):
    accelerate = pytest.importorskip("accelerate", reason="needs Accelerate")
    file = pytest.importorskip("safetensors").safe_open

    def prepared(seed: int):
        accelerator = accelerate.Accelerator(cpu=True)
        model = network(seed)
        return accelerator, *accelerator.prepare(model, optimizer(model, backend))

    accelerator, model, opt = prepared(1)
    train(model, opt, range(3))
    accelerator.save_state(tmp_path / "state", safe_serialization=safe)
    accelerator.save_model(model, tmp_path / "model")
    with file(tmp_path / "model" / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(network().state_dict())
    train(model, opt, range(3, 6))
    again, twin, other = prepared(2)
    again.load_state(tmp_path / "state")
    train(twin, other, range(3, 6))
    assert_same(twin, model)


@and_triton
def test_safetensors_saves_and_loads_all(backend, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = network()
    opt = optimizer(model, backend)
    train(model, opt, range(3))
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    twin, third = network(2), network(3)
    other = optimizer(twin, backend)
    train(twin, other, range(1))  # loaded into weights that are in use
    assert safetensors.load_model(twin, tmp_path / "model.safetensors") == (set(), [])
    third.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    assert_same(twin, model)
    assert_same(third, model)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, range(3, 6))
    train(twin, other, range(3, 6))
    assert_same(twin, model)


@every_optimizer
def test_the_hub_mixin_saves_and_loads_all(backend, tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width: int = 16):
            super().__init__()
            self.layers = network()
            self.tied = self.layers[0]

        def forward(self, x):
            return self.layers(x)

    model = Net(width=16)
    opt = optimizer(model, backend)
    train(model, opt, range(3))
    model.save_pretrained(tmp_path)
    twin = Net.from_pretrained(tmp_path)
    assert_same(twin, model)
    assert twin.tied.weight is twin.layers[0].weight


@and_triton
def test_a_part_of_a_model_is_saved_alone(backend):
    """In construction and after; as are views, slices and one tensor."""
    model = nn.Sequential(nn.Linear(32, 256), nn.Linear(256, 2), nn.Linear(2, 4))
    opt = optimizer(model, backend)

    def size(x) -> int:
        file = io.BytesIO()
        torch.save(x, file)
        return file.tell()

    for _ in range(2):
        assert size(model[1].state_dict()) < 8_000
        assert size(model[1].weight) < 8_000
        assert size(model[1]) < 8_000
        for step in (opt.step,) if backend == "torch" else (opt.first_step, opt.second_step):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            step()


# ---- aliases


@every_optimizer
def test_aliases_taken_before_construction_stay_alive(backend):
    model = network()
    shared = nn.Sequential(*copy.deepcopy(model))
    for mine, its in zip(shared.parameters(), model.parameters(), strict=True):
        mine.data = its.data
    weight = model[0].weight
    live, array, row = model.state_dict(), weight.detach().numpy(), weight.data[3]
    address = [p.data_ptr() for p in model.parameters()]
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    opt = optimizer(model, backend)
    assert [p.data_ptr() for p in model.parameters()] == address
    for i in range(3):
        train(model, opt, range(i, i + 1))
        assert not torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), flat)
        assert all(torch.equal(live[name], x) for name, x in model.state_dict().items())
        assert (array == weight.detach().numpy()).all()
        assert torch.equal(row, weight[3])
        assert_same(shared, model)
    array[3, 2] = 7.0
    live["2.bias"].fill_(5.0)
    twin = copy.deepcopy(model)
    other = optimizer(twin, backend)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, range(3, 5))
    train(twin, other, range(3, 5))
    assert_same(twin, model)
    assert [p.data_ptr() for p in model.parameters()] == address


@every_optimizer
def test_averages_of_the_weights(backend):
    """torch's AveragedModel and an EMA by hand, taken before construction, see every step."""
    model = network()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    by_hand = [p.detach().clone() for p in model.parameters()]
    opt = optimizer(model, backend)
    for i in range(3):
        train(model, opt, range(i, i + 1))
        averaged.update_parameters(model)
        for mean, p in zip(by_hand, model.parameters(), strict=True):
            mean.copy_(p.detach()) if i == 0 else mean.lerp_(p.detach(), 0.5)
    assert_different(averaged.module, model)
    for mean, p in zip(by_hand, averaged.module.parameters(), strict=True):
        torch.testing.assert_close(p, mean, rtol=1e-6, atol=1e-7)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x).tanh())


@every_optimizer
def test_tied_weights_stay_tied(backend, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, twin = Tied(), Tied()
    opt, other = optimizer(model, backend), optimizer(twin, backend)
    train(model, opt, range(3))
    assert model.head.weight is model.embed.weight
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(twin, tmp_path / "model.safetensors")
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same(twin, model)
    train(model, opt, range(3, 5))
    train(twin, other, range(3, 5))
    assert_same(twin, model)


# ---- modules around modules, and memory of several processes


@every_optimizer
@pytest.mark.parametrize("first", ["compile", "optimizer"])
def test_a_compiled_module_trains_as_the_plain_one(backend, first):
    plain, model = network(), network()
    expected = optimizer(plain, backend)
    if first == "compile":
        run = torch.compile(model, backend="eager")
        opt = optimizer(run, backend)
    else:
        opt = optimizer(model, backend)
        run = torch.compile(model, backend="eager")
    train(plain, expected, range(3))
    train(run, opt, range(3))
    assert_same(model, plain)
    assert set(run.state_dict()) == {"_orig_mod." + name for name in plain.state_dict()}


@every_optimizer
def test_data_parallel_trains_as_the_plain_module(backend):
    plain, model = network(), network()
    expected = optimizer(plain, backend)
    run = nn.DataParallel(model)
    opt = optimizer(run, backend)
    train(plain, expected, range(3))
    train(run, opt, range(3))
    assert_same(model, plain)


@every_optimizer
@pytest.mark.parametrize("when", ["before", "after"])
def test_shared_memory_stays_shared(backend, when):
    """A process of the same memory, as Hogwild has it, sees every step."""
    plain, model = network(), network()
    expected = optimizer(plain, backend)
    if when == "before":
        model.share_memory()
    opt = optimizer(model, backend)
    if when == "after":
        train(model, opt, range(1))
        train(plain, expected, range(1))
        model.share_memory()
    first = model[0].weight
    handle = first.untyped_storage()._share_fd_cpu_()
    other = torch.tensor([], dtype=first.dtype).set_(
        torch.UntypedStorage._new_shared_fd_cpu(*handle), 0, first.shape)
    train(model, opt, range(1, 4))
    train(plain, expected, range(1, 4))
    assert_same(model, plain)
    assert all(p.is_shared() for p in model.parameters())
    assert torch.equal(other, first)


@every_optimizer
def test_weights_over_memory_of_numpy(backend):
    numpy = pytest.importorskip("numpy")
    array = numpy.ones((4, 6), dtype=numpy.float32)
    model = nn.Linear(6, 4)
    model.weight = nn.Parameter(torch.from_numpy(array))
    opt = optimizer(model, backend)
    train(model, opt, range(3))
    assert (array != 1).all()
    assert (array == model.weight.detach().numpy()).all()
