"""The airbench networks: what whitening does, what it is fitted to, that it is kept and resumed."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.models import build_model
from bench.models.airbench import Whitening
from bench.settings.config import resolve
from bench.training.checkpoint import load_model
from bench.training.session import Sitting
from bench.training.stopped import Stopped
from bench.training.train import set_up, train

OPTIONS = {"model": "airbench-relu", "width": 4, "epochs": 2, "val": 0.5, "threads": 1,
           "schedule": "linear", "warmup": 0.15, "nesterov": True}  # fmt: skip


def config(method="sgd", **options):
    return resolve(method, "digits", OPTIONS | options)


def patches(x, k=2):
    """(values, patches), by indexing."""
    h, w = x.shape[2:]
    return torch.stack([
        x[:, c, i : h - k + 1 + i, j : w - k + 1 + j].flatten()
        for c in range(x.shape[1]) for i in range(k) for j in range(k)
    ])  # fmt: skip


def test_the_outputs_of_a_fitted_layer_are_uncorrelated_and_of_variance_one():
    torch.manual_seed(0)
    mixed = torch.randn(12, 12).double()
    noise = torch.randn(700, 3, 9, 9).double()  # more than are summed at a time
    x = F.conv2d(noise, mixed.view(12, 3, 2, 2))[:, :3] * 4 + 7
    layer = Whitening(3).double()
    layer.fit(x)
    out = layer(x)
    assert out.shape == (700, 24, 7, 7)
    torch.testing.assert_close(out[:, :12], -out[:, 12:])
    covariance = torch.cov(out[:, :12].transpose(0, 1).flatten(1))
    variances = torch.linalg.eigvalsh(torch.cov(patches(x)))
    torch.testing.assert_close(covariance.diag(), variances / (variances + 5e-4), atol=1e-3, rtol=0)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3


def test_a_direction_without_variance_is_not_blown_up():
    layer = Whitening(1)
    layer.fit(torch.ones(5, 1, 8, 8))
    assert layer.directions.isfinite().all()
    assert layer.directions.flatten(1).norm(dim=1).max() <= 5e-4**-0.5 * 1.001


def test_training_fits_it_to_normalised_training_images_of_all_classes():
    run = set_up(config(val=0.1, data="digits"))
    x, _ = run.data.train.batch(torch.arange(len(run.data.train)))
    twin = Whitening(1)
    twin.fit((x - run.data.mean[0]) / run.data.std[0])
    found = run.model[1].whitening.directions
    torch.testing.assert_close(found, twin.directions)
    assert not found.requires_grad
    assert "1.whitening.directions" in run.model.state_dict()
    names = {name for name, _ in run.model.named_parameters()}
    assert "1.whitening.bias" in names and "1.whitening.directions" not in names


def test_images_that_lie_class_by_class_are_taken_from_all_classes(monkeypatch):
    from bench.training import train as training

    monkeypatch.setattr(training, "FITTED_TO", 20)
    run = set_up(config())
    order = run.data.train.labels.argsort()
    run.data.train, taken = run.data.train.take(order), []
    batch = type(run.data.train).batch
    monkeypatch.setattr(type(run.data.train), "batch",
                        lambda self, index: taken.append(self.labels[index]) or batch(self, index))
    training.fit_to(run.model, run.data)
    assert len(taken[0]) == 20 and len(taken[0].unique()) == 10


def test_layout_and_start():
    net = build_model("airbench-relu", 6, 3, 10, [0.5] * 3, [0.2] * 3)[1]
    kernels = [(m.in_channels, m.out_channels) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(24, 6), (6, 6), (6, 24), (24, 24), (24, 24), (24, 24)]
    x = torch.rand(2, 6, 5, 5)
    torch.testing.assert_close(net.groups[1].conv1(x)[:, :6], x)  # the first channels pass through
    seen = []
    for group in net.groups:
        group.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[1:])))
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(6, 15, 15), (24, 7, 7), (24, 3, 3)]


def test_gelu_and_relu_differ_in_the_activation_alone():
    torch.manual_seed(0)
    relu, gelu = (build_model(name, 4, 1, 10, [0.5], [0.2])[1]
                  for name in ("airbench-relu", "airbench"))  # fmt: skip
    gelu.load_state_dict(relu.state_dict())
    x = torch.rand(3, 1, 16, 16)
    relu_like = F.relu(relu.whitening(x))
    torch.testing.assert_close(relu.groups(relu_like), relu.groups(F.relu(relu_like)))
    assert not torch.allclose(relu(x), gelu(x))
    gelu.activation = F.relu
    for group in gelu.groups:
        group.activation = F.relu
    torch.testing.assert_close(relu(x), gelu(x))


@pytest.mark.parametrize("method", ["sgd", "sam", "fsam"])
def test_a_resumed_run_ends_with_the_same_bits_and_the_first_whitening(method, tmp_path):
    options = config(method, amp="bf16", channels_last=True)
    whole = train(options, tmp_path / "whole").model.state_dict()
    sitting = Sitting(time_budget=0)
    for _ in range(100):
        try:
            resumed = train(options, tmp_path / "parts", sitting=sitting).model.state_dict()
            break
        except Stopped:
            continue
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert torch.equal(whole["1.whitening.directions"],
                       set_up(options).model[1].whitening.directions)  # fmt: skip
    loaded = load_model(tmp_path / "whole/last.pt").state_dict()
    assert torch.equal(loaded["1.whitening.directions"], whole["1.whitening.directions"])


def test_nesterov_and_warm_up_are_what_torch_does():
    run = set_up(config(lr=0.2))
    assert run.opt.param_groups[0]["nesterov"] is True
    assert set_up(config("sam")).opt.param_groups[0]["nesterov"] is True
    assert set_up(config(nesterov=False)).opt.param_groups[0]["nesterov"] is False


def test_nesterov_without_its_momentum_is_refused_and_a_presets_left_out():
    with pytest.raises(ValueError, match="needs SGD with momentum"):
        config("adamw")
    with pytest.raises(ValueError, match="needs SGD with momentum"):
        config("sam", base="adamw")
    with pytest.raises(ValueError, match="needs SGD with momentum"):
        config(momentum=0.0)
    for options in ({"method": "adamw"}, {"method": "sam", "base": "adamw"}):
        values = {k: v for k, v in options.items() if k != "method"}
        assert not resolve(options["method"], "cifar-fast", values).nesterov
    assert resolve("sam", "cifar-fast", {}).nesterov


@pytest.mark.parametrize("warmup", [-0.1, 1.0, float("nan")])
def test_a_warm_up_of_all_steps_is_refused(warmup):
    with pytest.raises(ValueError, match="warmup"):
        config(warmup=warmup)


def test_the_preset_takes_torchvisions_cifar_and_any_directory():
    for data in ("cifar10", "elsewhere"):
        options = resolve("sam", "cifar-fast", {"data": data})
        assert (options.model, options.data) == ("airbench-relu", data)
    fields = {f.name: f.default for f in dataclasses.fields(options)}
    assert options.val == 0 and fields["warmup"] == 0 and fields["nesterov"] is False
