"""The pages of docs/recipes: their code runs as printed and does what the page says.

Pages run in double precision, where a loop written out parameter by parameter (recipes_support)
and the optimizer differ by rounding alone: any other difference is a difference in method.
"""

import contextlib
import math
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastsam import GSAM, SAM, FriendlySAM, FullGradientSAM, LookSAM, freeze_bn_stats

from .recipes_support import (
    PAGES,
    ROOT,
    assert_same,
    descend,
    execute,
    sam_gradient,
    sam_step,
)


class Run(ModuleType):
    """What a page leaves behind, and how often it called backward."""

    backwards = 0


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Run a page as a program elsewhere: it prints nothing and leaves no file."""
    dtype, rng = torch.get_default_dtype(), torch.get_rng_state()

    def page(name: str) -> Run:
        module = Run(f"recipe_{name.replace('-', '_')}")
        backward = torch.Tensor.backward

        def counted(*args, **kwargs):
            module.backwards += 1
            return backward(*args, **kwargs)

        monkeypatch.setitem(sys.modules, module.__name__, module)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != ROOT])
            patch.setattr(torch.Tensor, "backward", counted)
            torch.set_default_dtype(torch.float64)
            execute(PAGES / f"{name}.md", module)
        printed = capfd.readouterr()
        assert printed.out + printed.err == ""
        assert not list(tmp_path.iterdir())
        return module

    yield page
    torch.set_default_dtype(dtype)
    torch.set_rng_state(rng)


def fell(losses: list[float], to: float = 0.6) -> bool:
    """Whether the last losses' mean is below `to` times the first ones'."""
    n = max(len(losses) // 4, 1)
    return sum(losses[-n:]) < to * sum(losses[:n])


def loss_of(model, batch):
    return lambda: cross_entropy(model(batch[0]), batch[1])


def test_every_page_is_listed_and_tested():
    pages = {page.stem for page in PAGES.glob("*.md")} - {"README"}
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert pages == {line.split("](")[1].split(".md)")[0] for line in index.splitlines()
                     if line.startswith("- [")}
    tests = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run("{page}")' in tests for page in pages - {"ray-train"})
    assert "ray-train.md" in tests                 # in processes of its own
    assert all("```python\n" in (PAGES / f"{page}.md").read_text("utf-8") for page in pages)


def test_plain_loop(run):
    page = run("plain-loop")
    assert page.backwards == 2 * (len(page.losses) + len(page.closure_losses)) == 2 * 2 * 20
    twin = page.network()
    base = SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(5):
        for batch in page.batches:
            sam_step(twin, base, loss_of(twin, batch), rho=0.05)
    assert twin[1].num_batches_tracked == 20
    assert_same(page.model, twin)
    assert_same(page.closure_model, page.model, tolerance=0)
    assert page.closure_losses == page.losses and fell(page.losses)


def test_gradient_accumulation(run):
    page = run("gradient-accumulation")
    steps = list(page.groups()) * 5
    assert page.backwards == 2 * 2 * 4 * len(steps)
    large, sharp = page.network(), page.network()
    large_base, sharp_base = (SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (large, sharp))
    for group in steps:
        together = [torch.cat(part) for part in zip(*group, strict=True)]
        sam_step(large, large_base, loss_of(large, together), rho=0.05)
        parts = [sam_gradient(sharp, loss_of(sharp, batch), rho=0.05) for batch in group]
        descend(sharp, sharp_base, [sum(g) / 4 for g in zip(*parts, strict=True)])
    assert_same(page.model, large)
    assert_same(page.m_model, sharp)
    with pytest.raises(AssertionError):
        assert_same(page.m_model, large, tolerance=1e-4)
    assert fell(page.losses) and fell(page.m_losses)


def test_gradient_clipping(run):
    page = run("gradient-clipping")
    batches = page.batches * 5
    assert page.backwards == 3 * 2 * len(batches)
    twin, adaptive = page.network(), page.network()
    base, adaptive_base = (SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (twin, adaptive))
    clipped = 0
    for batch in batches:
        g = sam_gradient(twin, loss_of(twin, batch), rho=0.05)
        norm = sum(x.square().sum() for x in g).sqrt()
        clipped += int(norm > 0.4)
        descend(twin, base, [x * min(1, 0.4 / (norm + 1e-6)) for x in g])
        g = sam_gradient(adaptive, loss_of(adaptive, batch), rho=0.05)
        for p, x in zip(adaptive.parameters(), g, strict=True):
            x *= min(1, 0.02 * max(p.norm().item(), 1e-3) / (x.norm() + 1e-6))
        descend(adaptive, adaptive_base, g)
    assert 5 < clipped < len(batches)
    assert_same(page.model, twin)
    assert_same(page.adaptive_model, adaptive)
    assert_same(page.scaled_model, page.model)


def test_clipping_the_first_gradient_matters_to_friendly_sam_alone(run):
    page = run("gradient-clipping")
    for kind, kwargs, same in ((SAM, {}, True), (FriendlySAM, dict(lmbda=0.6), False)):
        models = page.network(), page.network()
        for model, max_norm in zip(models, (0.1, float("inf")), strict=True):
            opt = kind(model.parameters(), SGD, rho=0.05, lr=0.3, **kwargs)
            for x, y in page.batches:
                cross_entropy(model(x), y).backward()
                clip_grad_norm_(model.parameters(), max_norm)
                opt.first_step(zero_grad=True)
                cross_entropy(model(x), y).backward()
                opt.second_step(zero_grad=True)
        difference = max((p - q).abs().max().item() for p, q in zip(
            *(m.parameters() for m in models), strict=True))
        assert difference < 1e-12 if same else difference > 1e-4, (kind, difference)


def test_without_the_scaler_in_first_step_an_early_unscale_is_not_seen():
    """Also what docs/mixed-precision.md says: the warning can go when this fails."""
    p = torch.nn.Parameter(torch.ones(2))
    opt, scaler = SAM([p], SGD, lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.sum()).backward()
    scaler.unscale_(opt)
    opt.first_step(zero_grad=True)
    scaler.scale(p.sum()).backward()
    scaler.step(opt)
    assert torch.equal(p, torch.full((2,), 1 - 1024.0))


@pytest.mark.parametrize("restored", [False, True])
def test_a_restored_step_is_not_skipped(run, restored):
    page = run("gradient-clipping")
    model = page.network()
    opt = page.optimizer(model)
    x, y = page.batches[0]
    cross_entropy(model(x), y).backward()
    model[0].bias.grad[0] = torch.inf
    opt.first_step(zero_grad=True)
    cross_entropy(model(x), y).backward()
    before = model[0].weight.clone()
    if restored:
        opt.restore()
    opt.step()
    assert opt.skipped_steps == (0 if restored else 1)
    assert torch.equal(model[0].weight, before) is not restored


@pytest.mark.parametrize("cls", [SAM, GSAM, LookSAM])
def test_a_restored_step_is_plain_but_for_looksam(cls):
    p = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    opt = cls([p], SGD, lr=0.1, **(dict(k=1) if cls is LookSAM else {}))
    g, sharp, last = torch.randn(3, 4, dtype=torch.float64)
    for second in (sharp, last):
        p.grad = g.clone()
        opt.first_step(zero_grad=True)
        p.grad = second.clone()
        if second is sharp:
            opt.step()
    opt.restore()
    w = p.detach().clone()
    opt.step()
    g_v = sharp - (sharp @ g) / (g @ g) * g
    added = 0.7 * last.norm() / g_v.norm() * g_v if cls is LookSAM else 0
    torch.testing.assert_close(p.detach(), w - 0.1 * (last + added), rtol=1e-12, atol=1e-12)


def test_schedules(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")             # torch's, of a scheduler ahead of its optimizer
        page = run("schedules")
    twin = page.network()
    base = SGD(twin.parameters(), lr=0.2, momentum=0.9)
    seen = page.seen + page.seen_on
    for i, (lr, rho, radius) in enumerate(seen):
        cosine = 0.5 + 0.5 * math.cos(math.pi * i / 20)
        assert lr == pytest.approx(0.2 * cosine) and rho == pytest.approx(0.1 * min(i / 5, cosine))
        assert radius == pytest.approx(rho, abs=1e-9)
        base.param_groups[0]["lr"] = 0.2 * cosine
        sam_step(twin, base, loss_of(twin, page.batches[i % 4]), 0.1 * min(i / 5, cosine))
    assert len(seen) == 20
    assert_same(page.resumed_model, twin)
    page.train(page.model, page.opt, page.lr_schedule, page.rho_schedule, 12, 20)
    assert_same(page.resumed_model, page.model, tolerance=0)


def masked_sam_step(model, base, loss, rho, mask) -> None:
    """SAM's step with the climb and its norm over the masked parameters alone."""
    params = list(model.parameters())
    climbers = [p for p, climbs in zip(params, mask, strict=True) if climbs]
    first = torch.autograd.grad(loss(), climbers)
    saved = [p.detach().clone() for p in climbers]
    norm = sum(g.square().sum() for g in first).sqrt()
    with torch.no_grad():
        for p, g in zip(climbers, first, strict=True):
            p.add_(rho * g / norm)
    sharp = torch.autograd.grad(loss(), params)
    with torch.no_grad():
        for p, w in zip(climbers, saved, strict=True):
            p.copy_(w)
    descend(model, base, sharp)


