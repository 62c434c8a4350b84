"""freeze_bn_stats with all buffers, as a decorator, and forgotten."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

from fastsam import SAM, freeze_bn_stats


class Averaged(nn.Module):
    """A layer of someone's own, with averages that it changes in place and assigns anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.ones(4))
        self.register_buffer("seen", torch.tensor(0), persistent=False)

    def forward(self, x):
        if self.training:
            self.codes.lerp_(x.detach().mean(0), 0.1)
            self.seen = self.seen + 1
        return x - self.codes


def observer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: to be moved to another package
        from torch.ao.quantization import MovingAverageMinMaxObserver
        return MovingAverageMinMaxObserver()


BUFFERED = {
    "old spectral norm": lambda: spectral_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "an observer": observer,
    "one's own": Averaged,
    "BatchNorm": lambda: nn.BatchNorm1d(4),
}


@pytest.fixture(params=BUFFERED)
def model(request) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), BUFFERED[request.param]())
    with torch.no_grad():
        model(torch.randn(8, 4))
    return model


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_all_buffers_are_as_before_the_block_and_go_on_from_there(model):
    before, objects, x = buffers(model), dict(model.named_buffers()), 3 * torch.randn(8, 4)
    twin = copy.deepcopy(model)
    with freeze_bn_stats(model, all_buffers=True) as the_same, freeze_bn_stats(model):
        assert the_same is model
        model(x).square().mean().backward()
    assert same(model, before)
    assert all(b is objects[name] for name, b in model.named_buffers())
    for m in (model, twin):
        m(x)
    assert same(model, buffers(twin)) and not same(model, before)


def test_without_all_buffers_only_running_statistics_stay():
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4))
    model(torch.randn(8, 4))
    before = buffers(model)
    with freeze_bn_stats(model):
        model(torch.randn(8, 4))
    assert not torch.equal(model[0].weight_u, before["0.weight_u"])
    assert torch.equal(model[1].running_mean, before["1.running_mean"])


def test_a_buffer_that_two_layers_share_stays_shared_inside():
    model = nn.Sequential(Averaged(), Averaged())
    model[1].codes = model[0].codes
    before = model[0].codes.clone()
    with freeze_bn_stats(model, all_buffers=True):
        model(torch.randn(8, 4))
        assert model[0].codes is model[1].codes and not torch.equal(model[0].codes, before)
    assert model[0].codes is model[1].codes and torch.equal(model[0].codes, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_that_recomputes_belongs_inside_the_block(reentrant):
    """A step with rho=0 then leaves the statistics of one pass, recomputed as it is."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(8, 4)
    x.requires_grad_()
    twin = copy.deepcopy(model)

    def backward(m):
        checkpoint(m, x, use_reentrant=reentrant).square().mean().backward()

    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.0, lr=0.1)
    backward(model)
    opt.first_step(zero_grad=True)
    with freeze_bn_stats(model):
        backward(model)
    opt.second_step()
    backward(twin)
    assert same(model, buffers(twin))
    assert model[1].running_mean.abs().sum() > 0


def test_as_a_decorator_it_freezes_every_call(recwarn):
    model = nn.Sequential(nn.BatchNorm1d(4))

    @freeze_bn_stats(model, all_buffers=True)
    def second_pass():
        return model(torch.randn(8, 4))

    before = buffers(model)
    second_pass(), second_pass()
    del second_pass
    gc.collect()
    assert same(model, before) and not recwarn


def test_a_forgotten_with_is_said_where_it_was_written():
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match="never entered, so it froze nothing") as caught:
        freeze_bn_stats(model)
        gc.collect()
    assert [w.filename for w in caught] == [__file__]


def test_a_block_that_was_entered_is_not_a_forgotten_one(recwarn):
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(KeyboardInterrupt), freeze_bn_stats(model):
        raise KeyboardInterrupt
    frozen = freeze_bn_stats(model)
    for _ in range(2):
        with frozen, frozen:  # one object, several times
            model(torch.randn(8, 4))
    assert model[0].track_running_stats and model[0].num_batches_tracked == 0
    with pytest.raises(TypeError):
        freeze_bn_stats()
    del frozen
    gc.collect()
    assert not recwarn
