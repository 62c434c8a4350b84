"""fastsam.integrations: what the recipes do not show, and several processes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastsam import GSAM, SAM, LookSAM, MomentumSAM, PhaseError

ROOT = Path(__file__).parent.parent.parent


def run(folder: Path, program: str, processes: int = 1) -> str:
    (folder / "program.py").write_text(program)
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([sys.executable, *launcher, "program.py"], cwd=folder, timeout=300,
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_each_framework_is_imported_only_when_it_is_used(tmp_path):
    run(tmp_path, """
import sys
import fastsam, fastsam.integrations
frameworks = {"transformers", "lightning", "accelerate", "peft"}
assert not frameworks & set(sys.modules)
sys.modules["transformers"] = sys.modules["lightning"] = None     # as if not installed
for name, framework in (("SAMTrainer", "transformers"), ("SAMModule", "lightning")):
    try:
        getattr(fastsam.integrations, name)
    except ImportError as error:
        assert framework in str(error)
    else:
        raise SystemExit(name)
try:
    fastsam.integrations.SamTrainer
except AttributeError as error:
    assert "SamTrainer" in str(error)
""")


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip(
        "accelerate", reason="needs Accelerate: pip install .[recipes]")
    return accelerate.Accelerator(cpu=True)


def test_an_optimizer_that_cannot_climb_is_refused(accelerator):
    from fastsam.integrations import both_passes

    model = nn.Linear(3, 2)
    opt = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="the optimizer is of SGD, which has no second pass"):
        both_passes(accelerator, model, opt, lambda: None)


@pytest.mark.parametrize("kind, micro_batches, message", [
    ("DEEPSPEED", 1, "DeepSpeed keeps weights and gradients in buffers of its own"),
    ("FSDP", 2, "gradient accumulation with distributed_type=FSDP"),
])
def test_processes_in_which_a_climb_would_be_wrong_are_refused(
        accelerator, kind, micro_batches, message, monkeypatch):
    from accelerate.utils import DistributedType

    from fastsam.integrations.accelerate import check_processes

    with pytest.raises(ValueError, match=message):
        check_processes(DistributedType[kind], micro_batches > 1)
    check_processes(DistributedType.FSDP, accumulates=False)


def test_accumulation_over_processes_wants_the_model_that_averages(accelerator):
    """With the network inside it nothing would be averaged, and the replicas would part."""
    from fastsam.integrations.accelerate import replicas

    with pytest.raises(ValueError, match="model is a Linear: .* what accelerator.prepare.model. "):
        replicas(SimpleNamespace(num_processes=2), nn.Linear(3, 2))
    assert replicas(accelerator, accelerator.prepare(nn.Linear(3, 2))) is None


def test_a_step_that_does_not_climb_is_one_pass(accelerator):
    from fastsam.integrations import both_passes

    model = nn.Linear(3, 2)
    opt = accelerator.prepare(SAM(model.parameters(), torch.optim.SGD, lr=0.1, interval=3))
    calls = []

    def backward():
        loss = model(torch.ones(4, 3)).square().mean()
        accelerator.backward(loss)
        calls.append(opt.optimizer.is_perturbed)
        return loss

    for _ in range(4):
        both_passes(accelerator, model, opt, backward)
        opt.step()
        opt.zero_grad()
    assert calls == [False, True, False, False, False, True]


@pytest.mark.parametrize("cls", [GSAM, LookSAM])
def test_what_does_not_climb_by_micro_batches_is_refused_before_it_climbs(cls, accelerator):
    from fastsam.integrations import both_passes

    model = nn.Linear(3, 2)
    opt = accelerator.prepare(cls(model.parameters(), torch.optim.SGD, lr=0.1))
    with pytest.raises(PhaseError, match="both gradients of the whole batch"):
        both_passes(accelerator, model, opt, lambda: pytest.fail("a pass"), micro_batches=2)
    assert not opt.optimizer.is_perturbed


def test_momentum_sam_s_only_pass_is_neither_repeated_nor_frozen(accelerator):
    """With accumulation all micro-batches are at the one moved place."""
    from fastsam.integrations import both_passes

    def network():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def build(net):
        return MomentumSAM(net.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)

    model, twin = network(), network()
    opt, plain = accelerator.prepare(build(model)), build(twin)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        parts = torch.randn(2, 8, 3, generator=generator)
        calls = []
        for x in parts:
            def backward(x=x, calls=calls):
                calls.append(opt.optimizer.is_perturbed)
                loss = model(x).square().mean()
                accelerator.backward(loss)
                return loss

            both_passes(accelerator, model, opt, backward, micro_batches=2)
        opt.step()
        opt.zero_grad()
        assert calls == [True, True]
        plain.first_step()
        for x in parts:
            twin(x).square().mean().backward()
        plain.second_step(zero_grad=True)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert model[1].num_batches_tracked == 8


def test_momentum_sam_s_only_pass_is_no_second_one_for_lightning():
    lightning = pytest.importorskip("lightning", reason="needs Lightning: pip install .[recipes]")
    from fastsam.integrations import SAMModule

    passes = []

    class Net(SAMModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

        def training_step(self, batch, batch_idx):
            passes.append(self.second_pass)
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return MomentumSAM(self.parameters(), torch.optim.SGD, rho=0.3, lr=0.01, momentum=0.9)

    model = Net()
    lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False,
                      ).fit(model, torch.utils.data.DataLoader(torch.randn(24, 4), batch_size=8))
    assert passes == [False] * 3 and model.net[1].num_batches_tracked == 3


@pytest.mark.parametrize("by_hand", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("algorithm, length", [("norm", 2), ("value", torch.inf)])
def test_lightning_clips_in_bf16_as_with_sgd(algorithm, length, by_hand):
    """The update is lr times a gradient of the length that it was clipped to."""
    lightning = pytest.importorskip("lightning", reason="needs Lightning: pip install .[recipes]")
    from fastsam.integrations import SAMModule

    class Net(SAMModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not by_hand
            self.net = linear()

        def training_step(self, batch, batch_idx):
            if not by_hand:
                return 100 * self.net(batch).square().mean()
            opt = self.optimizers()

            def closure():
                self.manual_backward(100 * self.net(batch).square().mean())
                self.clip_gradients(opt, 0.5, algorithm)

            opt.step(closure)

        def configure_optimizers(self):
            return SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)

    model, clipping = Net(), dict(gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False,
                      precision="bf16-mixed", **({} if by_hand else clipping),
                      ).fit(model, torch.utils.data.DataLoader(torch.ones(8, 3), batch_size=8))
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - w
    assert float(moved.norm(length)) == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_where_lightning_still_refuses_to_clip():
    """What a scaler has scaled; in bf16 a plain LightningModule."""
    lightning = pytest.importorskip("lightning", reason="needs Lightning: pip install .[recipes]")
    from lightning.pytorch.plugins.precision import MixedPrecision

    from fastsam.integrations import SAMModule

    for module, precision in (
            (SAMModule(), MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))),
            (lightning.LightningModule(), MixedPrecision("bf16-mixed", "cpu"))):
        module._trainer = SimpleNamespace(precision_plugin=precision, gradient_clip_val=None,
                                          gradient_clip_algorithm=None)
        sam = SAM(linear().parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(RuntimeError, match="SAM, does not allow for gradient clipping"):
            module.clip_gradients(sam, 0.5, "norm")


def test_accumulation_that_a_callback_begins_in_mid_training_is_refused():
    """GradientAccumulationScheduler sets it at an epoch of its own, after the start of fit."""
    lightning = pytest.importorskip("lightning", reason="needs Lightning: pip install .[recipes]")
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    from fastsam.integrations import SAMModule

    class Net(SAMModule):
        def __init__(self):
            super().__init__()
            self.net = linear()
            self.after_an_epoch = []

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def on_train_epoch_end(self):
            self.after_an_epoch = [p.detach().clone() for p in self.parameters()]

        def configure_optimizers(self):
            return SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)

    model = Net()
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", logger=False,
                                enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False,
                                callbacks=GradientAccumulationScheduler({0: 1, 1: 2}))
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 would update with the last"):
        trainer.fit(model, torch.utils.data.DataLoader(torch.ones(8, 3), batch_size=4))
    assert trainer.current_epoch == 1
    for p, was in zip(model.parameters(), model.after_an_epoch, strict=True):
        assert torch.equal(p, was)


# ---- a pass that raises


class Stop(KeyboardInterrupt):
    """Ctrl-C, which pytest does not take for its own."""


def failing_at(k: int, error: type[BaseException], model: nn.Module) -> nn.Module:
    """The model, whose k-th forward pass raises."""
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == k:
            raise error("CUDA out of memory. (pretended)")

    model.register_forward_pre_hook(hook)
    return model


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("error", [RuntimeError, Stop])
@pytest.mark.parametrize("cls, micro_batches, failing", [
    (SAM, 1, 4), (SAM, 2, 6), (SAM, 2, 7), (SAM, 2, 8), (MomentumSAM, 1, 2), (MomentumSAM, 2, 4)])
def test_a_pass_that_raises_gives_the_whole_update_up(
        cls, micro_batches, failing, error, accelerator):
    """In the second update, which is then begun again: in a second pass, in that of the first
    micro-batch, or in either of the second one's, when a gradient is set aside already."""
    from fastsam.integrations import both_passes

    model, twin = failing_at(failing, error, linear()), linear()
    opt, plain = (accelerator.prepare(cls(m.parameters(), torch.optim.SGD, rho=0.3, lr=0.1,
                                          momentum=0.9)) for m in (model, twin))
    x = torch.randn(3, 2, 4, 3, generator=torch.Generator().manual_seed(0))

    def update(net, net_opt, i):
        for j in range(micro_batches):
            def backward(j=j):
                loss = net(x[i, j]).square().mean()
                accelerator.backward(loss)
                return loss

            accelerator.gradient_state._set_sync_gradients(j == micro_batches - 1)
            both_passes(accelerator, net, net_opt, backward, micro_batches)
        net_opt.step()
        net_opt.zero_grad()

    for i in range(3):
        if i == 1:
            w = [p.detach().clone() for p in model.parameters()]
            with pytest.raises(error):
                update(model, opt, i)
            assert not opt.optimizer.is_perturbed
            assert all(map(torch.equal, model.parameters(), w))
            opt.zero_grad()
        update(model, opt, i)
        update(twin, plain, i)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_both_passes_before_the_last_step_is_done_are_refused_before_a_pass(accelerator):
    from fastsam.integrations import both_passes

    model = linear()
    opt = accelerator.prepare(SAM(model.parameters(), torch.optim.SGD, lr=0.1))
    both_passes(accelerator, model, opt,
                lambda: accelerator.backward(model(torch.ones(4, 3)).square().mean()))
    with pytest.raises(PhaseError, match="both_passes while the weights are perturbed"):
        both_passes(accelerator, model, opt, lambda: pytest.fail("a pass"))
    assert opt.optimizer.is_perturbed


