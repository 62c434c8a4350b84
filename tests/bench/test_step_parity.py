"""The step benchmark's gate and peers: who is off has no speed."""

import pytest
import torch

from bench.__main__ import main
from bench.speed import contenders as who
from bench.speed.baselines import PerParameterFriendlySAM, PerParameterSAM
from bench.speed.contenders import Contender
from bench.speed.parity import BASE_HYPER, SHAPES, exact_course, flat, parity_error
from bench.speed.step_report import read_rows
from bench.speed.timing import random_like
from fastsam import SAM, reference
from fastsam.choose import BACKENDS

from ..helpers.oracle import Oracle

CPU = torch.device("cpu")
TINY = ["step", "--params", "2000", "--tensors", "5", "--reps", "2"]
HYPER = dict(rho=0.8, sigma=0.7, lmbda=0.6)
SGD = dict(lr=0.3, momentum=0.8, weight_decay=0.05)


# ---- the formulas that judge, and the peers, against the tests' own oracle


@pytest.mark.parametrize("convention", ["algorithm1", "official"])
@pytest.mark.parametrize("method", ["sam", "asam", "fsam", "fasam"])
def test_the_gates_formulas_are_the_oracles(method, convention):
    weights = random_like(SHAPES, torch.float64, CPU, seed=1)
    passes = [tuple(random_like(SHAPES, torch.float64, CPU, 2 * i + j) for j in (2, 3))
              for i in range(4)]  # fmt: skip
    oracle = Oracle(weights, [dict(params=range(len(SHAPES)), **HYPER, **SGD)], method, convention)
    course = exact_course(flat(weights), [(flat(a), flat(b)) for a, b in passes], method, "sgd",
                          convention, HYPER | SGD)  # fmt: skip
    for (g1, g2), (before, climbed, after) in zip(passes, course, strict=True):
        assert torch.allclose(before, flat(oracle.w), rtol=0, atol=1e-13)
        oracle.first_step(g1)
        assert torch.allclose(climbed, flat(oracle.w), rtol=0, atol=1e-13)
        oracle.second_step(g2)
        assert torch.allclose(after, flat(oracle.w), rtol=0, atol=1e-13)


