"""Momentum-SAM, LookSAM and GSAM as methods of the benchmark."""

import json

import pytest
import torch

import fastsam
from bench.__main__ import main
from bench.settings.config import check_used, resolve
from bench.speed import plain_relatives as plain
from bench.training.run import forward_of
from bench.training.step import step
from bench.training.train import set_up

from ..helpers import published
from ..helpers.drawn import assert_close, give, normals

TINY = {"data": "digits", "width": 4, "epochs": 1, "threads": 1}
CLASSES = {
    "msam": (fastsam.MomentumSAM, dict(rho=3.0)),
    "looksam": (fastsam.LookSAM, dict(rho=0.1, alpha=0.7)),
    "gsam": (fastsam.GSAM, dict(rho=0.1, alpha=0.4)),
}


def test_their_papers_values_and_the_option_s_name_beside_the_attack_s():
    for method, (cls, own) in CLASSES.items():
        opt = set_up(resolve(method, "cifar-fast", TINY)).opt
        assert type(opt) is cls
        assert {k: opt.param_groups[0][k] for k in own} == own
    assert [resolve("looksam", p, TINY).interval for p in ("cifar-fast", None)] == [5, 5]
    config = resolve("at-linf+gsam", None, TINY | {"gsam_alpha": 0.2, "eps": "8", "alpha": "1"})
    assert config.gsam_alpha == 0.2 and config.attack.alpha == 1 / 255
    assert resolve("sgd", None, TINY | {"gsam_alpha": 0.2}).gsam_alpha is None
    with pytest.raises(ValueError, match="look_alpha 0.2 has no effect on gsam"):
        check_used(["gsam"], {"look_alpha": 0.2})


@pytest.mark.parametrize("method, options, match", [
    ("msam", {"momentum": 0.0}, "momentum 0.0 leaves nothing"),
    ("gsam", {"gsam_alpha": float("nan")}, "gsam_alpha must be finite"),
    ("looksam", {"interval": 0}, "interval must be at least 1"),
    ("msam", {"processes": 2, "local_ascent": True}, "not for 'msam'"),
])
def test_what_they_refuse(method, options, match):
    with pytest.raises(ValueError, match=match):
        resolve(method, None, TINY | options)
    if method == "msam":
        resolve(method, None, TINY | {"base": "adamw", "momentum": 0.0})


@pytest.mark.parametrize("method, passes", [("msam", [1] * 5), ("looksam", [2, 1, 1, 2, 1]),
                                            ("gsam", [2] * 5)])
def test_their_steps_are_the_classes(method, passes):
    """Weights bit for bit those of the class in a loop of its own; passes as hooks count them."""
    run, twin = (set_up(resolve(method, None, TINY | ({"interval": 3} if method == "looksam"
                                                      else {}))) for _ in range(2))
    seen = []
    run.model.register_forward_hook(lambda *_: seen.append(1))
    for r in (run, twin):
        r.model.train()
    x, y = run.data.train.batch(slice(0, 32))

    def closure():
        loss = torch.nn.functional.cross_entropy(twin.model(x), y)
        loss.backward()
        return loss

    for expected in passes:
        seen.clear()
        step(run, forward_of(run), x, y)
        assert len(seen) == expected
        if expected == 2:
            closure()
            twin.opt.first_step(zero_grad=True)
            with fastsam.freeze_bn_stats(twin.model):
                closure()
            twin.opt.second_step(zero_grad=True)
        else:
            twin.opt.step(closure)
            twin.opt.zero_grad()
        for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("method, option", [("msam", ["--rho", "0.5"]),
                                            ("looksam", ["--look-alpha", "0.3"]),
                                            ("gsam", ["--gsam-alpha", "0.1"])])
def test_an_epoch_on_the_command_line(method, option, tmp_path):
    assert main(["train", "--method", method, *option, "--width", "4", "--epochs", "1",
                 "--threads", "1", "--eval-linf", "8", "--eval-l2", "0.5", "--eval-steps", "1",
                 "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["method"] == method and float(option[1]) in config.values()


SHAPES = [(7,), (4, 3), (), (33, 40)]
F64 = torch.float64
SGD = dict(lr=0.07, momentum=0.8)


@pytest.mark.parametrize("method", ["msam", "looksam", "gsam"])
def test_what_the_loops_are_held_against_is_the_authors(method):
    """The per-parameter forms, on given gradients. Momentum-SAM's without weight decay, which its
    authors take at the moved weights."""
    w = [torch.nn.Parameter(t) for t in normals(SHAPES, 0, F64)]
    decay = 0.0 if method == "msam" else 0.02
    own = {"msam": {}, "gsam": dict(alpha=0.7), "looksam": dict(alpha=0.7)}[method]
    names = {"msam": "MomentumSAM", "looksam": "LookSAM", "gsam": "GSAM"}
    base = published.SGD(w, **SGD, weight_decay=decay)
    theirs = getattr(published, names[method])(base, 0.3, **own)
    opt = getattr(plain, f"PerParameter{names[method]}")(
        w, torch.optim.SGD, 0.3, **own, **({"k": 3} if method == "looksam" else {}),
        **SGD, weight_decay=decay)
    for t in range(8):
        first, second = (normals(SHAPES, seed + t, F64) for seed in (10, 50))
        climbs = opt.climbs_next
        if method == "msam":
            opt.first_step()
            assert_close(w, theirs.moved)
            give(w, second)
            theirs.step(second)
        elif climbs:
            give(w, first)
            opt.first_step()
            assert_close(w, theirs.climbed(first))
            give(w, second)
            (theirs.step if method == "gsam" else theirs.sam_step)(first, second)
        else:
            give(w, second)
            theirs.step_between(second)
        assert climbs == (method != "looksam" or t % 3 == 0)
        opt.second_step()
        assert_close(w, base.w)