def sam_trainer(folder, model, cls=SAM, callbacks=(), trainer=None, **args):
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install .[recipes]")
    from fastsam.integrations import SAMTrainer

    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(3, generator=generator), "labels": torch.tensor(i % 2)}
            for i in range(32)]
    base = dict(base_optimizer=torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3)
    return (trainer or SAMTrainer)(
        model=model, train_dataset=data, optimizer_cls_and_kwargs=(cls, base),
        callbacks=list(callbacks), args=transformers.TrainingArguments(
            output_dir=folder, max_steps=3, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, train_sampling_strategy="sequential", **args))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = linear()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("last", [True, False], ids=["last", "first"])
def test_both_passes_are_on_the_batch_that_another_trainer_has_made(last, tmp_path):
    """As TRL's GRPOTrainer makes one in `_prepare_inputs`, where the model writes; beside it
    SAMTrainer stands last or first. A loss may take the labels out of what it is given."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install .[recipes]")
    from fastsam.integrations import SAMTrainer

    class Making(transformers.Trainer):
        def _prepare_inputs(self, inputs):
            made.append(torch.randn(8, 3, generator=generator))
            return {**super()._prepare_inputs(inputs), "x": made[-1]}

        def training_step(self, *args, **kwargs):
            steps.append(1)
            return super().training_step(*args, **kwargs)

        def compute_loss(self, model, inputs, **kwargs):
            seen.append(inputs["x"])
            return model(x=inputs["x"], labels=inputs.pop("labels"))["loss"]

    made, seen, steps, generator = [], [], [], torch.Generator().manual_seed(0)
    both = (Making, SAMTrainer) if last else (SAMTrainer, Making)
    trainer = sam_trainer(tmp_path, Classifier(), trainer=type("Both", both, {}))
    trainer.train()
    assert len(made) == 3 and len(steps) == (3 if last else 6)
    assert [id(x) for x in seen] == [id(x) for x in made for _ in range(2)]
    assert "_prepare_inputs" not in vars(trainer)


@pytest.mark.parametrize("accumulate, failing", [(1, 2), (2, 3), (2, 4)])
def test_the_trainer_finds_its_batch_size_from_the_same_weights(accumulate, failing, tmp_path):
    """Out of memory in the first update: it begins again with smaller batches."""
    model, twin = failing_at(failing, RuntimeError, Classifier()), Classifier()
    sam_trainer(tmp_path, model, per_device_train_batch_size=8, auto_find_batch_size=True,
                gradient_accumulation_steps=accumulate).train()
    sam_trainer(tmp_path, twin, per_device_train_batch_size=7,
                gradient_accumulation_steps=accumulate).train()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_callback_of_the_trainer_s_that_raises_leaves_no_moved_weights(tmp_path):
    """Between the passes and the step, and between Momentum-SAM's micro-batches."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install .[recipes]")

    class Stopping(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *given, **more):
            raise Stop

        on_substep_end = on_pre_optimizer_step

    for cls, accumulate in ((SAM, 1), (MomentumSAM, 2)):
        model = Classifier()
        w = model.net.weight.detach().clone()
        trainer = sam_trainer(tmp_path, model, cls, [Stopping()],
                              gradient_accumulation_steps=accumulate)
        with pytest.raises(Stop):
            trainer.train()
        assert not trainer.optimizer.optimizer.is_perturbed
        assert torch.equal(model.net.weight, w)


