"""freeze_bn_stats: the second pass leaves every layer's running statistics alone."""

import copy
import types

import pytest
import torch
from torch import nn

from fastsam import SAM, freeze_bn_stats


class RunningScale(nn.Module):
    """A norm layer of someone's own: an average that it assigns anew, and a plain constant."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("running_square", torch.ones(3, 1, 1))
        self.register_buffer("batches", torch.tensor(0))
        self.register_buffer("unused", None)

    def forward(self, x):
        square = x.square().mean((0, 2, 3)).view(3, 1, 1)
        if self.training:
            self.running_square = 0.9 * self.running_square + 0.1 * square.detach()
            self.batches += 1
        return self.weight * x / (square if self.training else self.running_square).sqrt()


class GhostBatchNorm(nn.BatchNorm2d):
    """Two halves of a batch, each with statistics of its own, which move whatever the flag says."""

    def __init__(self, n):
        super().__init__(n)
        self.register_buffer("running_mean", torch.zeros(2 * n))
        self.register_buffer("running_var", torch.ones(2 * n))

    def forward(self, x):
        if self.training or not self.track_running_stats:
            return nn.functional.batch_norm(
                x.reshape(-1, 2 * x.shape[1], *x.shape[2:]), self.running_mean, self.running_var,
                self.weight.repeat(2), self.bias.repeat(2), True, self.momentum, self.eps,
            ).reshape(x.shape)
        n = self.num_features
        return nn.functional.batch_norm(x, self.running_mean[:n], self.running_var[:n],
                                        self.weight, self.bias, False, self.momentum, self.eps)


class InFloat32(nn.SyncBatchNorm):
    """A forward of its own, around torch's."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


def replaced() -> nn.BatchNorm2d:
    """Of torch's class, with a forward of someone's own."""
    layer, ghost = nn.BatchNorm2d(3), GhostBatchNorm(3)
    layer._buffers = ghost._buffers
    layer.forward = types.MethodType(GhostBatchNorm.forward, layer)
    return layer


LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (8, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (8, 3, 2, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (8, 3, 2, 2, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (8, 3, 2, 2)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (8, 3, 2, 2)),
    "LazyBatchNorm1d": (nn.LazyBatchNorm1d, (8, 3)),
    "LazyBatchNorm2d": (nn.LazyBatchNorm2d, (8, 3, 2, 2)),
    "LazyBatchNorm3d": (nn.LazyBatchNorm3d, (8, 3, 2, 2, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (8, 3, 4)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
                       (8, 3, 2, 2)),
    "LazyInstanceNorm3d": (lambda: nn.LazyInstanceNorm3d(track_running_stats=True),
                           (8, 3, 2, 2, 2)),
    "one's own": (RunningScale, (8, 3, 2, 2)),
    "ghost": (lambda: GhostBatchNorm(3), (8, 3, 2, 2)),
    "around torch's": (lambda: InFloat32(3), (8, 3, 2, 2)),
    "replaced": (replaced, (8, 3, 2, 2)),
}


@pytest.fixture(params=LAYERS)
def trained(request) -> tuple[nn.Module, torch.Tensor]:
    """A model with the layer inside, after one pass, and an input."""
    make, shape = LAYERS[request.param]
    model = nn.Sequential(nn.Sequential(make()), nn.Identity())
    x = torch.randn(shape)
    model(x)
    return model, x


def assert_same(model: nn.Module, before: dict) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_statistics_and_counters_stay_even_where_the_batch_is_infinite(trained):
    model, x = trained
    before, buffers = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    assert len(before) >= 2
    with freeze_bn_stats(model) as the_same, freeze_bn_stats(model):
        assert the_same is model
        model(2 * x)
        model(torch.inf * x)
    assert_same(model, before)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    twin = copy.deepcopy(model)
    for m in (model, twin):
        m(2 * x)  # and go on from there
    assert_same(model, twin.state_dict())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_layers_normalise_as_ever_and_the_backward_may_come_later(trained):
    model, x = trained
    twin, grads = copy.deepcopy(model), []
    for m, freeze in ((model, True), (twin, False)):
        leaf = x.clone().requires_grad_()
        if freeze:
            with freeze_bn_stats(m):
                y = m(leaf)
        else:
            y = m(leaf)
        y.square().sum().backward()
        grads.append((y, leaf.grad, [p.grad for p in m.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_an_exception_puts_the_statistics_back(trained):
    model, x = trained
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), freeze_bn_stats(model):
        model(3 * x)
        raise KeyboardInterrupt
    assert_same(model, before)
    model(3 * x)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_in_evaluation_mode_the_running_statistics_are_used(trained):
    model, x = trained
    model.eval()
    expected, before = model(x), copy.deepcopy(model.state_dict())
    with freeze_bn_stats(model):
        assert torch.equal(model(x), expected)
    assert_same(model, before)


def test_layers_that_track_nothing_or_have_seen_nothing_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.LazyBatchNorm1d(),
                          nn.InstanceNorm1d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3))
    with freeze_bn_stats(model):
        assert not model[0].track_running_stats
    assert not model[0].track_running_stats and model[1].track_running_stats
    assert nn.parameter.is_lazy(model[1].running_mean)


def test_rho_zero_is_sgd_with_any_of_them(trained):
    """Weights and statistics, over a few steps."""
    model, x = trained
    if not list(model.parameters()):
        model.append(nn.Conv1d(3, 3, 1))
    twin = copy.deepcopy(model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.0, lr=0.1)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1)
    for i in range(3):
        model((1 + i) * x).square().mean().backward()
        opt.first_step(zero_grad=True)
        with freeze_bn_stats(model):
            model((1 + i) * x).square().mean().backward()
        opt.second_step(zero_grad=True)
        sgd.zero_grad()
        twin((1 + i) * x).square().mean().backward()
        sgd.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("all_buffers", [False, True])
def test_a_scripted_model_is_frozen_too(all_buffers):
    model, x = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())), torch.randn(8, 3)
    model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with freeze_bn_stats(model, all_buffers=all_buffers):
        model(torch.inf * x)
    assert_same(model, before)
    model(2 * x)
    assert all(not torch.equal(v, before[k]) for k, v in model.named_buffers())


@pytest.mark.parametrize("given", [nn.Linear(2, 2).parameters(), None, "model"])
def test_what_is_no_module_is_refused_by_name(given, recwarn):
    with pytest.raises(TypeError, match=f"takes the model, not a {type(given).__name__}"):
        freeze_bn_stats(given)
    assert not list(recwarn)
