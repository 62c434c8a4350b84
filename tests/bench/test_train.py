"""Training: resume after a kill, what a run leaves, and the parts of an epoch."""

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch

from bench.data.augmentation import Augmentation, Pipeline
from bench.evaluation.evaluate import evaluate
from bench.experiments.train_and_evaluate import speed, train_and_evaluate
from bench.settings.config import resolve
from bench.settings.evaluation import resolve_evaluation
from bench.training.adversarial import attacked
from bench.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from bench.training.optimizers import lr_at
from bench.training.run import forward_of
from bench.training.step import sharp_gradient, step
from bench.training.train import set_up, train

from ..helpers.survive import learning, same, state

TINY = {"width": 4, "epochs": 3, "batch_size": 256, "threads": 1}
EVALUATION = resolve_evaluation("digits", {"linf": (8 / 255,), "l2": (128 / 255,), "steps": 2})


def tiny(method, **options):
    return resolve(method, "digits", TINY | options)


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["sgd", "sam", "asam", "fsam", "fasam", "at-linf", "at-l2"])
def test_stopping_after_any_epoch_changes_no_bit(method, tmp_path):
    config = tiny(method, **({"attack_steps": 2} if method.startswith("at") else {}))
    train(config, tmp_path / "whole")

    def kill_after(epoch):
        def after_epoch(row):
            if row["epoch"] == epoch:
                raise Killed

        return after_epoch

    for epoch in range(config.epochs - 1):
        with pytest.raises(Killed):
            train(config, tmp_path / "cut", after_epoch=kill_after(epoch))
    train(config, tmp_path / "cut")
    for name in ("last.pt", "best.pt"):
        assert same(state(tmp_path / "whole" / name), state(tmp_path / "cut" / name))
    assert learning(tmp_path / "whole") == learning(tmp_path / "cut")
    assert len(learning(tmp_path / "cut")) == config.epochs


def test_metrics_past_the_checkpoint_are_dropped(tmp_path):
    config = tiny("sgd")
    train(config, tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"epoch": 3, "half a row')
    train(config, tmp_path)
    assert [row["epoch"] for row in learning(tmp_path)] == [0, 1, 2]


def test_another_config_is_refused_and_nothing_changes(tmp_path):
    train(tiny("sgd"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"lr 0\.05 -> 0\.5"):
        train(tiny("sgd", lr=0.5), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_run_on_images_that_changed_is_refused(tmp_path):
    config = tiny("sgd")
    train(config, tmp_path)
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(checkpoint | {"fingerprint": "of other images"}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="the training images of 'digits' changed since"):
        train(config, tmp_path)


def test_a_run_says_what_trained_it_not_what_evaluates_it(tmp_path, monkeypatch):
    """Begun at one commit, ended at another, evaluated at a third."""

    def at(commit):
        monkeypatch.setattr("bench.training.train.git_hash", lambda: commit)
        monkeypatch.setattr("bench.experiments.train_and_evaluate.git_hash", lambda: commit)

    def kill(row):
        raise Killed

    config = tiny("sgd")
    at("first")
    with pytest.raises(Killed):
        train(config, tmp_path, after_epoch=kill)
    at("second")
    train(config, tmp_path)
    at("third")
    summary = train_and_evaluate(config, EVALUATION, tmp_path)
    assert [(place["epoch"], place["git"]) for place in summary["trained"]] == [
        (0, "first"), (1, "second")]  # fmt: skip
    assert summary["git"] == "third"
    assert {"device", "versions", "threads"} <= summary["trained"][0].keys()


@pytest.mark.parametrize("method, given, typical", [
    ("sam-late", {"late": 0.5, "epochs": 4}, 2 * 1 + 2 * 6.5),
    ("sgd", {"epochs": 4}, 4 * 2.5),
    ("at-linf", {"awp_gamma": 0.01, "awp_warmup": 1, "epochs": 4}, 1 + 3 * 4)])  # fmt: skip
def test_each_phase_counts_by_its_median_epoch(method, given, typical):
    run = set_up(tiny(method, **given))
    run.history = [{"seconds": s} for s in (1.0, 1.0, 4.0, 9.0)]
    assert speed(run) == pytest.approx(4 * len(run.data.train) / typical)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    config = tiny("sgd")
    run = set_up(replace(config, width=8))
    save_checkpoint(tmp_path / "last.pt", config, run.data, run.model, optimizer={}, history=[])
    with pytest.raises(ValueError, match="another model"):
        train(config, tmp_path)
    with pytest.raises(ValueError, match="another model"):
        load_model(tmp_path / "last.pt")


def test_a_run_directory_and_its_numbers(tmp_path):
    config = tiny("sam", epochs=6)
    summary = train_and_evaluate(config, EVALUATION, tmp_path)
    names = [".lock", "best.pt", "config.json", "last.pt", "metrics.jsonl", "summary.json"]
    assert sorted(os.listdir(tmp_path)) == names
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    run = set_up(config)
    for name, result in (("last", summary), ("best", summary["best"])):
        model = load_model(tmp_path / f"{name}.pt")
        again = evaluate(model, run.data.test, EVALUATION)
        assert again["natural"] == result["natural"] and again["robust"] == result["robust"]
        assert again["warnings"] == result["warnings"]
    rows = learning(tmp_path)
    best = max(range(6), key=lambda i: (rows[i]["val_acc"], -i))
    assert summary["best"]["epoch"] == best == load_checkpoint(tmp_path / "best.pt")["epoch"]
    assert summary["natural"] > 0.3, "chance is 0.1"
    assert summary["robust"]["linf"]["8/255"] <= summary["natural"]


def test_model_of_a_checkpoint_is_ready_to_attack(tmp_path):
    train(tiny("sgd", epochs=1), tmp_path)
    model = load_model(tmp_path / "last.pt")
    assert not model.training and model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_attack_leaves_gradients_and_statistics_alone(mode):
    run = set_up(tiny("at-linf", attack_bn=mode))
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.model.train()
    x, y = run.data.train.batch(slice(0, 32))
    x_adv = attacked(run, forward_of(run), x, y, torch.Generator().manual_seed(0))
    assert not torch.equal(x, x_adv) and run.model.training
    assert same(before, dict(run.model.state_dict()))
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize(("known", "amp", "slow"), [
    ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False}, "bf16", True),
    ({"architecture": "x86_64"}, "bf16", True),  # one too old for the word
    ({"architecture": "x86_64", "avx512_bf16": False}, "off", False),
    ({"architecture": "x86_64", "avx512_bf16": True}, "bf16", False),
    ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, "bf16", False),
    ({"architecture": "arm64"}, "bf16", False),
    (None, "bf16", False),  # a torch that does not say
])
def test_bf16_on_a_processor_without_it_is_warned_of(known, amp, slow, monkeypatch, tmp_path):
    if known is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    config = tiny("sgd", amp=amp, epochs=1)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        train(config, tmp_path)
    assert any("--amp off" in str(w.message) for w in given) == slow
    with warnings.catch_warnings(record=True) as given:  # nothing is left to be slow
        warnings.simplefilter("always")
        train(config, tmp_path)
    assert not any("--amp off" in str(w.message) for w in given)