def test_the_gates_adamw_is_torchs():
    p = torch.nn.Parameter(random_like([(50,)], torch.float64, CPU, seed=1)[0])
    opt = torch.optim.AdamW([p], **BASE_HYPER["adamw"])
    grads = random_like([(50,)] * 4, torch.float64, CPU, seed=2)
    course = exact_course(p.detach().clone(), [(g, g) for g in grads], "sgd", "adamw", "",
                          BASE_HYPER["adamw"] | dict(rho=0.0))  # fmt: skip
    for g, (_, _, after) in zip(grads, course, strict=True):
        p.grad = g
        opt.step()
        assert torch.allclose(p, after, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", ["sam", "asam", "fsam", "fasam"])
def test_the_peers_do_what_the_oracle_does(method):
    params = [torch.nn.Parameter(w) for w in random_like(SHAPES, torch.float64, CPU, seed=1)]
    oracle = Oracle(params, [dict(params=range(len(SHAPES)), **HYPER, **SGD)], method, "official")
    arguments = dict(rho=HYPER["rho"], adaptive=method in ("asam", "fasam"), **SGD)
    if method in ("fsam", "fasam"):
        friendly = dict(sigma=HYPER["sigma"], lmbda=HYPER["lmbda"])
        opt = PerParameterFriendlySAM(params, torch.optim.SGD, **friendly, **arguments)
    else:
        opt = PerParameterSAM(params, torch.optim.SGD, **arguments)
    for i in range(4):
        for j, phase in enumerate(("first_step", "second_step")):
            grads = random_like(SHAPES, torch.float64, CPU, seed=2 * i + j + 2)
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            getattr(opt, phase)()
            getattr(oracle, phase)(grads)
            assert torch.allclose(flat(params), flat(oracle.w), rtol=0, atol=1e-13)
            assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


# ---- the gate


def norm_too_small(monkeypatch):
    norm = reference.norm

    def broken(p):
        norm(p)
        p.space.partials.mul_(0.98)

    monkeypatch.setattr(reference, "norm", broken)


def norm_of_nothing(monkeypatch):
    monkeypatch.setattr(reference, "norm", lambda p: p.space.partials.fill_(float("nan")))


def no_return(monkeypatch):
    step = reference.step
    monkeypatch.setattr(reference, "step", lambda p, climb: step(p, None))


def lose(key):
    def sabotage(monkeypatch):
        second_step = SAM.second_step

        def broken(self, *args):
            second_step(self, *args)
            for state in self.state.values():
                state.get(key, torch.empty(0)).zero_()

        monkeypatch.setattr(SAM, "second_step", broken)

    return sabotage


@pytest.mark.parametrize(
    "sabotage, method, base",
    [
        (norm_too_small, "sam", "sgd"), (norm_too_small, "fasam", "adamw"),
        (norm_of_nothing, "asam", "sgd"), (no_return, "sam", "sgd"),
        (lose("momentum_buffer"), "asam", "sgd"), (lose("ema"), "fsam", "sgd"),
        (lose("ema"), "fasam", "sgd"),
    ],
    ids=["norm", "norm-adamw", "nan", "return", "momentum", "ema-fsam", "ema-fasam"],
)  # fmt: skip
def test_a_wrong_backend_is_red_and_has_no_speed(
    sabotage, method, base, monkeypatch, capsys, tmp_path, quick
):
    monkeypatch.setattr(who, "BACKENDS", ("reference",))
    sabotage(monkeypatch)
    rows = tmp_path / "rows.jsonl"
    command = [*TINY, "--methods", "sgd", method, "--base", base, "--rows", str(rows)]
    assert main(command) == 1
    printed = capsys.readouterr().out
    red = [line for line in printed.splitlines() if line.startswith("parity is red")]
    assert len(red) == 1 and f"{method} by fastsam reference" in red[0]
    assert "GB/s" not in printed and not rows.exists()


def test_a_step_to_nan_is_infinitely_wrong():
    class ToNaN(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.fill_(float("nan"))

    contender = Contender("sgd", "to NaN", ToNaN, state=4)
    assert parity_error(contender, "sgd", torch.float32, CPU) == float("inf")


class CorrectedAverage(PerParameterFriendlySAM):
    """Averages d instead of g: the error of some published F-SAM."""

    def directions(self):
        gs, ms = [p.grad for p in self.params], self.state["ema"]
        if not ms:
            return super().directions()
        ds = [g - self.sigma * m for g, m in zip(gs, ms, strict=True)]
        for d, m in zip(ds, ms, strict=True):
            m.mul_(self.lmbda).add_(d, alpha=1 - self.lmbda)
        return ds


class TwiceAsFar(PerParameterSAM):
    def first_step(self):
        super().first_step()
        with torch.no_grad():
            for p, w in zip(self.params, self.state["saved"], strict=True):
                p.add_(p - w)


def package(monkeypatch, *classes):
    monkeypatch.setattr(who, "BACKENDS", ())
    monkeypatch.setattr(who, "pytorch_optimizer_classes", lambda: classes or None)


def test_a_package_with_another_friendly_sam_is_speed_only(monkeypatch, capsys, tmp_path, quick):
    package(monkeypatch, PerParameterSAM, CorrectedAverage)
    rows = tmp_path / "rows.jsonl"
    assert main([*TINY, "--methods", "sam", "fsam", "--rows", str(rows)]) == 0
    marks = {(r["method"], r["implementation"]): r["speed_only"] for r in read_rows([rows])}
    assert [key for key, mark in marks.items() if mark] == [("fsam", "pytorch_optimizer")]
    assert len(marks) == 4
    assert capsys.readouterr().out.count("pytorch_optimizer (speed only)") == 1


def test_a_package_with_another_sam_is_red(monkeypatch, capsys, quick):
    package(monkeypatch, TwiceAsFar, PerParameterFriendlySAM)
    assert main([*TINY, "--methods", "sam", "fsam"]) == 1
    assert "parity is red: sam by pytorch_optimizer is off by 1.0e+00" in capsys.readouterr().out


def test_every_backend_of_fastsam_is_timed_or_said_to_be_left_out(monkeypatch):
    assert who.BACKENDS == BACKENDS
    monkeypatch.setattr(who, "BACKENDS", ("reference", "triton", "abacus"))
    found, left_out = who.contenders(("sam",), "sgd", torch.float32, CPU)
    assert [c.name for c in found if c.name.startswith("fastsam")] == ["fastsam reference"]
    assert [line.split(":")[0] for line in left_out if line.startswith("fastsam")] == [
        "fastsam triton", "fastsam abacus"
    ]  # fmt: skip


def test_an_absent_package_is_one_line(monkeypatch, capsys, quick):
    package(monkeypatch)
    assert main([*TINY, "--methods", "sam"]) == 0
    printed = capsys.readouterr().out
    assert "| pytorch_optimizer" not in printed
    assert "left out: pytorch_optimizer: not installed\n" in printed