def test_what_climbs(run):
    page = run("what-climbs")
    torch.manual_seed(0)
    inputs = torch.randn(64, 10)
    nn = torch.nn
    twin = nn.Sequential(nn.Linear(10, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))
    labels = inputs[:, :3].argmax(1)
    base = SGD(twin.parameters(), lr=0.1, momentum=0.9)

    def loss():
        return cross_entropy(twin(inputs), labels)

    for _ in range(10):
        masked_sam_step(twin, base, loss, 0.5, [False, False, True, True, False, False])
    base = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    assert len(set(map(tuple, page.climbed))) > 1 and len(page.climbed) == 6
    for mask in page.climbed:
        assert sum(mask) == 3
        masked_sam_step(twin, base, loss, 0.05, mask)
    assert_same(page.model, twin)


def test_cheaper_steps(run):
    page = run("cheaper-steps")
    costs = [page.other_cost, page.part_cost, *page.sparse_costs, page.momentum_cost,
             page.look_cost]
    assert costs == [2, 1.25, 1.2, 1.5, 1.1, 1, 1.2]
    printed = re.findall(r"\| ([\d.]+) \|$", (PAGES / "cheaper-steps.md").read_text("utf-8"), re.M)
    assert [float(x) for x in printed] == [2, *costs]

    def part(i):
        return [t[:16] for t in page.batches[i % 4]]

    def other(i):
        return page.batches[(i + 1) % 4]

    def expected(climbs, ascent):
        twin = page.network()
        base = SGD(twin.parameters(), lr=0.1, momentum=0.9)
        for i in range(20):
            loss = loss_of(twin, page.batches[i % 4])
            sam_step(twin, base, loss, 0.05 if climbs(i) else 0.0, loss_of(twin, ascent(i)))
        return twin

    assert_same(page.part_model, expected(lambda i: True, part))
    assert_same(page.other_model, expected(lambda i: True, other))
    for model, climbs in zip(page.sparse_models, (
            lambda i: i in (0, 5, 10, 15), lambda i: i >= 10, lambda i: i in (10, 15)),
            strict=True):
        assert_same(model, expected(climbs, lambda i: page.batches[i % 4]))
    assert_same(page.momentum_model, along_the_momentum(page))
    assert_same(page.look_model, with_the_last_climb(page))