@pytest.mark.parametrize(("known", "precision", "slow"), [
    ({"architecture": "x86_64"}, "bf16", True), ({"architecture": "x86_64"}, "fp32", False),
    ({"architecture": "x86_64", "avx512_bf16": True}, "bf16", False),
])
def test_an_evaluation_in_bf16_is_warned_of_too(known, precision, slow, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    run = set_up(tiny("sgd"))
    evaluation = replace(EVALUATION, precision=precision, samples=20)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        evaluate(run.model, run.data.test, evaluation)
    assert any("--eval-precision fp32" in str(w.message) for w in given) == slow


def test_rho_zero_trains_as_sgd(tmp_path):
    sgd, sam = (train(c, tmp_path / c.method) for c in (tiny("sgd"), tiny("sam", rho=0.0)))
    for name, value in sgd.model.state_dict().items():
        torch.testing.assert_close(sam.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_seeds_differ_and_repeat(tmp_path):
    a, b, c = (
        train(tiny("sgd", seed=seed, epochs=1), tmp_path / name)
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert same(dict(a.model.state_dict()), dict(b.model.state_dict()))
    assert not same(dict(a.model.state_dict()), dict(c.model.state_dict()))


def test_schedules():
    piecewise = tiny("sgd", schedule="piecewise", epochs=100, lr=0.1)
    rates = [lr_at(piecewise, e, 0, 10) for e in (0, 74, 75, 89, 90, 99)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    cosine = tiny("sgd", schedule="cosine", epochs=200, lr=0.05)
    assert lr_at(cosine, 0, 0, 391) == 0.05
    assert lr_at(cosine, 100, 0, 391) == pytest.approx(0.025)
    assert lr_at(cosine, 199, 0, 391) == pytest.approx(3.084e-6, rel=1e-3)  # F-SAM's log


def test_linear_schedule_and_warm_up():
    linear = tiny("sgd", schedule="linear", warmup=0.15, epochs=2, lr=0.3)
    rates = [lr_at(linear, e, i, 10) for e in range(2) for i in range(10)]
    rising, falling = [0.1, 0.2, 0.3], [0.3 * k / 17 for k in range(17, 0, -1)]
    assert rates == pytest.approx(rising + falling)
    torchs = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    schedule = torch.optim.lr_scheduler.LinearLR(torchs, 1.0, 0.0, total_iters=20)
    cold = tiny("sgd", schedule="linear", epochs=2, lr=0.3)
    for i in range(20):
        assert lr_at(cold, *divmod(i, 10), 10) == pytest.approx(schedule.get_last_lr()[0])
        torchs.step(), schedule.step()
    piecewise = tiny("sgd", schedule="piecewise", warmup=0.01, epochs=100, lr=0.1)
    rates = [lr_at(piecewise, e, 0, 10) for e in (0, 1, 74, 75, 90)]
    assert rates == pytest.approx([0.01, 0.1, 0.1, 0.01, 0.001])
    cosine = tiny("sgd", schedule="cosine", warmup=0.5, epochs=2, lr=0.2)
    assert [lr_at(cosine, *place, 4) for place in ((0, 3), (1, 0), (1, 2))] == pytest.approx(
        [0.2, 0.2, 0.1]
    )


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_crop_of_the_reflected_image(flip):
    images = torch.arange(2 * 200 * 36, dtype=torch.int32).view(200, 2, 6, 6)
    pipeline = Pipeline(images, torch.zeros(200), 1, Augmentation(2, flip=flip), [0.0, 0.0])
    out = pipeline.batch(torch.arange(200), torch.Generator().manual_seed(0))[0].int()
    padded = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="reflect").int()
    seen = set()
    for image, big in zip(out, padded, strict=True):
        crops = {
            (y, x, f): c.flip(2) if f else c
            for y in range(5)
            for x in range(5)
            for f in ([False, True] if flip else [False])
            for c in [big[:, y : y + 6, x : x + 6]]
        }
        found = [key for key, crop in crops.items() if torch.equal(image, crop)]
        assert found, "not a crop of the padded image"
        seen.add(found[0])
    assert len(seen) > (30 if flip else 20), "some crops never occur"


def test_a_config_says_how_images_are_augmented():
    run = set_up(tiny("sgd", augment="crop-flip", pad=2, padding="zero", cutout=3))
    assert run.images.augmentation == Augmentation(2, "zero", flip=True, cutout=3)
    assert run.images.fill.flatten().tolist() == pytest.approx(run.data.mean)
    assert set_up(tiny("sgd")).images.augmentation == Augmentation(1, "reflect", flip=False)
    assert set_up(tiny("sgd", augment="none")).images.augmentation is None


def sharpness(method: str, **options):
    """A run on digits, its first batch, and the gradient that `sharp_gradient` leaves."""
    run = set_up(resolve(method, None, {"data": "digits", "epochs": 4, "width": 4, **options}))
    x, y = run.data.train.take(torch.arange(60)).batch(slice(None))
    sharp_gradient(run, forward_of(run), x, y)
    return run, x, y, [p.grad.clone() for p in run.model.parameters()]


def gradient_at(run, w, x, y) -> list[torch.Tensor]:
    """The gradient on (x, y) at weights w, the model in training mode."""
    with torch.no_grad():
        for p, value in zip(run.model.parameters(), w, strict=True):
            p.copy_(value)
    loss = torch.nn.functional.cross_entropy(run.model(x), y)
    return list(torch.autograd.grad(loss, list(run.model.parameters())))


def sam_gradient(run, w, x_climb, y_climb, x, y) -> list[torch.Tensor]:
    """SAM's gradient by its formula: at w + rho g / ||g||."""
    g = gradient_at(run, w, x_climb, y_climb)
    norm = torch.stack([t.norm() for t in g]).norm()
    rho = run.config.rho
    return gradient_at(run, [p + rho * t / norm for p, t in zip(w, g, strict=True)], x, y)


def test_ascent_from_a_part_of_the_batch_is_sam_with_that_parts_gradient():
    run, x, y, found = sharpness("sam-part", ascent_part=0.25)
    run.opt.restore()
    w = [p.detach().clone() for p in run.model.parameters()]
    expected = sam_gradient(run, w, x[:15], y[:15], x, y)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_micro_batches_each_climb_by_themselves():
    run, x, y, found = sharpness("sam-micro", micro=4)
    w = [p.detach().clone() for p in run.model.parameters()]
    parts = [sam_gradient(run, w, *[x[i:i + 15], y[i:i + 15]] * 2) for i in range(0, 60, 15)]
    for a, *b in zip(found, *parts, strict=True):
        torch.testing.assert_close(a, sum(b) / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method, options, climbs", [
    ("sam", {}, [True] * 8),
    ("sam-interval", {"interval": 3}, [True, False, False, True, False, False, True, False]),
    ("sam-late", {"late": 0.5, "batch_size": 700}, [False] * 4 + [True] * 4),
    ("looksam", {}, [True, False, False, False, False, True, False, False]),
    ("msam", {}, [True] * 8),
])
def test_which_steps_climb(method, options, climbs, monkeypatch):
    run = set_up(resolve(method, None, {"data": "digits", "epochs": 4, "width": 4, **options}))
    x, y = run.data.train.take(torch.arange(20)).batch(slice(None))
    climbed = []
    first_step = type(run.opt).first_step
    monkeypatch.setattr(type(run.opt), "first_step",
                        lambda opt, *a, **k: (climbed.append(opt.param_groups[0]["sam_steps"]),
                                              first_step(opt, *a, **k)))
    for _ in range(8):
        step(run, forward_of(run), x, y)
    assert climbed == [t for t in range(8) if climbs[t]]