@pytest.mark.parametrize("cls, failing", [(SAM, 4), (MomentumSAM, 2)])
def test_a_pass_that_raises_in_lightning_restores(cls, failing):
    lightning = pytest.importorskip("lightning", reason="needs Lightning: pip install .[recipes]")
    from fastsam.integrations import SAMModule

    class Net(SAMModule):
        def __init__(self):
            super().__init__()
            self.net = failing_at(failing, RuntimeError, linear())

        def on_train_batch_start(self, batch, batch_idx):
            self.w = self.net.weight.detach().clone()

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return cls(self.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9)

    model = Net()
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False,
                                enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(model, torch.utils.data.DataLoader(torch.randn(24, 3), batch_size=8))
    assert torch.equal(model.net.weight, model.w) and not model.second_pass


# ---- recomputation, and several processes


def test_lightning_s_second_pass_is_frozen_with_its_recomputation():
    lightning = pytest.importorskip("lightning", reason="needs Lightning: pip install .[recipes]")
    from fastsam.integrations import SAMModule

    passes = []

    class Net(SAMModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

        def training_step(self, batch, batch_idx):
            x = batch.requires_grad_()  # recomputed in the backward, which must be frozen too
            passes.append(self.second_pass)
            return torch.utils.checkpoint.checkpoint(
                self.net, x, use_reentrant=True).square().mean()

        def configure_optimizers(self):
            return SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.01)

    def after(rows):
        torch.manual_seed(0)
        model = Net()
        lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                          enable_progress_bar=False, enable_model_summary=False,
                          ).fit(model, torch.utils.data.DataLoader(rows, batch_size=8))
        return model

    model = after(torch.randn(24, 4))
    assert passes == [False, True] * 3 and not model.second_pass
    assert model.net[1].num_batches_tracked == 2 * 3  # both forwards of the first pass, no others