def along_the_momentum(page):
    """Momentum-SAM by hand."""
    twin = page.network()
    base, params = SGD(twin.parameters(), lr=0.1, momentum=0.9), list(twin.parameters())
    for i in range(20):
        w = [p.detach().clone() for p in params]
        vs = [base.state[p]["momentum_buffer"] for p in params] if i else w
        norm = sum(v.square().sum() for v in vs).sqrt()
        with torch.no_grad():
            for p, v in zip(params, vs, strict=True):
                p.sub_(0.3 * v / norm if i else 0)
        gradients = torch.autograd.grad(loss_of(twin, page.batches[i % 4])(), params)
        with torch.no_grad():
            for p, x in zip(params, w, strict=True):
                p.copy_(x)
        descend(twin, base, gradients)
    return twin


def with_the_last_climb(page):
    """LookSAM by hand."""
    twin = page.network()
    base, params = SGD(twin.parameters(), lr=0.1, momentum=0.9), list(twin.parameters())

    def dot(xs, ys):
        return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))

    for i in range(20):
        loss = loss_of(twin, page.batches[i % 4])
        first = torch.autograd.grad(loss(), params)
        if i % 5 == 0:
            sharp = sam_gradient(twin, loss, rho=0.05)
            rest = [x - dot(sharp, first) / dot(first, first) * g
                    for x, g in zip(sharp, first, strict=True)]
            descend(twin, base, sharp)
        else:
            scale = 0.7 * (dot(first, first) / dot(rest, rest)).sqrt()
            descend(twin, base, [g + scale * r for g, r in zip(first, rest, strict=True)])
    return twin