TWO_PROCESSES = """
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from fastsam import SAM
from fastsam.integrations import both_passes

torch.set_default_dtype(torch.float64)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
rank = accelerator.process_index
assert accelerator.num_processes == 2
torch.manual_seed(0)
x, y = torch.randn(6, 2, 2, 8, 5), torch.randint(3, (6, 2, 2, 8))  # update, micro-batch, rank


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


model = network()
sam = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.2, momentum=0.9)
model, opt = accelerator.prepare(model, sam)
twin = network()
base = torch.optim.SGD(twin.parameters(), lr=0.2, momentum=0.9)
params = list(twin.parameters())


def sharp(a, b):
    g = torch.autograd.grad(cross_entropy(twin(a), b), params)
    norm = sum(t.square().sum() for t in g).sqrt()
    saved = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, t in zip(params, g):
            p.add_(0.1 * t / norm)
    g = torch.autograd.grad(cross_entropy(twin(a), b), params)
    with torch.no_grad():
        for p, w in zip(params, saved):
            p.copy_(w)
    return g


for i in range(6):
    for j in range(2):
        with accelerator.accumulate(model):
            def backward():
                loss = cross_entropy(model(x[i, j, rank]), y[i, j, rank])
                accelerator.backward(loss)
                if i == 3 and j == 0 and rank == 1 and not sam.is_perturbed:
                    next(model.parameters()).grad.view(-1)[0] = torch.inf
                return loss

            both_passes(accelerator, model, opt, backward)
            opt.step()
            opt.zero_grad()
    if i != 3:  # an overflow on one process is a skip on all
        parts = [sharp(x[i, j, r], y[i, j, r]) for j in range(2) for r in range(2)]
        for p, *g in zip(params, *parts):
            p.grad = sum(g) / 4
        base.step()
assert sam.skipped_steps == 1
for p, q in zip(model.parameters(), params):
    torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    both = [torch.empty_like(p) for _ in range(2)]
    dist.all_gather(both, p.detach())
    assert torch.equal(*both)
dist.barrier()  # over gloo, one that leaves first may abort another that is leaving
dist.destroy_process_group()
"""

COMPILED = TWO_PROCESSES.replace("Accelerator(", 'Accelerator(dynamo_backend="eager", ')

TRAINER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments
from fastsam import SAM
from fastsam.integrations import SAMTrainer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


torch.manual_seed(0)
data = [{"x": torch.randn(5), "labels": torch.randint(3, ())} for _ in range(64)]
model = Net()
before = model.net.weight.detach().clone()
trainer = SAMTrainer(
    model=model, train_dataset=data,
    optimizer_cls_and_kwargs=(SAM, dict(base_optimizer=torch.optim.AdamW, lr=1e-2, rho=0.05)),
    args=TrainingArguments(output_dir="out", max_steps=6, per_device_train_batch_size=4,
                           gradient_accumulation_steps=2, save_strategy="no", report_to="none",
                           disable_tqdm=True, use_cpu=True))
trainer.train()
assert trainer.args.world_size == 2 and not trainer.optimizer.optimizer.is_perturbed
weight = model.net.weight.detach()
both = [torch.empty_like(weight) for _ in range(2)]
dist.all_gather(both, weight)
assert torch.equal(*both) and not torch.equal(weight, before)
dist.barrier()  # over gloo, one that leaves first may abort another that is leaving
dist.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.parametrize("program, needs", [
    (TWO_PROCESSES, "accelerate"), (COMPILED, "accelerate"), (TRAINER, "transformers"),
], ids=["accelerate", "compiled", "transformers"])
def test_accumulation_in_two_processes_keeps_the_replicas_equal(program, needs, tmp_path):
    pytest.importorskip(needs, reason=f"needs {needs}: pip install .[recipes]")
    run(tmp_path, program, processes=2)