def test_torch_compile(run):
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    page = run("torch-compile")
    assert counted["unique_graphs"] - before == 2
    assert page.backwards == 2 * 20 and fell(page.losses)
    twin = page.network()
    base = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        for batch in page.batches:
            sam_step(twin, base, loss_of(twin, batch), rho=0.05)
    assert_same(page.model, twin)
    assert_same(page.compiled, twin)

    def both_passes(rows):
        x, y = page.inputs[:rows], page.labels[:rows]
        cross_entropy(page.compiled(x), y).backward()
        with freeze_bn_stats(page.model):
            cross_entropy(page.compiled(x), y).backward()
        return counted["unique_graphs"] - before

    assert [both_passes(64), both_passes(30)] == [2, 4]


@pytest.mark.parametrize("cls, calls, backend", [
    (FriendlySAM, "closure", "numba"), (SAM, "plain steps between", "reference"),
    (FullGradientSAM, "both steps", "numba")])
def test_of_a_compiled_training_step_only_the_forward_passes_are_compiled(
        run, cls, calls, backend):
    pytest.importorskip({"numba": "numba"}.get(backend, "torch"))
    torch._dynamo.reset()
    page, graphs = run("torch-compile"), []
    frames = torch._dynamo.utils.counters["frames"]

    def kept(graph, _):
        graphs.append(graph)
        return graph.forward

    def train(compiled):
        model, own = page.network(), {"part": "full"} if cls is FullGradientSAM else {}
        opt = cls(model.parameters(), SGD, **own, rho=0.05, lr=0.1, momentum=0.9, backend=backend,
                  interval=1 + (calls == "plain steps between"))
        if own:
            opt.set_full_gradient([torch.ones_like(p) for p in model.parameters()])
        schedule, seen = CosineAnnealingLR(opt, 20), []

        def gradient(x, y):
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        def both(x, y):
            gradient(x, y)
            if opt.climbs_next:
                opt.first_step(zero_grad=True)
                with freeze_bn_stats(model):
                    gradient(x, y)
            opt.step()
            opt.zero_grad()

        def closed(x, y):
            opt.step(lambda: gradient(x, y))

        step = closed if calls == "closure" else both
        if compiled:
            step = torch.compile(step, backend=kept)
        for batch in page.batches * 3:
            step(*batch)
            schedule.step()
            seen.append(sum(frames.values()))
        return model, seen

    (plain, _), (model, seen) = train(False), train(True)
    computing = [graph.code for graph in graphs
                 if any(node.op.startswith("call") for node in graph.graph.nodes)]
    assert computing and all("linear" in code for code in computing)
    assert seen[4] == seen[-1]  # nothing is compiled anew
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


def test_lightning(run):
    pytest.importorskip("lightning", reason="needs Lightning: pip install .[recipes]")
    page = run("lightning")
    assert page.backwards == 2 * 2 * 20 + 2 * 20
    twin = page.network()
    base = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    schedule = CosineAnnealingLR(base, T_max=5)
    for _ in range(5):
        for batch in page.loader:
            sam_step(twin, base, loss_of(twin, batch), rho=0.05)
        schedule.step()
    assert_same(page.automatic.net, twin)
    assert_same(page.manual.net, page.automatic.net, tolerance=0)
    assert_same(page.resumed.net, page.automatic.net, tolerance=0)
    assert len(page.resumed.losses) == 12
    assert page.automatic_trainer.global_step == page.manual_trainer.global_step == 20
    assert page.manual.losses == page.automatic.losses and fell(page.automatic.losses)


def test_lightning_traps(run):
    """What the page warns of is so: the warnings can go when this fails."""
    lightning = pytest.importorskip("lightning", reason="needs Lightning: pip install .[recipes]")
    from lightning.pytorch.plugins.precision import MixedPrecision
    page = run("lightning")

    class Unguarded(page.Automatic):
        def _refuse_other_training(self):
            pass

    class NoClosure(page.Manual):
        def training_step(self, batch, batch_idx):
            self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
            self.optimizers().step()

    def fit(module, **options):
        lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, num_sanity_val_steps=0,
                          enable_checkpointing=False, enable_progress_bar=False,
                          enable_model_summary=False, **options).fit(module, page.loader)
        return module

    def weights(net):
        return [p.detach().clone() for p in net.parameters()]

    initial = weights(page.network())
    assert all(map(torch.equal, weights(fit(NoClosure()).net), initial))

    class TwoPhase(page.Manual):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
            opt.first_step(zero_grad=True)
            with freeze_bn_stats(self.net):
                self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
            opt.second_step(zero_grad=True)

    two_phase, closure = fit(TwoPhase()), fit(page.Manual())
    assert (two_phase.trainer.global_step, closure.trainer.global_step) == (0, 4)
    assert_same(two_phase.net, closure.net, tolerance=0)

    twin = page.network()
    base = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    batches = list(page.loader)
    for kept, batch in zip((False, True, False, True), batches, strict=True):
        loss = loss_of(twin, batch)
        if kept:
            sam_step(twin, base, lambda loss=loss: loss() / 2, rho=0.05)
        else:
            loss()                                 # BatchNorm sees it; the update does not
    assert_same(fit(Unguarded(), accumulate_grad_batches=2).net, twin)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 would update with the last"):
        fit(page.Automatic(), accumulate_grad_batches=2)

    plain = page.network()
    base = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        base.zero_grad()
        loss_of(plain, batch)().backward()
        base.step()
    fp16 = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    fp16.autocast_context_manager = contextlib.nullcontext
    assert_same(fit(Unguarded(), plugins=fp16).net, plain)
    with pytest.raises(ValueError, match="calls the closure once.*use 'bf16-mixed'"):
        fit(page.Automatic(), plugins=fp16)

    from lightning.pytorch.cli import instantiate_class

    named = dict(class_path="fastsam.SAM", init_args=dict(base_optimizer=SGD, rho=0.2),
                 dict_kwargs=dict(lr=0.5, momentum=0.9))
    made = instantiate_class(page.network().parameters(), named)     # as LightningCLI does
    default = SGD(plain.parameters())
    assert made.defaults["rho"] == 0.2
    assert all(made.defaults[key] == default.defaults[key] for key in ("lr", "momentum"))


def test_accelerate(run):
    pytest.importorskip("accelerate", reason="needs Accelerate: pip install .[recipes]")
    page = run("accelerate")
    assert page.backwards == 2 * 4 * 20
    twin, sharp = page.network(), page.network()
    base, sharp_base = (SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (twin, sharp))
    schedule, sharp_schedule = (CosineAnnealingLR(b, T_max=20) for b in (base, sharp_base))
    batches = list(zip(page.inputs.split(64), page.labels.split(64), strict=True)) * 5
    for batch in batches:
        descend(twin, base, clipped_to(0.6, sam_gradient(twin, loss_of(twin, batch), rho=0.05)))
        schedule.step()
    for pair in zip(batches[::2], batches[1::2], strict=True):
        parts = [sam_gradient(sharp, loss_of(sharp, batch), rho=0.05) for batch in pair]
        descend(sharp, sharp_base,
                clipped_to(0.6, [(a + b) / 2 for a, b in zip(*parts, strict=True)]))
        sharp_schedule.step()
    assert_same(page.model, twin)
    assert_same(page.m_model, sharp)
    assert_same(page.own_model, page.model, tolerance=0)
    assert_same(page.resumed_model, page.model, tolerance=0)
    assert fell(page.losses)


def clipped_to(limit, g):
    norm = sum(x.square().sum() for x in g).sqrt()
    return [x * min(1, limit / (norm + 1e-6)) for x in g]


def test_accelerate_passes_a_closure_on_without_its_loss(run):
    pytest.importorskip("accelerate", reason="needs Accelerate: pip install .[recipes]")
    page = run("accelerate")
    calls = []
    page.accelerator.gradient_state._set_sync_gradients(True)

    def closure():
        loss = page.own_model(page.inputs).square().mean()
        page.accelerator.backward(loss)
        calls.append(page.sam.is_perturbed)
        return loss

    assert page.own_opt.step(closure) is None
    assert calls == [False, True]
    page.accelerator.gradient_state._set_sync_gradients(False)
    page.own_opt.step(closure)
    assert len(calls) == 2


def bert_twin(page):
    """The model and AdamW with the Trainer's groups: no decay on biases and LayerNorms."""
    twin = page.network()
    exempt = [p for n, p in twin.named_parameters() if "bias" in n or "LayerNorm" in n]
    decayed = [p for n, p in twin.named_parameters() if "bias" not in n and "LayerNorm" not in n]
    return twin, [dict(params=decayed, weight_decay=0.01), dict(params=exempt, weight_decay=0.0)]


def bert_loss(page, model, i):
    rows = slice(16 * i % 64, 16 * i % 64 + 16)
    labels = torch.stack([entry["labels"] for entry in page.data])[rows]
    return lambda: cross_entropy(model(input_ids=page.tokens[rows]).logits, labels)


def set_lr(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr


def test_transformers_trainer(run):
    pytest.importorskip("transformers", reason="needs transformers: pip install .[recipes]")
    page = run("transformers-trainer")
    assert page.backwards == 2 * 24 + 2 * 2 * 12 + 2 * 24 + 2 * 8
    assert_same(page.resumed_model, page.model, tolerance=0)
    for trained, steps, accumulate in ((page.model, 24, 1), (page.m_model, 12, 2)):
        twin, groups = bert_twin(page)
        base, clipped, losses = AdamW(groups, lr=1e-2), 0, []
        for i in range(steps):
            losses.append(bert_loss(page, twin, i)().item())
            parts = [sam_gradient(twin, bert_loss(page, twin, accumulate * i + j), rho=0.05)
                     for j in range(accumulate)]
            g = [sum(part) / accumulate for part in zip(*parts, strict=True)]
            norm = sum(x.square().sum() for x in g).sqrt()
            clipped += int(norm > 0.3)
            set_lr(base, 1e-2 * (1 - i / steps))
            descend(twin, base, [x * min(1, 0.3 / (norm + 1e-6)) for x in g])
        assert 0 < clipped < steps
        assert_same(trained, twin)
        if trained is page.model:                  # what the Trainer logs: four steps' mean
            logged = torch.tensor(losses).view(-1, 4).mean(1).tolist()
            assert page.losses == pytest.approx(logged, abs=1e-4)
    assert fell(page.losses)


@pytest.mark.long
def test_transformers_trainer_equals_a_plain_fastsam_loop(run, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers: pip install .[recipes]")
    page = run("transformers-trainer")
    twin, groups = bert_twin(page)
    opt = SAM(groups, AdamW, rho=0.05, lr=1e-2)
    for i in range(24):
        set_lr(opt, 1e-2 * ((24 - i) / 24))
        loss = bert_loss(page, twin, i)
        loss().backward()
        opt.first_step(zero_grad=True)
        loss().backward()
        clip_grad_norm_(twin.parameters(), 0.3)
        opt.second_step(zero_grad=True)
    assert_same(page.model, twin, tolerance=0)


def test_transformers_trainer_traps(run, tmp_path):
    """What the page warns of is so: the warnings can go when this fails."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install .[recipes]")
    page = run("transformers-trainer")
    model = page.network()
    with pytest.warns(UserWarning, match="10 steps without a climb are plain steps"):
        page.trainer(model, tmp_path, transformers.Trainer, learning_rate=7.0).train()
    twin, groups = bert_twin(page)
    base = AdamW(groups, lr=1e-2)
    for i in range(24):
        set_lr(base, 1e-2 * (1 - i / 24))
        base.zero_grad()
        bert_loss(page, twin, i)().backward()
        clip_grad_norm_(twin.parameters(), 0.3)
        base.step()
    assert_same(model, twin)
    plain = (AdamW, dict(lr=1e-2))
    with pytest.raises(TypeError, match="the optimizer is of AdamW, which has no second pass"):
        page.trainer(page.network(), tmp_path, optimizer=plain).train()


@pytest.mark.parametrize("replay", [True, pytest.param(False, marks=pytest.mark.long)])
def test_timm(run, replay):
    pytest.importorskip("timm", reason="needs timm: pip install .[recipes]")
    page = run("timm")
    assert page.backwards == 2 * 8
    model = page.model
    if not replay:
        model = page.network()
        page.train(model, page.optimizer(model), replay=False)
    twin = page.network()
    decayed = [p for p in twin.parameters() if p.ndim > 1]
    base = AdamW([dict(params=decayed, weight_decay=0.05),
                  dict(params=[p for p in twin.parameters() if p.ndim <= 1], weight_decay=0.0)],
                 lr=3e-3)
    rng = torch.Generator().manual_seed(2).get_state()
    for x, y in page.batches * 4:
        begin = [rng]

        def loss(x=x, y=y, begin=begin):
            torch.set_rng_state(begin[0])
            value = cross_entropy(twin(x), y)
            begin[:] = [begin[0] if replay else torch.get_rng_state()]
            return value

        sam_step(twin, base, loss, rho=0.05)
        rng = torch.get_rng_state()
    assert_same(model, twin)
    assert fell(page.losses, to=0.9)
    other = page.network()
    page.train(other, page.optimizer(other), replay=not replay)
    with pytest.raises(AssertionError):
        assert_same(other, twin, tolerance=1e-4)


def test_peft(run):
    pytest.importorskip("peft", reason="needs peft: pip install .[recipes]")
    page = run("peft")
    assert page.backwards == 2 * 10 * 4
    twin = page.adapted()
    base = AdamW([p for p in twin.parameters() if p.requires_grad], lr=3e-2)
    before = page.adapted().state_dict()
    for ids, y in page.batches * 10:
        trained = [p for p in twin.parameters() if p.requires_grad]

        def gradient(trained=trained, ids=ids, y=y):
            return torch.autograd.grad(twin(input_ids=ids, labels=y).loss, trained)

        g, w = gradient(), [p.detach().clone() for p in trained]
        norm = sum(x.square().sum() for x in g).sqrt()
        with torch.no_grad():
            for p, x in zip(trained, g, strict=True):
                p.add_(0.05 * x / norm)
        sharp = gradient()
        with torch.no_grad():
            for p, x, s in zip(trained, w, sharp, strict=True):
                p.copy_(x)
                p.grad = s
        base.step()
    assert_same(page.model, twin, tolerance=1e-6)  # Adam divides gradients near 0 by themselves
    changed = [not torch.equal(x, before[name]) for name, x in page.model.state_dict().items()]
    assert 0 < sum(changed) < len(changed)         # the frozen ones are as they were
    page.model.eval(), page.merged.eval()
    with torch.no_grad():
        logits = page.model(input_ids=page.tokens).logits
        torch.testing.assert_close(page.merged(input_ids=page.tokens).logits, logits)
    assert fell(page.losses, to=0.8)


def test_fsdp2(run):
    page = run("fsdp2")
    assert page.backwards == 2 * (4 * 8 + 2 * 4 * 4)
    assert all(map(torch.equal, page.whole, page.whole_resumed))
    torch.manual_seed(1)
    twin = page.Model()
    base = AdamW(twin.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = CosineAnnealingLR(base, T_max=32)
    for ids, y in page.batches * 8:
        descend(twin, base, clipped_to(1.0, sam_gradient(
            twin, lambda ids=ids, y=y: cross_entropy(twin(ids), y), rho=0.05)))
        schedule.step()
    torch.testing.assert_close(page.whole, list(twin.parameters()), rtol=1e-9, atol=1e-9)
    assert fell(page.losses)


@pytest.mark.long
def test_ray_train(monkeypatch, tmp_path):
    pytest.importorskip("ray.train", exc_type=ImportError,
                        reason="needs Ray Train: pip install 'ray[train]'")
    page = Run("recipe_ray_train")
    monkeypatch.chdir(tmp_path)
    execute(PAGES / "ray-train.md", page)
    first, second = page.states
    assert first["epoch"] == second["epoch"] == 4
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    twin = page.network()
    torch.manual_seed(0)
    inputs = torch.randn(256, 10)
    labels = inputs[:, :3].argmax(1)
    base = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    halves = [list(zip(inputs[r::2].split(32), labels[r::2].split(32), strict=True))
              for r in range(2)]
    for both in list(zip(*halves, strict=True)) * 4:  # BatchNorm sees each process's batch alone
        sam_step(twin, base, lambda both=both: sum(
            cross_entropy(twin(x), y) for x, y in both) / 2, rho=0.05)
    for name, value in twin.named_parameters():
        torch.testing.assert_close(value.detach(), first["model"][name], rtol=1e-4, atol=1e-5)
